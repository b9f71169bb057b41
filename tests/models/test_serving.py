"""Tenants: many sequences over the same weights, each as if it were alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import made_model
from kernelgen import models
from kernelgen.api import runtime_of
from kernelgen.errors import KernelgenError, ShapeError
from kernelgen.models import measure, serving
from tests.models import tiny

RNG = np.random.default_rng(3)
PROMPTS = [
    [int(one) for one in RNG.integers(0, tiny.VOCABULARY, n)] for n in (5, 1, 40, 5, 17, 3)
]  # fmt: skip
COUNTS = [6, 9, 3, 6, 1, 12]


def sampler(n: int) -> models.Sampler:
    """Some take the most probable token, some one by chance."""
    return models.Sampler(0.8, top_k=20, seed=n) if n % 2 else models.Sampler()


def check_tenants(target: str, tmp_path: Path, tenants: int, count: int) -> None:
    model = models.open(tiny.write(tmp_path / "model.gguf"), target, "fp32")
    alone = [
        list(models.Generation(model, prompt, n, sampler=sampler(at)))
        for at, (prompt, n) in enumerate(zip(PROMPTS[:count], COUNTS, strict=False))
    ]
    server = models.Server(model, tenants, capacity=64)
    pages = server.cache.free_pages
    requests = [
        server.submit(prompt, n, sampler(at))
        for at, (prompt, n) in enumerate(zip(PROMPTS[:2], COUNTS, strict=False))
    ]
    server.step()
    # the others come while these run
    requests += [
        server.submit(prompt, n, sampler(at))
        for at, (prompt, n) in enumerate(zip(PROMPTS[:count], COUNTS, strict=False))
        if at >= 2
    ]
    most = 0
    while server.running or server.waiting:
        server.step()
        most = max(most, server.running)
    assert most <= tenants
    assert [one.tokens for one in requests] == alone
    assert all(one.done for one in requests)
    assert server.cache.free_pages == pages and not server.cache.lengths.any()


@pytest.mark.parametrize("tenants", [1, 3, 6])
def test_each_gets_the_tokens_that_it_gets_alone(tenants: int, tmp_path: Path) -> None:
    check_tenants("numpy", tmp_path, tenants, len(PROMPTS))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["c", "opencl", "wgsl"])
def test_so_on_other_targets(target: str, tmp_path: Path) -> None:
    if (reason := runtime_of(target).available()) is not None:
        pytest.skip(reason)
    check_tenants(target, tmp_path, 3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["q4_K", "f16"])
def test_sixteen_on_the_cpu_get_what_each_gets_alone(layout: str, tmp_path: Path) -> None:
    path = made_model.write(
        tmp_path / "made.gguf", layout, layers=2, width=256, hidden=512, heads=4, kv_heads=2,
        tokens=made_model.vocabulary(512), context=64, sharpness=2.0, following=0.35,
    )  # fmt: skip
    model = models.open(path, "c")
    prompts = [[int(one) for one in RNG.integers(3, 512, 1 + n % 5)] for n in range(16)]
    alone = [list(models.Generation(model, prompt, 8)) for prompt in prompts]
    server = models.Server(model, 16, capacity=32)
    requests = [server.submit(prompt, 8) for prompt in prompts]
    server.run()
    assert [one.tokens for one in requests] == alone
    # one step of all is, to the last bit, the step of each
    one, all_ = model.sequences(1, capacity=8), model.sequences(16, capacity=8)
    steps = []
    for n, prompt in enumerate(prompts):
        one.truncate()
        for cache, sequence in ((one, 0), (all_, n)):
            model.forward([(sequence, prompt)], cache)
        steps.append(model.forward([(0, [5])], one)[0])
    assert (model.forward([(n, [5]) for n in range(16)], all_) == np.array(steps)).all()


def test_long_prompts_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.open(tiny.write(tmp_path / "model.gguf"), "numpy", "fp32")
    alone = [list(models.Generation(model, prompt, 4)) for prompt in PROMPTS]
    monkeypatch.setattr(serving, "BATCH", 7)
    sizes: list[int] = []
    forward = model.forward

    def counted(turns: list[serving.Turn], cache: models.Sequences) -> object:
        sizes.append(sum(len(tokens) for _, tokens in turns))
        return forward(turns, cache)

    monkeypatch.setattr(model, "forward", counted)
    server = models.Server(model, 4, capacity=64)
    requests = [server.submit(prompt, 4) for prompt in PROMPTS]
    server.run()
    assert [one.tokens for one in requests] == alone
    assert max(sizes) <= 7 + 4


def test_requests_wait_for_pages(tmp_path: Path) -> None:
    model = models.open(tiny.write(tmp_path / "model.gguf"), "numpy", "fp32")
    server = models.Server(model, 4, capacity=64, pool=2)
    requests = [server.submit(prompt, 4) for prompt in PROMPTS]
    server.step()
    assert server.running == 2  # of a page each; the next in the queue needs two
    server.run()
    assert [one.tokens for one in requests] == [
        list(models.Generation(model, prompt, 4)) for prompt in PROMPTS
    ]


def test_a_text_ends_where_the_model_says_so(tmp_path: Path) -> None:
    model = models.open(tiny.write(tmp_path / "model.gguf"), "numpy", "fp32")
    tokens = list(models.Generation(model, PROMPTS[0], 6))
    server = models.Server(model, 2, capacity=64, ends=tokens[3:4])
    one = server.submit(PROMPTS[0], 6)
    server.run()
    assert one.done and one.tokens == tokens[: tokens.index(tokens[3])]


def test_one_that_fails_or_leaves_does_not_disturb_the_others(tmp_path: Path) -> None:
    class Failing(models.Sampler):
        def __call__(self, logits: object) -> int:
            raise KernelgenError("no")

    model = models.open(tiny.write(tmp_path / "model.gguf"), "numpy", "fp32")
    server = models.Server(model, 3, capacity=64)
    pages = server.cache.free_pages
    good = server.submit(PROMPTS[0], 6)
    bad = server.submit(PROMPTS[0], 6, Failing())
    left, late = server.submit(PROMPTS[2], 6), server.submit(PROMPTS[3], 6)
    server.step()
    server.cancel(left)
    server.cancel(late)
    server.run()
    assert (bad.done, bad.error, bad.tokens) == (True, "no", [])
    assert left.done and len(left.tokens) == 1 and late.done and not late.tokens
    assert good.error is None
    assert good.tokens == list(models.Generation(model, PROMPTS[0], 6))
    assert server.cache.free_pages == pages


@pytest.mark.parametrize(("prompt", "count"), [([], 1), ([1], 0), ([1] * 60, 6)])
def test_what_could_never_be_served_is_refused(
    prompt: list[int], count: int, tmp_path: Path
) -> None:
    model = models.open(tiny.write(tmp_path / "model.gguf"), "numpy")
    server = models.Server(model, 2, capacity=64)
    with pytest.raises(ShapeError, match="at most 65"):
        server.submit(prompt, count)
    assert server.step() == []


#: the bytes that a process grows by when 16 tenants fill their caches, and those of the caches
GROWTH = """
import re, sys
from kernelgen import models

