"""Each instruction against a model in numpy, written from the figures of the PTX manual.

The engine finds elements of fragments by one formula for all types.  The models here do not: they
say for each shape where element i of a lane lies, in the manual's words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from kernelgen.emulator import Emulator
from tests.emulator.tools import needs_compiler

pytestmark = needs_compiler

# ---- mma: (row, column) of element i of a lane, as in the manual's sections on each shape

Place = Callable[[int, int], tuple[int, int]]  # (lane, i) -> (row, column)


def a_16816_16bit(lane: int, i: int) -> tuple[int, int]:
    group, member = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, member * 2 + (i & 1) + (0 if i < 4 else 8)


def b_16816_16bit(lane: int, i: int) -> tuple[int, int]:
    return (lane % 4) * 2 + (i & 1) + (0 if i < 2 else 8), lane >> 2


def c_m16(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) if i < 2 else (lane >> 2) + 8, (lane % 4) * 2 + (i & 1)


def a_1688_16bit(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) if i < 2 else (lane >> 2) + 8, (lane % 4) * 2 + (i & 1)


def b_1688_16bit(lane: int, i: int) -> tuple[int, int]:
    return (lane % 4) * 2 + i, lane >> 2


def a_1688_tf32(lane: int, i: int) -> tuple[int, int]:
    row = lane >> 2 if i in (0, 2) else (lane >> 2) + 8
    return row, lane % 4 if i in (0, 1) else lane % 4 + 4


def b_1688_tf32(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 if i == 0 else lane % 4 + 4, lane >> 2


def a_16816_8bit(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) if i < 4 else (lane >> 2) + 8, (lane % 4) * 4 + (i & 3)


def b_16816_8bit(lane: int, i: int) -> tuple[int, int]:
    return (lane % 4) * 4 + i, lane >> 2


def a_16832_8bit(lane: int, i: int) -> tuple[int, int]:
    row = lane >> 2 if 0 <= i < 4 or 8 <= i < 12 else (lane >> 2) + 8
    return row, (lane % 4) * 4 + (i & 3) + (0 if i < 8 else 16)


def b_16832_8bit(lane: int, i: int) -> tuple[int, int]:
    return (lane % 4) * 4 + (i & 3) + (0 if i < 4 else 16), lane >> 2


def a_8816_8bit(lane: int, i: int) -> tuple[int, int]:
    return lane >> 2, (lane % 4) * 4 + i


def c_m8(lane: int, i: int) -> tuple[int, int]:
    return lane >> 2, (lane % 4) * 2 + i


@dataclass(frozen=True)
class Mma:
    m: int
    k: int
    d: str
    a: str
    b: str
    c: str
    a_at: Place
    b_at: Place
    c_at: Place = c_m16
    saturates: bool = False

    @property
    def name(self) -> str:
        end = "_sat" if self.saturates else ""
        return f"mma_{self.m}_{self.k}_{self.d}_{self.a}_{self.b}_{self.c}{end}"

    def words(self, operand: str) -> int:
        """32-bit registers of an operand in each lane."""
        elements = {"a": self.m * self.k, "b": self.k * 8, "c": self.m * 8, "d": self.m * 8}[
            operand
        ]
        return elements * BITS[getattr(self, operand)] // 32 // 32

    def text(self) -> str:
        w = {o: self.words(o) for o in "dabc"}
        start = np.cumsum([0, *w.values()])
        names = [", ".join(f"%{i}" for i in range(start[n], start[n + 1])) for n in range(4)]
        registers = ", ".join("{" + n + "}" for n in names)
        instruction = (
            f"mma.sync.aligned.m{self.m}n8k{self.k}.row.col{'.satfinite' * self.saturates}"
            f".{self.d}.{self.a}.{self.b}.{self.c} {registers};"
        )
        if self.d == "f32":  # float registers, as kernels have
            outs = ", ".join(f'"=f"(((float*)d)[lane * {w["d"]} + {i}])' for i in range(w["d"]))
        else:
            outs = ", ".join(f'"=r"(d[lane * {w["d"]} + {i}])' for i in range(w["d"]))
        ins = [f'"r"({o}[lane * {w[o]} + {i}])' for o in "ab" for i in range(w[o])]
        if self.c == "f32":
            ins += [f'"f"(((const float*)c)[lane * {w["c"]} + {i}])' for i in range(w["c"])]
        else:
            ins += [f'"r"(c[lane * {w["c"]} + {i}])' for i in range(w["c"])]
        return (
            f'extern "C" __global__ void {self.name}(const unsigned* a, const unsigned* b,\n'
            f"    const unsigned* c, unsigned* d) {{\n  int lane = threadIdx.x;\n"
            f'  asm volatile("{instruction}"\n    : {outs}\n    : {", ".join(ins)});\n}}\n'
        )


BITS = {"f16": 16, "bf16": 16, "f32": 32, "tf32": 32, "s8": 8, "u8": 8, "s32": 32}
_16 = (a_16816_16bit, b_16816_16bit)
_8 = (a_1688_16bit, b_1688_16bit)
MMAS = [
    Mma(16, 16, "f32", "f16", "f16", "f32", *_16),
    Mma(16, 16, "f16", "f16", "f16", "f16", *_16),
    Mma(16, 16, "f32", "bf16", "bf16", "f32", *_16),
    Mma(16, 8, "f32", "f16", "f16", "f32", *_8),
    Mma(16, 8, "f16", "f16", "f16", "f16", *_8),
    Mma(16, 8, "f32", "bf16", "bf16", "f32", *_8),
    Mma(16, 8, "f32", "tf32", "tf32", "f32", a_1688_tf32, b_1688_tf32),
    *(
        Mma(m, k, "s32", a, b, "s32", *at, saturates=sat)
        for a in ("s8", "u8")
        for b in ("s8", "u8")
        for m, k, *at, sat in (
            (16, 32, a_16832_8bit, b_16832_8bit, c_m16, False),
            (16, 16, a_16816_8bit, b_16816_8bit, c_m16, False),
            (8, 16, a_8816_8bit, b_16816_8bit, c_m8, False),
            (16, 32, a_16832_8bit, b_16832_8bit, c_m16, True),
        )
    ),
]


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of floats that bf16 holds exactly."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def bits_of(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return to_bf16(values)
    types = {"f16": "f2", "f32": "f4", "tf32": "f4", "s8": "i1", "u8": "u1", "s32": "i4"}
    return values.astype(types[kind])


def fragment(matrix: np.ndarray, kind: str, place: Place, words: int) -> np.ndarray:
    """A matrix spread over lanes: (32, words) registers."""
    each = 32 * words // BITS[kind]
    lanes = [[matrix[place(lane, i)] for i in range(each)] for lane in range(32)]
    return bits_of(np.array(lanes), kind).view(np.uint32).reshape(32, words)


def matrix_of(registers: np.ndarray, kind: str, place: Place, shape: tuple[int, int]) -> np.ndarray:
    types = {"f16": "f2", "f32": "f4", "s32": "i4"}
    values = registers.view(types[kind]).reshape(32, -1)
    matrix = np.zeros(shape, values.dtype)
    for lane in range(32):
        for i, value in enumerate(values[lane]):
            matrix[place(lane, i)] = value
    return matrix


# ---- instructions of one thread: text, types, and the model

U32 = np.uint32


def prmt_model(a: np.ndarray, b: np.ndarray, choice: np.ndarray) -> np.ndarray:
    source = np.stack([a >> 8 * i & 255 for i in range(4)] + [b >> 8 * i & 255 for i in range(4)])
    result = np.zeros_like(a)
    for i in range(4):
        nibble = choice >> 4 * i & 15
        byte = np.take_along_axis(source, (nibble & 7)[None].astype(int), 0)[0]
        sign = np.where(byte & 128, 255, 0)
        result |= np.where(nibble & 8, sign, byte).astype(U32) << U32(8 * i)
    return result


def lop3_model(table: int) -> Callable[..., np.ndarray]:
    def model(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.zeros_like(a)
        for i in range(8):
            if table >> i & 1:
                term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
                result |= term
        return result

    return model


def halves(function: Callable[..., np.ndarray], kind: str = "f16") -> Callable[..., np.ndarray]:
    """A model of pairs: in float64, rounded once."""

    def model(*words: np.ndarray) -> np.ndarray:
        if kind == "f16":
            floats = [w.view(np.float16).astype(np.float64) for w in words]
            return function(*floats).astype(np.float16).view(U32)
        parts = [(w.view(np.uint16).astype(U32) << 16).view(np.float32) for w in words]
        exact = function(*(p.astype(np.float64) for p in parts))
        bits = exact.astype(np.float32).view(U32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return rounded.astype(np.uint16).view(U32)

    return model


def signed(w: np.ndarray) -> np.ndarray:
    return w.astype(U32).view(np.int32).astype(np.int64)


def low(w: np.ndarray) -> np.ndarray:
    return (w & 0xFFFFFFFF).astype(U32)


def floats(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def model(*words: np.ndarray) -> np.ndarray:
        exact = function(*(w.view(np.float32).astype(np.float64) for w in words))
        return exact.astype(np.float32).view(U32)

    return model


def bytes_of(w: np.ndarray, dtype: str) -> np.ndarray:
    return w.view(dtype).reshape(-1, 4).astype(np.int64)


def bfe_signed(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return low((signed(a) >> 4) << 59 >> 59)


Model = Callable[..., np.ndarray]
#: name -> (assembly on %0 = f(%1, %2, %3), model, kind of random input)
PLAIN: dict[str, tuple[str, Model, str]] = {
    "prmt": ("prmt.b32 %0, %1, %2, %3;", prmt_model, "bits"),
    "prmt_fixed": ("prmt.b32 %0, %1, %2, 0x5410;",
                   lambda a, b, c: prmt_model(a, b, np.full_like(a, 0x5410)), "bits"),
    "and_": ("and.b32 %0, %1, %2;", lambda a, b, c: a & b, "bits"),
    "or_": ("or.b32 %0, %1, %2;", lambda a, b, c: a | b, "bits"),
    "xor_": ("xor.b32 %0, %1, %2;", lambda a, b, c: a ^ b, "bits"),
    "not_": ("not.b32 %0, %1;", lambda a, b, c: ~a, "bits"),
    "shl": ("shl.b32 %0, %1, 5;", lambda a, b, c: low(a.astype(np.uint64) << 5), "bits"),
    "shl_all": ("shl.b32 %0, %1, 32;", lambda a, b, c: a * U32(0), "bits"),
    "shr_u": ("shr.u32 %0, %1, 7;", lambda a, b, c: a >> U32(7), "bits"),
    "shr_s": ("shr.s32 %0, %1, 7;", lambda a, b, c: low(signed(a) >> 7), "bits"),
    "shf": ("shf.r.wrap.b32 %0, %1, %2, 12;",
            lambda a, b, c: low((b.astype(np.uint64) << 32 | a) >> 12), "bits"),
    "bfe_u": ("bfe.u32 %0, %1, 4, 5;", lambda a, b, c: a >> U32(4) & 31, "bits"),
    "bfe_s": ("bfe.s32 %0, %1, 4, 5;", bfe_signed, "bits"),
    "bfi": ("bfi.b32 %0, %1, %2, 8, 4;",
            lambda a, b, c: (b & ~U32(0xF00)) | (a & 15) << U32(8), "bits"),
    "popc": ("popc.b32 %0, %1;", lambda a, b, c: np.bitwise_count(a).astype(U32), "bits"),
    "add_u": ("add.u32 %0, %1, %2;", lambda a, b, c: a + b, "bits"),
    "sub_s": ("sub.s32 %0, %1, %2;", lambda a, b, c: a - b, "bits"),
    "mul_lo": ("mul.lo.s32 %0, %1, %2;", lambda a, b, c: a * b, "bits"),
    "mul_hi_u": ("mul.hi.u32 %0, %1, %2;",
                 lambda a, b, c: low(a.astype(np.uint64) * b >> 32), "bits"),
    "mul_hi_s": ("mul.hi.s32 %0, %1, %2;",
                 lambda a, b, c: low(signed(a) * signed(b) >> 32), "bits"),
    "mad_lo": ("mad.lo.u32 %0, %1, %2, %3;", lambda a, b, c: a * b + c, "bits"),
    "min_s": ("min.s32 %0, %1, %2;", lambda a, b, c: low(np.minimum(signed(a), signed(b))), "bits"),
    "max_u": ("max.u32 %0, %1, %2;", lambda a, b, c: np.maximum(a, b), "bits"),
    "dp4a_s": ("dp4a.s32.s32 %0, %1, %2, %3;", lambda a, b, c: low(
        signed(c) + (bytes_of(a, "i1") * bytes_of(b, "i1")).sum(1)), "bits"),
    "dp4a_us": ("dp4a.u32.s32 %0, %1, %2, %3;", lambda a, b, c: low(
        signed(c) + (bytes_of(a, "u1") * bytes_of(b, "i1")).sum(1)), "bits"),
    "setp_and_guard": (
        "{ .reg .pred p, q; setp.lt.s32 p, %1, %2; setp.ne.and.u32 q, %3, 0, p;"
        " mov.b32 %0, 1; @q mov.b32 %0, 2; @!p mov.b32 %0, 3; }",
        lambda a, b, c: np.where(signed(a) < signed(b), np.where(c != 0, 2, 1), 3).astype(U32),
        "bits"),
    "setp_two": (
        "{ .reg .pred p<2>; setp.ge.u32 p0|p1, %1, %2; selp.b32 %0, %3, 7, p1; }",
        lambda a, b, c: np.where(a >= b, 7, c).astype(U32), "bits"),
    "registers": (
        "{ .reg .b32 lo, t<2>;\n\t"
        " and.b32 lo, %1, 0x0f0f0f0f; // the low nibbles\n\t"
        " shr.u32 t0, %1, 4; and.b32 t1, t0, 0x0f0f0f0f; /* the high */ add.u32 %0, lo, t1; }",
        lambda a, b, c: (a & 0x0F0F0F0F) + (a >> U32(4) & 0x0F0F0F0F), "bits"),
    "mov_pack": (
        "{ .reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, l}; }",
        lambda a, b, c: (a >> U32(16)) | (a << U32(16)), "bits"),
    "laneid": ("mov.u32 %0, %%laneid;", lambda a, b, c: np.arange(a.size, dtype=U32) % 32, "bits"),
    "tid": ("mov.u32 %0, %%tid.x;", lambda a, b, c: np.arange(a.size, dtype=U32), "bits"),
    "add_h2": ("add.f16x2 %0, %1, %2;", halves(lambda a, b, c: a + b), "f16"),
    "sub_h2": ("sub.rn.f16x2 %0, %1, %2;", halves(lambda a, b, c: a - b), "f16"),
    "mul_h2": ("mul.f16x2 %0, %1, %2;", halves(lambda a, b, c: a * b), "f16"),
    "fma_h2": ("fma.rn.f16x2 %0, %1, %2, %3;", halves(lambda a, b, c: a * b + c), "f16"),
    "fma_b2": ("fma.rn.bf16x2 %0, %1, %2, %3;", halves(lambda a, b, c: a * b + c, "bf16"), "bf16"),
    "mul_b2": ("mul.bf16x2 %0, %1, %2;", halves(lambda a, b, c: a * b, "bf16"), "bf16"),
    "max_h2": ("max.f16x2 %0, %1, %2;", halves(lambda a, b, c: np.maximum(a, b)), "f16"),
    "neg_h2": ("neg.f16x2 %0, %1;", halves(lambda a, b, c: -a), "f16"),
    "add_f": ("add.f32 %0, %1, %2;", floats(lambda a, b, c: a + b), "f32"),
    "mul_f": ("mul.rn.f32 %0, %1, %2;", floats(lambda a, b, c: a * b), "f32"),
    "fma_f": ("fma.rn.f32 %0, %1, %2, %3;", floats(lambda a, b, c: a * b + c), "f32"),
    "fma_one": ("fma.rn.f32 %0, %1, 0f40000000, %3;", floats(lambda a, b, c: a * 2 + c), "f32"),
    "cvt_rni": ("cvt.rni.s32.f32 %0, %1;",
                lambda a, b, c: low(np.rint(a.view(np.float32)).astype(np.int64)), "f32"),
    "cvt_rzi": ("cvt.rzi.s32.f32 %0, %1;",
                lambda a, b, c: low(np.trunc(a.view(np.float32)).astype(np.int64)), "f32"),
    "cvt_f_s": ("cvt.rn.f32.s32 %0, %1;",
                lambda a, b, c: signed(a).astype(np.float32).view(U32), "bits"),
    "cvt_h2": ("cvt.rn.f16x2.f32 %0, %1, %2;", lambda a, b, c: np.stack(
        [b.view("f4").astype("f2"), a.view("f4").astype("f2")], 1).view(U32)[:, 0], "f32"),
    "cvt_b2": ("cvt.rn.bf16x2.f32 %0, %1, %2;", lambda a, b, c: halves(
        lambda x: x, "bf16")(U32(0) * a) * 0 + np.stack(
        [_rounded(b), _rounded(a)], 1).view(U32)[:, 0], "f32"),
    "cvt_f_h": ("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }",
                lambda a, b, c: a.view("f2")[1::2].astype("f4").view(U32), "f16"),
    "cvt_h_f": ("{ .reg .b16 l; cvt.rn.f16.f32 l, %1; mov.b32 %0, {l, l}; }",
                lambda a, b, c: np.repeat(a.view("f4").astype("f2"), 2).view(U32), "f32"),
}  # fmt: skip
for _table in (0x00, 0x96, 0xE8, 0xEA, 0xCA, 0xF8, 0x6A, 0x1B, 0xFF):
    PLAIN[f"lop3_{_table:02x}"] = (
        f"lop3.b32 %0, %1, %2, %3, {hex(_table)};", lop3_model(_table), "bits"
    )  # fmt: skip


def _rounded(words: np.ndarray) -> np.ndarray:
    bits = words.astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def plain_text(name: str) -> str:
    # quoted line by line, as people write it
    lines = '\\n"\n      "'.join(PLAIN[name][0].split("\n"))
    return (
        f'extern "C" __global__ void plain_{name}(const unsigned* a, const unsigned* b,\n'
        f"    const unsigned* c, unsigned* d) {{\n  int i = threadIdx.x;\n"
        f'  asm volatile("{lines}" : "=&r"(d[i]) : "r"(a[i]), "r"(b[i]), "r"(c[i]));\n}}\n'
    )


# ---- ldmatrix, stmatrix and memory

MEMORY = r"""
#define SHARED_ADDRESS(p) ((unsigned)__cvta_generic_to_shared(p))

