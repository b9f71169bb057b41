"""Attention with arrays that end where memory ends:

    python -m tests.c.guarded_attention ISA [STYLE PRECISION]

As tests.c.guarded does it for other kernels.  It prints the number of calls.
"""

from __future__ import annotations

import sys

import numpy as np

from kernelgen import targets
from kernelgen.generate import generate_walk
from kernelgen.problem import relative_error, rounded, tolerance
from kernelgen.targets.c.runtime import attention_arguments
from tests.c.attention_kinds import BOUND, arrays_of, kind, reference, tensors
from tests.c.guarded import Caller

KINDS = (kind("bias", "q8_0", "f16", 64, 80), kind("causal", "bf16", "q4_0", 36, 32))
SHAPES = ((1, 1, 1), (1, 65, 4), (7, 7, 4), (33, 70, 1), (70, 33, 1), (0, 5, 1), (5, 0, 1))


def main(isa: str, style: str = "", precision: str = "fp32") -> int:
    """Runs all shapes on a walk; 1 where a result is wrong."""
    calls, target = 0, targets.get("c")
    wanted = ("attention", style, precision)
    (walk,) = (w for w in target.walks if (w.op, w.style, w.precision) == wanted)
    for at_end in (True, False):
        call = Caller(isa, at_end)
        for one in KINDS:
            config = walk.default(one, call.runtime.capabilities())
            kernel = generate_walk(walk, one, target, config)
            bound = BOUND if walk.precision == "fp32" else tolerance(walk.op, walk.precision)
            for t, s, group in SHAPES:
                q, k, v = tensors(one, t, s, group)
                arrays = arrays_of(one, q.shape[1], s)
                given, sizes = attention_arguments(one, q, k, v, arrays)
                y = np.empty((*q.shape[:3], one.value_dim), np.float32)
                (got,) = call(kernel, q, k.data, v.data, y, *given, *sizes)
                calls += 1
                seen = (rounded(x, walk.precision) for x in (q, k.dequantize(), v.dequantize()))
                want = reference(one, *seen, arrays)
                if got.size and not relative_error(got, want) <= bound:
                    print(f"{kernel.entry} is wrong at T={t}, S={s}, {group} heads share")
                    return 1
    print(calls)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
