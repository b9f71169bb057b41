"""GPTQ as AutoGPTQ and GPTQModel save it, and AWQ as AutoAWQ does (its GEMM layout).

    plane     GPTQ                      AWQ                    all are for x @ W.T of W (N, K)
    qweight   int32 (K * bits / 32, N)  int32 (K, N / 8)
    qzeros    int32 (G, N * bits / 32)  int32 (G, N / 8)       G groups
    scales    f16 (G, N)                f16 (G, N)
    g_idx     int32 (K,), may be absent                        the group of each column

A value is scales * (code - zero).  In files of GPTQ's first version zero points are stored less
one: 15 stands for 16 (as AutoGPTQ's newer layers have it; in its older ones it wraps to 0).
GPTQModel calls the second version gptq_v2.  The eight nibbles of AWQ's words are columns 0 2 4 6 1
3 5 7 (AutoAWQ: utils/packing_utils.py).  Both multiply in fp16; here the product is exact in
float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kernelgen.checkpoints.config import Quantization
from kernelgen.checkpoints.groups import (
    Codes,
    Groups,
    Stored,
    by_index,
    integer_groups,
    unpack,
)
from kernelgen.checkpoints.planes import Array, Planes

_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def gptq(planes: Planes, config: Quantization) -> Iterator[Stored]:
    """The quantized matrices of a GPTQ checkpoint."""
    version = config.text("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise config.error(f"checkpoint_format {version!r}", "gptq and gptq_v2")
    return _layers(planes, config, awq=False, zero_plus=1 if version == "gptq" else 0)


def awq(planes: Planes, config: Quantization) -> Iterator[Stored]:
    """The quantized matrices of an AWQ checkpoint."""
    version = config.text("version", "gemm").lower()
    if version != "gemm":
        raise config.error(f"version {version!r}", "gemm")
    return _layers(planes, config, awq=True, zero_plus=0)


def _layers(planes: Planes, config: Quantization, awq: bool, zero_plus: int) -> Iterator[Stored]:
    for prefix in planes.prefixes(".qweight"):
        yield _Layer(planes, config, prefix, awq, zero_plus).stored()


class _Layer:
    """The planes of one matrix."""

    def __init__(
        self, planes: Planes, config: Quantization, prefix: str, awq: bool, zero_plus: int
    ) -> None:
        of = f"{prefix}.qweight"
        self.config, self.awq, self.zero_plus = config, awq, zero_plus
        self.prefix = prefix
        self.weight = planes[of].must_be("I32")
        self.scales = planes.need(f"{prefix}.scales", of).must_be("F16 BF16 F32")
        self.zeros = planes.need(f"{prefix}.qzeros", of).must_be("I32")
        self.index = planes.get(f"{prefix}.g_idx")
        for one in (self.weight, self.scales, self.zeros):
            if len(one.shape) != 2 or 0 in one.shape:
                raise one.error(f"has shape {one.shape}, and a matrix was expected")
        self.n = self.scales.shape[1]
        self.bits = self.zeros.shape[1] * 32 // self.n
        packed = (self.scales.shape[0], self.n * self.bits // 32)
        if self.bits not in ((4,) if awq else (2, 3, 4, 8)) or self.zeros.shape != packed:
            raise self.zeros.error(
                f"has shape {self.zeros.shape} for scales of {self.scales.shape}: these are no"
                f" {'4' if awq else '2, 3, 4 or 8'} bits for each zero point"
            )
        self.k = self.weight.shape[0] if awq else self.weight.shape[0] * 32 // self.bits
        words = (self.k, self.n * self.bits // 32) if awq else (self.k * self.bits // 32, self.n)
        self.weight.must_be("I32", words)

    def stored(self) -> Stored:
        """The matrix."""
        planes = [self.weight, self.scales, self.zeros]
        if self.index is not None:
            planes.append(self.index.must_be("I32", (self.k,)))
        uses = tuple(one.name for one in planes)
        return Stored(f"{self.prefix}.weight", (self.n, self.k), uses, self.groups)

    def groups(self) -> Groups:
        """Its scales and zero points as (N, groups), and its codes."""
        which, run, columns = by_index(self._group_of_column())
        zero = unpack(self.zeros.array(), self.bits, self.n)
        if self.awq:
            zero = _in_order(zero)
        zero = zero + np.int16(self.zero_plus)
        made = integer_groups(
            self.bits, self._codes(columns), self.scales.scales()[which].T, zero[which].T, run,
            self.scales,
        )  # fmt: skip
        return Groups(made.format, made.codes, made.fields, columns)

    def _group_of_column(self) -> Array:
        count = self.scales.shape[0]
        if self.index is not None:
            index = self.index.array()
            if index.min() < 0 or index.max() >= count:
                raise self.index.error(
                    f"names groups {index.min()} ... {index.max()}, and there are {count}"
                )
            return index
        size = self.config.integer("group_size", -(-self.k // count))
        size = self.k if size <= 0 else size
        if -(-self.k // size) != count:
            raise self.scales.error(
                f"has {count} groups, and {self.k} columns in groups of {size} have"
                f" {-(-self.k // size)}"
            )
        return np.arange(self.k) // size

    def _codes(self, columns: Array | None) -> Codes:
        words = self.weight.array()
        bits, k = self.bits, self.k

        def of_rows(rows: slice) -> Array:
            if self.awq:
                # a word has eight rows, and slices begin at multiples of eight
                part = words[:, rows.start // 8 : -(-rows.stop // 8)]
                codes = _in_order(unpack(part, 4, 8 * part.shape[1])).T
            else:
                codes = unpack(np.ascontiguousarray(words[:, rows].T), bits, k)
            return codes if columns is None else codes[:, columns]

        return of_rows


def _in_order(nibbles: Array) -> Array:
    """Columns of AWQ's words, (..., 8 * words), in their order."""
    words = nibbles.reshape(*nibbles.shape[:-1], -1, 8)
    placed = np.empty_like(words)
    placed[..., _AWQ_ORDER] = words
    return placed.reshape(nibbles.shape)


def auto_round(planes: Planes, config: Quantization) -> Iterator[Stored]:
    """AutoRound, which saves in the layouts of others and says in which."""
    packing = config.text("packing_format", config.text("backend", ""))
    if "awq" in packing:
        return _layers(planes, config, awq=True, zero_plus=0)
    if "gptq" in packing:
        return _layers(planes, config, awq=False, zero_plus=1)
    raise config.error(f"packing_format {packing!r}", "auto_round:auto_gptq, auto_round:auto_awq")
