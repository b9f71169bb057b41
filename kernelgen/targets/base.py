"""What all targets share: the types of their manifests and runtimes.

A target is a folder with `__init__.py` (a frozen `Target`), `dialect.py` (words) and `runtime.py`
(a `Runtime`).  Nothing here names a language.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy.typing as npt

from kernelgen.config import Capabilities, Config
from kernelgen.errors import ShapeError, TargetError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.ops import Activations
from kernelgen.ir.ops.epilogue import NORM_WEIGHT, PLAIN, Fusion
from kernelgen.ir.steps import scalar_steps
from kernelgen.problem import acceptable
from kernelgen.targets.printer import Dialect

Array = npt.NDArray[Any]

#: operands of a kernel that has none
NONE: Mapping[str, Array] = {}

#: the variant of a target that runs its kernels without their device
EMULATED = "emulated"

#: ops and precisions, in the order in which they are listed
OPS = (
    "dequantize",
    "get_rows",
    "quantize",
    "cast",
    "matvec",
    "matmul",
    "prepare",
    "attention",
    "attention_combine",
    "map",
    "rows",
)


#: columns of y, where these are not the rows of weights: two of which make one in a gated product
NY = "NY"


@dataclass(frozen=True)
class Argument:
    """An argument of a kernel's entry point.

    role    "in", "out", "scratch" (of any content), "zero" (all zero, before and after), "size" (an
            integer passed by value), "result" (returned), or "table" (the format's own numbers, in
            manifests under `tables`)
    dtype   element type
    shape   in the symbols of the size arguments, as text; empty for a scalar
    """

    name: str
    role: str
    dtype: str
    shape: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """A grid.

    groups        along x and y, as Python expressions of the size arguments
    threads       of a group
    shared_bytes  that the launch asks for, besides what is declared
    symbols       what the shapes' names mean that depend on the configuration, as `Walk.symbols`
    """

    groups: tuple[str, str]
    threads: int
    shared_bytes: int = 0
    symbols: Mapping[str, str] = field(default_factory=dict, hash=False)


def call_launch(config: Config, fmt: BlockFormat) -> Launch | None:
    """For languages in which a call is a launch."""
    return None


def element_steps(fmt: BlockFormat, config: Config) -> Any:
    """Steps for a walk that decodes element by element."""
    return scalar_steps(fmt)


class Subject(Protocol):
    """What a kernel is specialized for: a format, or what an op of its own kind describes.

    `names` are those that its author chose and the source uses.
    """

    @property
    def name(self) -> str: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Walk:
    """A way to compute an op.  Its functions take what the kernel is specialized for (`Subject`): a
    format, where the op is about quantized weights.

    name       the walk's own name
    op         one of `OPS`
    precision  what it multiplies: "fp32", "fp16", "bf16", "int8" (activations), or "" where there
               is no choice
    template   file under the target's templates
    config     what it leaves open
    arguments  of the entry point
    symbols    what the shapes' names mean that are not size arguments, in words of the sizes
    features   of the device that it cannot do without, in any configuration
    applies    why a subject cannot take this walk, or None
    contract   whether a*b + c may be rounded once (the result must not be bit-exact)
    steps      what its template gets as `steps`: a subject's expressions, by the loop they belong
               in
    launch     the grid that a launch takes; None where a call is a launch
    needs      ops whose kernels must run before this one, besides what the caller gives
    then       ops whose kernels must run after it, on what it leaves
    operands   arguments that depend on the subject, in place of any of the same name; sizes come
               last, whoever gives them
    style      tells it, in names, from other walks of the same op and precision
    kind       type of the subject
    least_rows rows of activations, or queries, from which it is a good choice where nobody measured
    instead_of precisions that "auto" stands for in whose place it serves, from `least_rows` on, as
               it is faster there and rounds less
    fits       why a configuration that is legal by itself does not fit a subject, or None
    buffers    arguments with blocks, where there is not one `w`: for each its template gets a
               printer of expressions that fetch from it, such as memory_k
    norms      whether its template normalizes activations where that is asked for
    apart      how far apart two rows of weights lie of which one thread has both sums, as a gated
               product has its rows; `pairs`: why it has not in a configuration, or None
    """

    name: str
    op: str
    precision: str
    template: str
    config: type[Config]
    arguments: tuple[Argument, ...]
    symbols: Mapping[str, str] = field(default_factory=dict, hash=False)
    features: tuple[str, ...] = ()
    applies: Callable[[Any], str | None] = lambda subject: None
    contract: bool = True
    steps: Callable[[Any, Config], Any] = element_steps
    launch: Callable[[Config, Any], Launch | None] = call_launch
    needs: Callable[[Config], tuple[str, ...]] = lambda config: ()
    then: Callable[[Config], tuple[str, ...]] = lambda config: ()
    operands: Callable[[Any], tuple[Argument, ...]] = lambda subject: ()
    style: str = ""
    kind: type = BlockFormat
    least_rows: int = 0
    instead_of: tuple[str, ...] = ()
    fits: Callable[[Config, Any, Capabilities], str | None] = lambda *_: None
    buffers: tuple[str, ...] = ()
    norms: bool = False
    apart: int = 1
    pairs: Callable[[Config], str | None] = lambda config: None

    def accepts(self, subject: Subject) -> str | None:
        """Why a subject cannot take this walk, or None."""
        if not isinstance(subject, self.kind):
            return f"{self.op} is about another kind of thing than {subject.name}"
        return self.applies(subject)

    def arguments_for(self, subject: Subject, fused: Fusion = PLAIN) -> tuple[Argument, ...]:
        """Arguments of the entry point, in order."""
        everything = (*self.arguments, *self.operands(subject), *self._fused_arguments(fused))
        given = tuple({a.name: a for a in everything}.values())
        if fused.epilogue is not None and fused.epilogue.gated:
            given = tuple(
                replace(a, shape=("M", NY)) if a.role in ("out", "result") else a for a in given
            )
        return tuple(sorted(given, key=lambda one: one.role == "size"))

    def _fused_arguments(self, fused: Fusion) -> Iterator[Argument]:
        """The norm's weight, operands and, of a gated product, `NY`."""
        if fused.norm:
            yield Argument(NORM_WEIGHT, "in", "f32", ("K",))
        if fused.epilogue is None:
            return
        columns = NY if fused.epilogue.gated else "N"
        for one in fused.epilogue.operands:
            shape = tuple(columns if s == "N" else s for s in one.shape)
            yield Argument(one.name, "in", "f32", shape)
        sizes = [one for one in self.arguments if one.role == "size"]
        if fused.epilogue.gated and sizes:  # arrays of a language that knows their shapes need none
            yield Argument(NY, "size", sizes[0].dtype)

    def part_of(self, fused: Fusion) -> Fusion:
        """What this walk does of a fusion: products end it, and some kernels begin it."""
        ends = self.op in ("matvec", "matmul")
        return Fusion(fused.epilogue if ends else None, fused.norm if self.norms else None)

    def refuses(self, config: Config, subject: Subject, caps: Capabilities) -> str | None:
        """Why a device cannot run this walk for a subject in a configuration, or None."""
        return caps.lacks(self.features) or config.legal(caps) or self.fits(config, subject, caps)

    def default(self, subject: Subject, caps: Capabilities, m: int = 0) -> Config:
        """The configuration for a device that was never tuned: the class's own, or as much
        smaller as the subject needs."""
        chosen = self.config.default(caps, m)
        while self.fits(chosen, subject, caps) and (smaller := chosen.smaller()):
            chosen = smaller
        return chosen