extern "C" __global__ void copies(const unsigned char* x, const int* sizes, unsigned char* y) {
    extern __shared__ __align__(16) unsigned char tile[];
    int t = threadIdx.x;
    for (int i = 0; i < 48; i++) tile[t * 48 + i] = 0xEE;
    unsigned to = SHARED_ADDRESS(tile + t * 48);
    int n = sizes[t];
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(to), "l"(x + t * 48));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
                 :: "r"(to + 8), "l"(x + t * 48 + 8), "r"(n < 8 ? n : 8));
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0;\n"
                 "  @p cp.async.cg.shared.global.L2::128B [%0], [%1], 16; }"
                 :: "r"(to + 16), "l"(x + t * 48 + 16), "r"(t % 2));
    asm volatile("cp.async.cg.shared.global [%0], [%1], %3, %2;"
                 :: "r"(to + 32), "l"(x + t * 48 + 32), "r"(n), "n"(16));
    asm volatile("cp.async.commit_group;\n\tcp.async.wait_all;" ::: "memory");
    for (int i = 0; i < 48; i++) y[t * 48 + i] = tile[t * 48 + i];
}

extern "C" __global__ void late(const float* x, float* y) {
    __shared__ float a[32], b[32];
    int t = threadIdx.x;
    a[t] = b[t] = -1;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                 :: "r"(SHARED_ADDRESS(a + t)), "l"(x + t));
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                 :: "r"(SHARED_ADDRESS(b + t)), "l"(x + t));
    asm volatile("cp.async.commit_group;");
    y[t] = a[t];
    asm volatile("cp.async.wait_group %0;" :: "n"(1) : "memory");
    y[32 + t] = a[t];
    y[64 + t] = b[t];
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    y[96 + t] = b[t];
}

