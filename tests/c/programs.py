"""Kernels as programs of their own, which read their arguments from a file and write the results
to another: for instruction sets that only an emulator runs, and for sanitizers."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kernelgen import targets
from kernelgen.config import Capabilities
from kernelgen.errors import CompileError, TargetError
from kernelgen.generate import render_index
from kernelgen.ir.ops import Activations
from kernelgen.targets.base import Kernel, Weights
from kernelgen.targets.c.compiler import HEADERS, cache_folder, flags, headers_digest
from kernelgen.targets.c.runtime import attention_arguments

Array = npt.NDArray[Any]

DRIVER = Path(__file__).with_name("driver.c")

#: how arguments are marked in the file, as driver.c has it
ROLES = {"in": 0, "out": 1, "scratch": 2, "size": 3}


class ProgramRuntime:
    """Runs kernels of the C target as programs.

    compiler      command that makes programs
    instructions  flags that choose the instruction set, and others
    runner        command that runs them, such as an emulator
    """

    def __init__(
        self,
        compiler: Sequence[str],
        instructions: Sequence[str],
        capabilities: Capabilities,
        runner: Sequence[str] = (),
    ) -> None:
        self.compiler = tuple(compiler)
        self.instructions = tuple(instructions)
        self.runner = tuple(runner)
        self._capabilities = capabilities
        self._programs: dict[str, Path] = {}

    # ---- kernelgen.targets.base.Runtime ---------------------------------------------------

    def available(self) -> str | None:
        return None

    def how(self) -> str:
        return "emulated" if self.runner else "run"

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def describe(self) -> list[dict[str, Any]]:
        return [{"device": " ".join(self.runner) or "this CPU", "compiler": self.compiler[0]}]

    def dequantize(self, kernel: Kernel, w: Weights) -> Array:
        y = np.empty(w.shape, np.float32)
        self.call(kernel, w.data, y, y.size // w.format.block)
        return y

    def get_rows(self, kernel: Kernel, w: Weights, ids: Array) -> Array:
        y = np.empty((len(ids), w.shape[-1]), np.float32)
        self.call(kernel, w.data, ids.astype(np.int64), y, *y.shape)
        return y

    def quantize(self, kernel: Kernel, x: Array) -> Activations:
        m, k = x.shape
        q = np.empty((m, k), np.int8)
        scale = np.empty((m, k // kernel.format.block), np.float32)
        sums = np.empty((m, k // kernel.format.group), np.float32)
        self.call(kernel, x, q, scale, sums, m, k)
        return Activations(q, scale, sums)

    def prepare(self, kernel: Kernel, w: Weights) -> Array:
        if "prepare" not in kernel.needs:
            return w.data
        key = ("program", self._capabilities.lanes, self.compiler, self.instructions)
        tiles: Array | None = w.prepared.get(key)
        if tiles is None:
            (n, k), lanes = w.shape, self._capabilities.lanes
            tiles = np.empty(-(-n // lanes) * lanes * w.format.row_bytes(k), np.uint8)
            self.call(kernel.needs["prepare"], w.data, tiles, n, k)
            w.prepared[key] = tiles
        return tiles

    def matmul(self, kernel: Kernel) -> Callable[[Array, Weights, Array], None]:
        def run(x: Array, w: Weights, y: Array) -> None:
            (m, k), n = x.shape, w.shape[0]
            given = [x, self.prepare(kernel, w), y]
            if any(a.role == "scratch" for a in kernel.arguments):
                given.append(np.empty(0, np.uint8))  # the driver makes it
            self.call(kernel, *given, m, n, k)

        return run

    def attention(
        self, kernel: Kernel
    ) -> Callable[[Array, Weights, Weights, Mapping[str, Array], Array], None]:
        def run(q: Array, k: Weights, v: Weights, operands: Mapping[str, Array], y: Array) -> None:
            arrays, sizes = attention_arguments(kernel.subject, q, k, v, operands)
            self.call(kernel, q, k.data, v.data, y, *arrays, *sizes)

        return run

    # ---- programs ---------------------------------------------------------------------------

    def call(self, kernel: Kernel, *given: Array | int) -> None:
        """Run a kernel: inputs are read, outputs are written into the arrays given."""
        program = self.program(kernel)
        with tempfile.TemporaryDirectory(prefix="kernelgen-") as folder:
            sent, received = Path(folder) / "in", Path(folder) / "out"
            parts: list[bytes] = []
            for argument, value in zip(kernel.arguments, given, strict=True):
                size = value if isinstance(value, int) else value.nbytes
                parts.append(np.array([ROLES[argument.role], size], "<i8").tobytes())
                if argument.role == "in" and not isinstance(value, int):
                    parts.append(value.tobytes())
            sent.write_bytes(b"".join(parts))
            command = [*self.runner, str(program), str(sent), str(received)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode != 0:
                raise TargetError(f"{kernel.entry}: exit {done.returncode}: {done.stderr[-2000:]}")
            results = received.read_bytes()
        for argument, value in zip(kernel.arguments, given, strict=True):
            if argument.role == "out" and not isinstance(value, int):
                now = np.frombuffer(results, value.dtype, value.size).reshape(value.shape)
                value[...] = now
                results = results[value.nbytes :]

    def program(self, kernel: Kernel) -> Path:
        """The kernel's program, from the cache where it is there."""
        if kernel.hash not in self._programs:
            self._programs[kernel.hash] = self._make(kernel)
        return self._programs[kernel.hash]

    def _make(self, kernel: Kernel) -> Path:
        source = main_text(kernel) + kernel.source
        options = [*flags(self.instructions, kernel.contract, False), "-Werror"]
        version = subprocess.run(
            [self.compiler[0], "--version"], capture_output=True, text=True, check=True
        ).stdout
        key = "\0".join([source, headers_digest(), version, *self.compiler, *options])
        folder = cache_folder() / "programs"
        path = folder / f"{kernel.entry}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as here:
            text, made = Path(here) / "kernel.c", Path(here) / "kernel"
            text.write_text(source)
            done = subprocess.run(
                [*self.compiler, *options, f"-I{HEADERS}", str(text), "-o", str(made), "-lm"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                raise CompileError(f"{self.compiler[0]} rejected {kernel.entry}: {done.stderr}")
            os.replace(made, path)
        return path


def main_text(kernel: Kernel) -> str:
    """The driver, told of this kernel's arguments."""
    header = render_index("kernelgen.h.j2", targets.get("c"), [kernel])
    names = {a.name: i for i, a in enumerate(kernel.arguments)}
    values = (f"size[{i}]" if a.role == "size" else f"at[{i}]" for a, i in _numbered(kernel))
    scratch = "0"
    if any(a.role == "scratch" for a in kernel.arguments):
        scratch = f"{kernel.entry}_scratch(size[{names['M']}], size[{names['K']}])"
    says: list[tuple[str, int]] = []
    if kernel.op == "prepare":
        arguments = f"size[{names['N']}], size[{names['K']}]"
        says.append((f"{kernel.entry}_bytes({arguments})", names["tiles"]))
    right = " && ".join(f"size[{i}] == {text}" for text, i in says) or "1"
    return "\n".join(
        [
            header,
            f"#define ARGUMENTS {len(kernel.arguments)}",
            f"#define CALL {kernel.entry}({', '.join(values)})",
            f"#define SIZES_RIGHT ({right})",
            f"#define SCRATCH_BYTES {scratch}",
            DRIVER.read_text(),
        ]
    )


def _numbered(kernel: Kernel) -> list[tuple[Any, int]]:
    return [(a, i) for i, a in enumerate(kernel.arguments)]
