"""Whether a candidate computes what it should: its result against the numpy reference."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kernelgen import quantizer
from kernelgen.errors import FormatError
from kernelgen.generate import generate
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.ops import matmul, samples
from kernelgen.ir.ops.attention import Attention, attention
from kernelgen.ir.ops.library import Kind
from kernelgen.ir.ops.maps import Map
from kernelgen.ir.ops.rows import written
from kernelgen.ir.ops.tensors import Output
from kernelgen.problem import MATVEC_ROWS, relative_error, rounded, tolerance
from kernelgen.targets.base import Kernel, Runtime, Target
from kernelgen.tensor import QuantTensor
from kernelgen.tuner.problems import AttentionProblem, MapProblem, MatmulProblem, Problem

Array = npt.NDArray[Any]
#: a kernel, ready to be called: as `Runtime.matmul`, `attention` or `apply` gives it
Run = Callable[..., None]

#: bytes of inputs to go through in turns, so that they come from memory, as a model's do
PAST_THE_CACHE = 96 * 2**20
MOST_COPIES = 64

#: rows of weights that differ; a prime, so that no tile meets the same row in the same place
_DISTINCT = 61


@functools.lru_cache(maxsize=64)
def sample_rows(fmt: BlockFormat, n: int, k: int) -> Array:
    """Blocks, uint8 (N, row_bytes), of normal weights; random ones where a format has no
    quantizer."""
    rng = np.random.default_rng(n + k)
    try:
        return quantizer.quantize(rng.standard_normal((n, k), np.float32), fmt)
    except FormatError:
        blocks = rng.integers(0, 256, (n * (k // fmt.block), fmt.nbytes), np.uint8)
        fields = fmt.split(blocks)
        for one in fmt.layout_fields:
            if one.storage.name in ("f16", "f32"):
                fields[one.name] = rng.uniform(-1, 1, fields[one.name].shape)
        return fmt.join(fields).reshape(n, -1)


@dataclass(frozen=True)
class Sample:
    """Inputs of a shape, and what they should give.

    w          the weights, rows of them over and over
    x          activations (M, K)
    exact      x times the distinct rows, float64
    """

    w: QuantTensor
    x: Array
    values: Array
    exact: Array

    @classmethod
    def make(cls, fmt: BlockFormat, m: int, n: int, k: int) -> Sample:
        """Normal weights and activations of that shape."""
        rows = sample_rows(fmt, min(n, _DISTINCT), k)
        w = QuantTensor(fmt, (n, k), np.resize(rows, (n, fmt.row_bytes(k))))
        x = np.random.default_rng(m).standard_normal((m, k), np.float32)
        values = w[: len(rows)].dequantize()
        return cls(w, x, values, matmul(x, values))

    def seen(self, kernel: Kernel, runtime: Runtime, target: Target) -> Array:
        """What a kernel should give, float64 (M, distinct rows): with the activations rounded as
        its precision says, and the integers that this target makes of them, where it makes any."""
        if kernel.precision in ("fp16", "bf16"):
            return matmul(rounded(self.x, kernel.precision), self.values)
        if kernel.precision != "int8":
            return self.exact
        quantize = generate("quantize", kernel.format, target)
        return matmul(runtime.quantize(quantize, self.x).values(), self.values)


@dataclass(frozen=True)
class Verdict:
    """Errors of a candidate.

    error      the largest relative to the reference's RMS, on the inputs that it saw; of maps and
               row reductions relative to the largest number
    bound      what is allowed
    rms_error  RMS of the difference to exact activations, relative to the RMS of the result
    kind       "nan" or "wrong" where it fails, with its reason; both None where it passes
    """

    error: float
    bound: float
    rms_error: float
    kind: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Trial:
    """One call of a kernel: `call` gives y, and compared is `part` of it.

    want    float64, what it should give with inputs that its precision rounds
    exact   the same with exact inputs
    where   the shape
    size    what errors are measured in; None for the root mean square of what it should give
    """

    call: Callable[[], Array]
    want: Array
    exact: Array
    where: str
    part: tuple[slice, ...] = ()
    size: float | None = None


class Case(Protocol):
    """The inputs of a problem, many times over, so that they come from memory."""

    #: bytes of the inputs that are read once
    nbytes: int

    def runner(self, runtime: Runtime, kernel: Kernel) -> Run:
        """The kernel, compiled."""
        ...

    def prepare(self, runtime: Runtime, kernel: Kernel) -> None:
        """Repack and upload what a kernel reads."""
        ...

    def call(self, run: Run, turn: int) -> None:
        """Run a kernel on the inputs whose turn it is."""
        ...

    def little(self, run: Run, kernel: Kernel) -> None:
        """Run it on almost nothing."""
        ...

    def bound(self, kernel: Kernel) -> float:
        """The largest `relative_error` that a kernel may have: what its op may lose by rounding in
        float32."""
        ...

    def trials(self, kernel: Kernel, run: Run, runtime: Runtime, target: Target) -> Iterator[Trial]:
        """Small shapes that no tile divides, and the problem's own at last."""
        ...


