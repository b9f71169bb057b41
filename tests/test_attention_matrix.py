"""Attention on matrix units: emulated against the reference, and compiled by nvcc."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kernelgen import targets, verify_attention
from kernelgen.config import Capabilities, Config
from kernelgen.config.attention import (
    FragmentAttentionConfig,
    MatrixAttentionConfig,
    WarpgroupAttentionConfig,
)
from kernelgen.emulator import Emulator, Report
from kernelgen.files import attention_kinds
from kernelgen.generate import generate_walk
from kernelgen.ir import formats
from kernelgen.ir.ops import attention as ops
from kernelgen.ir.ops.attention import Attention
from kernelgen.problem import relative_error, rounded, tolerance
from kernelgen.targets.attention import is_half
from kernelgen.targets.base import Kernel, Walk
from kernelgen.tensor import QuantTensor
from tests import cuda_binaries, made_up
from tests.cuda_binaries import ARCHITECTURES, disassembler, serves, why_no_compiler
from tests.test_attention import VARIANTS, Case, case, device, poisoned, result

Array = npt.NDArray[Any]

#: the target of each style of walk
STYLES = {"mma": "cuda", "wgmma": "cuda", "matrix": "metal"}
PRECISIONS = ("fp16", "bf16")


def walk_of(name: str, precision: str, kind: Attention) -> Walk:
    return targets.get(STYLES[name]).walk("attention", kind, precision, style=name)


def kernel_of(name: str, kind: Attention, precision: str, m: int = 0, **changes: Any) -> Kernel:
    """The kernel for m queries, in the default configuration but for the changes."""
    walk, caps = walk_of(name, precision, kind), device(STYLES[name]).capabilities()
    found = walk.default(kind, caps, m)
    config = type(found).from_dict(found.as_dict() | changes)
    while changes and walk.fits(config, kind, caps) and (smaller := config.smaller()):
        config = smaller
    assert walk.refuses(config, kind, caps) is None
    return generate_walk(walk, kind, targets.get(STYLES[name]), config)


@functools.lru_cache(maxsize=64)
def rounded_case(
    variant: str, kind: Attention, precision: str, t: int, s: int, batches: int = 2, heads: int = 4
) -> Case:
    """A case, with what it gives where inputs are rounded as the kernel does it."""
    one = case(variant, kind, t, s, batches, heads)
    q, k, v = (rounded(x, precision) for x in (one.q, one.k.dequantize(), one.v.dequantize()))
    want = ops.attention(kind, q, k, v, one.operands, one.operands.get("sinks"))
    return dataclasses.replace(one, want=want)


def check(name: str, kernel: Kernel, variant: str, shapes: tuple[tuple[int, int], ...]) -> None:
    kind, precision = kernel.subject, kernel.precision
    for t, s in shapes:
        if variant in ("documents", "own") and t > s:
            continue  # positions before the first key have no document and no bias
        one = rounded_case(variant, kind, precision, t, s)
        found = relative_error(result(STYLES[name], kernel, one), one.want)
        assert found <= tolerance(kernel.op, precision), (t, s)


# ---- results


@dataclass(frozen=True)
class Sample:
    """A kernel, and the (T, S) that it runs with."""

    variant: str
    d: int
    k: str
    v: str
    dv: int
    precision: str
    m: int
    shapes: tuple[tuple[int, int], ...]
    changes: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.variant}-{self.d}-{self.k}-{self.v}-{self.precision}-{self.m}"


#: every variant, format, precision, head size and number of queries, each with many of the others;
#: rows of 72, 100 and 33 elements, which are filled up, and copied in 16, 8 or 2 bytes
SAMPLES = (
    Sample("full", 80, "f16", "q8_0", 96, "fp16", 0, ((1, 1), (64, 64), (7, 107))),
    Sample("window", 64, "q8_0", "q4_0", 0, "fp16", 0, ((257, 257), (7, 64))),
    Sample("documents", 128, "q4_0", "f16", 64, "bf16", 7, ((1, 300), (7, 7))),
    Sample("shared", 256, "q8_0", "q8_0", 0, "fp16", 1, ((1, 257), (7, 64), (1, 1))),
    Sample("own", 64, "f16", "f16", 100, "fp16", 0, ((64, 65), (7, 40)), {"share": "group"}),
    Sample("soft-cap", 128, "bf16", "q4_0", 0, "bf16", 7, ((7, 99), (1, 7)), {"splits": 4}),
    Sample("ALiBi", 256, "q4_0", "q4_0", 32, "bf16", 64, ((64, 64), (9, 257))),
    Sample("sinks", 72, "f16", "f32", 33, "fp16", 7, ((7, 64), (4, 1)), {"splits": 4}),
    Sample("causal", 33, "f16", "f16", 100, "fp16", 7, ((7, 64), (9, 5)), {"splits": 1}),
    Sample("shared", 256, "q6_K", "q4_K", 0, "bf16", 0, ((40, 70),)),
    Sample("full", 64, "three_bits", "mxfp4", 96, "fp16", 64, ((9, 70),)),
)
#: of these, what each target runs where tests are to be short
SHORT = {"mma": (0, 1, 2, 3, 4, 7), "wgmma": (0, 1, 4), "matrix": (0, 2, 4, 6, 7, 10)}
KNOWN = {fmt.name: fmt for fmt in (*formats.FORMATS, made_up.THREE_BITS)}


def kind_of(variant: str, d: int, k: str, v: str = "", dv: int = 0) -> Attention:
    plain = VARIANTS[variant].kind(d, "f32", "", dv)
    return dataclasses.replace(plain, k=KNOWN[k], v=KNOWN[v or k])


@pytest.mark.parametrize(
    ("name", "one"),
    [
        pytest.param(
            name, one, id=f"{name}-{one}",
            marks=() if number in SHORT[name] else pytest.mark.slow,
        )
        for name in STYLES
        for number, one in enumerate(SAMPLES)
    ],
)  # fmt: skip
def test_against_the_reference(name: str, one: Sample) -> None:
    kind = kind_of(one.variant, one.d, one.k, one.v, one.dv)
    kernel = kernel_of(name, kind, one.precision, one.m, **one.changes)
    assert bool(kernel.then) == (kernel.config.as_dict()["splits"] > 1)
    check(name, kernel, one.variant, one.shapes)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ("f16", "q8_0", "q4_0"))
@pytest.mark.parametrize("d", (64, 80, 128, 256))
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", STYLES)
def test_product_of_all(name: str, precision: str, variant: str, d: int, fmt: str) -> None:
    if d % KNOWN[fmt].block:
        pytest.skip(f"{d} is no multiple of a block")
    kind = kind_of(variant, d, fmt)
    for t in (1, 7, 64, 257):
        check(name, kernel_of(name, kind, precision, t), variant, ((t, t), (t, t + 100)))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", KNOWN)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", STYLES)
def test_every_format(name: str, precision: str, fmt: str) -> None:
    kind = kind_of("causal", 256 if KNOWN[fmt].block > 32 else 96, fmt)
    for m in (0, 1):
        check(name, kernel_of(name, kind, precision, m), "causal", ((9, 40), (1, 130)))


def test_halves_are_known_by_their_bits() -> None:
    assert is_half(KNOWN["f16"], "fp16") and is_half(KNOWN["bf16"], "bf16")
    others = [(n, p) for n in KNOWN for p in PRECISIONS if (n, p) not in
              (("f16", "fp16"), ("bf16", "bf16"))]  # fmt: skip
    assert not any(is_half(KNOWN[n], p) for n, p in others)


# ---- edges


PLAIN = kind_of("causal", 64, "f16")


@pytest.mark.parametrize("m", (0, 1))
@pytest.mark.parametrize("name", STYLES)
def test_edges(name: str, m: int) -> None:
    """Queries without keys, no keys at all, large scores, and what is not finite."""
    kernel = kernel_of(name, PLAIN, "fp16", m)
    bound = tolerance("attention", "fp16")
    more_queries = rounded_case("causal", PLAIN, "fp16", 9, 5)
    found = result(STYLES[name], kernel, more_queries)
    assert (found[:, :, :4] == 0).all() and relative_error(found, more_queries.want) <= bound
    one = rounded_case("causal", PLAIN, "fp16", 40, 40)
    none = QuantTensor("f16", (2, 4, 0, 64), np.empty(0, np.uint8))
    empty = dataclasses.replace(one, k=none, v=none)
    assert (result(STYLES[name], kernel, empty) == 0).all()
    large = one.q * np.float32(3e3)  # scores of 1e4
    want = ops.attention(PLAIN, rounded(large, "fp16"), one.k.dequantize(), one.v.dequantize())
    found = result(STYLES[name], kernel, dataclasses.replace(one, q=large))
    # a score is off by its own last bits, which is much beside the weights it makes
    assert np.isfinite(found).all() and relative_error(found, want) < 0.05
    dirty = one.q.copy()
    dirty[0, 1, 7, 3] = np.nan
    found = result(STYLES[name], kernel, dataclasses.replace(one, q=dirty))
    assert np.isnan(found[0, 1, 7]).all()
    found[0, 1, 7] = one.want[0, 1, 7]
    assert relative_error(found, one.want) <= bound


WINDOW = kind_of("window", 64, "f16")
#: tiles of as many queries as keys, each a part of 64
SMALL = {"mma": {"warps": 2, "warp_rows": 16, "keys": 32}, "matrix": {"keys": 32},
         "wgmma": {"warps": 4, "keys": 64}}  # fmt: skip
#: what a kernel skips a tile by, and what it would be without
SKIPS = {"cuda": (r"if \(!\(.*\)\) \{ break; \}", "break;"),
         "metal": (r"if \(.*\) \{ continue; \}", "")}  # fmt: skip


def skips(name: str, kernel: Kernel, size: int) -> tuple[Array, Array]:
    """What queries give where keys that whole tiles are to skip are poisoned, and should give."""
    one = rounded_case("window", WINDOW, "fp16", 32, 256)
    # the first query stands at 224 and sees 192..224; the tiles of keys before are not touched
    before = result(STYLES[name], kernel, poisoned(WINDOW, one, slice(0, 192)))
    np.testing.assert_array_equal(before, result(STYLES[name], kernel, one))
    # of two tiles of queries the first sees none of the keys behind it
    ahead = rounded_case("window", WINDOW, "fp16", 2 * size, 2 * size)
    found = result(STYLES[name], kernel, poisoned(WINDOW, ahead, slice(size, 2 * size)))
    assert np.isnan(found[:, :, size:]).all()
    return found[:, :, :size], ahead.want[:, :, :size]


@pytest.mark.parametrize("name", STYLES)
def test_tiles_are_skipped(name: str) -> None:
    kernel = kernel_of(name, WINDOW, "fp16", 0, **SMALL[name])
    size: int = kernel.config.rows  # type: ignore[attr-defined]
    assert size == kernel.config.keys  # type: ignore[attr-defined]
    assert relative_error(*skips(name, kernel, size)) <= tolerance("attention", "fp16")
    pattern, instead = SKIPS[STYLES[name]]
    source, count = re.subn(pattern, instead, kernel.source)
    assert count == 1
    without = dataclasses.replace(kernel, source=source, hash="without")
    with pytest.raises(AssertionError):
        skips(name, without, size)


def emulated(kernel: Kernel, one: Case, language: str, source: str) -> tuple[Array, Report]:
    """A launch under the emulator's checks for races: the result, and what was found."""
    launch = kernel.walk.launch(kernel.config, kernel.subject)
    assert launch is not None
    (b, h, t, _), (hk, s) = one.q.shape, one.k.shape[1:3]
    y = np.full(one.want.shape, np.nan, np.float32)
    sizes = {"B": b, "H": h, "HK": hk, "T": t, "S": s}
    arrays = (one.q, one.k.data, one.v.data, y, np.empty(1, np.float32))
    arguments = [*map(np.ascontiguousarray, arrays), *sizes.values(), 0, 0]
    groups = eval(launch.groups[0], dict(sizes))
    run = Emulator(source, language, name=kernel.entry)
    report = run.run(
        kernel.entry, groups, launch.threads, arguments, shared_bytes=launch.shared_bytes,
        sanitize=True,
    )  # fmt: skip
    return arguments[3], report


