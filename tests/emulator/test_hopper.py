"""wgmma, mbarriers and bulk copies: results beside numpy's, and the bugs of such kernels.

The kernels place their matrices by their own formulas, in each of the layouts that a descriptor
can say; the engine has others.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kernelgen.emulator import Emulator, EmulatorError, Report
from tests.emulator.tools import needs_compiler

pytestmark = needs_compiler

PATH = Path(__file__).parent / "hopper.cu"
TEXT = PATH.read_text()
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def hopper() -> Emulator:
    return Emulator(TEXT, name=PATH.name)


@pytest.fixture(params=[False, True], ids=["plain", "checked"])
def sanitize(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


#: what is wrong, in the file's order -> the finding of a checked run, and what stands at its line
BUGS = {
    "EXPECT": ("async", "wgmma.mma_async"),  # nobody says how many bytes will come
    "PARITY": ("async", "wgmma.mma_async"),  # a wait for the phase before
    "COUNT": ("barrier", ".reg .pred done"),  # more arrivals than ever come
    "PROXY": ("proxy", "wgmma.mma_async"),  # no fence.proxy.async behind plain stores
    "FENCE": ("async", "wgmma.mma_async"),  # no wgmma.fence
    "WAIT": ("async", "wgmma.mma_async"),  # no wgmma.wait_group
    "READ": ("async", "sums[31] == 1e30f"),  # sums are used before it
    "RELEASE": ("race", "cp.async.bulk"),  # a stage is given back before it
    "SHOW": ("proxy", "cp.async.bulk"),  # no fence behind mbarrier.init
    "OVERWRITE": ("race", "wgmma.mma_async"),  # what is multiplied is written before the wait
}


def small(*shape: int) -> npt.NDArray[np.float32]:
    """Numbers of which products and sums are exact."""
    return RNG.integers(-8, 9, shape).astype(np.float32)


def bf16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def run_pipeline(emulator: Emulator, bug: str = "", **options: object) -> tuple[Report, bool]:
    """A product in tiles, maybe with a bug; whether it is right, too."""
    m, n, k = 128, 64, 320
    x, w = small(m, k).astype(np.float16), small(n, k).astype(np.float16)
    # tiles of 64 rows x 64 elements; in each row of 128 bytes the chunks of 16 change places
    chunks = w.reshape(n // 64, 64, k // 64, 8, 8).transpose(0, 2, 1, 3, 4)
    tiles = np.empty_like(chunks)
    for row in range(64):
        for c in range(8):
            tiles[:, :, row, c ^ row % 8] = chunks[:, :, row, c]
    y = np.full((m, n), np.nan, np.float32)
    report = emulator.run(
        "pipeline", (n // 64, m // 64), 160,
        [x, np.ascontiguousarray(tiles).view(np.uint8), y, k, ["", *BUGS].index(bug)],
        shared_bytes=2 * 8192 + 8192, **options,
    )  # fmt: skip
    return report, bool((y == x.astype(np.float32) @ w.astype(np.float32).T).all())


def test_a_pipeline_of_bulk_copies(hopper: Emulator, sanitize: bool) -> None:
    report, right = run_pipeline(hopper, sanitize=sanitize)
    assert report.ok, report
    assert right


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_of_pipelines(hopper: Emulator, bug: str, order: str) -> None:
    report, _ = run_pipeline(hopper, bug, sanitize=True, order=order)
    kind, words = BUGS[bug]
    lines = TEXT.splitlines()
    for one in report.findings:
        assert 0 <= one.thread[0] < 160 and one.block[0] == 0 and one.block[1] < 2
        near = "\n".join(lines[one.line - 1 : one.line + 4])
        if one.kind == kind and one.line and words in near:
            break
    else:
        pytest.fail(str(report))


@pytest.mark.parametrize("bug", ["EXPECT", "PARITY", "COUNT", "FENCE", "WAIT", "SHOW", "OVERWRITE"])
def test_bugs_that_a_plain_run_finds(hopper: Emulator, bug: str) -> None:
    report, right = run_pipeline(hopper, bug)
    assert report.kinds() & {"async", "barrier", "proxy", "race"}
    assert right == (bug == "SHOW")


def test_a_hang_says_what_it_waits_for(hopper: Emulator) -> None:
    report, _ = run_pipeline(hopper, "COUNT", order="forward")
    assert "which lacks 1 of 2 arrivals and 0 bytes" in report.findings[0].message
    assert "thread 0 at the mbarrier of line" in report.findings[0].message
    assert report.seconds < 15  # it is seen, not timed out


def test_bytes_without_swizzle(hopper: Emulator, sanitize: bool) -> None:
    a = RNG.integers(-128, 128, (64, 64), np.int8)
    b = RNG.integers(0, 256, (32, 64), np.uint8)
    y = np.zeros((64, 32), np.int32)
    report = hopper.run("bytes", 1, 128, [a, b, y], sanitize=sanitize)
    assert report.ok, report
    np.testing.assert_array_equal(y, a.astype(np.int32) @ b.astype(np.int32).T)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_a_from_registers(hopper: Emulator, sanitize: bool, width: int) -> None:
    """Also: the sign of B turned, three swizzles."""
    a, b = small(64, width // 2), small(16, width // 2)
    y = np.zeros((64, 16), np.float32)
    report = hopper.run(f"registers_{width}", 1, 128, [bf16(a), bf16(b), y], sanitize=sanitize)
    assert report.ok, report
    np.testing.assert_array_equal(y, -(a @ b.T))


def test_transposed_sides(hopper: Emulator, sanitize: bool) -> None:
    x, w = small(32, 64), small(32, 128)
    y = np.zeros((64, 128), np.float32)
    given = [x.astype(np.float16), w.astype(np.float16), y]
    report = hopper.run("transposed", 1, 128, given, sanitize=sanitize)
    assert report.ok, report
    np.testing.assert_array_equal(y, x.T @ w)


def test_mbarriers_by_state(hopper: Emulator, sanitize: bool) -> None:
    x, y = RNG.integers(0, 1000, (5, 64), np.int32), np.zeros(64, np.int32)
    report = hopper.run("by_state", 1, 64, [x, y, 5], sanitize=sanitize)
    assert report.ok, report
    np.testing.assert_array_equal(y, x[:, ::-1].sum(0))


def test_copies_that_arrive_at_an_mbarrier(hopper: Emulator, sanitize: bool) -> None:
    x, y = RNG.integers(0, 1000, (64, 4), np.int32), np.zeros((64, 4), np.int32)
    report = hopper.run("tracked", 1, 64, [x, y], sanitize=sanitize)
    assert report.ok, report
    np.testing.assert_array_equal(y, x[::-1])


def test_a_block_without_a_whole_warpgroup(hopper: Emulator) -> None:
    given = [np.zeros((64, 64), np.int8), np.zeros((32, 64), np.uint8), np.zeros((64, 32), "i4")]
    report = hopper.run("bytes", 1, 96, given)
    assert "needs a warpgroup of 128 threads, but the block has 96" in report.findings[0].message


def test_weakly_aligned_memory_shows() -> None:
    """A swizzle of 128 bytes repeats every 1024: a tile that is aligned to less is misread."""
    weak = TEXT.replace("extern __shared__ __align__(1024)", "extern __shared__ __align__(128)")
    report, right = run_pipeline(Emulator(weak, name=PATH.name))
    assert report.ok and not right


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cp.async.bulk.commit_group;", "does not know the instruction"),
        ("mapa.shared::cluster.u32 %0, %0, 1;", "does not know the instruction"),
        ("wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 x;", "no register"),
    ],
)
def test_what_is_not_emulated_is_named(text: str, words: str) -> None:
    kernel = f'extern "C" __global__ void f(int* x) {{ int r = 0; asm("{text}" : "+r"(r)); }}'
    report = Emulator(kernel).run("f", 1, 128, [np.zeros(1, np.int32)])
    assert report.kinds() == {"instruction"} and words in report.findings[0].message


def test_clusters_are_not_emulated() -> None:
    kernel = 'extern "C" __global__ void __cluster_dims__({}, 1, 1) f(int* x) {{ *x = 1; }}'
    x = np.zeros(1, np.int32)
    assert Emulator(kernel.format(1)).run("f", 1, 1, [x]).ok and x[0] == 1
    with pytest.raises(EmulatorError, match=r"line 1: clusters of more than one block"):
        Emulator(kernel.format(2)).run("f", 1, 1, [x])


# ---- every type, in the smallest product: 64 x 8, of rows of 32 bytes

#: types of both sides, and what follows the descriptors
TYPES = [
    ("f32", "f16", "f16", "1, 1, 1, 0, 0"),
    ("f32", "bf16", "bf16", "1, 1, 1, 0, 0"),
    ("f32", "tf32", "tf32", "1, 1, 1"),
    ("f32", "e4m3", "e5m2", "1, 1, 1"),
    ("f32", "e5m2", "e4m3", "1, -1, 1"),
    ("s32", "s8", "u8", "1"),
    ("s32", "u8", "s8", "1"),
]


def typed_kernel(d: str, a: str, b: str, options: str) -> str:
    depth = {"f16": 16, "bf16": 16, "tf32": 8}.get(a, 32)
    c, constraint = ("float", "f") if d == "f32" else ("int", "r")
    outputs = ", ".join(f'"+{constraint}"(d[{i}])' for i in range(4))
    return f"""