def judge(
    kernel: Kernel, run: Run, runtime: Runtime, target: Target, case: Case,
    max_error: float | None = None,
) -> Verdict:  # fmt: skip
    """Run a kernel on a problem, and on small shapes that no tile divides.

    The bound is that of the case; `max_error` bounds the RMS error besides, and counts what rounded
    inputs add.
    """
    bound = case.bound(kernel)
    worst = rms = 0.0
    for one in case.trials(kernel, run, runtime, target):
        y = one.call()
        if not np.isfinite(y).all():
            return Verdict(
                np.inf, bound, np.inf, "nan",
                f"{np.count_nonzero(~np.isfinite(y))} of {y.size} results are NaN or infinite"
                f" at {one.where}, where the reference is finite",
            )  # fmt: skip
        y = y[one.part]
        error = relative_error(y, one.want, one.size)
        if error > bound:
            reason = f"its error of {error:.2g} at {one.where} exceeds {bound:.2g}"
            return Verdict(error, bound, np.inf, "wrong", reason)
        worst = max(worst, error)
        squares = float(np.mean(one.exact**2))
        rms = float(np.sqrt(np.mean((y - one.exact) ** 2) / (squares or 1.0)))
    if max_error is not None and rms > max_error:
        reason = f"its RMS error of {rms:.2g} exceeds the {max_error:.2g} asked for"
        return Verdict(worst, bound, rms, "wrong", reason)
    return Verdict(worst, bound, rms)


