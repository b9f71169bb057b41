"""Multiplies by a Q4_K matrix with a package of kernels: numpy, the package, and no kernelgen.

python multiply.py kernelgen_c      (or kernelgen_opencl, kernelgen_wgsl, kernelgen_cuda, ...)
"""

import importlib
import sys

import numpy as np

BLOCK, BLOCK_BYTES = 256, 144


def main(name: str) -> None:
    kernels = importlib.import_module(name)
    n, k = 96, 1024
    rng = np.random.default_rng(0)
    # blocks as a file has them: any bytes will do, but for the two scales, which are halves
    blocks = rng.integers(0, 256, (n, k // BLOCK, BLOCK_BYTES), np.uint8)
    scales = rng.uniform(0.001, 0.002, (n, k // BLOCK, 2)).astype(np.float16)
    blocks[..., :4] = scales.view(np.uint8)
    w = kernels.Weights("q4_K", (n, k), blocks.reshape(n, -1))
    values = kernels.dequantize(w)
    for m in (1, 5, 40):
        x = rng.standard_normal((m, k)).astype(np.float32)
        exact = x.astype(np.float64) @ values.T.astype(np.float64)
        for precision, allowed in (("fp32", 1e-5), ("auto", 5e-2)):
            y = kernels.matmul(x, w, precision)
            error = np.abs(y - exact).max() / np.sqrt(np.mean(exact**2))
            print(f"{kernels.choose('q4_K', precision, m, n, k)}: error {error:.1e}")
            assert error < allowed
    assert "kernelgen" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:])
