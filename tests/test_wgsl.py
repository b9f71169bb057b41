"""The WGSL target: on whatever adapter is here (llvmpipe, where there is no GPU), in Tint, which is
the compiler of browsers, and in a browser."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

import kernelgen
from kernelgen import targets
from kernelgen.files import contents
from kernelgen.generate import generate, generate_walk
from kernelgen.ir import BlockFormat, formats
from kernelgen.ir.layout import named_layout
from kernelgen.ir.ops import matmul
from kernelgen.problem import relative_error
from kernelgen.targets.base import Kernel
from kernelgen.targets.wgsl import runtime as wgsl
from kernelgen.tensor import QuantTensor
from kernelgen.verify import sample_weights
from kernelgen.verify_epilogue import KINDS
from tests import device_checks as checks
from tests.test_numpy_target import ODD

TARGET = targets.get("wgsl")
LAYOUTS = ("native", "planes")
HERE = Path(__file__).parent
BUILD = HERE.parent / "build"


def name(fmt: BlockFormat) -> str:
    return fmt.name


# ---- run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", (*checks.SAMPLE, *checks.MADE_UP), ids=name)
def test_verified(fmt: BlockFormat) -> None:
    checks.passes_verify(TARGET, fmt)


@pytest.mark.parametrize("fmt", checks.MADE_UP, ids=name)
def test_native_layout(fmt: BlockFormat) -> None:
    """Where they were verified above, kernels read planes."""
    walks = list(checks.walks(TARGET, fmt))
    assert {w.config().as_dict()["layout"] for w in walks} == {"planes"}
    assert checks.passes_with(TARGET, fmt, layout="native") == len(walks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fmt", checks.most_slow(formats.FORMATS), ids=name)
def test_all_formats_in_all_layouts(fmt: BlockFormat, layout: str) -> None:
    checks.passes_with(TARGET, fmt, every_case=True, layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", (*checks.SAMPLE, *checks.MADE_UP), ids=name)
def test_configs_at_random(fmt: BlockFormat) -> None:
    checks.some_configs(TARGET, fmt, 3)


@pytest.mark.parametrize("fmt", (formats.get("q5_0"), formats.get("f16")), ids=name)
def test_edge_shapes(fmt: BlockFormat) -> None:
    checks.edge_shapes(TARGET, fmt)


@pytest.mark.parametrize("fmt", (formats.get("q6_K"), checks.THREE_BITS), ids=name)
def test_outputs(fmt: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.outputs_written_and_kept(TARGET, fmt, monkeypatch)


@pytest.mark.parametrize("fmt", (formats.get("q4_0"), formats.get("f16")), ids=name)
def test_not_finite(fmt: BlockFormat) -> None:
    checks.not_finite_stays_in_its_row(TARGET, fmt)


@pytest.mark.parametrize("fmt", (formats.get("q4_0"), checks.THREE_BITS), ids=name)
def test_pieces(fmt: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.pieces_change_nothing(TARGET, fmt, monkeypatch)


def test_weights_over_the_limit_of_the_device() -> None:
    """As above, but with no limit made smaller."""
    found, fmt, k = checks.runtime(TARGET), formats.get("q8_0"), 4096
    border = found.driver().largest // fmt.row_bytes(k)
    if border > 100_000:
        pytest.skip("a binding holds more than this test cares to fill")
    n = border + 5
    w = QuantTensor(fmt, (n, k), np.resize(sample_weights(fmt, 7, k), (n, fmt.row_bytes(k))))
    assert w.nbytes > found.driver().largest
    x = np.random.default_rng(0).standard_normal((1, k), np.float32)
    y = kernelgen.matmul(x, w, target=TARGET.name, precision="fp32")
    (pieces,) = w.prepared.values()
    assert [(p.start, p.stop) for p in pieces] == [(0, border), (border, n)]
    exact = w[:7].dequantize()
    assert relative_error(y, np.resize(matmul(x, exact), (1, n))) < 1e-5
    ids = np.array([n - 1, 0, border, border - 1])
    got = kernelgen.get_rows(w, ids, target=TARGET.name)
    np.testing.assert_array_equal(got, exact[ids % 7])


@pytest.mark.parametrize("fmt", (formats.get("q4_0"), formats.get("f16")), ids=name)
def test_large_grids(fmt: BlockFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.more_groups_than_a_grid_has(TARGET, fmt, monkeypatch)


@pytest.mark.parametrize(
    ("changes", "walks"),
    [
        ({"reduce": "shared"}, 2),
        ({"reduce": "subgroup", "threads": 32, "columns": 2}, 2),
        ({"dot": "plain"}, 2),
        ({"dot": "packed"}, 2),
    ],
    ids=str,
)
def test_variants(changes: dict[str, Any], walks: int) -> None:
    caps = checks.runtime(TARGET).capabilities()
    needed = {"subgroup": "subgroups"}
    for feature in {needed[v] for v in changes.values() if v in needed} - caps.features:
        pytest.skip(f"this adapter lacks {feature}")
    for fmt in (formats.get("q4_K"), formats.get("q8_0")):
        assert checks.passes_with(TARGET, fmt, **changes) == walks


SUBGROUPS = """
import sys
from kernelgen import targets
from kernelgen.ir import formats
from tests import device_checks as checks
target = targets.get("wgsl")
runtime = target.runtime()
print({d["subgroup_size"] for d in runtime.describe() if d["subgroups"]})
for name in sys.argv[1:]:
    fmt = formats.get(name)
    for one in checks.walks(target, fmt):
        if one.op == "matvec":
            for threads in (32, 256):
                config = checks.changed(one, runtime, reduce="subgroup", threads=threads)
                kernel = checks.generate(one.op, fmt, target, config, one.precision)
                checks.error_of(kernel, runtime, [(1, 5, 4 * fmt.block), (3, 7, 64 * fmt.block)])