def copies(nbytes: int) -> int:
    """How often inputs have to be there, so that none is in a cache when its turn comes."""
    return min(MOST_COPIES, max(1, -(-PAST_THE_CACHE // nbytes)))


class Products:
    """What is common to products, those of attention too."""

    def bound(self, kernel: Kernel) -> float:
        """What sums may lose by rounding."""
        return tolerance(kernel.op, kernel.precision)


class MatmulCase(Products):
    """Activations, and weights over and over; only once where not `many` are wanted."""

    def __init__(self, problem: MatmulProblem, many: bool = True) -> None:
        one = problem
        self.sample = Sample.make(one.fmt, one.m, one.n, one.k)
        w = self.sample.w
        self.nbytes = w.nbytes
        self._weights = [w]
        for _ in range(copies(w.nbytes) - 1 if many else 0):
            self._weights.append(QuantTensor(w.format, w.shape, w.data.copy()))
        self._out = np.empty((one.m, one.n), np.float32)

    def runner(self, runtime: Runtime, kernel: Kernel) -> Run:
        """The kernel, compiled."""
        return runtime.matmul(kernel)

    def prepare(self, runtime: Runtime, kernel: Kernel) -> None:
        """Repack and upload the weights."""
        for w in self._weights:
            runtime.prepare(kernel, w)

    def call(self, run: Run, turn: int) -> None:
        """Multiply by the weights whose turn it is."""
        run(self.sample.x, self._weights[turn % len(self._weights)], self._out)

    def little(self, run: Run, kernel: Kernel) -> None:
        """Multiply a few small matrices."""
        one = ragged(kernel)[0]
        run(one.x, one.w, np.empty((len(one.x), one.w.shape[0]), np.float32))

    def trials(self, kernel: Kernel, run: Run, runtime: Runtime, target: Target) -> Iterator[Trial]:
        """Small matrices, and the problem's."""
        for one in (*ragged(kernel), self.sample):
            m, n = len(one.x), one.w.shape[0]

            def call(one: Sample = one, shape: tuple[int, int] = (m, n)) -> Array:
                y = np.full(shape, np.nan, np.float32)  # what is not written stays visible
                run(one.x, one.w, y)
                return y

            seen, exact = one.seen(kernel, runtime, target), one.exact
            want, plain = (np.resize(x.T, (n, m)).T for x in (seen, exact))
            yield Trial(call, want, plain, f"{m}x{n}x{one.w.shape[1]}")


@dataclass(frozen=True)
class Heads:
    """q, k and v, and what k and v hold; `arrays` are other operands."""

    q: Array
    k: QuantTensor
    v: QuantTensor
    arrays: dict[str, Array]

    @classmethod
    def make(cls, kind: Attention, b: int, h: int, hk: int, t: int, s: int) -> Heads:
        """Normal numbers in those shapes."""
        rng = np.random.default_rng(t + s)
        q = rng.standard_normal((b, h, t, kind.head_dim), np.float32)
        arrays: dict[str, Array] = {}
        outer = (b, hk, s)
        if kind.lengths:
            arrays["lengths"] = np.full(b, s, np.int32)
        if kind.page:
            each = -(-s // kind.page)
            arrays["pages"] = rng.permutation(b * each).reshape(b, each).astype(np.int32)
            outer = (b * each, hk, kind.page)
        if kind.sinks:
            arrays["sinks"] = rng.standard_normal(h).astype(np.float32)

        def side(fmt: BlockFormat, elements: int) -> QuantTensor:
            count = math.prod(outer)
            rows = sample_rows(fmt, min(count, _DISTINCT), elements)
            # heads and tiles begin with different rows: the count of these is a prime
            return QuantTensor(fmt, (*outer, elements), np.resize(rows, (count, rows.shape[1])))

        return cls(q, side(kind.k, kind.head_dim), side(kind.v, kind.value_dim), arrays)

    def reference(self, kind: Attention, precision: str, rows: int) -> Array:
        """The last rows of the first heads that share one of k and v, float64."""
        shared = self.q.shape[1] // self.k.shape[1]
        some = slice(0, 1) if not kind.page else slice(None)
        q, k, v = (
            rounded(x, precision)
            for x in (self.q[:1, :shared, -rows:], _first(self.k, some), _first(self.v, some))
        )
        sinks = self.arrays.get("sinks")
        arrays = {name: a[:1] for name, a in self.arrays.items() if name != "sinks"}
        return attention(kind, q, k, v, arrays, None if sinks is None else sinks[:shared])

    def result(self, kind: Attention) -> Array:
        """An array for y, in which what is not written stays visible."""
        return np.full((*self.q.shape[:3], kind.value_dim), np.nan, np.float32)


def _first(w: QuantTensor, batches: slice) -> Array:
    """The values of the first head of some batches."""
    data = w.data[batches, :1]
    return QuantTensor(w.format, (*data.shape[:3], w.shape[3]), data).dequantize()


#: queries of a head that are compared, of the many that a prefill has
_COMPARED = 64


class AttentionCase(Products):
    """Queries, and keys and values over and over."""

    def __init__(self, problem: AttentionProblem) -> None:
        one = problem
        self._kind = one.kind
        first = Heads.make(one.kind, one.batches, one.heads, one.kv_heads, one.queries, one.keys)
        self.nbytes = one.nbytes
        self._heads = [first]
        for _ in range(copies(one.nbytes) - 1):
            k, v = (QuantTensor(w.format, w.shape, w.data.copy()) for w in (first.k, first.v))
            self._heads.append(Heads(first.q, k, v, first.arrays))
        self._out = first.result(one.kind)
        self._prepared: Runtime | None = None

    def runner(self, runtime: Runtime, kernel: Kernel) -> Run:
        """The kernel, compiled."""
        return runtime.attention(kernel)

    def prepare(self, runtime: Runtime, kernel: Kernel) -> None:
        """Uploads come with the first call, and serve every kernel."""
        if self._prepared is not runtime:
            run = runtime.attention(kernel)
            for turn in range(len(self._heads)):
                self.call(run, turn)
            self._prepared = runtime

    def call(self, run: Run, turn: int) -> None:
        """Attend to the keys whose turn it is."""
        one = self._heads[turn % len(self._heads)]
        run(one.q, one.k, one.v, one.arrays, self._out)

    def little(self, run: Run, kernel: Kernel) -> None:
        """One query and one key."""
        one = Heads.make(self._kind, 1, 1, 1, 1, 1)
        run(one.q, one.k, one.v, one.arrays, one.result(self._kind))

    def trials(self, kernel: Kernel, run: Run, runtime: Runtime, target: Target) -> Iterator[Trial]:
        """Few and odd numbers of queries and keys, and the problem's."""
        kind = self._kind
        odd = [(2, 4, 2, t, s) for t, s in ((1, 77), (5, 5), (33, 129))]
        for one in (*(Heads.make(kind, *shape) for shape in odd), self._heads[0]):
            (b, h, t, _), shared = one.q.shape, one.q.shape[1] // one.k.shape[1]
            rows = min(t, _COMPARED)

            def call(one: Heads = one) -> Array:
                y = one.result(kind)
                run(one.q, one.k, one.v, one.arrays, y)
                return y

            want, exact = (one.reference(kind, p, rows) for p in (kernel.precision, "fp32"))
            part = (slice(0, 1), slice(0, shared), slice(t - rows, t))
            yield Trial(call, want, exact, f"{b}x{h}x{t}, {kind.name}", part)


@dataclass(frozen=True)
class Elements:
    """Arrays that a map or row reduction reads, and what it should store, float64."""

    m: int
    n: int
    arrays: dict[str, Array]
    want: dict[str, Array]

    @classmethod
    def make(cls, kind: Kind, m: int, n: int) -> Elements:
        """Normal numbers in arrays (m, n), of which few rows are different; of a map of one row,
        few columns."""
        flat = isinstance(kind, Map) and all(one.strides == (0, 1) for one in kind.inputs)
        rows, columns = (m, min(n, _DISTINCT_COLUMNS)) if flat else (min(m, _DISTINCT), n)
        few, other = (cls._sampled(kind, r, columns) for r in (rows, rows + 1))
        stored = samples.reference(kind, few, rows, columns)
        want = {o.name: samples.values(o, stored[o.name]) for o in written(kind)}

        def whole(a: Array, of_rows: bool) -> Array:
            if flat:
                return np.resize(a, (m, n))
            return np.resize(a, (m, *a.shape[1:])) if of_rows else a

        grown = {name: len(other[name]) != len(a) for name, a in few.items()}
        return cls(
            m, n, {name: whole(a, grown[name]) for name, a in few.items()},
            {name: whole(a, True) for name, a in want.items()},
        )  # fmt: skip

    @staticmethod
    def _sampled(kind: Kind, m: int, n: int) -> dict[str, Array]:
        rng = np.random.default_rng(m + n)
        return {one.name: samples.sample(one, m, n, rng) for one in kind.inputs}


#: columns that differ where there is one row; a prime, so that no vector meets the same
_DISTINCT_COLUMNS = 65521


class MapCase:
    """Arrays of a map or row reduction.  They are there once: what stands between products was
    written a moment before, and is in the caches where it fits."""

    def __init__(self, problem: MapProblem) -> None:
        self._kind, self.nbytes = problem.kind, problem.nbytes
        self._elements = Elements.make(problem.kind, problem.m, self._columns(problem.n))
        self._out = samples.poisoned(problem.kind, problem.m, self._columns(problem.n))

    def _columns(self, n: int) -> int:
        return samples.columns(self._kind, n)

    def runner(self, runtime: Runtime, kernel: Kernel) -> Run:
        """The kernel, compiled."""
        return runtime.apply(kernel)

    def prepare(self, runtime: Runtime, kernel: Kernel) -> None:
        """Nothing is repacked."""

    def call(self, run: Run, turn: int) -> None:
        """Fill the results."""
        one = self._elements
        run(one.arrays, one.m, one.n, self._out)

    def little(self, run: Run, kernel: Kernel) -> None:
        """One row of few elements."""
        n = self._columns(1)
        one = Elements.make(self._kind, 1, n)
        run(one.arrays, 1, n, samples.poisoned(self._kind, 1, n))

    def bound(self, kernel: Kernel) -> float:
        """What functions, and sums, may lose."""
        return samples.tolerance(self._kind)

    def trials(self, kernel: Kernel, run: Run, runtime: Runtime, target: Target) -> Iterator[Trial]:
        """Few and odd numbers of rows and columns, and the problem's; each array that is written
        by itself."""
        kind = self._kind
        rows = {one.strides[0] for one in kind.inputs if len(one.strides) > 1} != {0}
        odd = [(m if rows else 1, self._columns(n)) for m, n in ((1, 1), (5, 33), (2, 1031))]
        for one in (*(Elements.make(kind, m, n) for m, n in odd), self._elements):
            for out in written(kind):

                def call(one: Elements = one, out: Output = out) -> Array:
                    found = samples.poisoned(kind, one.m, one.n)
                    run(one.arrays, one.m, one.n, found)
                    return samples.values(out, found[out.name])

                want = one.want[out.name]
                where = f"{one.m}x{one.n}, {out.name}"
                yield Trial(call, want, want, where, size=samples.unit(want))


def case(problem: Problem) -> Case:
    """The inputs of a problem."""
    if isinstance(problem, MatmulProblem):
        return MatmulCase(problem)
    if isinstance(problem, MapProblem):
        return MapCase(problem)
    assert isinstance(problem, AttentionProblem)
    return AttentionCase(problem)


def ragged(kernel: Kernel) -> tuple[Sample, ...]:
    """Small inputs that no tile divides."""
    fmt = kernel.format
    rows = (1, 3, MATVEC_ROWS) if kernel.op == "matvec" else (MATVEC_ROWS + 1, 21)
    return tuple(_small(fmt, m, n, 3 * fmt.block) for m, n in zip(rows, (37, 5, 64), strict=False))


@functools.lru_cache(maxsize=64)
def _small(fmt: BlockFormat, m: int, n: int, k: int) -> Sample:
    return Sample.make(fmt, m, n, k)