extern "C" __global__ void {a}_{b}(const uint4* a, const uint4* b, {c}* y) {{
    __shared__ __align__(128) uint4 left[128], right[16];
    int t = threadIdx.x;
    left[t / 16 * 16 + t % 2 * 8 + t / 2 % 8] = a[t];
    if (t < 16) right[t % 2 * 8 + t / 2] = b[t];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    unsigned long long la = (__cvta_generic_to_shared(left) & 0x3ffff) >> 4 | 8ull << 16;
    unsigned long long lb = (__cvta_generic_to_shared(right) & 0x3ffff) >> 4 | 8ull << 16;
    la |= 16ull << 32;
    lb |= 16ull << 32;
    {c} d[4] = {{}};
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k{depth}.{d}.{a}.{b} "
                 "{{%0, %1, %2, %3}}, %4, %5, {options};" : {outputs} : "l"(la), "l"(lb));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    for (int i = 0; i < 4; i++)
        y[(t / 32 * 16 + t % 32 / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2] = d[i];
}}
"""


def numbers(raw: npt.NDArray[np.uint8], kind: str) -> npt.NDArray[np.float64]:
    """What bytes mean, by numpy or by hand."""
    if kind in ("s8", "u8"):
        return raw.view("i1" if kind == "s8" else "u1").astype(np.float64)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if kind == "tf32":  # the low 13 bits are not there
        return (raw.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)
    if kind == "e5m2":
        return (raw.astype(np.uint16) << 8).view(np.float16).astype(np.float64)
    exponent, fraction = raw >> 3 & 15, (raw & 7).astype(np.float64)
    size = np.where(exponent, (8 + fraction) * 2.0 ** (exponent.astype(float) - 10), fraction / 512)
    return np.where(raw & 0x80, -size, size)


@pytest.fixture(scope="module")
def typed() -> Emulator:
    return Emulator("".join(typed_kernel(*one) for one in TYPES))


@pytest.mark.parametrize(("d", "a", "b", "options"), TYPES, ids=lambda v: v if v.isalnum() else "")
def test_types(typed: Emulator, d: str, a: str, b: str, options: str) -> None:
    raw = [RNG.integers(0, 256, (rows, 32), np.uint8) for rows in (64, 8)]
    for side, kind in zip(raw, (a, b), strict=True):
        if kind == "e4m3":
            side[side & 0x7F == 0x7F] = 0  # NaN
        elif kind in ("f16", "bf16", "tf32", "e5m2"):  # no huge numbers, and none not finite
            width = {"tf32": 4, "e5m2": 1}.get(kind, 2)
            side[:, width - 1 :: width] &= 0xBF
    y = np.zeros((64, 8), np.float32 if d == "f32" else np.int32)
    report = typed.run(f"{a}_{b}", 1, 128, [*raw, y])
    assert report.ok, report
    want = numbers(raw[0], a) @ numbers(raw[1], b).T * (-1 if "-1" in options else 1)
    scale = np.abs(numbers(raw[0], a)) @ np.abs(numbers(raw[1], b)).T
    # sums are float32, of which the smallest have fewer bits
    assert (np.abs(y - want) <= 1e-6 * scale + 1e-40).all()


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
def test_the_kernels_are_cuda(tmp_path: Path) -> None:
    """NVIDIA's compiler takes them."""
    path = tmp_path / "all.cu"
    path.write_text(TEXT + "".join(typed_kernel(*one) for one in TYPES))
    command = ["nvcc", "-arch=sm_90a", "-cubin", "-o", str(tmp_path / "out.cubin"), str(path)]
    subprocess.run(command, check=True, timeout=120)