TILES = {"mma": {"warps": 4, "warp_rows": 16, "key_warps": 2, "keys": 32},
         "wgmma": {"warps": 4, "keys": 64}, "matrix": {"simds": 2, "keys": 16}}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "what", "count", "finding"),
    [
        ("mma", "__syncthreads();", 6, "race"),
        ("wgmma", "__syncthreads();", 5, "race"),
        ("wgmma", "writes_show();", 3, "proxy"),
        ("wgmma", "products_wait();", 3, "async"),
        ("wgmma", "products_wait_but_last();", 1, "async"),
        ("matrix", "threadgroup_barrier(mem_flags::mem_threadgroup);", 5, "race"),
    ],
)
def test_every_barrier_is_needed(name: str, what: str, count: int, finding: str) -> None:
    """Of those that all threads meet at, and of fences and waits, whichever is taken away leaves
    something that the emulator finds."""
    kind = kind_of("shared", 64, "q8_0", "f16", 80)
    kernel = kernel_of(name, kind, "fp16", 0, share="group", **TILES[name])
    one = rounded_case("shared", kind, "fp16", 9, 90, 1)
    y, report = emulated(kernel, one, STYLES[name], kernel.source)
    assert report.ok, report
    assert relative_error(y, one.want) <= tolerance("attention", "fp16")
    places = [m.span() for m in re.finditer(re.escape(what), kernel.source)]
    assert len(places) == count
    for start, stop in places:
        text = kernel.source[:start] + kernel.source[stop:]
        _, report = emulated(kernel, one, STYLES[name], text)
        assert finding in {f.kind for f in report.findings}, text[start - 200 : start]


