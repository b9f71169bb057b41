"""What is tuned: an op on inputs of a shape, and what is asked of it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

from kernelgen.errors import ConfigError, FormatError, ShapeError
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.ops import library
from kernelgen.ir.ops.attention import Attention
from kernelgen.ir.ops.library import Kind
from kernelgen.ir.ops.rows import written
from kernelgen.problem import MATVEC_ROWS, PRECISIONS, choose_precision, op_for, row_bucket

#: what may be minimized
OBJECTIVES = ("time", "energy")

#: ops of which every element, or row, is computed by itself
MAP_OPS = ("map", "rows")

#: how many times larger or smaller other sizes than the rows may be in a shape that is near, as
#: powers of two
_NEAR = 2.0


class Wanted(Protocol):
    """What problems and keys of entries say alike."""

    @property
    def precision(self) -> str: ...

    @property
    def max_error(self) -> float | None: ...

    @property
    def objective(self) -> str: ...


def wanted(one: Wanted) -> str:
    """What was asked for besides op, subject and shape, in a few words."""
    parts = [one.precision]
    if one.max_error is not None:
        parts.append(f"error <= {one.max_error:g}")
    if one.objective != "time":
        parts.append(f"least {one.objective}")
    return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of any op.

    precision   one of PRECISIONS, of which "auto" leaves it open
    max_error   RMS error, relative to the result's RMS, that rounded inputs included may make;
                None for what the precision that was asked for stands for
    objective   what is to be least: one of OBJECTIVES
    """

    precision: str = "auto"
    max_error: float | None = None
    objective: str = "time"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"precision {self.precision!r} was asked for; allowed are {', '.join(PRECISIONS)}"
            )
        if self.max_error is not None and not self.max_error > 0:
            raise ConfigError(
                f"a largest error of {self.max_error} was asked for; it must be above 0, as 0.01"
            )
        if self.objective not in OBJECTIVES:
            raise ConfigError(
                f"objective {self.objective!r} was asked for; allowed are {', '.join(OBJECTIVES)}"
            )


class Problem(Asked, ABC):
    """One thing to tune."""

    @property
    @abstractmethod
    def op(self) -> str:
        """The op that serves it."""

    @property
    @abstractmethod
    def subject(self) -> Any:
        """What its kernels are specialized for."""

    @property
    def like(self) -> Any:
        """The subject that stands for all to which the same entries apply."""
        return self.subject

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Its shape, by the names of the sizes."""

    @property
    @abstractmethod
    def rows_name(self) -> str:
        """Which of the sizes is that of the rows that go through what is in memory at once."""

    @property
    def rows(self) -> int:
        """That size: default configurations ask for it."""
        return self.sizes[self.rows_name]

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that have to be read from memory."""

    @property
    @abstractmethod
    def smallest(self) -> Problem:
        """The same with sizes that cost nothing."""

    @property
    @abstractmethod
    def flags(self) -> str:
        """How the command line is told which it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes, in their order."""
        return tuple(self.sizes.values())

    @property
    def name(self) -> str:
        """Of what the entries that apply are about."""
        return str(self.like.name)

    def apart(self, shape: tuple[int, ...]) -> float | None:
        """How far a shape is from this one in powers of two: 0 for the same bucket, None where it
        says nothing about this one, as few rows say nothing of other numbers of them: what is best
        for one goes over the weights twice for two."""
        if len(shape) != len(self.shape):
            return None
        total = 0.0
        for (name, mine), other in zip(self.sizes.items(), shape, strict=True):
            rows = name == self.rows_name
            if rows and row_bucket(mine) == row_bucket(other):
                continue
            few = rows and min(mine, other) <= MATVEC_ROWS
            off = abs(math.log2(mine / other))
            if few or off > (1 if rows else _NEAR):
                return None
            total += off
        return total

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.op} {self.name} {shape} ({wanted(self)})"


def subject_named(op: str, name: str) -> Any:
    """The subject that `Problem.name` stands for, as entries keep it; FormatError where there is
    none that is known here."""
    if op in MAP_OPS:
        known = library.named(name)
        if known is None:
            raise FormatError(f"{op} {name!r} is not one of the library of maps and row reductions")
        return known[2]
    found = re.fullmatch(r"d(\d+)(?:_(\d+))?_(\w+)", name) if op == "attention" else None
    if found is None:
        return formats.get(name)
    head_dim, value_dim, both = int(found[1]), int(found[2] or 0), found[3].lower()
    for one in formats.formats():
        if both == one.name.lower():
            return Attention(head_dim, one, one, value_dim)
        if both.startswith(f"{one.name.lower()}_"):
            with contextlib.suppress(FormatError):
                other = formats.get(both[len(one.name) + 1 :])
                return Attention(head_dim, one, other, value_dim)
    raise FormatError(f"attention {name!r} is of formats that are not known here")


def _positive(sizes: dict[str, int]) -> None:
    if min(sizes.values()) < 1:
        shape = "x".join(map(str, sizes.values()))
        raise ShapeError(f"shape {shape} was given; {', '.join(sizes)} are above 0")


