"""Which entry serves a problem, and what is used then."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kernelgen
from kernelgen import api, targets
from kernelgen.config import RowTileConfig
from kernelgen.errors import TuningError
from kernelgen.generate import generate_walk
from kernelgen.ir import formats
from kernelgen.ir.ops import library
from kernelgen.targets.base import Runtime, Target
from kernelgen.tuner import cache, ledger, lookup, space
from kernelgen.tuner.cache import Entry, Key
from kernelgen.tuner.device import Device, of
from tests.tuner import made_up_target
from tests.tuner.made_up_target import SMALL, needs_c

Q8 = formats.get("q8_0")


def entry(
    pair: tuple[Target, Runtime], size: int = 1, where: Path | None = None, **changed: Any
) -> Entry:
    """An entry for SMALL, written."""
    target, runtime = pair
    one = space.walks(target, SMALL)[0]
    sizes = {"m": 1, "n": 64, "k": 256}
    names = {"config", "walk", "used", "seconds", "time"}
    key: dict[str, Any] = {
        "op": "matvec", "format": "q8_0", "precision": "auto", "target": target.name,
        "device": of(target, runtime),
        "hash": space.walk_hash(one, Q8, target),
    }  # fmt: skip
    sizes = {name.upper(): changed.pop(name, size) for name, size in sizes.items()}
    key["sizes"] = tuple(sizes.items())
    key |= {name: value for name, value in changed.items() if name not in names}
    values = {name: value for name, value in changed.items() if name in names}
    given: dict[str, Any] = {
        "walk": one.name, "used": one.precision, "config": {"kind": "good", "size": size},
        "seconds": 1e-3, "time": "2026",
    }  # fmt: skip
    made = Entry(Key(**key), **(given | values))
    cache.append(made, where / "made-up.jsonl" if where else None)
    return made


def chosen(pair: tuple[Target, Runtime], **changed: Any) -> tuple[str, int]:
    choice = lookup.choose_for(*pair, dataclasses.replace(SMALL, **changed))
    return choice.rule, choice.config.as_dict()["size"]


def test_entries_are_looked_up_in_order(
    made_up: tuple[Target, Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "presets", lambda: tmp_path / "presets")
    sibling = Device("Made Up 2000", "1.0", 2)
    assert chosen(made_up) == (lookup.DEFAULT, 1)
    entry(made_up, 2, tmp_path / "presets")
    assert chosen(made_up) == (lookup.PRESET, 2)
    entry(made_up, 4, device=sibling)
    assert chosen(made_up) == (lookup.FAMILY, 4)
    entry(made_up, 8, n=128)
    assert chosen(made_up) == (lookup.NEAREST, 8)
    entry(made_up, 2)
    assert chosen(made_up) == (lookup.EXACT, 2)
    assert chosen(made_up, n=120) == (lookup.NEAREST, 8)
    assert chosen(made_up, n=64 * 1024) == (lookup.DEFAULT, 1)
    rules = [found.rule for found in lookup.search(*made_up, SMALL)]
    assert rules == [lookup.EXACT, lookup.NEAREST, lookup.FAMILY, lookup.PRESET]


@pytest.mark.parametrize(
    "changed",
    [{"hash": "1" * 16}, {"walk": "gone"}, {"config": {"kind": "good", "colour": 3}},
     {"config": {"kind": "strange", "size": 1}}, {"config": {"kind": "nan", "size": 2}},
     {"config": {"kind": ["good"]}}, {"device": Device("Other", "1.0", 4)}, {"format": "q4_0"},
     {"target": "other"}, {"precision": "fp32"}, {"op": "matmul"}, {"objective": "energy"},
     {"m": 4}],
)  # fmt: skip
def test_what_does_not_fit_is_not_used(
    made_up: tuple[Target, Runtime], changed: dict[str, Any]
) -> None:
    entry(made_up, **changed)
    assert chosen(made_up)[0] == lookup.DEFAULT


def test_an_auto_winner_serves_the_precision_it_computes_in(
    made_up: tuple[Target, Runtime],
) -> None:
    used = space.walks(made_up[0], SMALL)[0].precision
    entry(made_up, 4)
    assert chosen(made_up, precision=used) == (lookup.EXACT, 4)
    other = {"int8": "fp32", "fp32": "int8"}[used]
    assert chosen(made_up, precision=other)[0] == lookup.DEFAULT


def test_rows_of_a_bucket_share_an_entry(made_up: tuple[Target, Runtime]) -> None:
    one = next(w for w in made_up[0].walks if w.op == "matmul" and w.precision == "int8")
    digest = space.walk_hash(one, Q8, made_up[0])
    entry(made_up, 4, op="matmul", m=100, walk=one.name, used="int8", hash=digest)
    assert chosen(made_up, m=128) == chosen(made_up, m=65) == (lookup.EXACT, 4)
    assert chosen(made_up, m=129) == (lookup.NEAREST, 4)
    assert chosen(made_up, m=600)[0] == lookup.DEFAULT


def test_few_rows_say_nothing_of_other_numbers_of_them(made_up: tuple[Target, Runtime]) -> None:
    entry(made_up, 4, m=1)
    assert chosen(made_up, m=1) == (lookup.EXACT, 4)
    assert chosen(made_up, m=1, n=128) == (lookup.NEAREST, 4)
    assert chosen(made_up, m=2)[0] == lookup.DEFAULT
    entry(made_up, 2, m=8)
    assert chosen(made_up, m=7)[0] == lookup.DEFAULT


def test_a_miss_can_be_an_error(
    made_up: tuple[Target, Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(lookup.REQUIRE, "1")
    with pytest.raises(TuningError, match=r"--shape 1x64x256"):
        chosen(made_up)
    entry(made_up, 2)
    assert chosen(made_up) == (lookup.EXACT, 2)
    numpy = targets.get("numpy")  # it has nothing to choose
    assert lookup.choose_for(numpy, numpy.runtime(), SMALL).rule == lookup.DEFAULT


def test_the_hash_sees_the_format_and_the_walk() -> None:
    c, opencl = targets.get("c"), targets.get("opencl")
    walk = space.walks(c, SMALL)[0]
    one = space.walk_hash(walk, Q8, c)
    assert one == space.walk_hash(walk, Q8, c)
    assert one != space.walk_hash(walk, formats.get("q4_0"), c)
    other = space.walks(opencl, SMALL)[0]
    assert one != space.walk_hash(other, Q8, opencl)


@needs_c
def test_matmul_computes_with_what_the_cache_says(monkeypatch: pytest.MonkeyPatch) -> None:
    target = targets.get("c")
    runtime = target.runtime()
    walk = space.walks(target, SMALL)[0]
    config = RowTileConfig(columns=3, layout="native")
    key = Key("matvec", "q8_0", "auto", "c", tuple(SMALL.sizes.items()), of(target, runtime),
              space.walk_hash(walk, Q8, target))  # fmt: skip
    cache.append(Entry(key, walk.name, walk.precision, config.as_dict(), 1e-3))
    api._matmul_runner.cache_clear()
    used: list[Any] = []
    inner = type(runtime).matmul
    monkeypatch.setattr(
        type(runtime), "matmul", lambda self, kernel: used.append(kernel) or inner(self, kernel)
    )
    rng = np.random.default_rng(0)
    w = kernelgen.quantize(rng.standard_normal((64, 256), np.float32), "q8_0")
    x = rng.standard_normal((1, 256), np.float32)
    got = kernelgen.matmul(x, w, target="c")
    api._matmul_runner.cache_clear()
    assert used[0].config == config
    assert np.abs(got - x @ w.dequantize().T).max() < 0.05 * np.abs(got).max()


def test_an_entry_answers_only_for_the_error_that_was_asked_for(
    made_up: tuple[Target, Runtime],
) -> None:
    """One found under a wider gate may err too much; one under a narrower gate may be slow."""
    entry(made_up, 4)
    assert chosen(made_up) == (lookup.EXACT, 4)
    assert chosen(made_up, max_error=1e-3)[0] == lookup.DEFAULT
    entry(made_up, 8, max_error=1e-3)
    assert chosen(made_up, max_error=1e-3) == (lookup.EXACT, 8)
    assert chosen(made_up) == (lookup.EXACT, 4)
    for other in (1e-2, 1e-4):
        assert chosen(made_up, max_error=other)[0] == lookup.DEFAULT
    # both stay, as they have different keys
    assert len(cache.winners(cache.entries())) == 2


def test_where_nobody_measured_a_bound_float32_serves(made_up: tuple[Target, Runtime]) -> None:
    def precision(**changed: Any) -> str:
        return lookup.choose_for(*made_up, dataclasses.replace(SMALL, **changed)).walk.precision

    assert precision() == "int8" and precision(max_error=1e-3) == "fp32"
    assert precision(max_error=1e-3, precision="int8") == "int8"  # asked for by name


def test_an_entry_of_version_2_was_left_to_the_precision() -> None:
    data = json.loads(cache.dumps(entry(made_up_target.factory())))
    assert data["v"] == cache.VERSION and data["key"]["max_error"] is None
    data["v"] = 2
    del data["key"]["max_error"]
    data["key"] |= {name.lower(): size for name, size in data["key"].pop("sizes").items()}
    found = cache.parse(json.dumps(data))
    assert isinstance(found, Entry) and found.key.max_error is None


@needs_c
def test_matmul_keeps_to_a_largest_error() -> None:
    """Rounded activations err by thousandths, float32 by millionths."""
    rng = np.random.default_rng(1)
    w = kernelgen.quantize(rng.standard_normal((64, 256), np.float32), "q8_0")
    x = rng.standard_normal((3, 256), np.float32)
    exact = x.astype(np.float64) @ w.dequantize().astype(np.float64).T

    def error(**options: Any) -> float:
        off = kernelgen.matmul(x, w, target="c", **options) - exact
        return float(np.sqrt(np.mean(off**2) / np.mean(exact**2)))

    assert error(max_error=1e-4) < 1e-5 < 1e-3 < error()


def test_the_preset_of_the_nearest_device_serves(
    made_up: tuple[Target, Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model first, whatever its driver; then the family's, by the number of units."""
    shipped = tmp_path / "presets"
    monkeypatch.setattr(cache, "presets", lambda: shipped)
    this = of(*made_up)
    far, near = (Device(f"Made Up {n}", "1.0", units) for n, units in ((9000, 64), (4000, 6)))
    for size, one in ((2, far), (4, near), (8, dataclasses.replace(this, driver="0.9"))):
        assert chosen(made_up)[1] < size
        made = entry(made_up, size, device=one)
        ledger.export(shipped / f"{size}.jsonl", [made], preset=True)
        cache.path_of("made up", one).unlink()
        assert chosen(made_up) == (lookup.PRESET, size)
    entry(made_up, 2)  # what was measured here goes before what is shipped
    assert chosen(made_up) == (lookup.EXACT, 2)


def test_entries_outlive_changes_of_headers_that_they_do_not_include() -> None:
    """The headers of one kernel are all that its hash is of, also those that headers include."""
    target = targets.get("c")

    def included(op: str, subject: Any) -> set[str]:
        kernel = generate_walk(target.walk(op, subject), subject, target)
        return set(space._included(kernel.source, target))

    names = {
        "matvec": included("matvec", formats.get("q4_K")),
        "map": included("map", library.get("silu")),
    }
    assert {"words.h", "words_avx512.h", "words_plain.h"} <= names["matvec"] & names["map"]
    assert "words_maps.h" in names["map"] and "words_maps.h" not in names["matvec"]
    assert names["map"] <= set(target.support_files)