# ---- configurations


CLASSES: dict[str, type[Config]] = {
    "mma": FragmentAttentionConfig, "wgmma": WarpgroupAttentionConfig,
    "matrix": MatrixAttentionConfig,
}  # fmt: skip
#: kinds that go different ways: copied and decoded, with rows that are filled up
WAYS = (kind_of("shared", 72, "f16", "q8_0", 96), kind_of("shared", 64, "q4_0", "f16", 52))


def configurations() -> Iterator[Any]:
    for name, made in CLASSES.items():
        every = [c for c in made.space() if not c.legal(device_capabilities(name))]
        chosen = np.random.default_rng(0).permutation(len(every))
        fitting = [every[i] for i in chosen if not _refused(name, every[i])]
        for number, config in enumerate(fitting[:40]):
            text = "-".join(map(str, config.as_dict().values()))
            marks = () if number < 1 else (pytest.mark.slow,)
            yield pytest.param(name, config, number, id=f"{name}-{text}", marks=marks)


def device_capabilities(name: str) -> Capabilities:
    """What is assumed of a device, with what the style wants."""
    caps = targets.get(STYLES[name]).capabilities
    return dataclasses.replace(caps, features=caps.features | {"wgmma"})


def _refused(name: str, config: Config) -> bool:
    caps = device_capabilities(name)
    return any(walk_of(name, "fp16", k).refuses(config, k, caps) for k in WAYS)