"""


@pytest.mark.parametrize("bits", (128, 256, 512))
def test_subgroups_of_all_sizes(bits: int) -> None:
    """llvmpipe's subgroups are the lanes of a vector register, whose size can be chosen."""
    found = checks.runtime(TARGET)
    if not found.describe()[0]["device"].startswith("llvmpipe"):
        pytest.skip("the size of subgroups can be chosen with llvmpipe only")
    run = subprocess.run(
        [sys.executable, "-c", SUBGROUPS, "q6_K", "f16"],
        env=os.environ | {"LP_NATIVE_VECTOR_WIDTH": str(bits), "PYTHONPATH": "."},
        cwd=HERE.parent, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip() == str({bits // 32})


def test_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checks.prepared_once(TARGET, monkeypatch)


def test_many_threads() -> None:
    checks.many_threads(TARGET)


def test_rejections() -> None:
    checks.rejections_show_the_line(
        TARGET,
        [
            ("part[i * THREADS + thread]", "part[i * THREDS + thread]", "THREDS"),
            ("let row0: u32 =", "let row0: u32 +", "expected"),
            ("let row0: u32 =", "let row0: f32 =", "`f32`"),
        ],
    )


def test_features_are_named() -> None:
    marks = {"dot": "dot4I8Packed", "fp16": "enable f16;", "subgroups": "enable subgroups;"}
    checks.features_are_named(TARGET, marks)
    for kernel in checks.texts(TARGET, formats.get("q4_0")):
        assert "enable" not in kernel.source or kernel.features  # none for what browsers lack


def test_manifest_names_features_of_webgpu() -> None:
    fmt = formats.get("q4_0")
    config = TARGET.walk("matvec", fmt, "int8").config.from_dict(
        {"dot": "packed", "reduce": "subgroup", "layout": "planes"}
    )
    text = contents(TARGET, [generate("matvec", fmt, TARGET, config, "int8")])["manifest.json"]
    (entry,) = json.loads(text)["kernels"]
    assert entry["features"] == ["subgroups", "packed_4x8_integer_dot_product"]
    # a host without kernelgen repacks by this
    n, k = 3, 64
    data = sample_weights(fmt, n, k)
    packed, count = np.zeros(data.size, np.uint8), n * k // fmt.block
    for plane in entry["planes"]:
        for i, block in enumerate(data.reshape(count, -1)):
            at = plane["start"] * count + i * plane["bytes"]
            field = block[plane["offset"] : plane["offset"] + plane["bytes"]]
            packed[at : at + plane["bytes"]] = field
    np.testing.assert_array_equal(packed, named_layout("planes").pack(data, fmt, k))


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    wgpu = pytest.importorskip("wgpu")
    find: Any = wgsl.find_adapter.__wrapped__

    def none(**options: Any) -> None:
        raise RuntimeError("no suitable adapter\nand much more")

    monkeypatch.setattr(wgpu.gpu, "request_adapter_sync", none)
    said = find()
    assert "no suitable adapter)" in said and "install" in said and "\n" not in said
    monkeypatch.setitem(sys.modules, "wgpu", None)
    checks.one_sentence(find())
    monkeypatch.setattr(wgsl, "find_adapter", find)
    checks.one_sentence(wgsl.WgpuRuntime().available())


def test_devices_are_described() -> None:
    found = checks.runtime(TARGET).describe()
    assert found
    for one in found:
        assert one["max_threads"] > 0 and one["shared_bytes"] > 0 and one["largest_buffer"] > 0
        assert one["subgroups"] == (one.get("subgroup_size", 0) > 0)
        assert one["largest_binding"] <= one["largest_buffer"] and one["driver"] and one["kind"]


def test_looking_for_devices_is_quiet() -> None:
    """Also where there is no display."""
    checks.runtime(TARGET)
    look = "from kernelgen import targets; print(len(targets.get('wgsl').runtime().describe()))"
    environment = {k: v for k, v in os.environ.items() if k != "XDG_RUNTIME_DIR"}
    run = subprocess.run(
        [sys.executable, "-c", look], env=environment | {"PYTHONPATH": "."}, cwd=HERE.parent,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(run.stdout) > 0 and run.stderr == ""


@pytest.mark.parametrize("nbytes", (4, 5, 4096, wgsl._SMALL, wgsl._SMALL + 4, wgsl._SMALL + 6))
def test_download(nbytes: int) -> None:
    """Both ways to read a buffer, and sizes that are no whole words."""
    driver = checks.runtime(TARGET).driver()
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    out = np.zeros_like(data)
    driver.download(driver.upload(data), out)
    np.testing.assert_array_equal(out, data)


# ---- Tint ---------------------------------------------------------------------------------------


def _install(folder: Path) -> None:
    """Fetch Tint; skips the test where no registry is in reach.  What one process was told, those
    that wait for it need not hear again."""
    failed = folder / ".failed"
    if not failed.exists() or time.time() - failed.stat().st_mtime > 60:
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0"]
        npm = subprocess.run(
            [*command, "--fetch-timeout=30000"], cwd=folder, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if npm.returncode == 0:
            (folder / ".installed").touch()
            return
        said = [s for s in npm.stderr.splitlines() if s.startswith(("npm error", "npm ERR!"))]
        failed.write_text(next((s for s in said if "reason:" in s), " ".join(said[:1])))
    pytest.skip(f"npm could not install Tint: {failed.read_text() or 'no reason given'}")


@pytest.fixture(scope="session")
def tint() -> Path:
    """A folder with Tint for node and the script that runs it; made once, in build/."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no node and npm on the path; on Debian: apt-get install nodejs npm")
    folder = BUILD / "tint"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        for one in ("package.json", "package-lock.json", "check.mjs"):
            text = (HERE / "tint" / one).read_text()
            if not (folder / one).exists() or (folder / one).read_text() != text:
                (folder / one).write_text(text)
                (folder / ".installed").unlink(missing_ok=True)
        if not (folder / ".installed").exists():
            _install(folder)
    return folder


def rejected(tint: Path, kernels: Iterable[Kernel]) -> dict[str, list[str]]:
    """What Tint says about kernels that it does not take."""
    shaders = [
        {"name": f"{k.entry} {k.config}", "entry": k.entry, "source": k.source} for k in kernels
    ]
    assert shaders
    run = subprocess.run(
        ["node", "check.mjs"], cwd=tint, input=json.dumps(shaders), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["features"] == ["shader-f16", "subgroups"]
    found: dict[str, list[str]] = result["rejected"]
    return found


@pytest.mark.parametrize("fmt", (*checks.SAMPLE, *checks.MADE_UP), ids=name)
def test_tint_takes_every_variant(tint: Path, fmt: BlockFormat) -> None:
    assert rejected(tint, checks.texts(TARGET, fmt)) == {}


def test_tint_takes_all_formats(tint: Path) -> None:
    every = (*formats.FORMATS, *checks.MADE_UP, *ODD)
    assert rejected(tint, (k for f in every for k in checks.texts(TARGET, f))) == {}


def test_tint_takes_epilogues(tint: Path) -> None:
    """Up to three operands beside quantized activations: of storage buffers there are eight."""
    fmt, made = formats.get("q4_K"), {}
    for one in (w for w in TARGET.walks if w.op in ("matvec", "matmul")):
        for kind in ("gelu_tanh", "gated_own", "rms_swiglu"):
            kernel = generate_walk(one, fmt, TARGET, None, KINDS[kind])
            made |= {each.entry: each for each in (kernel, *kernel.needs.values())}
    assert rejected(tint, made.values()) == {}


def test_tint_rejects(tint: Path) -> None:
    """What naga lets through: a barrier that not all threads reach, a feature not enabled."""
    fmt = formats.get("q4_0")
    kernel = next(k for k in checks.texts(TARGET, fmt) if k.features == ("subgroups",))
    broken = {
        "barrier": ("workgroupBarrier();", "if (thread < 3u) { workgroupBarrier(); }"),
        "enable": ("enable subgroups;", ""),
        "name": ("let m0", "let m_0"),
    }
    kernels = [
        dataclasses.replace(kernel, entry=kernel.entry, source=kernel.source.replace(a, b, 1))
        for a, b in broken.values()
    ]
    for wrong, one in zip(broken, kernels, strict=True):
        (messages,) = rejected(tint, [one]).values()
        assert messages and messages[0].startswith("line "), wrong


# ---- a browser ----------------------------------------------------------------------------------

#: as Playwright starts it, on the software device that comes with it
CHROMIUM = (
    "--headless=new", "--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run", "--disable-gpu-sandbox",
)  # fmt: skip


class Page(http.server.BaseHTTPRequestHandler):
    """Serves the page and its jobs, and takes the results; `server` has `jobs` and `results`."""

    def do_GET(self) -> None:
        server: Any = self.server
        jobs = json.dumps(server.jobs).encode()
        body, kind = {
            "/": ((HERE / "browser.html").read_bytes(), "text/html"),
            "/jobs": (jobs, "application/json"),
        }.get(self.path, (b"", "text/plain"))
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.results.update(json.loads(body))
        self.send_response(204)
        self.end_headers()
        server.done.set()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test is quiet."""


def in_browser(jobs: list[dict[str, Any]], profile: Path, seconds: float) -> dict[str, Any]:
    """What the page makes of the jobs in headless Chromium."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium on the path; on Debian: apt-get install chromium")
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    server.jobs, server.results, server.done = jobs, {}, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    command = [browser, *CHROMIUM, f"--user-data-dir={profile}", address]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert server.done.wait(seconds), f"the browser said nothing for {seconds} s"
    finally:
        process.terminate()
        process.wait(30)
        server.shutdown()
    found: dict[str, Any] = server.results
    return found


def browser_kernels() -> Iterator[Kernel]:
    for fmt in ("q4_K", "q6_K", "mxfp4"):
        walk = TARGET.walk("matvec", formats.get(fmt), "fp32")
        for reduce in ("shared", "subgroup"):
            for layout in LAYOUTS:
                config = walk.config.from_dict({"reduce": reduce, "layout": layout, "columns": 2})
                yield generate("matvec", formats.get(fmt), TARGET, config, "fp32")


def test_runs_in_a_browser(tmp_path: Path) -> None:
    """A page that knows nothing of kernelgen but the manifest runs the kernels."""
    jobs, wanted = [], {}
    m, n = 3, 37
    for number, kernel in enumerate(browser_kernels()):
        fmt = kernel.format
        k = 3 * fmt.block
        w = QuantTensor(fmt, (n, k), sample_weights(fmt, n, k))
        x = np.random.default_rng(number).standard_normal((m, k), np.float32)
        packed = named_layout(kernel.config.as_dict()["layout"]).pack(w.data, fmt, k)
        packed = np.pad(packed, (0, -packed.size % 4))
        launch = kernel.walk.launch(kernel.config, fmt)
        assert launch is not None
        sizes = {"M": m, "N": n, "K": k}
        jobs.append({
            "name": str(number), "source": kernel.source, "entry": kernel.entry,
            "features": [TARGET.feature_names.get(f, f) for f in kernel.features],
            "inputs": [packed.tolist(), np.frombuffer(x.tobytes(), np.uint8).tolist()],
            "output": 4 * m * n, "sizes": list(sizes.values()),
            "groups": [eval(text, {"min": min}, dict(sizes)) for text in launch.groups],
        })  # fmt: skip
        wanted[str(number)] = matmul(x, w.dequantize())
    results = in_browser(jobs, tmp_path / "profile", 120)
    assert results.get("error") is None, results["error"]
    assert results.keys() - {"adapter", "subgroups"} == wanted.keys()
    for number, want in wanted.items():
        got = np.array(results[number], np.uint8).view(np.float32).reshape(m, n)
        assert relative_error(got, want) < 1e-5
