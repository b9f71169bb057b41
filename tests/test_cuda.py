"""CUDA without a GPU: kernels run in the emulator, and nvcc compiles them where it is."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelgen import targets
from kernelgen.files import kernels
from kernelgen.generate import generate_walk
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.ir.evaluate import evaluate
from kernelgen.ir.layout import named_layout
from kernelgen.ir.steps import codebook, memory_steps
from kernelgen.targets.base import EMULATED, Kernel
from kernelgen.targets.cuda.wide import wide_codes
from kernelgen.targets.device import DeviceRuntime
from kernelgen.targets.driver import Buffer
from kernelgen.targets.emulated import EmulatorDriver
from kernelgen.verify import OPS, cases, verify
from tests import cuda_binaries, device_checks
from tests.cuda_binaries import ARCHITECTURES, Binary, disassembler, serves, why_no_compiler
from tests.made_up import THREE_BITS

CUDA = targets.get("cuda")
KNOWN = {fmt.name: fmt for fmt in (*formats.FORMATS, THREE_BITS, formats.get("mxfp6_e2m3"))}
EVERY = [pytest.param(fmt, marks=pytest.mark.slow, id=name) for name, fmt in KNOWN.items()]
WALKS = {
    f"{one.op}_{one.name}" if one.name == "words" else one.name: one
    for one in CUDA.walks
    if one.op in (*OPS, "cast")
}

#: for each walk formats that take different ways through it: with offsets and scales decoded once a
#: slab (q4_K), groups of 16 and signed codes (q6_K), one group a block and odd addresses (q5_0),
#: tables (iq4_nl), floats (f16), signed codes whose decode ends in an or (mxfp6_e2m3)
SAMPLE = {
    "dequantize_words": ("three_bits", "f16"),
    "get_rows_words": ("q5_0", "iq1_m"),
    "absmax": ("q4_K",),
    "matmul_fp16_wgmma": ("three_bits", "q6_K"),
    "matmul_bf16_wgmma": ("iq4_nl",),
    "matmul_int8_mma": ("q4_K", "q6_K"),
    "matmul_fp16_mma": ("three_bits", "q5_0", "mxfp6_e2m3"),
    "matmul_bf16_mma": ("f16",),
    "matvec_int8_warp": ("three_bits", "q6_K", "iq2_xs"),
    "matvec_fp16_half2": ("three_bits", "q4_K", "mxfp6_e2m3"),
    "matvec_int8_mma": ("three_bits",),
    "matvec_fp16_mma": ("q4_K", "tq1_0"),
    "matvec_bf16_mma": ("q5_0",),
    "matvec_int8": ("q6_K",),
    "matvec_fp32": ("three_bits", "f16"),
    "matmul_int8": ("q5_0",),
    "matmul_fp32": ("q4_K",),
}


def made(name: str, fmt: BlockFormat, m: int = 0, **changes: Any) -> Kernel:
    """The kernel of a walk by its name, with its default for so many rows, or what is changed."""
    one = WALKS[name]
    caps = emulator().capabilities()
    config = one.default(fmt, caps, m)
    if changes:
        config = dataclasses.replace(config, **changes)
        while one.fits(config, fmt, caps) and (smaller := config.smaller()):
            config = smaller
        assert one.refuses(config, fmt, caps) is None
    return generate_walk(one, fmt, CUDA, config)


@functools.cache
def emulator() -> DeviceRuntime:
    """The emulator; skips the test where nothing can be compiled for it."""
    found = CUDA.runtime(EMULATED)
    if reason := found.available():
        pytest.skip(reason)
    assert isinstance(found, DeviceRuntime)
    return found


# ---- emulated ----------------------------------------------------------------------------------


def test_each_walk_is_sampled() -> None:
    assert SAMPLE.keys() | {name for name in WALKS if name.startswith("cast")} == WALKS.keys()


@pytest.mark.parametrize(
    ("name", "fmt"),
    [pytest.param(n, KNOWN[f], id=f"{n}-{f}") for n, listed in SAMPLE.items() for f in listed],
)
def test_emulated(name: str, fmt: BlockFormat) -> None:
    one = WALKS[name]
    shapes = list(cases(one.op, fmt))
    # results of all shapes in the slow tests
    device_checks.error_of(made(name, fmt, 9 if one.op == "matmul" else 8), emulator(), shapes[-3:])


@pytest.mark.parametrize("fmt", EVERY)
def test_every_kernel_emulated(fmt: BlockFormat) -> None:
    results = list(verify(CUDA, [fmt], runtime=emulator()))
    assert results and {r.how for r in results} == {"emulated"}
    assert [(r.op, r.precision, r.problem) for r in results if not r.ok] == []


#: M and N that no tile divides, or one just does
EDGES = ((1, 5), (8, 64), (9, 37), (33, 129), (129, 130))
TENSOR = [name for name in WALKS if name.startswith(("matvec", "matmul")) and WALKS[name].style]


def edges(fmt: BlockFormat, rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """Shapes with K of one block, and of a number of blocks that no depth divides."""
    few = 1 if fmt.block > 1 else 40
    return [(m, n, k * few * fmt.block) for m, n in EDGES if m in rows for k in (1, 3)]


@pytest.mark.parametrize("name", ["matmul_fp16_mma", "matmul_int8_mma", "matmul_fp16_wgmma"])
def test_edges(name: str) -> None:
    fmt = KNOWN["q5_0"] if WALKS[name].accepts(KNOWN["q5_0"]) is None else THREE_BITS
    device_checks.error_of(made(name, fmt), emulator(), edges(fmt, (1, 9, 33)))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["q4_K", "q6_K", "q5_0", "iq4_nl", "f16", "three_bits"])
@pytest.mark.parametrize("name", TENSOR)
def test_all_edges(name: str, fmt: str) -> None:
    one = WALKS[name]
    if reason := one.accepts(KNOWN[fmt]):
        pytest.skip(reason)
    rows = (1, 8) if one.op == "matvec" else (1, 8, 9, 33, 129)
    device_checks.error_of(made(name, KNOWN[fmt]), emulator(), edges(KNOWN[fmt], rows))


#: every value of every choice, and those that depend on each other together
MMA = (
    {"tile_m": 8, "warp_n": 64, "warps": 2, "stages": 2},
    {"tile_m": 16, "warp_n": 16, "warps": 8, "depth": 128, "stages": 2},
    {"tile_m": 32, "warp_n": 32, "stages": 4, "split": 2},
    {"tile_m": 128, "warp_n": 16, "warps": 2, "split": 4},
    {"tile_m": 64, "warp_n": 64, "warps": 2, "stages": 2, "workers": 108},
    {"tile_m": 8, "warp_n": 32, "depth": 128, "stages": 3, "split": 16, "warps": 2},
    {"tile_m": 16, "warp_n": 64, "warps": 2, "stages": 2, "workers": 264},
    {"tile_m": 128, "warp_n": 32, "depth": 64, "stages": 2, "split": 8},
)
WGMMA = (
    {"tile_m": 16, "warps": 4, "stages": 2},
    {"tile_m": 32, "warps": 12, "stages": 6},
    {"tile_m": 64, "warp_n": 32, "stages": 3},
    {"tile_m": 128, "warp_n": 32, "warps": 4, "stages": 2},
    {"tile_m": 256, "warp_n": 16, "stages": 2},
)


def named(changes: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in changes.items())


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["q4_K", "q6_K", "q5_0", "three_bits"])
@pytest.mark.parametrize("changes", MMA, ids=named)
@pytest.mark.parametrize("name", ["matmul_fp16_mma", "matmul_int8_mma"])
def test_fragment_configurations(name: str, changes: dict[str, Any], fmt: str) -> None:
    kernel = made(name, KNOWN[fmt], **changes)
    many = max(3, -(-1536 // kernel.format.block)) * kernel.format.block
    shapes = [(1, 5, many), (9, 37, 3 * kernel.format.block), (33, 130, many)]
    device_checks.error_of(kernel, twice(), shapes)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["q4_K", "q6_K", "three_bits", "f16"])
@pytest.mark.parametrize("changes", WGMMA, ids=named)
def test_bulk_configurations(changes: dict[str, Any], fmt: str) -> None:
    kernel = made("matmul_fp16_wgmma", KNOWN[fmt], **changes)
    few = kernel.format.block if kernel.format.block > 1 else 64
    shapes = [(1, 5, few), (9, 37, 3 * few), (129, 130, 7 * few)]
    device_checks.error_of(kernel, emulator(), shapes)


WARPS = (
    {"rows": 1, "groups": 1, "threads": 64, "layout": "native"},
    {"rows": 4, "columns": 4, "groups": 2, "threads": 256},
    {"rows": 2, "columns": 8, "groups": 4},
    {"rows": 4, "columns": 2, "groups": 1, "layout": "native"},
)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["q4_K", "q6_K", "q5_0", "iq4_nl", "q3_K", "three_bits"])
@pytest.mark.parametrize("changes", WARPS, ids=named)
@pytest.mark.parametrize("name", ["matvec_int8_warp", "matvec_fp16_half2"])
def test_warp_configurations(name: str, changes: dict[str, Any], fmt: str) -> None:
    kernel = made(name, KNOWN[fmt], **changes)
    block = kernel.format.block
    shapes = [(1, 37, block), (3, 64, 3 * block), (8, 37, 37 * 64 // block * block or 3 * block)]
    device_checks.error_of(kernel, emulator(), shapes)


@pytest.mark.parametrize("layout", ["planes", "native"])
def test_words_side_by_side_are_loaded_together(layout: str) -> None:
    """All formats of ggml have their codes so in planes; what is loaded is what it stands for."""
    rng = np.random.default_rng(0)
    for fmt in formats.FORMATS:
        found = wide_codes(fmt, layout)
        if fmt.float_codes:
            assert found is None
            continue
        # of some formats codes lie in a list of rows, are fewer than sixteen bytes in a group, or
        # lie side by side, so that four of them are one byte
        apart = codebook(fmt) or fmt.name in ("nvfp4", "q1_0", "q2_0")
        assert found is not None or layout == "native" or apart, fmt.name
        if found is None:
            continue
        steps = memory_steps(fmt, named_layout(layout))
        n, blocks = 3, 2
        w = rng.integers(0, 256, n * blocks * fmt.nbytes, np.uint8)
        for row, block, g, j in itertools.product(
            range(n), range(blocks), range(fmt.groups), (0, 4)
        ):
            if 4 * j >= fmt.group:
                continue
            known = {"N": n, "blocks": blocks, "row": row, "block": block, "g": g}
            known |= {str(p.at.attr[0]): int(evaluate(p.start, known).item()) for p in steps.places}
            at = [int(evaluate(a, {**known, "j": j}).item()) for a in found.addresses]
            assert all(a % 16 == 0 for a in at)
            for i in range(4):
                inside = known | {
                    f"wide{n}[r][j]": int(w[a + 4 * i : a + 4 * i + 4].view(np.uint32)[0])
                    for n, a in enumerate(at)
                }
                got = evaluate(found.codes, {**inside, "j": j + i}, {"w": w})
                assert steps.codes is not None
                want = evaluate(steps.codes, {**known, "j": j + i}, {"w": w})
                assert got.item() == want.item(), (fmt.name, row, block, g, j + i)


class TwiceDriver(EmulatorDriver):
    """Launches each kernel in three orders of its threads, over what the launch before left in its
    memory: results must not differ in a bit, and counters must be zero again."""

    #: buffers of kernels by the role of the argument, by name of the entry point
    roles: dict[str, list[str]] = {}  # noqa: RUF012 - of all drivers, as kernels are
    counted = 0

    def program(self, kernel: Kernel) -> Any:
        self.roles[kernel.entry] = [a.role for a in kernel.arguments if a.role != "size"]
        return super().program(kernel)

    def launch(
        self,
        program: Any,
        groups: tuple[int, int],
        threads: int,
        buffers: Sequence[Buffer],
        sizes: Sequence[int],
    ) -> None:
        emulator, entry, shared_bytes = program
        roles, results = self.roles[entry], []
        for order in ("forward", "reverse", "random"):
            report = emulator.run(
                entry, groups, threads, [*buffers, *sizes], shared_bytes=shared_bytes, order=order
            )
            assert report.ok, report.findings[0]
            results.append(
                [b.copy() for b, role in zip(buffers, roles, strict=True) if role == "out"]
            )
            for buffer, role in zip(buffers, roles, strict=True):
                if role == "zero":
                    assert not buffer.any(), f"{entry} leaves counters that are not zero"
                    TwiceDriver.counted += 1
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=entry)


def twice() -> DeviceRuntime:
    """The emulator, over a `TwiceDriver`."""
    plain: Any = emulator()
    fresh = type(plain)("cuda", "cuda", plain.capabilities())
    fresh._driver = TwiceDriver("cuda")
    return fresh


@pytest.mark.parametrize("name", ["matmul_fp16_mma", "matmul_int8_mma"])
@pytest.mark.parametrize("changes", [{"split": 4}, {"workers": 108, "stages": 2}], ids=named)
def test_shared_sums_do_not_depend_on_who_is_last(name: str, changes: dict[str, Any]) -> None:
    # tiles are few and blocks many, so that several share each, and some find nothing to do
    kernel = made(name, KNOWN["q5_0"], tile_m=16, warps=2, **changes)
    before = TwiceDriver.counted
    device_checks.error_of(kernel, twice(), [(9, 70, 32 * 48), (33, 37, 96)])
    assert TwiceDriver.counted > before


def test_a_counter_that_stays_is_seen() -> None:
    kernel = made("matmul_fp16_mma", KNOWN["q5_0"], tile_m=16, warps=2, split=4)
    text = "if (thread == 0u) counters[tile] = 0u;"
    assert text in kernel.source
    broken = dataclasses.replace(kernel, source=kernel.source.replace(text, ""))
    with pytest.raises(AssertionError, match="counters that are not zero"):
        device_checks.error_of(broken, twice(), [(9, 70, 32 * 48)])


@pytest.mark.parametrize("name", ["matmul_int8_mma", "matmul_fp16_wgmma", "matvec_fp16_mma"])
def test_results_are_written_whole_and_nothing_behind_them(name: str) -> None:
    fmt = THREE_BITS
    plain: Any = emulator()
    fresh = type(plain)("cuda", "cuda", plain.capabilities())
    fresh._driver = device_checks.GuardedDriver(plain.driver())
    m = 8 if name.startswith("matvec") else 19
    device_checks.error_of(made(name, fmt, m), fresh, [(m, 7, fmt.block), (m, 33, 3 * fmt.block)])


# ---- compiled ----------------------------------------------------------------------------------

without_compiler = pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))

#: registers of a multiprocessor, and of a thread at most
REGISTERS = 65536


@functools.cache
def default_kernels(fmt: BlockFormat, arch: str) -> tuple[Kernel, ...]:
    """Every kernel in its default configuration that an architecture has the features for."""
    return tuple(one for one in kernels(CUDA, [fmt]) if serves(one, arch))


def check_binary(kernel: Kernel, binary: Binary) -> None:
    """What the machine code of a default configuration must be like."""
    name = f"{kernel.entry} for {binary.arch}"
    assert binary.spilled == 0 and binary.stack == 0, f"{name} spills: {binary}"
    threads = kernel.walk.launch(kernel.config, kernel.subject).threads  # type: ignore[union-attr]
    assert binary.registers * threads <= REGISTERS, name
    if disassembler() is None:
        return
    assert not binary.count("LDL") and not binary.count("STL"), name
    if kernel.walk.style == "mma" and kernel.op != "cast":
        assert binary.count("IMMA" if kernel.precision == "int8" else "HMMA"), name
        assert binary.count("LDSM"), name
        # activations in pieces of 16 bytes, and weights, too, where eight blocks are that aligned
        # keys and values lie in rows of any size
        assert binary.count("LDGSTS" if kernel.op == "attention" else "LDGSTS.128"), name
    if kernel.walk.style == "warp":
        # weights, where they lie so aligned, and activations in 16 bytes; four products at once
        assert binary.count("LDG.128") and binary.count("IDP"), name
    if kernel.walk.style == "half2":
        assert binary.count("LDG.128") and binary.count("HFMA2"), name
    if kernel.walk.style == "wgmma" and kernel.op != "cast":
        assert binary.count("HGMMA"), name
        # keys and values come row by row, whose bytes the copy engine need not take
        assert binary.count("UBLKCP") or kernel.op == "attention", name
        # by which ptxas says that it makes products wait for each other
        assert not any("C7510" in line or "wgmma" in line for line in binary.said), binary.said


def check_all(fmt: BlockFormat, arch: str, folder: Path) -> dict[str, Binary]:
    wanted = {one.entry: one for one in default_kernels(fmt, arch)}
    found = cuda_binaries.compiled(wanted.values(), arch, folder)
    assert found.keys() == wanted.keys()
    for entry, kernel in wanted.items():
        check_binary(kernel, found[entry])
    return found


@without_compiler
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("fmt", ["q4_K", "q6_K"])
def test_compiled(fmt: str, arch: str, tmp_path: Path) -> None:
    found = check_all(KNOWN[fmt], arch, tmp_path)
    # three blocks of 128 threads on a multiprocessor hide what each waits for
    assert found[f"kernelgen_matmul_{fmt}_int8_mma"].registers <= 168


@pytest.mark.slow
@without_compiler
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("fmt", EVERY)
def test_every_kernel_compiled(fmt: BlockFormat, arch: str, tmp_path: Path) -> None:
    check_all(fmt, arch, tmp_path)


@without_compiler
def test_spills_are_seen(tmp_path: Path) -> None:
    kernel = made("matmul_fp16_mma", KNOWN["q5_0"])
    tight = kernel.source.replace("__launch_bounds__(THREADS", "__launch_bounds__(1024")
    assert tight != kernel.source
    broken = dataclasses.replace(kernel, source=tight)
    found = cuda_binaries.compiled([broken], "sm_80", tmp_path)[kernel.entry]
    assert found.spilled
    with pytest.raises(AssertionError, match="spills"):
        check_binary(broken, found)