@pytest.mark.parametrize(("name", "config", "number"), list(configurations()))
def test_configurations(name: str, config: Config, number: int) -> None:
    """Any that is legal, with sizes that nothing divides."""
    kind, precision = WAYS[number % 2], PRECISIONS[number // 2 % 2]
    kernel = generate_walk(walk_of(name, precision, kind), kind, targets.get(STYLES[name]), config)
    check(name, kernel, "shared", ((37, 131), (3, 67)))


#: capabilities of devices with much shared memory, or with small groups of threads
OTHERS = {
    "mma": dataclasses.replace(device_capabilities("mma"), launch_bytes=232448),
    "wgmma": device_capabilities("wgmma"),
    "matrix": dataclasses.replace(device_capabilities("matrix"), max_threads=256),
}


@pytest.mark.parametrize("name", STYLES)
def test_defaults_fit(name: str) -> None:
    for caps in (OTHERS[name], device_capabilities(name)):
        for d, m in itertools.product((32, 33, 64, 80, 96, 128, 160, 192, 256), (0, 1, 2, 9, 64)):
            for fmt in ("f32", "f16", "q8_0"):
                if d % KNOWN[fmt].block:
                    continue
                kind = kind_of("causal", d, fmt)
                for precision in PRECISIONS:
                    walk = walk_of(name, precision, kind)
                    config = walk.default(kind, caps, m)
                    assert walk.refuses(config, kind, caps) is None, (d, m, fmt, precision)


@pytest.mark.parametrize("made", CLASSES.values(), ids=CLASSES)
def test_what_is_smaller_ends(made: type[Config]) -> None:
    for config in (c for c in made.space() if not c.legal(device_capabilities("mma"))):
        smaller, count = config.smaller(), 0
        while smaller is not None:
            smaller, count = smaller.smaller(), count + 1
            assert count < 12, config


def test_reasons() -> None:
    caps = device_capabilities("mma")
    walk = walk_of("mma", "fp16", PLAIN)
    large = kind_of("full", 128, "f16")
    said = [
        FragmentAttentionConfig(keys=16, key_warps=2).legal(caps),
        FragmentAttentionConfig(warps=2, key_warps=4).legal(caps),
        FragmentAttentionConfig().legal(Capabilities(max_threads=64)),
        walk.refuses(FragmentAttentionConfig(keys=128, stages=3, warp_rows=16), large, caps),
        walk.refuses(FragmentAttentionConfig(keys=64), large, dataclasses.replace(
            caps, launch_bytes=1 << 20)),
        walk.accepts(kind_of("full", 512, "f16")),
        walk_of("matrix", "fp16", PLAIN).accepts(kind_of("full", 1024, "f16")),
        MatrixAttentionConfig(simds=8).legal(Capabilities(max_threads=128)),
    ]  # fmt: skip
    reasons = (
        "8 keys in each warp", "4 warps share the keys; a block has 2", "128 threads in a group",
        "bytes of shared memory; a launch may ask for", "224 registers of each thread",
        "heads of 512 elements", "do not fit the registers", "256 threads in a group",
    )  # fmt: skip
    for reason, one in zip(reasons, said, strict=True):
        assert one is not None and reason in one


def test_float32_stays_with_the_shared_walk() -> None:
    """Without a precision, and in float32, attention is what it is on every target."""
    for style in ("mma", "matrix"):
        target = targets.get(STYLES[style])
        assert target.walk("attention", PLAIN).name == "flash"
        assert target.walk("attention", PLAIN, "fp32").name == "flash"
        for precision in PRECISIONS:
            served = target.serve("attention", PLAIN, precision, device_capabilities(style), 1)
            assert served.style == style and served.precision == precision


def test_warpgroups_serve_many_queries() -> None:
    """Where the device has them, and the kind fits their registers."""
    target, caps = targets.get("cuda"), device_capabilities("wgmma")
    own = next(v for v in verify_attention.VARIANTS if v.name == "own")
    large = verify_attention.kind_of(own, KNOWN["f16"], 256)
    for kind, where, rows, style in (
        (PLAIN, caps, 1, "mma"), (PLAIN, caps, 63, "mma"), (PLAIN, caps, 64, "wgmma"),
        (PLAIN, target.capabilities, 512, "mma"), (large, caps, 512, "mma"),
    ):  # fmt: skip
        walk = target.serve("attention", kind, "fp16", where, rows)
        assert walk.style == style
        assert walk.refuses(walk.default(kind, where, rows), kind, where) is None


# ---- compiled


without_compiler = pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))