@dataclass(frozen=True)
class Kernel:
    """Generated source, and all that a host must know to launch it.

    subject    what it is specialized for
    walk       the walk it came from, `config` what was chosen for it
    entry      name of the entry point, `arguments` what it takes
    hash       of the source
    needs      kernels that must run before this one, by op: "prepare" repacks the weights,
               "quantize" the activations
    then       kernels that must run after it, by op
    notes      what a reader of `list` or of the source should know
    fused      what it does besides
    """

    target: str
    op: str
    subject: Any
    walk: Walk
    config: Config
    entry: str
    source: str
    hash: str
    needs: Mapping[str, Kernel] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()
    then: Mapping[str, Kernel] = field(default_factory=dict, hash=False)
    fused: Fusion = PLAIN

    @property
    def precision(self) -> str:
        """What it multiplies; "" where the op has no such choice."""
        return self.walk.precision

    @property
    def name(self) -> str:
        """What it is called in a build: op, subject, fusion, precision, style."""
        parts = (self.op, self.subject.name, self.fused.name, self.precision, self.walk.style)
        return "_".join(p for p in parts if p)

    @property
    def format(self) -> BlockFormat:
        """The format of the weights, where the op is about these."""
        assert isinstance(self.subject, BlockFormat)
        return self.subject

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """Arguments of the entry point, in order."""
        return self.walk.arguments_for(self.subject, self.fused)

    @property
    def normalizes(self) -> bool:
        """Whether it, or a kernel that runs before it, normalizes activations."""
        return any(one.fused.norm for one in (self, *self.needs.values()))

    @property
    def features(self) -> tuple[str, ...]:
        """Features of the device that it cannot do without."""
        return self.walk.features + self.config.features

    @property
    def contract(self) -> bool:
        """Whether the compiler may round a*b + c once."""
        return self.walk.contract


