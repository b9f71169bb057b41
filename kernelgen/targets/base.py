"""What all targets share: the manifest's types, and the printer of expressions.

A target is a folder with `__init__.py` (a frozen `Target`), `dialect.py` (words) and `runtime.py`
(a `Runtime`).  Nothing here names a language.
"""

from __future__ import annotations

import importlib
import math
import re
import struct
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy.typing as npt

from kernelgen.config import Capabilities, Config
from kernelgen.errors import ShapeError, TargetError
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import (
    BITWISE,
    BOOL,
    COMPARISONS,
    F32,
    I32,
    LOADS,
    PRECEDENCE,
    SHIFTS,
    U32,
    Expr,
    walk,
    where,
)
from kernelgen.ir.ops import Activations
from kernelgen.ir.ranges import interval
from kernelgen.ir.steps import scalar_steps

Array = npt.NDArray[Any]

#: the variant of a target that runs its kernels without their device
EMULATED = "emulated"

#: ops and precisions, in the order in which they are listed
OPS = ("dequantize", "get_rows", "quantize", "matvec", "matmul", "prepare")


@dataclass(frozen=True)
class Argument:
    """An argument of a kernel's entry point.

    role    "in", "out", "scratch", "size" (an integer passed by value), or "result" (returned)
    dtype   element type
    shape   in the symbols of the size arguments, as text; empty for a scalar
    """

    name: str
    role: str
    dtype: str
    shape: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """A grid: groups along x and y, as Python expressions of the size arguments, and the threads
    of a group."""

    groups: tuple[str, str]
    threads: int


def call_launch(config: Config, fmt: BlockFormat) -> Launch | None:
    """For languages in which a call is a launch."""
    return None


def element_steps(fmt: BlockFormat, config: Config) -> Any:
    """Steps for a walk that decodes element by element."""
    return scalar_steps(fmt)


@dataclass(frozen=True)
class Walk:
    """A way to compute an op.

    name       the walk's own name
    op         one of `OPS`
    precision  "fp32", "int8" (activations), or "" where there is no choice
    template   file under the target's templates
    config     what it leaves open
    arguments  of the entry point
    symbols    what the shapes' names mean that are not size arguments, in words of the sizes
    features   of the device that it cannot do without, in any configuration
    applies    why a format cannot take this walk, or None
    contract   whether a*b + c may be rounded once (the result must not be bit-exact)
    steps      what its template gets as `steps`: a format's expressions, by the loop they belong in
    launch     the grid that a launch takes; None where a call is a launch
    needs      ops whose kernels must run before this one, besides what the caller gives
    """

    name: str
    op: str
    precision: str
    template: str
    config: type[Config]
    arguments: tuple[Argument, ...]
    symbols: Mapping[str, str] = field(default_factory=dict, hash=False)
    features: tuple[str, ...] = ()
    applies: Callable[[BlockFormat], str | None] = lambda fmt: None
    contract: bool = True
    steps: Callable[[BlockFormat, Config], Any] = element_steps
    launch: Callable[[Config, BlockFormat], Launch | None] = call_launch
    needs: Callable[[Config], tuple[str, ...]] = lambda config: ()


@dataclass(frozen=True)
class Kernel:
    """Generated source, and all that a host must know to launch it.

    walk       the walk it came from, `config` what was chosen for it
    entry      name of the entry point, `arguments` what it takes
    hash       of the source
    needs      kernels that must run before this one, by op: "prepare" repacks the weights,
               "quantize" the activations
    notes      what a reader of `list` or of the source should know
    """

    target: str
    op: str
    format: BlockFormat
    walk: Walk
    config: Config
    entry: str
    source: str
    hash: str
    needs: Mapping[str, Kernel] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """ "fp32" or "int8" activations; "" where the op has no such choice."""
        return self.walk.precision

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """Arguments of the entry point, in order."""
        return self.walk.arguments

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

    def quantize(self, kernel: Kernel, x: Array) -> Activations:
        """Activations x, float32 (M, K), as int8 in the form of the kernel's format."""
        ...

    def prepare(self, kernel: Kernel, w: Weights) -> Any:
        """What `matmul` of this kernel reads instead of the native blocks, kept in w.prepared."""
        ...

    def matmul(self, kernel: Kernel) -> Callable[[Array, Weights, Array], None]:
        """A function of x, float32 (M, K), w (N, K) and y, float32 (M, N), which it fills.

        Arrays are C-contiguous and do not overlap.  The function is safe to call from many
        threads at once.
        """
        ...


