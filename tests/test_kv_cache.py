"""KVCache and attention over what it keeps: lengths of each batch, pages, copies on devices."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kernelgen
from kernelgen import targets
from kernelgen.errors import KernelgenError
from kernelgen.generate import generate
from kernelgen.ir import formats
from kernelgen.ir.ops import attention as ops
from kernelgen.ir.ops.attention import Attention
from kernelgen.kv_cache import KVCache
from kernelgen.problem import relative_error
from kernelgen.targets.driver import Held

Array = npt.NDArray[Any]

HK, H, D, CAPACITY = 2, 4, 32, 24


def filled(lengths: tuple[int, ...], **options: Any) -> KVCache:
    """A cache with sequences of so many tokens, appended in turns and in pieces."""
    rng = np.random.default_rng(0)
    cache = KVCache(HK, D, capacity=CAPACITY, batches=len(lengths), **options)
    for share in (2, 1):
        for b, n in enumerate(lengths):
            more = n // share - int(cache.lengths[b])
            if more:
                cache.append(*rng.standard_normal((2, 1, HK, more, D), np.float32), [b])
    return cache


def kept(cache: KVCache, b: int) -> tuple[Array, Array]:
    """Keys and values of a sequence, float32 (1, HK, tokens, D)."""
    found = []
    for w in (cache.keys, cache.values):
        x = w.dequantize()
        if cache.pages is not None:
            x = x[cache.pages[b]].swapaxes(0, 1).reshape(1, HK, -1, D)
        else:
            x = x[b : b + 1]
        found.append(np.ascontiguousarray(x[:, :, : cache.lengths[b]]))
    return found[0], found[1]


def expected(cache: KVCache, q: Array, kind: Attention) -> Array:
    """Each sequence by itself."""
    parts = [ops.attention(kind, q[b : b + 1], *kept(cache, b)) for b in range(len(cache.lengths))]
    return np.concatenate(parts)


CAUSAL = Attention(D, formats.get("f32"), formats.get("f32"), mask=ops.trace(None, ops.causal)[1])


@pytest.mark.parametrize("page", [0, 4])
@pytest.mark.parametrize("target", ["numpy", "c", "opencl", "wgsl", "triton"])
def test_attends_to_what_each_sequence_has(target: str, page: int) -> None:
    reason = targets.get(target).runtime().available()
    if reason is not None:
        pytest.skip(reason)
    rng = np.random.default_rng(1)
    cache = filled((5, 0, 21), format="q8_0", page=page)
    q = rng.standard_normal((3, H, 3, D), np.float32)
    got = cache.attention(q, causal=True, target=target)
    assert relative_error(got, expected(cache, q, CAUSAL)) < 1e-5
    assert not got[1].any()  # no key
    # what is on a device follows
    cache.append(*rng.standard_normal((2, 3, HK, 3, D), np.float32))
    got = cache.attention(q, causal=True, target=target)
    assert relative_error(got, expected(cache, q, CAUSAL)) < 1e-5
    assert got[1].any()


@pytest.mark.parametrize("name", ["cuda", "metal"])
def test_an_emulated_device_follows(name: str) -> None:
    target = targets.get(name)
    runtime = target.runtime("emulated")
    reason = runtime.available()
    if reason is not None:
        pytest.skip(reason)
    rng = np.random.default_rng(2)
    cache = filled((5, 9), format="q4_0", page=4)
    kind = Attention(D, cache.keys.format, cache.values.format, mask=CAUSAL.mask, page=4)
    run = runtime.attention(generate("attention", kind, target))
    q = rng.standard_normal((2, H, 2, D), np.float32)
    y = np.empty_like(q)
    assert cache.pages is not None
    for _ in range(2):
        arrays = {"lengths": cache.lengths, "pages": cache.pages}
        run(q, cache.keys, cache.values, arrays, y)
        assert relative_error(y, expected(cache, q, CAUSAL)) < 1e-5
        cache.append(*rng.standard_normal((2, 2, HK, 2, D), np.float32))


def test_a_mask_array_counts_from_the_last_query() -> None:
    rng = np.random.default_rng(3)
    cache = filled((5, 21))
    q = rng.standard_normal((2, H, 3, D), np.float32)
    mask = rng.random((2, 1, 3, CAPACITY)) < 0.7
    got = cache.attention(q, mask=mask, target="numpy")
    for b, n in enumerate(cache.lengths):
        one = kernelgen.attention(q[b : b + 1], *kept(cache, b), mask=mask[b : b + 1, :, :, :n],
                                  target="numpy")  # fmt: skip
        assert relative_error(got[b : b + 1], one) < 1e-6


def test_values_may_have_a_format_and_a_size_of_their_own() -> None:
    cache = KVCache(1, 64, capacity=8, format="q8_0", value_format="f16", value_dim=16)
    assert cache.keys.shape == (1, 1, 8, 64) and cache.values.shape == (1, 1, 8, 16)
    assert cache.nbytes == 8 * (2 * 34 + 2 * 16)
    cache.append(np.ones((1, 1, 3, 64)), np.full((1, 1, 3, 16), 2.0))
    got = cache.attention(np.ones((1, 2, 1, 64), np.float32), target="numpy")
    assert got.shape == (1, 2, 1, 16) and np.allclose(got, 2)


def test_pages_come_from_a_pool_and_go_back() -> None:
    cache = filled((0, 0, 0), page=4, pool=5)
    ones = np.ones((1, HK, 9, D), np.float32)
    cache.append(ones, ones, [0])
    assert cache.free_pages == 2
    with pytest.raises(KernelgenError, match="3 more pages are needed, and 2 are free"):
        cache.append(ones, ones, [2])
    assert cache.free_pages == 2 and cache.lengths.tolist() == [9, 0, 0]
    cache.truncate(4, batch=0)
    assert cache.free_pages == 4
    cache.append(2 * ones, 2 * ones, [2])
    assert cache.free_pages == 1 and cache.pages is not None
    used = [cache.pages[0, 0], *cache.pages[2, :3]]
    assert len(set(map(int, used))) == 4  # nobody's page is another's
    assert (kept(cache, 0)[0] == 1).all() and (kept(cache, 2)[0] == 2).all()
    cache.truncate()
    assert cache.free_pages == 5 and not cache.lengths.any()


NEW = np.ones((1, HK, 1, D), np.float32)
REFUSED: list[tuple[dict[str, Any], tuple[Any, ...], str]] = [
    ({}, (NEW[:, :1], NEW, [0]), "k of shape"),
    ({}, (NEW, NEW[..., :8], [0]), "v of shape"),
    ({}, (NEW, np.ones((1, HK, 2, D)), [0]), "as many in k as in v"),
    ({}, (np.ones(3), NEW, [0]), "k of shape"),
    ({"format": "q8_0"}, (np.full_like(NEW, np.nan), NEW, [0]), "finite"),
    ({}, (NEW, NEW, [2]), "from 0 to 1"),
    ({}, (*np.ones((2, 2, HK, 1, D)), [0, 0]), "at most once"),
    ({}, (*np.ones((2, 1, HK, CAPACITY, D)), [0]), "do not fit a cache for 24"),
    ({"page": 4, "format": "q8_0"}, (np.full_like(NEW, np.inf), NEW, [0]), "finite"),
]


@pytest.mark.parametrize(("options", "given", "said"), REFUSED)
def test_what_does_not_fit_changes_nothing(
    options: dict[str, Any], given: tuple[Any, ...], said: str
) -> None:
    cache = filled((5, 3), **options)
    before = cache.keys.data.tobytes(), cache.lengths.tolist(), cache.free_pages
    with pytest.raises(KernelgenError, match=said):
        cache.append(*given)
    assert (cache.keys.data.tobytes(), cache.lengths.tolist(), cache.free_pages) == before


def test_what_was_never_there_is_not_forgotten() -> None:
    cache = filled((5, 3))
    with pytest.raises(KernelgenError, match="sequence 1 was to be cut to 4 tokens; it has 3"):
        cache.truncate(4, batch=1)


@pytest.mark.parametrize("given", [(0, D, 8, 1, 0), (1, D, 0, 1, 0), (1, D, 8, 1, -1)])
def test_sizes_make_sense(given: tuple[int, ...]) -> None:
    heads, elements, capacity, batches, page = given
    with pytest.raises(KernelgenError, match="was asked for"):
        KVCache(heads, elements, capacity=capacity, batches=batches, page=page)


Q = np.ones((2, H, 1, D), np.float32)
FLAT = np.ones((2, HK, 8, D), np.float32)
POOL = np.ones((3, HK, 4, D), np.float32)
BAD: list[tuple[Array, dict[str, Any], str]] = [
    (FLAT, {"lengths": np.array([1, 9])}, "from 1 to 9 were given; there is room for 8"),
    (FLAT, {"lengths": np.array([-1, 9])}, "from -1"),
    (FLAT, {"lengths": np.array([1])}, r"integers \(2\)"),
    (FLAT, {"lengths": np.array([1.0, 2.0])}, "float64"),
    (POOL, {"pages": np.zeros((2, 2), int)}, "pages were given without lengths"),
    (POOL, {"lengths": np.array([1, 5]), "pages": np.array([[0, 0], [1, 3]])}, "up to 3"),
    (POOL, {"lengths": np.array([1, 5]), "pages": np.array([0, 1])}, r"integers \(2, any\)"),
    (POOL, {"lengths": np.array([1, 9]), "pages": np.zeros((2, 2), int)}, "room for 8"),
]


@pytest.mark.parametrize(("x", "options", "said"), BAD)
def test_lengths_and_pages_must_fit(x: Array, options: dict[str, Any], said: str) -> None:
    with pytest.raises(KernelgenError, match=said):
        kernelgen.attention(Q, x, x, target="numpy", **options)


def test_pages_that_no_key_is_in_may_be_anything() -> None:
    pages = np.array([[0, 99], [1, 2]])
    got = kernelgen.attention(Q, POOL, POOL, lengths=np.array([4, 5]), pages=pages, target="numpy")
    assert np.allclose(got, 1)


class Recorded:
    """A driver that notes what is written."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = np.zeros(nbytes, np.uint8)
        self.written: list[tuple[int, int]] = []

    def write(self, buffer: Array, offset: int, array: Array) -> None:
        assert offset % 4 == 0 and (array.size % 4 == 0 or offset + array.size == buffer.size)
        self.written.append((offset, array.size))
        buffer[offset : offset + array.size] = array


@pytest.mark.parametrize("width", [4, 6, 34])
def test_a_copy_is_renewed_in_whole_words_and_no_more(width: int) -> None:
    rng = np.random.default_rng(4)
    data = rng.integers(0, 256, (3, 2, 7, width), np.uint8)
    driver = Recorded(data[1:].size)
    held = Held(driver, driver.buffer, slice(1, 3), slice(0, 2))  # type: ignore[arg-type]
    held.renew(data, 0, slice(0, 7))
    assert not driver.written
    held.renew(data, 2, slice(3, 5))
    copy = driver.buffer.reshape(2, 2, 7, width)
    assert (copy[1, :, 3:5] == data[2, :, 3:5]).all() and not copy[0].any()
    assert sum(n for _, n in driver.written) <= 2 * (2 * width + 6)