class Weights(Protocol):
    """A quantized matrix as a runtime takes it (`kernelgen.tensor.QuantTensor` is one).

    `data` holds native blocks, uint8 (..., row_bytes); a runtime keeps repacked or uploaded
    copies in `prepared` under keys of its own.
    """

    @property
    def format(self) -> BlockFormat: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def data(self) -> Array: ...

    @property
    def prepared(self) -> dict[Hashable, Any]: ...


class Product(Protocol):
    """A matmul that is ready to be called (`Runtime.matmul`)."""

    def __call__(
        self, x: Array, w: Weights, y: Array, operands: Mapping[str, Array] = NONE, /
    ) -> None: ...


def check_rows(ids: Array, n: int) -> None:
    """Raises ShapeError where `ids` names a row that a matrix of n rows does not have."""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ShapeError(f"rows are named by integers (R,), not by {ids.dtype} {ids.shape}")
    if ids.size and not (0 <= ids.min() and ids.max() < n):
        raise ShapeError(
            f"rows {ids.min()}..{ids.max()} were asked for; the matrix has rows 0..{n - 1}"
        )


class Runtime(Protocol):
    """How a target reaches its machine.  Drivers are imported on use only.

    The methods that run a kernel take and give numpy arrays; they compile it on first use, and
    keep the binary on disk.
    """

    def available(self) -> str | None:
        """Why kernels cannot run here, or None."""
        ...

    def expected(self) -> str | None:
        """What on this machine speaks for the device, found without loading a driver; None where
        nothing does.  A device that is expected and cannot be used is worth a warning."""
        ...

    def on_cpu(self) -> bool:
        """Whether the device is the CPU, by whatever way; called where `available` gives None."""
        ...

    def how(self) -> str:
        """What results here are worth: "run" on what the kernels are for, or "emulated"."""
        ...

    def capabilities(self) -> Capabilities:
        """What configurations may count on here."""
        ...

    def describe(self) -> list[dict[str, Any]]:
        """The devices, one dictionary each, for people and programs to read; first the one that
        kernels run on, which the tuner knows it by."""
        ...

    def dequantize(self, kernel: Kernel, w: Weights) -> Array:
        """Values of w, float32, of its shape."""
        ...

    def get_rows(self, kernel: Kernel, w: Weights, ids: Array) -> Array:
        """Values of the rows of w that `ids`, integers (R,), names: float32 (R, K)."""
        ...

    def quantize(
        self, kernel: Kernel, x: Array, operands: Mapping[str, Array] = NONE
    ) -> Activations:
        """Activations x, float32 (M, K), as int8 in the form of the kernel's format; `operands`
        holds the norm's weight where the kernel normalizes them."""
        ...

    def prepare(self, kernel: Kernel, w: Weights) -> Any:
        """What `matmul` of this kernel reads instead of the native blocks, kept in w.prepared."""
        ...

    def attention(
        self, kernel: Kernel
    ) -> Callable[[Array, Weights, Weights, Mapping[str, Array], Array], None]:
        """A function of q, float32 (B, H, T, D), k (B, HK, S, D), v (B, HK, S, DV), the operands of
        the kernel's `Attention` by name, "sinks" among them where it has these, and y, float32
        (B, H, T, DV), which it fills.
        """
        ...

    def apply(
        self, kernel: Kernel
    ) -> Callable[[Mapping[str, Array], int, int, Mapping[str, Array]], None]:
        """A function of the arrays that a map or a row reduction reads, by name, as they lie in
        memory; rows; columns; and the arrays that it fills, by name: C-contiguous, (ROWS, COLUMNS)
        or (ROWS,), of integers as wide as their elements, or of float32.

        Results may lie where an input does only if each element of that input is read at its own
        place alone, and the input is contiguous.
        """
        ...

    def matmul(self, kernel: Kernel) -> Product:
        """A function of x, float32 (M, K), w (N, K) and y, float32 (M, N), which it fills, and of
        what the kernel's fusion reads, by name: operands of its epilogue, float32 of the shapes
        that their axes say, and the norm's weight.

        Of a gated product, w is the two matrices as one (`kernelgen.tensor.Interleaved`), and y has
        half as many columns.  Arrays are C-contiguous and do not overlap; but an operand (M, N) may
        be y itself.  The function is safe to call from many threads at once.
        """
        ...