@dataclass(frozen=True, eq=False)
class Dialect:
    """The words of a language: how each thing that an expression can contain is spelt.

    Templates are str.format strings.  A missing word is an error that names it.  For {x} there is
    also {atom}: the same, in brackets where it is an operation.

    constant   by dtype name
    load       by storage name, of {field} and {index}
    cast       by "from>to" dtype names, of {x}; likewise bitcast
    call       by function name, of {x}
    word, element, spread1, lookup   the packed operations
    select     of {condition} {a} {b}, where the condition is the same in all lanes
    blend      the same where it differs between lanes
    min, max   of {a} {b}
    shift      what a signed amount of a shift is wrapped in, where the language wants that
    constant.special   of the bits {x} of an f32 that is not finite

    operators  by operator, where its sign is not Python's; a language in which // is / rounds
               integers to zero
    printer    a kind of `Printer`, for languages that need more than words
    """

    words: Mapping[str, str]
    operators: Mapping[str, str] = field(default_factory=dict)
    printer: type[Printer] | None = None

    def word(self, key: str) -> str:
        """The spelling of `key`."""
        found = self.words.get(key)
        if found is None:
            raise TargetError(f"this language has no word for {key}; add it to its dialect")
        return found


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

    def walk(self, op: str, fmt: BlockFormat, precision: str = "") -> Walk:
        """The first walk of this target for an op, a format and a precision."""
        reasons = []
        for one in self.walks:
            if one.op != op or (precision and one.precision and one.precision != precision):
                continue
            reason = one.applies(fmt)
            if reason is None:
                return one
            reasons.append(reason)
        asked = f"{op} {fmt.name}" + (f" in {precision}" if precision else "")
        why = "; ".join(reasons) or "it has no such walk"
        offers = sorted({w.op + (f" ({w.precision})" if w.precision else "") for w in self.walks})
        raise TargetError(
            f"target {self.name} cannot do {asked}: {why}; it offers {', '.join(offers)}"
        )


#: how tightly names and calls bind, tighter than any operator
ATOM = 99


class Printer:
    """Prints expressions of a language whose operators bind as C's or Python's, through its
    dialect."""

    def __init__(
        self,
        dialect: Dialect,
        tables: Callable[[tuple[Any, ...]], str],
        rename: Callable[[str], str] = str,
    ) -> None:
        """`tables` names a table by its values; `rename` gives a name of the format's author that
        the walk or the language uses itself another spelling."""
        self._dialect = dialect
        self._tables = tables
        self._rename = rename

    def __call__(self, expr: Expr) -> str:
        return self._print(expr)[0]

    def _print(self, expr: Expr) -> tuple[str, int]:
        op, word, atom = expr.op, self._dialect.word, ATOM
        if op == "const":
            text = self._constant(expr)
            return text, atom if not text.startswith("-") else PRECEDENCE["neg"]
        if op == "var":
            return str(expr.attr[0]), atom
        if op in PRECEDENCE and op != "select":
            return self._operator(expr)
        parts = [self._print(a) for a in expr.args]
        args = [text for text, _ in parts]
        x = {"x": args[0], "atom": args[0] if parts[0][1] == ATOM else f"({args[0]})"}
        if op == "load":
            key = f"load.{expr.attr.storage.name}"
            return word(key).format(field=self._rename(expr.attr.name), index=args[0]), atom
        if op == "word":
            return word("word").format(field=self._rename(expr.attr.name), index=args[0]), atom
        if op == "fetch":
            storage, align = expr.attr
            return word(f"fetch.{storage.name}.{min(align, storage.nbytes)}").format(
                address=args[0]
            ), atom
        if op == "element":
            return word("element").format(name=self._rename(expr.attr), index=args[0]), atom
        if op in ("cast", "bitcast"):
            key = f"{op}.{expr.args[0].dtype.value}>{expr.dtype.value}"
            return word(key).format(**x), atom
        if op == "select":
            key = "blend" if varies(expr.args[0]) else "select"
            return word(key).format(condition=args[0], a=args[1], b=args[2]), atom
        if op in ("table", "lookup"):
            return word(op).format(table=self._tables(expr.attr), index=args[0]), atom
        if op == "spread":
            return word(f"spread{expr.attr}").format(**x), atom
        if op in ("min", "max"):
            return word(op).format(a=args[0], b=args[1]), atom
        if op == "call":
            return word(f"call.{expr.attr}").format(**x), atom
        if op == "named":
            return self._print(expr.args[0])
        raise TargetError(f"{op} cannot be printed")

    def _constant(self, expr: Expr) -> str:
        special = self._dialect.words.get("constant.special")
        if expr.dtype is F32 and special and not math.isfinite(expr.attr):
            bits = struct.unpack("<I", struct.pack("<f", expr.attr))[0]
            return special.format(x=self._dialect.word("constant.u32").format(x=hex(bits)))
        if expr.dtype is F32:
            return self._dialect.word("constant.f32").format(x=repr(float(expr.attr)))
        if expr.dtype is U32:
            text = f"0x{expr.attr:08X}" if expr.attr > 0xFFFF else str(expr.attr)
            return self._dialect.word("constant.u32").format(x=text)
        if expr.dtype is BOOL:
            return str(int(expr.attr))
        return str(expr.attr)

    def _operator(self, expr: Expr) -> tuple[str, int]:
        op = expr.op
        level = PRECEDENCE[op]
        if op == "neg":
            text, inner = self._print(expr.args[0])
            return f"-{text if inner > level else f'({text})'}", level
        left, right = expr.args
        rounds_to_zero = self._dialect.operators.get("//") == "/"
        if op in ("//", "%") and rounds_to_zero and interval(left)[0] < 0:
            return self._print(_floored(expr))
        # the opposite of -2**31 is no i32
        if op == "+" and right.op == "const" and -(2**31) < right.attr < 0:
            op, right = "-", Expr("const", right.dtype, attr=-right.attr)
        sides = []
        for arg, is_right in ((left, False), (right, True)):
            text, inner = self._print(arg)
            if is_right and op in SHIFTS and arg.dtype is I32 and "shift" in self._dialect.words:
                text, inner = self._dialect.word("shift").format(x=text), 99
            regrouped = op == arg.op == "+" and arg.dtype.is_int  # a + (b + c) needs none
            loose = inner < level or (inner == level and is_right and not regrouped)
            mixed = op in (*BITWISE, *SHIFTS) and arg.op in PRECEDENCE and arg.op != op
            # a < b == c compares three values in some languages and two in others
            chained = op in COMPARISONS and arg.op in COMPARISONS
            bracketed = loose or chained or (mixed and inner != ATOM)
            sides.append(f"({text})" if bracketed else text)
        return f"{sides[0]} {self._dialect.operators.get(op, op)} {sides[1]}", level


