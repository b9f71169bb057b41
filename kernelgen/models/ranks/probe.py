"""Bandwidths of this machine, for plans: of its memory, and of an all-reduce between processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

from kernelgen.errors import RankError
from kernelgen.models.ranks import local
from kernelgen.models.ranks.costs import Link
from kernelgen.tuner.worker import host_bandwidth

#: bytes of a message that only takes the time to get there, and of one that fills the way
_SMALL, _LARGE = 64, 1 << 23
_TURNS, _LIMIT = 15, 120


def memory() -> float:
    """Bytes in a second that all of this machine's threads read together."""
    return host_bandwidth(os.cpu_count() or 1)


def link() -> Link:
    """What an all-reduce of gloo between two processes here comes to.

    Raises RankError where that cannot be measured.
    """
    both = [
        subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import _rank; _rank()"],
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for environment in local.environments(2)
    ]  # fmt: skip
    said: list[tuple[str, str]] = []
    try:
        for one in both:
            said.append(one.communicate(timeout=_LIMIT))
        seconds = json.loads(said[0][0])
    except (subprocess.TimeoutExpired, ValueError) as error:
        lines = [line for _, text in said for line in text.strip().splitlines()[-1:]]
        raise RankError(
            "the all-reduce of torch.distributed could not be timed between two processes here"
            f" ({[*lines, type(error).__name__][0][:200]}); give --link and --link-latency"
        ) from None
    finally:
        for one in both:
            one.kill()
            one.wait()
    # a sum of two is two steps, each of half of the bytes
    return Link(_LARGE / max(seconds["large"] - seconds["small"], 1e-9), seconds["small"] / 2)


def _rank() -> None:
    """What each of the two processes does; the first prints medians in seconds."""
    import torch.distributed as dist
    from torch import zeros

    dist.init_process_group("gloo")
    found = {}
    for name, nbytes in (("small", _SMALL), ("large", _LARGE)):
        tensor, times = zeros(nbytes // 4), []
        for _ in range(_TURNS):
            dist.barrier()
            begin = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - begin)
        found[name] = statistics.median(times[1:])
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()