COMPILED = tuple(
    itertools.product(
        ("full", "causal", "window", "soft-cap", "ALiBi", "sinks", "shared", "own"),
        (64, 80, 128, 256), ("f16", "q8_0", "q4_0"),
    )
)  # fmt: skip


def check_compiled(kinds: list[Attention], arch: str, folder: Path, precisions: Any) -> None:
    """Defaults for many queries and for one, without spills, on matrix units."""
    target, wanted = targets.get("cuda"), {}
    for kind, precision, (style, m) in itertools.product(
        kinds, precisions, (("mma", 0), ("mma", 1), ("wgmma", 0))
    ):
        walk = next(w for w in target.walks if (w.style, w.precision, w.op) ==
                    (style, precision, "attention"))  # fmt: skip
        config = walk.default(kind, target.capabilities, m)
        one = generate_walk(walk, kind, target, config)
        if serves(one, arch) and not walk.fits(config, kind, target.capabilities):
            entry = f"{one.entry}_{m}"
            source = one.source.replace(f"{one.entry}(", f"{entry}(")
            wanted[entry] = dataclasses.replace(one, source=source, entry=entry)
    found = cuda_binaries.compiled(wanted.values(), arch, folder) if wanted else {}
    assert found.keys() == wanted.keys()
    for entry, binary in found.items():
        kernel = wanted[entry]
        name = f"{entry} for {arch}, {kernel.config}"
        assert binary.spilled == 0 and binary.stack == 0, f"{name} spills: {binary}"
        if disassembler() is None:
            continue
        assert binary.count("LDGSTS"), name
        fmt, elements = kernel.subject.k, kernel.subject.head_dim
        if fmt.row_bytes(elements) % 16 == 0:
            assert binary.count("LDGSTS.128"), name
        if kernel.walk.style == "mma":
            assert binary.count("HMMA") and binary.count("LDSM") and binary.count("LDSM.MT88"), name
        else:
            assert binary.count("HGMMA"), name
            # by which ptxas says that it makes products wait for each other
            assert not any("C7510" in line or "wgmma" in line for line in binary.said), binary.said


@without_compiler
def test_compiled(tmp_path: Path) -> None:
    """Some of what is built without being asked for."""
    kinds = [attention_kinds(KNOWN[name])[1] for name in ("f16", "q8_0")]
    check_compiled(kinds, "sm_90a", tmp_path, ("fp16",))


@pytest.mark.slow
@without_compiler
@pytest.mark.parametrize("variant", sorted({v for v, _, _ in COMPILED}))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kind_compiled(arch: str, variant: str, tmp_path: Path) -> None:
    kinds = [
        kind_of(v, d, fmt) for v, d, fmt in COMPILED if v == variant and d % KNOWN[fmt].block == 0
    ]
    check_compiled(kinds, arch, tmp_path, PRECISIONS)
