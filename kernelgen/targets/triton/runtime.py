"""Runs Triton kernels through torch: on its GPU, or on the CPU by Triton's interpreter.

Without a GPU the same kernels can be compiled for one (`compile_ahead`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import linecache
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from kernelgen.config import Capabilities
from kernelgen.errors import CompileError, TargetError
from kernelgen.targets.base import Array, Kernel
from kernelgen.targets.device import DeviceRuntime
from kernelgen.targets.driver import Buffer, TimedByEvents, bytes_of, own_symbols, rejected

#: Triton decides by it, when its language is imported, whether kernels are interpreted
INTERPRET = "TRITON_INTERPRET"

#: DLPack's numbers of devices that torch calls by the same name: CUDA and ROCm
_GPU_KINDS = (2, 10)

#: the interpreter replaces parts of Triton's language while a kernel runs
_interpreting = threading.Lock()


@dataclass(frozen=True)
class Device:
    """Where kernels run: a GPU's name for torch, or "cpu" for the interpreter."""

    name: str

    @property
    def interpreted(self) -> bool:
        """Whether kernels are interpreted."""
        return self.name == "cpu"


@functools.cache
def find_device() -> Device | str:
    """The device to run on, or a sentence that says why there is none."""
    asked = os.environ.get(INTERPRET, "").lower() in ("1", "true", "on", "yes", "y")
    before = "triton.language" in sys.modules
    try:
        import torch

        if not torch.cuda.is_available():
            os.environ[INTERPRET] = "1"
            asked = True
        with own_symbols():
            import triton.language
            import triton.runtime.interpreter as interpreter
    except ImportError as error:
        return f"{error.name} cannot be imported ({error}); pip install kernelgen[triton]"
    interpreted = isinstance(triton.language.sum, interpreter.InterpretedFunction)
    if interpreted:
        return Device("cpu")
    if asked:
        why = "was imported before" if before else "was not told"
        return (
            f"torch sees no GPU, and triton {why} without {INTERPRET}=1, which its interpreter"
            " needs; set it in the environment, or let kernelgen be the first to import triton"
        )
    return Device("cuda")


@dataclass(frozen=True)
class Program:
    """A kernel as a function of Triton's, and the types of the tensors that it takes."""

    kernel: Kernel
    function: Any
    dtypes: tuple[Any, ...]


class TorchDriver:
    """Memory and launches of torch's current GPU, or of the interpreter (see
    kernelgen.targets.driver.Driver)."""

    #: addresses have 64 bits
    largest = 1 << 62

    def __init__(self, device: Device) -> None:
        import torch

        self._torch = torch
        self._device = device
        self._dtypes = {
            "u8": torch.uint8, "i8": torch.int8, "i32": torch.int32, "f32": torch.float32,
            "i16": torch.int16, "f16": torch.float16,
        }  # fmt: skip

    def key(self) -> Hashable:
        """The device, as torch counts them."""
        index = 0 if self._device.interpreted else self._torch.cuda.current_device()
        return (self._device.name, index)

    def upload(self, array: Array) -> Buffer:
        """A tensor with the bytes of an array."""
        raw = bytes_of(array)
        tensor = self._torch.empty(raw.nbytes, dtype=self._torch.uint8)
        tensor.numpy()[:] = raw
        return tensor.to(self._device.name)

    def empty(self, nbytes: int) -> Buffer:
        """A tensor of that many bytes."""
        return self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._device.name)

    def write(self, buffer: Buffer, offset: int, array: Array) -> None:
        """Put bytes into a buffer."""
        raw = bytes_of(array)
        buffer[offset : offset + raw.size] = self._torch.from_numpy(raw.copy()).to(buffer.device)

    def download(self, buffer: Buffer, out: Array) -> None:
        """Wait, and fill an array."""
        out.reshape(-1).view(np.uint8)[:] = buffer.cpu().numpy()

    def takes(self, array: Any) -> bool:
        """Whether an array lies on a GPU that torch sees; the interpreter takes torch's tensors
        on the CPU."""
        if not hasattr(array, "__dlpack_device__"):
            return False
        if self._device.interpreted:
            return isinstance(array, self._torch.Tensor) and array.device.type == "cpu"
        return int(array.__dlpack_device__()[0]) in _GPU_KINDS

    @contextlib.contextmanager
    def at(self, array: Any) -> Iterator[None]:
        """The array's GPU; Triton launches on torch's current stream."""
        if self._device.interpreted:
            yield
            return
        with self._torch.cuda.device(int(array.__dlpack_device__()[1])):
            yield

    def borrow(self, array: Any) -> Buffer:
        """The memory of an array as a tensor of bytes."""
        if not isinstance(array, self._torch.Tensor):
            array = self._torch.from_dlpack(array)
        return array.detach().reshape(-1).view(self._torch.uint8)

    def zeros(self, nbytes: int) -> Buffer:
        """A tensor of zeros."""
        return self._torch.zeros(nbytes, dtype=self._torch.uint8, device=self._device.name)

    def wait(self) -> None:
        """Wait for the current stream."""
        if not self._device.interpreted:
            self._torch.cuda.current_stream().synchronize()

    def program(self, kernel: Kernel) -> Program:
        """The kernel; it is compiled by its first launch, and for each kind of sizes again."""
        function = getattr(load(kernel.source, file_of(kernel)), kernel.entry)
        dtypes = tuple(self._dtypes[a.dtype] for a in kernel.arguments if a.role != "size")
        return Program(kernel, function, dtypes)

    def launch(
        self,
        program: Program,
        groups: tuple[int, int],
        threads: int,
        buffers: Sequence[Buffer],
        sizes: Sequence[int],
    ) -> None:
        """Start a grid."""
        from triton.errors import TritonError

        tensors = [b.view(dtype) for b, dtype in zip(buffers, program.dtypes, strict=True)]
        start = program.function[groups]
        try:
            if self._device.interpreted:
                with _interpreting, np.errstate(all="ignore"):
                    start(*tensors, *sizes)
            else:
                start(*tensors, *sizes, **options(program.kernel))
        except TritonError as error:
            message, line = _explained(error, program.kernel.source, file_of(program.kernel))
            raise rejected("triton", program.kernel, message, line) from error


