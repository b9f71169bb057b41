"""An OpenCL host that needs no kernelgen: sources and manifest of `kernelgen build --package`.

python host.py dist/opencl

It does by hand what the package's own Python module does: repacks weights, computes grids, binds
arguments.  So a host in any language does it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyopencl as cl

M, N, K, BLOCK, BLOCK_BYTES = 3, 70, 512, 32, 34


def main(folder: str) -> None:
    entries = json.loads((Path(folder) / "manifest.json").read_text())["kernels"]
    kernel = next(
        e for e in entries
        if (e["op"], e["format"], e["precision"]) == ("matvec", "q8_0", "fp32")
    )  # fmt: skip
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (N, K // BLOCK, BLOCK)).astype(np.int8)
    scales = rng.uniform(0.001, 0.01, (N, K // BLOCK, 1)).astype(np.float16)
    values = (codes * scales.astype(np.float64)).reshape(N, K)
    blocks = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=2)
    x = rng.standard_normal((M, K)).astype(np.float32)

    # each field of all blocks together, as the manifest says
    flat = blocks.reshape(-1, BLOCK_BYTES)
    packed = np.empty(flat.size, np.uint8)
    for one in kernel["planes"]:
        start = one["start"] * len(flat)
        field = flat[:, one["offset"] : one["offset"] + one["bytes"]]
        packed[start : start + field.size] = field.reshape(-1)

    context = cl.create_some_context(interactive=False)
    queue, flags = cl.CommandQueue(context), cl.mem_flags
    source = next(Path(folder).rglob(kernel["file"])).read_text()
    built = cl.Program(context, source).build(["-cl-std=CL1.2"])
    buffers = {
        "w": cl.Buffer(context, flags.READ_ONLY | flags.COPY_HOST_PTR, hostbuf=packed),
        "x": cl.Buffer(context, flags.READ_ONLY | flags.COPY_HOST_PTR, hostbuf=x),
        "y": cl.Buffer(context, flags.WRITE_ONLY, 4 * M * N),
    }
    sizes = {"M": M, "N": N, "K": K}
    arguments = [
        np.uint32(sizes[a["name"]]) if a["role"] == "size" else buffers[a["name"]]
        for a in kernel["arguments"]
    ]
    groups = [eval(text, {"min": min}, dict(sizes)) for text in kernel["launch"]["groups"]]
    threads = kernel["launch"]["threads"]
    run = cl.Kernel(built, kernel["entry"])
    run.set_args(*arguments)
    cl.enqueue_nd_range_kernel(queue, run, (groups[0] * threads, groups[1]), (threads, 1))
    y = np.empty((M, N), np.float32)
    cl.enqueue_copy(queue, y, buffers["y"])

    exact = x.astype(np.float64) @ values.T
    error = np.abs(y - exact).max() / np.sqrt(np.mean(exact**2))
    print(f"{kernel['entry']} on {queue.device.name.strip()}: error {error:.1e}")
    assert error < kernel["tolerance"]


if __name__ == "__main__":
    main(*sys.argv[1:])