extern "C" __global__ void loads(const unsigned* x, unsigned* y, unsigned* sums) {
    __shared__ __align__(16) unsigned s[32 * 4];
    int t = threadIdx.x;
    unsigned a, b, c, d;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "l"(x + 4 * t));
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "r"(SHARED_ADDRESS(s + 4 * t)), "r"(d), "r"(c), "r"(b), "r"(a) : "memory");
    asm volatile("bar.sync 1, 32;" ::: "memory");
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2+8];"
                 : "=r"(a), "=r"(b) : "r"(SHARED_ADDRESS(s + 4 * (31 - t))));
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" :: "l"(y + 2 * t), "r"(a), "r"(b) : "memory");
    asm volatile("red.global.add.u32 [%0], %1;" :: "l"(sums), "r"(a) : "memory");
    asm volatile("atom.global.max.u32 %0, [%1], %2;" : "=r"(c) : "l"(sums + 1), "r"(a) : "memory");
    asm volatile("{ .reg .u64 p; cvta.to.global.u64 p, %0; red.release.gpu.global.add.s32 [p], 1; }"
                 :: "l"(sums + 2) : "memory");
    asm volatile("fence.acq_rel.gpu;\n\tmembar.gl;");
}

extern "C" __global__ void shuffles(const unsigned* x, unsigned* y) {
    int t = threadIdx.x;
    unsigned v, inside;
    asm volatile("{ .reg .pred p; shfl.sync.bfly.b32 %0|p, %2, 5, 0x1f, 0xffffffff;\n"
                 "  selp.u32 %1, 1, 0, p; }" : "=r"(v), "=r"(inside) : "r"(x[t]));
    y[t] = v;
    asm volatile("{ .reg .pred p; shfl.sync.down.b32 %0|p, %2, 3, 0x181f, 0xffffffff;\n"
                 "  selp.u32 %1, 1, 0, p; }" : "=r"(v), "=r"(inside) : "r"(x[t]));
    y[32 + t] = v;
    y[64 + t] = inside;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(v) : "r"(x[t]));
    y[96 + t] = v;
}
"""


def ldmatrix_text(count: int, trans: bool) -> str:
    registers = ", ".join(f"%{i}" for i in range(count))
    outs = ", ".join(f'"=r"(y[lane * 4 + {i}])' for i in range(count))
    form = f"m8n8.x{count}{'.trans' * trans}.shared.b16"
    return f"""