class GpuDriver(TimedByEvents, TorchDriver):
    """The same on a GPU, whose events say how long launches take."""

    def launch(
        self,
        program: Program,
        groups: tuple[int, int],
        threads: int,
        buffers: Sequence[Buffer],
        sizes: Sequence[int],
    ) -> None:
        """Start a grid."""
        start = super().launch
        self._noted(lambda: start(program, groups, threads, buffers, sizes))

    def _moment(self) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _explained(error: Exception, source: str, file: str) -> tuple[str, int | None]:
    """What Triton says, and the line of the source that it says it about."""
    message = getattr(error, "error_message", None) or str(error)
    node = getattr(error, "node", None)  # of the compiler, which counts from the function's head
    if node is not None and hasattr(node, "lineno"):
        above = source[: source.index("\ndef ") + 1].count("\n")
        return message, above + int(node.lineno)
    cause = error.__cause__  # of the interpreter
    frames = traceback.extract_tb(cause.__traceback__ if cause else None)
    return message, next((f.lineno for f in reversed(frames) if f.filename == file), None)


def options(kernel: Kernel) -> dict[str, Any]:
    """What a launch of the kernel sets besides its grid."""
    config = kernel.config.as_dict()
    return {
        "num_warps": config["warps"], "num_stages": config["stages"],
        "enable_fp_fusion": kernel.contract,
    }  # fmt: skip


def file_of(kernel: Kernel) -> str:
    """What tracebacks call the kernel's source."""
    return f"<kernelgen {kernel.entry} {kernel.hash}>"


def load(source: str, file: str) -> ModuleType:
    """Generated source as a module.  Triton reads a function's text back, as tracebacks do."""
    # entries without a time of change are never looked for on disk
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = ModuleType(file)
    module.__file__ = file
    sys.modules[file] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module


class TritonRuntime(DeviceRuntime):
    """torch's current GPU; where there is none, Triton's interpreter."""

    name = "triton"

    def available(self) -> str | None:
        """Why kernels cannot run here, or None."""
        found = find_device()
        return found if isinstance(found, str) else None

    def how(self) -> str:
        """What is interpreted says nothing about a GPU's compiler."""
        return "emulated" if _device().interpreted else "run"

    def on_cpu(self) -> bool:
        """Whether kernels are interpreted."""
        return _device().interpreted

    def driver(self) -> TorchDriver:
        """The device; opened on first use."""
        return _driver()

    def capabilities(self) -> Capabilities:
        """Limits and features of the device."""
        import torch

        if _device().interpreted:
            return Capabilities(shared_bytes=65536, features=frozenset({"interpreted"}))
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        features = set()
        if torch.version.cuda:
            features |= {"dot"} if (found.major, found.minor) >= (6, 1) else set()
            features |= {"tf32x3"} if found.major >= 8 else set()
        shared = getattr(found, "shared_memory_per_block_optin", 65536)
        return Capabilities(
            max_threads=1024, shared_bytes=int(shared), features=frozenset(features)
        )

    def describe(self) -> list[dict[str, Any]]:
        """Every GPU that torch sees, or the interpreter."""
        import torch
        import triton

        versions = {"triton": triton.__version__, "torch": torch.__version__}
        if _device().interpreted:
            return [{"device": "the CPU, by Triton's interpreter", **versions}]
        found = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        return [
            {
                "device": one.name,
                "architecture": getattr(one, "gcnArchName", "") or f"{one.major}.{one.minor}",
                "compute_units": one.multi_processor_count,
                "memory": one.total_memory,
                **versions,
            }
            for one in found
        ]


def _device() -> Device:
    found = find_device()
    if isinstance(found, str):
        raise TargetError(found)
    return found


@functools.cache
def _driver() -> TorchDriver:
    found = _device()
    return TorchDriver(found) if found.interpreted else GpuDriver(found)


@functools.cache
def runtime(variant: str = "") -> TritonRuntime:
    """The runtime of torch's GPU, or of the interpreter."""
    return TritonRuntime()


