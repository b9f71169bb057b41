"""Attention with Triton: a program takes a tile of queries and goes through the keys, tile by tile,
as `kernelgen.ir.ops.attention.flash_attention` does.

The rows of a tile are the queries of all heads that share a head of K and V, so that these are
decoded once for all of them.  Where several programs share the keys of one tile of rows, each
leaves a maximum, a sum and rows that are not yet divided, and `attention_combine` adds these up.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kernelgen.config import Capabilities, Config
from kernelgen.config.attention import (
    ProgramAttentionConfig,
    ProgramCombineConfig,
    ProgramHalfAttentionConfig,
)
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.expr import (
    BOOL,
    F32,
    I32,
    Expr,
    call,
    const,
    logical_not,
    number,
    rebuild,
    transform,
    walk,
    where,
)
from kernelgen.ir.layout import NATIVE
from kernelgen.ir.ops.attention import Attention, B, H, K, Q, S, reads
from kernelgen.targets.attention import RESULT, TENSORS, arrays, dims, paged
from kernelgen.targets.base import Argument, Launch, Walk
from kernelgen.targets.codebook import codebook_argument, in_codebook
from kernelgen.targets.triton.steps import WARP, TensorSteps, padded, plain, tensor_steps

# ---- steps ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """How rows of K, or of V, are decoded.

    name      "k" or "v", which the names of all that belongs to it begin with
    elements  of a row
    groups    of a row, and `group`: elements of a group, both filled up to powers of two; floats
              are one group
    steps     expressions in `<name>_g` and `<name>_j`, or in `<name>_i`
    """

    name: str
    elements: int
    groups: int
    group: int
    steps: TensorSteps

    @property
    def fmt(self) -> BlockFormat:
        """The format of its blocks."""
        return self.steps.fmt

    @property
    def width(self) -> int:
        """Elements of a row, with those that fill it up."""
        return self.groups * self.group

    @property
    def exact(self) -> bool:
        """Whether nothing is filled up."""
        return self.width == self.elements

    @property
    def torn(self) -> bool:
        """Whether each group is filled up, so that elements do not lie side by side."""
        return not self.fmt.float_codes and self.group != self.fmt.group

    def pitch(self, stride: int) -> int:
        """From one row to the next, where a block is so many elements of a pointer."""
        return self.elements // self.fmt.block * stride


@dataclass(frozen=True)
class AttentionSteps:
    """What the walk asks of a kind of attention.

    scale    of scores; in units of log(2) where `score` is None
    named    f32, by name: what `score` and `mask` use
    score    f32, in scores, batch, head, query, key; None: the score itself
    mask     bool, in the last four; None: all keys are admitted
    always, never   bool, in the ends of a tile: all keys, or none, are admitted; None: not known
                    of any tile
    empty    whether no key is ever admitted
    gaps     whether tiles that are not admitted may lie between others
    """

    k: Side
    v: Side
    scale: float
    named: tuple[tuple[str, Expr], ...]
    score: Expr | None
    mask: Expr | None
    always: Expr | None
    never: Expr | None
    empty: bool
    gaps: bool

    @property
    def of_scores(self) -> bool:
        """Whether `score` has all axes that scores have."""
        return _mentions((self.score, *(value for _, value in self.named)), "scores")

    @property
    def scalar_because(self) -> tuple[str, ...]:
        """Reasons for which something was decoded lane by lane."""
        reasons = (*self.k.steps.scalar_because, *self.v.steps.scalar_because)
        return tuple(dict.fromkeys(reasons))


#: 1 / log(2): exponentials are powers of two
LOG2_E = 1.4426950408889634


def _called(x: Expr, name: str) -> Expr:
    return Expr("var", x.dtype, attr=(name, *x.attr[1:]))


#: what the walk calls the variables of score and mask
_NAMES = {
    x: _called(x, name)
    for x, name in ((S, "scores"), (B, "batch"), (H, "head"), (Q, "query"), (K, "key"))
}
#: and their ends in a tile
_ENDS = {
    _called(x, f"{x.attr[0]}_{end}"): _called(x, f"{name.attr[0]}_{end}")
    for x, name in _NAMES.items()
    for end in ("lo", "hi")
}


@functools.lru_cache(maxsize=256)
def attention_steps(kind: Attention, config: Config) -> AttentionSteps:
    """The steps of a kind of attention."""
    named = _Named((*kind.names, *(name for one in kind.operands for name in one.strides)))

    def lower(expr: Expr | None) -> Expr | None:
        return None if expr is None else named.lower(transform(expr, _NAMES.get))

    found = kind.tiles(Q, K, H)
    always, never = (transform(e, (_NAMES | _ENDS).get) for e in (found.always, found.never))
    score = lower(kind.score)
    mask = None if always is const(1, BOOL) else lower(kind.mask)
    return AttentionSteps(
        k=_side("k", kind.k, kind.head_dim, kind),
        v=_side("v", kind.v, kind.value_dim, kind),
        scale=kind.scale * (LOG2_E if score is None else 1),
        score=score,
        mask=mask,
        named=tuple(named.values),
        always=None if always.op == "const" else always,
        never=None if never.op == "const" else never,
        empty=never is const(1, BOOL),
        gaps=any(node.op == "&" for node in walk(never)),
    )


def _side(name: str, fmt: BlockFormat, elements: int, kind: Attention) -> Side:
    steps = tensor_steps(fmt, NATIVE)

    def change(node: Expr) -> Expr | None:
        if node.op == "var" and node.attr[0] in ("g", "j", "i"):
            return _called(node, f"{name}_{node.attr[0]}")
        if node.op == "fetch":
            at = node.args[0]
            return rebuild(node, (_called(at, f"{name}_{at.attr[0]}"), *node.args[1:]))
        if node.op == "element":
            return Expr("element", node.dtype, node.args, f"{name}_{node.attr}")
        return None

    def spelt(expr: Expr | None) -> Expr | None:
        return None if expr is None else in_codebook(kind, transform(expr, change))

    renamed = dataclasses.replace(
        steps,
        pointers=tuple(
            dataclasses.replace(p, row=f"{name}_{p.row}", at=f"{name}_{p.at}")
            for p in steps.pointers
        ),
        scale=spelt(steps.scale),
        offset=spelt(steps.offset),
        words=tuple((f"{name}_{word}", transform(expr, change)) for word, expr in steps.words),
        codes=spelt(steps.codes),
        values=spelt(steps.values),
    )
    if fmt.float_codes:
        return Side(name, elements, 1, padded(elements), renamed)
    return Side(name, elements, padded(elements // fmt.group), padded(fmt.group), renamed)


class _Named:
    """What score and mask use under names of its own: elements of arrays, which are loaded once,
    and arguments of functions that the language does not have."""

    def __init__(self, taken: Iterable[str]) -> None:
        self.values: list[tuple[str, Expr]] = []
        self._taken = set(taken)

    def lower(self, expr: Expr) -> Expr:
        """An expression in operations that the language has."""
        return transform(plain(self._read(expr, None)), self._without_tanh)

    def _name(self, value: Expr, stem: str) -> Expr:
        """A variable that stands for a value."""
        name = next((name for name, known in self.values if known is value), "")
        if not name:
            others = (f"{stem}_{n}" for n in itertools.count(2))
            name = next(one for one in itertools.chain([stem], others) if one not in self._taken)
            self._taken.add(name)
            self.values.append((name, value))
        return number(name) if value.dtype is F32 else Expr("var", I32, attr=(name, *_INTEGERS))

    def _read(self, node: Expr, guard: Expr | None) -> Expr:
        """The same with elements named.  Those in a branch of a selection are read only where it is
        taken: their index may be no good elsewhere."""
        if not any(n.op == "element" for n in walk(node)):
            return node
        if node.op == "select":
            condition = self._read(node.args[0], guard)
            branches = (
                self._read(branch, taken if guard is None else guard & taken)
                for branch, taken in zip(
                    node.args[1:], (condition, logical_not(condition)), strict=True
                )
            )
            return rebuild(node, (condition, *branches))
        args = tuple(self._read(a, guard) for a in node.args)
        if node.op != "element":
            return rebuild(node, args)
        where_read = () if guard is None else (self._plain(guard),)
        value = Expr("element", node.dtype, (self._plain(args[0]), *where_read), node.attr)
        return self._name(value, f"of_{node.attr}")

    def _plain(self, expr: Expr) -> Expr:
        return transform(plain(expr), self._without_tanh)

    def _without_tanh(self, node: Expr) -> Expr | None:
        if node.op != "call" or node.attr != "tanh":
            return None
        x = self._name(node.args[0], "tanh_of")
        return self._name(tanh(x, self._name(x * x, "tanh_square")), "tanh")


#: what an i32 may be
_INTEGERS = (-(2**31), 2**31 - 1)

#: where the series of tanh has all digits of a float32: x + x**3 * (c0 + x**2 * (c1 + ...))
_SMALL = 0.375
_SERIES = (-1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925)


def tanh(x: Expr, square: Expr) -> Expr:
    """tanh in operations that the language has, of x, whose square has a name as well."""
    series = const(_SERIES[-1], F32)
    for factor in reversed(_SERIES[:-1]):
        series = series * square + factor
    # finite where the exponential is not
    large = 1.0 - 2.0 / (call("exp", 2.0 * x) + 1.0)
    return where(call("abs", x) < _SMALL, x + x * square * series, large)


# ---- walks ------------------------------------------------------------------------------------


def shared_bytes(config: Config, kind: Attention) -> int:
    """Memory of a program that is not registers, about: all that is multiplied."""
    assert isinstance(config, ProgramHalfAttentionConfig)
    steps = attention_steps(kind, config)
    loaded = config.keys * (steps.k.width + steps.v.width) * max(1, config.stages - 1)
    return config.element_bytes * (config.rows * (steps.k.width + config.keys) + loaded)


def _fits(config: Config, kind: Attention, caps: Capabilities) -> str | None:
    needed = shared_bytes(config, kind)
    if needed > caps.shared_bytes and "interpreted" not in caps.features:
        return f"{needed} bytes of shared memory; the device has {caps.shared_bytes}"
    return None


def _launch(config: Config, kind: Attention) -> Launch:
    assert isinstance(config, ProgramHalfAttentionConfig)
    tiles = f"-(-(T * (H // HK)) // {config.rows})"
    # where one program has all keys there are no parts
    parts = {"PARTS": str(config.splits if config.splits > 1 else 0)}
    threads = WARP * config.warps
    return Launch((f"{tiles} * {config.splits}", "B * HK"), threads, symbols=dims(kind) | parts)


def _combine_launch(config: Config, kind: Attention) -> Launch:
    assert isinstance(config, ProgramCombineConfig)
    groups = (f"-(-(B * H * T) // {config.rows})", "1")
    symbols = dims(kind) | {"PARTS": "SPLITS"}
    return Launch(groups, WARP * config.warps, symbols=symbols)


def _sizes(*names: str) -> tuple[Argument, ...]:
    return tuple(Argument(name, "size", "i32") for name in names)


def _operands(kind: Attention) -> tuple[Argument, ...]:
    """Arrays, and their strides."""
    strides = (name for one in kind.operands for name in one.strides)
    sizes = _sizes(*strides, *(["PAGES"] if kind.page else []))
    return (*paged(kind), *arrays(kind), *codebook_argument("i32")(kind), *sizes)


#: for each program that shares keys and each row: a sum of values; a maximum, and a sum of weights
_PARTS = (
    ("parts", ("PARTS", "B", "H", "T", "DV")),
    ("tops", ("PARTS", "B", "H", "T")),
    ("totals", ("PARTS", "B", "H", "T")),
)


def _flash(precision: str, config: type[Config]) -> Walk:
    return Walk(
        name=f"flash_{precision}", op="attention", kind=Attention, precision=precision,
        template="attention.py.j2", config=config,
        arguments=(
            *TENSORS,
            *(Argument(name, "scratch", "f32", shape) for name, shape in _PARTS),
            *_sizes("B", "H", "HK", "T", "S"),
        ),
        steps=attention_steps, launch=_launch, operands=_operands, fits=_fits,
        then=lambda config: ("attention_combine",) * (config.as_dict()["splits"] > 1),
    )  # fmt: skip


#: attention, and what adds up its parts
WALKS = (
    _flash("fp32", ProgramAttentionConfig),
    _flash("fp16", ProgramHalfAttentionConfig),
    Walk(
        name="combine", op="attention_combine", kind=Attention, precision="",
        template="attention_combine.py.j2", config=ProgramCombineConfig,
        arguments=(
            *(Argument(name, "in", "f32", shape) for name, shape in _PARTS), RESULT,
            *_sizes("B", "H", "T", "SPLITS"),
        ),
        steps=lambda kind, config: None, launch=_combine_launch,
    ),
)  # fmt: skip


def _mentions(exprs: tuple[Expr | None, ...], name: str) -> bool:
    return any(name in reads(one) for one in exprs)


def _full(side: Side) -> bool:
    """Whether codes have all axes: they differ, or could, from word to word of any group."""
    used = [e for e in (side.steps.codes, *(word for _, word in side.steps.words)) if e is not None]
    seen = frozenset(name for one in used for name in reads(one))
    axes = {f"{side.name}_j"} | ({f"{side.name}_g"} if side.fmt.groups > 1 else set())
    return axes <= seen


#: what the templates may call
GLOBALS: dict[str, Any] = {"full": _full, "log2_e": LOG2_E, "mentions": _mentions}

#: names that the templates and Python use; an operand of such a name gets an underscore
RESERVED = frozenset(
    "B H HK KEYS PAGE PAGES S SPLITS T and as assert at batch break class code codes column"
    " continue def del elif else except finally first float for from global half head head_hi"
    " head_lo higher if import in index is k key key_hi key_lo lambda last left length lengths"
    " line line_of min none nonlocal not offset or page pages pair parts pass q queries query"
    " query_hi query_lo raise range return row rows scale scores shared shift shrink sinks split"
    " sums tile tl top tops total totals triton try v value weights while whole with"
    " y yield".split()
)
