"""Settings that all tests share.

Runs are repeatable; `--hypothesis-profile=deep` looks at many more, random examples.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

from kernelgen.targets.device import GPU_FILES, visible

_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)

settings.register_profile(
    "repeatable", max_examples=100, deadline=None, derandomize=True, suppress_health_check=_SLOW
)
settings.register_profile("deep", max_examples=2000, deadline=None, suppress_health_check=_SLOW)
settings.load_profile("repeatable")

# torch.compile imports Triton, which must know by then that it is to be interpreted
if visible(*GPU_FILES) is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