# ---- ahead of time ----------------------------------------------------------------------------

#: GPUs that kernels are compiled for where none is there: Ampere, Hopper, Blackwell, MI300
GPUS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")

#: threads of a warp
_WARPS = {"cuda": 32, "hip": 64}

_POINTERS = {
    "u8": "*u8", "i8": "*i8", "i16": "*i16", "f16": "*fp16", "i32": "*i32", "f32": "*fp32"
}  # fmt: skip


@dataclass(frozen=True)
class Binary:
    """A kernel that was compiled for a GPU.

    kind      "cubin" or "hsaco"; `size` in bytes
    shared    bytes of shared memory of a program
    assembly  its instructions as the vendor's compiler wrote them: PTX, or GCN
    """

    gpu: str
    kind: str
    size: int
    shared: int
    assembly: str


def compile_ahead(kernel: Kernel, gpu: str) -> Binary:
    """The kernel compiled for a GPU that need not be there; see `compile_all`."""
    (result,) = compile_all([(kernel, gpu)])
    if isinstance(result, str):
        raise CompileError(f"{kernel.op} {kernel.subject.name} did not compile for {gpu}: {result}")
    return result


def compile_all(
    wanted: Iterable[tuple[Kernel, str]], progress: Callable[[int], None] | None = None
) -> list[Binary | str]:
    """Kernels compiled for GPUs: each a binary, or the reason why there is none.

    All in one process of its own: in this one kernels may be interpreted, which excludes
    compiling, and a compiler may crash.  `progress` is called with the number that are done.
    """
    asked = [_request(kernel, gpu) for kernel, gpu in wanted]
    if not asked:
        return []
    result: list[Binary | str] = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {k: v for k, v in os.environ.items() if k != INTERPRET}
        # no result of another compiler's version, and none that is left behind
        environment |= {"TRITON_CACHE_DIR": folder, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", f"from {__name__} import _serve; _serve()"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=environment,
        ) as process:  # fmt: skip
            sent = "".join(json.dumps(one) + "\n" for one in asked)
            assert process.stdin and process.stdout and process.stderr
            feeder = threading.Thread(target=_feed, args=(process.stdin, sent))
            messages: list[str] = []
            stderr = process.stderr
            reader = threading.Thread(target=lambda: messages.append(stderr.read()))
            feeder.start()
            reader.start()
            for line in process.stdout:
                answer = json.loads(line)
                result.append(answer["error"] if "error" in answer else Binary(**answer))
                if progress is not None:
                    progress(len(result))
            feeder.join()
            reader.join()
    died = f"the compiler ended early: {''.join(messages).strip()[-2000:]}"
    return result + [died] * (len(asked) - len(result))


def _feed(stream: Any, text: str) -> None:
    try:
        stream.write(text)
        stream.close()
    except BrokenPipeError:
        pass  # it ended early, which its answers say


def _request(kernel: Kernel, gpu: str) -> dict[str, Any]:
    kind, _, arch = gpu.partition(":")
    if kind not in _WARPS or not arch:
        raise TargetError(
            f"{gpu!r} was asked for; a GPU is named as cuda:90 or hip:gfx942, for instance"
            f" {', '.join(GPUS)}"
        )
    types = ["i32" if a.role == "size" else _POINTERS[a.dtype] for a in kernel.arguments]
    return {
        "gpu": gpu, "source": kernel.source, "file": file_of(kernel), "entry": kernel.entry,
        "types": types, "options": options(kernel),
    }  # fmt: skip


def _serve() -> None:
    """The other process: a request a line, an answer a line."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _compile(**request)
        except Exception as error:
            message, at = _explained(error, request["source"], request["file"])
            text = request["source"].splitlines()[at - 1].strip() if at else ""
            where = f" at line {at}: {text}" if at else ""
            answer = {"error": " ".join(f"{type(error).__name__}: {message}".split()) + where}
        print(json.dumps(answer), file=answers, flush=True)


def _compile(
    gpu: str, source: str, file: str, entry: str, types: list[str],
    options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind, _, arch = gpu.partition(":")
    target = GPUTarget(kind, int(arch) if kind == "cuda" else arch, _WARPS[kind])
    # as a launch finds it: allocations are aligned, and sizes are multiples of 16
    attributes = {(n,): [["tt.divisibility", 16]] for n in range(len(types))}
    function = getattr(load(source, file), entry)
    signature = dict(zip(function.arg_names, types, strict=True))
    made = triton.compile(
        ASTSource(function, signature, attrs=attributes), target=target, options=options
    )
    binary, text = ("cubin", "ptx") if kind == "cuda" else ("hsaco", "amdgcn")
    if "\ttrap;" in made.asm[text]:  # what is left of a kernel that Triton could not compile
        raise CompileError("the compiler gave up, as it does where a GPU's memory is too small")
    return {
        "gpu": gpu, "kind": binary, "size": len(made.asm[binary]),
        "shared": made.metadata.shared, "assembly": made.asm[text],
    }  # fmt: skip