extern "C" __global__ void ldmatrix_x{count}{"_trans" * trans}(
    const unsigned short* x, const int* order, unsigned* y) {{
  __shared__ __align__(16) unsigned short rows[32][8];
  int lane = threadIdx.x;
  for (int i = 0; i < 8; i++) rows[lane][i] = x[lane * 8 + i];
  __syncwarp();
  asm volatile("ldmatrix.sync.aligned.{form} {{{registers}}}, [%{count}];"
               : {outs} : "r"(SHARED_ADDRESS(rows[order[lane]])));
}}
"""


def all_text() -> str:
    matrices = [ldmatrix_text(n, trans) for n in (1, 2, 4) for trans in (False, True)]
    return "\n".join([*(m.text() for m in MMAS), *map(plain_text, PLAIN), MEMORY, *matrices])


@pytest.fixture(scope="module")
def kernels() -> Emulator:
    return Emulator(all_text())


@pytest.mark.parametrize("mma", MMAS, ids=lambda m: m.name)
def test_mma(kernels: Emulator, mma: Mma) -> None:
    random = np.random.default_rng(7)
    shapes = {"a": (mma.m, mma.k), "b": (mma.k, 8), "c": (mma.m, 8)}
    values = {}
    for operand, shape in shapes.items():
        kind = getattr(mma, operand)
        if kind == "s8":
            values[operand] = random.integers(-128, 128, shape)
        elif kind == "u8":
            values[operand] = random.integers(0, 256, shape)
        elif kind == "s32":
            values[operand] = random.integers(-(2**20), 2**20, shape)
            if mma.saturates:  # next to the limits
                values[operand] = np.where(values[operand] < 0, 1 - 2**31, 2**31 - 1)
        else:  # few bits, so that every type holds them
            values[operand] = random.integers(-16, 17, shape) / 8
    registers = [
        fragment(values[o], getattr(mma, o), getattr(mma, f"{o}_at"), mma.words(o)) for o in "abc"
    ]
    out = np.zeros((32, mma.words("d")), U32)
    report = kernels.run(mma.name, 1, 32, [*registers, out])
    assert report.ok, report
    got = matrix_of(out, mma.d, mma.c_at, (mma.m, 8))
    want = values["a"] @ values["b"] + values["c"]
    if mma.d == "s32":
        limits = np.iinfo(np.int32)
        wrapped = want.astype(np.int64).astype(U32).view(np.int32)
        want = np.clip(want, limits.min, limits.max) if mma.saturates else wrapped
        assert (want != wrapped).any() == mma.saturates
    np.testing.assert_array_equal(got, want.astype(got.dtype))


def random_words(kind: str, random: np.random.Generator, n: int) -> np.ndarray:
    if kind == "bits":
        return random.integers(0, 2**32, n, dtype=U32)
    if kind == "f32":
        return (random.standard_normal(n) * 100).astype(np.float32).view(U32)
    if kind == "f16":
        return random.standard_normal(2 * n).astype(np.float16).view(U32)
    return to_bf16(random.standard_normal(2 * n)).view(U32)


@pytest.mark.parametrize("name", PLAIN)
def test_plain(kernels: Emulator, name: str) -> None:
    random = np.random.default_rng(11)
    _, model, kind = PLAIN[name]
    a, b, c = (random_words(kind, random, 256) for _ in range(3))
    c[::5] = 0
    d = np.zeros(256, U32)
    report = kernels.run(f"plain_{name}", 1, 256, [a, b, c, d])
    assert report.ok, report
    np.testing.assert_array_equal(d, model(a, b, c))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(kernels: Emulator, count: int, trans: bool) -> None:
    """Lane 8n + r gives the address of row r of matrix n; a lane gets two elements of a row."""
    random = np.random.default_rng(3)
    rows = random.integers(0, 2**16, (32, 8)).astype(np.uint16)
    order = random.permutation(32).astype(np.int32)
    out = np.zeros((32, 4), U32)
    name = f"ldmatrix_x{count}{'_trans' * trans}"
    report = kernels.run(name, 1, 32, [rows, order, out], sanitize=count == 4)
    assert report.ok, report
    want = np.zeros((32, 4), U32)
    for n in range(count):
        matrix = rows[order[8 * n : 8 * n + 8]]
        if trans:
            matrix = matrix.T
        for lane in range(32):
            first, second = matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            want[lane, n] = int(first) | int(second) << 16
    np.testing.assert_array_equal(out, want)


def test_copies_of_every_size(kernels: Emulator) -> None:
    random = np.random.default_rng(5)
    x = random.integers(0, 200, (32, 48)).astype(np.uint8)
    sizes = random.integers(0, 17, 32).astype(np.int32)
    y = np.zeros_like(x)
    report = kernels.run("copies", 1, 32, [x, sizes, y], shared_bytes=x.nbytes)
    assert report.ok, report
    want = np.full_like(x, 0xEE)
    want[:, :4] = x[:, :4]
    want[1::2, 16:32] = x[1::2, 16:32]
    for t, n in enumerate(sizes):
        want[t, 8:16] = 0
        want[t, 8 : 8 + min(n, 8)] = x[t, 8 : 8 + min(n, 8)]
        want[t, 32:48] = 0
        want[t, 32 : 32 + n] = x[t, 32 : 32 + n]
    np.testing.assert_array_equal(y, want)


def test_copies_arrive_when_they_are_waited_for(kernels: Emulator) -> None:
    x, y = np.arange(32, dtype=np.float32), np.zeros((4, 32), np.float32)
    kernels.run("late", 1, 32, [x, y], order="forward")
    np.testing.assert_array_equal(y, [np.full(32, -1), x, np.full(32, -1), x])


def test_loads_stores_and_reductions(kernels: Emulator) -> None:
    x = np.random.default_rng(9).integers(0, 2**20, (32, 4)).astype(U32)
    y, sums = np.zeros((32, 2), U32), np.zeros(3, U32)
    report = kernels.run("loads", 1, 32, [x, y, sums])
    assert report.ok, report
    np.testing.assert_array_equal(y, x[::-1, 1::-1])
    assert sums.tolist() == [x[:, 1].sum(), x[:, 1].max(), 32]


def test_shuffles(kernels: Emulator) -> None:
    x = np.random.default_rng(2).integers(0, 2**32, 32, dtype=U32)
    y = np.zeros((4, 32), U32)
    report = kernels.run("shuffles", 1, 32, [x, y])
    assert report.ok, report
    lane = np.arange(32)
    np.testing.assert_array_equal(y[0], x[lane ^ 5])
    # segments of 8: the mask in bits 8 to 12 holds what stays of a lane's number
    inside = lane % 8 + 3 < 8
    np.testing.assert_array_equal(y[1], np.where(inside, x[(lane + 3) % 32], x))
    np.testing.assert_array_equal(y[2], inside)
    matrix = x.view(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(y[3], np.ascontiguousarray(matrix.T).view(U32).reshape(32))