@dataclass(frozen=True)
class MatmulProblem(Problem):
    """x (M, K) times weights (N, K) of a format."""

    fmt: BlockFormat
    m: int
    n: int
    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        choose_precision(self.precision, self.fmt)
        _positive(self.sizes)
        self.fmt.row_bytes(self.k)

    @property
    def op(self) -> str:
        """matvec for a few rows, else matmul."""
        return op_for(self.m)

    @property
    def subject(self) -> BlockFormat:
        """The format."""
        return self.fmt

    @property
    def sizes(self) -> dict[str, int]:
        """M, N, K."""
        return {"M": self.m, "N": self.n, "K": self.k}

    @property
    def rows_name(self) -> str:
        """Rows of x."""
        return "M"

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return self.n * self.fmt.row_bytes(self.k)

    @property
    def smallest(self) -> MatmulProblem:
        """One row, one block."""
        return dataclasses.replace(self, m=1, n=1, k=self.fmt.block)

    @property
    def flags(self) -> str:
        """Format and shape."""
        return f"--format {self.fmt.name} --shape {self.m}x{self.n}x{self.k}"


@dataclass(frozen=True)
class AttentionProblem(Problem):
    """q (B, H, T, D) against S keys and values of HK heads.

    What is found for one score and mask applies to all of the same heads and formats: it is
    tuned with the kind that is given, and kept under the plain one.
    """

    kind: Attention
    batches: int
    heads: int
    kv_heads: int
    queries: int
    keys: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self.sizes)
        if self.heads % self.kv_heads:
            raise ShapeError(
                f"{self.heads} heads of q cannot share {self.kv_heads} of k and v in equal parts;"
                " H is a multiple of HK"
            )
        if self.kind.operands:
            names = ", ".join(one.name for one in self.kind.operands)
            raise ShapeError(
                f"attention that reads {names} was given; what is tuned reads q, k and v only, and"
                " applies to all scores and masks"
            )

    @property
    def op(self) -> str:
        """Attention."""
        return "attention"

    @property
    def subject(self) -> Attention:
        """The kind that is run."""
        return self.kind

    @property
    def like(self) -> Attention:
        """Heads and formats alone."""
        return self.kind.plain

    @property
    def sizes(self) -> dict[str, int]:
        """B, H, HK, T, S."""
        return {
            "B": self.batches, "H": self.heads, "HK": self.kv_heads, "T": self.queries,
            "S": self.keys,
        }  # fmt: skip

    @property
    def rows_name(self) -> str:
        """Queries of a head."""
        return "T"

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        kind = self.kind
        each = kind.k.row_bytes(kind.head_dim) + kind.v.row_bytes(kind.value_dim)
        return self.batches * self.kv_heads * self.keys * each

    @property
    def smallest(self) -> AttentionProblem:
        """One query, one key."""
        return dataclasses.replace(self, batches=1, heads=1, kv_heads=1, queries=1, keys=1)

    @property
    def flags(self) -> str:
        """Op, format and shape: those that there are flags for."""
        shape = "x".join(map(str, (*self.shape, self.kind.head_dim)))
        return f"--op attention --format {self.kind.k.name} --shape {shape}"


@dataclass(frozen=True)
class MapProblem(Problem):
    """A map or row reduction of (rows, columns).  All compute in float32, so that a precision says
    nothing here."""

    kind: Kind
    m: int
    n: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self.sizes)
        if self.precision not in ("auto", "fp32"):
            raise ConfigError(
                f"{self.kind.label} in {self.precision} was asked for; maps and row reductions"
                " compute in fp32, whatever types their elements are kept in"
            )

    @classmethod
    def of(cls, name: str, dtype: str, m: int, n: int, asked: Asked) -> MapProblem:
        """One of the library on contiguous arrays (m, n) of a type: as kernels see these, which
        take functions of single elements as one row."""
        if dtype not in library.DTYPES:
            raise ConfigError(
                f"{name} of {dtype} was asked for; elements of {', '.join(library.DTYPES)} are"
                " tuned"
            )
        kind = library.contiguous(name, dtype)
        flat = kind is not library.get(name, dtype)
        return cls(kind, *((1, m * n) if flat else (m, n)), **vars(asked))

    @property
    def op(self) -> str:
        """Map or rows."""
        return library.op_of(self.kind)

    @property
    def subject(self) -> Kind:
        """The map or row reduction."""
        return self.kind

    @property
    def sizes(self) -> dict[str, int]:
        """Rows and columns."""
        return {"ROWS": self.m, "COLUMNS": self.n}

    @property
    def rows_name(self) -> str:
        """Rows."""
        return "ROWS"

    @property
    def nbytes(self) -> int:
        """Of all that is read and written, for each element."""
        kind = self.kind
        read = sum(one.storage.nbytes for one in kind.inputs if len(one.strides) > 1)
        each = read + sum(one.storage.nbytes for one in written(kind) if one in kind.outputs)
        return self.m * self.n * each

    @property
    def smallest(self) -> MapProblem:
        """One row of few elements."""
        return dataclasses.replace(self, m=1, n=1)

    @property
    def flags(self) -> str:
        """Op, type and shape."""
        name, dtype, _ = library.named(self.kind.name) or (self.kind.label, "f32", None)
        return f"--op {name} --format {dtype} --shape {self.m}x{self.n}"