@dataclass(frozen=True, eq=False)
class Target:
    """The frozen manifest of a target.

    suffix         of its source files
    dialects       by the name under which templates print expressions
    capabilities   that default configurations assume where no device is asked
    indexes        (template, file) of what is written once for all kernels of a build
    support_files  files of the target's folder that every kernel of it includes
    globals        what its templates may call besides
    reserved       names that a format's fields must not have in its source
    prefix         what names of entry points begin with
    templates      folders of templates that it shares with others, beside its own
    variants       that its runtime can be asked for, such as instruction sets; often none
    unpackaged     features that packages for other hosts do not use
    feature_names  what a host must look for on a device, by feature of `Capabilities`, where the
                   API calls it something else; "" where every device has it
    """

    name: str
    description: str
    suffix: str
    walks: tuple[Walk, ...]
    dialects: Mapping[str, Dialect]
    capabilities: Capabilities
    indexes: tuple[tuple[str, str], ...] = ()
    support_files: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    globals: Mapping[str, Any] = field(default_factory=dict)
    reserved: frozenset[str] = frozenset()
    prefix: str = "kernelgen_"
    variants: tuple[str, ...] = ()
    unpackaged: frozenset[str] = frozenset()
    feature_names: Mapping[str, str] = field(default_factory=dict)

    def reach(self, variant: str = "") -> Runtime:
        """`runtime`, or the emulator where the device that it wants is not here."""
        wanted = self.runtime(variant)
        if variant or EMULATED not in self.variants or wanted.available() is None:
            return wanted
        emulator = self.runtime(EMULATED)
        return wanted if emulator.available() else emulator

    def runtime(self, variant: str = "") -> Runtime:
        """The target's driver side, imported now, for one of `variants`; by default the best."""
        if variant and variant not in self.variants:
            known = f"it has {', '.join(self.variants)}" if self.variants else "it has none"
            raise TargetError(f"target {self.name} has no variant {variant!r}; {known}")
        module = importlib.import_module(f"kernelgen.targets.{self.name}.runtime")
        runtime: Runtime = module.runtime(variant) if variant else module.runtime()
        return runtime

    def walk(
        self,
        op: str,
        subject: Subject,
        precision: str = "",
        caps: Capabilities | None = None,
        style: str = "",
        rows: int | None = None,
    ) -> Walk:
        """The first walk of this target for an op, a subject and a precision whose features a
        device has; without a device (`caps`), those assumed here are preferred, but no condition.
        With `style`, the one of that name; with `rows`, those that are for more come last."""
        reasons = []
        for_more: Walk | None = None
        first = [] if caps else [w for w in self.walks if not self.capabilities.lacks(w.features)]
        for one in (*first, *self.walks):
            if one.op != op or (precision and one.precision and one.precision != precision):
                continue
            if style and one.style != style:
                continue
            reason = one.accepts(subject) or (caps.lacks(one.features) if caps else None)
            if reason is None and rows is not None and one.least_rows > rows:
                for_more = for_more or one
            elif reason is None:
                return one
            else:
                reasons.append(reason)
        if for_more is not None:
            return for_more
        asked = f"{op} {subject.name}" + (f" in {precision}" if precision else "")
        why = "; ".join(reasons) or "it has no such walk"
        offers = sorted({w.op + (f" ({w.precision})" if w.precision else "") for w in self.walks})
        raise TargetError(
            f"target {self.name} cannot do {asked}: {why}; it offers {', '.join(offers)}"
        )

    def serve(
        self,
        op: str,
        subject: Subject,
        asked: str,
        caps: Capabilities,
        rows: int | None = None,
    ) -> Walk:
        """The first walk that serves a precision that is asked for (`kernelgen.problem`), and so
        many rows."""
        first, *others = acceptable(asked, subject)
        if asked == "auto" and rows is not None:
            for one in self.walks:
                better = one.op == op and first in one.instead_of and rows >= one.least_rows
                if better and (one.accepts(subject) or caps.lacks(one.features)) is None:
                    return one
        try:
            return self.walk(op, subject, first, caps, rows=rows)
        except TargetError:
            for other in others:
                with contextlib.suppress(TargetError):
                    return self.walk(op, subject, other, caps, rows=rows)
            raise


def integer_codes(fmt: BlockFormat) -> str | None:
    """Why a format has no integer dot product, or None."""
    if fmt.float_codes:
        return f"elements of {fmt.name} are floats, which have no integer dot product"
    return None
