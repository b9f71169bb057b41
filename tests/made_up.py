"""A format that nobody uses: 3 bits, blocks of 64.  What a user would write, in 20 lines."""

from __future__ import annotations

from kernelgen.ir import BlockFormat

#: two low bits as in four planes of 16, the third bit in a mask of its own
THREE_BITS = BlockFormat(
    name="three_bits",
    block=64,
    group=32,
    nbytes=28,
    fields={"d": "f16", "lift": "u8[2]", "high": "u8[8]", "low": "u8[16]"},
    ints={"step": lambda b, g: b.lift[g] & 15},
    code=lambda b, i: (
        ((b.low[i % 16] >> (2 * (i // 16))) & 3) | (((b.high[i % 8] >> (i // 8)) & 1) << 2)
    ),
    scale=lambda b, g: b.d * b.step[g],
    bias=4,
    source="tests/made_up.py",
)