model = models.open(sys.argv[1], "c")

def filled(tokens, steps):
    cache = model.sequences(16, capacity=tokens + steps)
    for start in range(0, tokens, 512):
        for n in range(16):
            model.forward([(n, [1 + n] * 512)], cache)
    for step in range(steps):
        model.forward([(n, [1 + step]) for n in range(16)], cache)
    return cache

def resident():
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(r"VmRSS:\\s*(\\d+)", file.read())[1])

for _ in range(2):  # so that what comes after is no first time
    filled(512, 2)
before = resident()
cache = filled(2048, 32)
print(resident() - before, cache.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what a process has")
def test_a_process_grows_by_keys_and_values_alone(tmp_path: Path) -> None:
    path = made_model.write(
        tmp_path / "made.gguf", "q4_K", layers=2, width=256, hidden=512, heads=4, kv_heads=4,
        tokens=made_model.vocabulary(512), context=4096,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    growth, of_caches = map(int, done.stdout.split())
    # the step of 16 has arrays of its own in each cache, and allocators keep some of what is free
    slack = 8 << 20
    assert of_caches > 4 * slack
    # what of 8 MB the first round had freed may be taken again
    assert of_caches - 2 * slack <= growth <= of_caches + slack, (growth, of_caches)


def test_memory_grows_by_keys_and_values_alone(tmp_path: Path) -> None:
    model = models.open(tiny.write(tmp_path / "model.gguf"), "numpy", "fp32")
    found = {n: measure.speeds(model, prompt=0, tokens=2, tenants=n, repeats=1)[0] for n in (2, 16)}
    each = tiny.LAYERS * tiny.KV_HEADS * tiny.HEAD_DIM * 2 * 2 * serving.PAGE
    assert {n: one.cache_bytes for n, one in found.items()} == {2: 2 * each, 16: 16 * each}
    assert all(one.mean > 0 and one.test == "tg2" for one in found.values())
