"""The phases of bench/gpu.py about attention, without a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kernelgen import targets
from kernelgen.ir import formats
from kernelgen.targets.base import EMULATED
from tests.test_gpu_bench import REASON, FakeTorch, command, modules  # noqa: F401

CUDA = targets.get("cuda")


def context(**changes: Any) -> Any:
    """What a phase is told, for the emulator."""
    known = {
        "target": CUDA, "runtime": lambda: CUDA.runtime(EMULATED), "side": 32, "past": 2**16,
        "budget": 0.001, "over": False, "formats": (formats.get("q8_0"),),
    }  # fmt: skip
    return SimpleNamespace(**(known | changes))


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_cases_are_timed_and_right(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    phase = modules.gpu_attention
    small = phase.Case("decoding", 1, 40, False, heads=2, kv_heads=1, head_dim=64)
    monkeypatch.setattr(phase, "cases", lambda context: (small,))
    monkeypatch.setattr(phase, "CACHES", ("q8_0",))
    monkeypatch.setattr(phase, "torch_here", lambda: None)
    without, *rows = phase.times_attention(context())
    assert "torch with CUDA" in without["why_not"]
    assert {r["walk"] for r in rows} >= {"flash", "flash_fp16_mma", "flash_bf16_mma"}
    for row in rows:
        assert "problem" not in row and row["seconds"] > 0, row
        assert row["ops_per_s"] == pytest.approx(4 * 2 * 40 * 64 / row["seconds"])
        assert row["bytes_per_s"] == pytest.approx(2 * 40 * 68 / row["seconds"])
    assert phase._problem(rows[0] | {"error": 1.0}) == "error 1 exceeds 1e-05"


def test_operations_of_a_causal_mask(modules: Any) -> None:  # noqa: F811
    case = modules.gpu_attention.Case("", 8, 8, True, heads=1, head_dim=1)
    assert case.operations == 4 * sum(range(1, 9))
    more = modules.gpu_attention.Case("", 2, 8, True, heads=1, head_dim=1)
    assert more.operations == 4 * (7 + 8)


class FakeAttention(FakeTorch):
    """With scaled_dot_product_attention, whose backends take different times; one is missing."""

    SECONDS = {"FLASH_ATTENTION": 2.0, "EFFICIENT_ATTENTION": 4.0, "MATH": 9.0}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.backend = ""
        self.nn = SimpleNamespace(
            functional=SimpleNamespace(scaled_dot_product_attention=self.attend),
            attention=SimpleNamespace(
                sdpa_kernel=self.sdpa_kernel,
                SDPBackend=SimpleNamespace(CUDNN_ATTENTION="CUDNN_ATTENTION",
                                           **{name: name for name in self.SECONDS}),
            ),
        )  # fmt: skip

    @contextmanager
    def sdpa_kernel(self, backend: str) -> Iterator[None]:
        self.backend = backend
        yield
        self.backend = ""

    def attend(self, q: Any, k: Any, v: Any, **_: Any) -> None:
        if self.backend not in self.SECONDS:
            raise RuntimeError("No available kernel.  Aborting execution.")
        for _ in range(int(self.SECONDS[self.backend])):
            self.launch(self.backend)

    def randn(self, *shape: int, **_: Any) -> Any:  # type: ignore[override]
        tensor = SimpleNamespace(shape=shape)
        tensor.reshape = tensor.repeat_interleave = lambda *_: tensor
        return tensor


def test_backends_of_torch_take_turns(modules: Any) -> None:  # noqa: F811
    phase, torch = modules.gpu_attention, FakeAttention()
    for case in (phase.Case("a", 1, 64, False), phase.Case("b", 64, 64, True)):
        found = list(phase.theirs(torch, case, 1))
        rows = [one for one in found if isinstance(one, dict)]
        assert {r["walk"].split()[0] for r in rows} == {"cudnn"}
        assert all("No available kernel" in r["why_not"] for r in rows)
        others = [one for one in found if not isinstance(one, dict)]
        assert len(others) == 6
        for one, taken in phase.interleaved(others, 0.003):
            wanted = torch.SECONDS[phase.BACKENDS[one.about["walk"].split()[0]]]
            assert taken == pytest.approx(wanted * 1e-3), one.about


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_phases_by_the_command(tmp_path: Path) -> None:
    done = command(
        tmp_path, "--emulate", "--scale", "40", "--format", "q8_0", "--only", "attention"
    )
    rows = [json.loads(s) for s in (tmp_path / "out/gpu.jsonl").read_text().splitlines()]
    assert not [r for r in rows if r.get("problem")], rows
    timed = [r for r in rows if "seconds" in r and "case" in r]
    assert {r["format"] for r in timed} == {"f16", "q8_0", "q4_0"}
    assert {"flash_fp16_mma", "flash_bf16_mma"} <= {r["walk"] for r in timed}
    assert "attention, 32 heads" in done.stdout, done.stdout + done.stderr