def _floored(expr: Expr) -> Expr:
    """x // c or x % c, which round down, in operations that agree where division rounds to zero."""
    x, by = expr.args
    if by.op == "const" and by.attr > 0 and by.attr & (by.attr - 1) == 0:
        return x & (by.attr - 1) if expr.op == "%" else x >> int(by.attr).bit_length() - 1
    # the masks change nothing in the branch that is taken, and say that there is no sign
    above = Expr("//", I32, (x & 0x7FFFFFFF, by))
    below = -1 - Expr("//", I32, ((-1 - x) & 0x7FFFFFFF, by))
    floor = where(x < 0, below, above)
    return floor if expr.op == "//" else x - floor * by


def varies(expr: Expr) -> bool:
    """Whether the value depends on what is loaded, and so may differ between the rows of a tile."""
    return any(node.op in LOADS for node in walk(expr))


# ---- layout of the text -----------------------------------------------------------------------

#: columns of generated text
WIDTH = 100


def statement(head: str, text: str, indent: int = 4) -> str:
    """`head` and an expression's text as lines that are short enough to read: broken in the
    outermost brackets, at commas or operators."""
    return "\n".join(_lines(" " * indent + head, text, "", " " * indent))


def _lines(before: str, text: str, after: str, indent: str) -> Iterator[str]:
    if len(before + text + after) <= WIDTH:
        yield before + text + after
        return
    if cuts := _cuts(text):
        if before == indent:  # inside of brackets already
            yield from _parts(text, cuts, "", after, indent)
            return
        text = f"({text})"
    opening, closing = _longest_bracket(text)
    if opening == closing:
        yield before + text + after
        return
    inside, deeper = text[opening + 1 : closing], indent + " " * 4
    yield before + text[: opening + 1]
    if commas := _cuts(inside, ","):
        yield from _parts(inside, commas, ",", ",", deeper)
    else:
        yield from _parts(inside, _cuts(inside), "", "", deeper)
    yield indent + text[closing:] + after


def _parts(text: str, cuts: list[int], between: str, after: str, indent: str) -> Iterator[str]:
    """`text` cut into lines, each behind its operator or with a comma (`between`) behind it."""
    for a, b in pairwise([0, *cuts, len(text)]):
        part = text[a:b].removeprefix(",").strip()
        operator = f"{part.split()[0]} " if a and not between else ""
        end = after if b == len(text) else between
        yield from _lines(indent + operator, part.removeprefix(operator), end, indent)


def _cuts(text: str, what: str = "") -> list[int]:
    """Where `what`, or else the operators that bind least, stand outside of brackets."""
    found: dict[int, list[int]] = {}
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        sign = re.match(r" (\S+) ", text[at:])
        if depth == 0 and what and letter == what:
            found.setdefault(0, []).append(at)
        elif depth == 0 and not what and sign and sign[1] in PRECEDENCE:
            found.setdefault(PRECEDENCE[sign[1]], []).append(at)
    return found[min(found)] if found else []


def _longest_bracket(text: str) -> tuple[int, int]:
    """Where the longest of the outermost brackets opens and closes."""
    best, opening, depth = (0, 0), 0, 0
    for at, letter in enumerate(text):
        if letter in "([":
            opening = opening if depth else at
            depth += 1
        elif letter in ")]":
            depth -= 1
            if depth == 0:
                best = max(best, (opening, at), key=lambda pair: pair[1] - pair[0])
    return best
