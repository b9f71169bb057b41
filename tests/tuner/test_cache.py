"""The file of winners: crashes, many writers, strange lines; moving entries about."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kernelgen.errors import FileError
from kernelgen.tuner import cache, ledger
from kernelgen.tuner.cache import Entry, Key
from kernelgen.tuner.device import Device, described

DEVICE = Device("Made Up 3000", "1.0", 4, "x9")


def entry(
    n: int = 64,
    seconds: float = 1e-3,
    time: str = "2026-01-01T00:00:00+00:00",
    m: int = 1,
    **key: Any,
) -> Entry:
    """An entry about nothing real."""
    named: dict[str, Any] = {
        "op": "matvec", "format": "q4_K", "precision": "auto", "target": "made up",
        "sizes": (("M", m), ("N", n), ("K", 256)), "device": DEVICE, "hash": "0" * 16,
    }  # fmt: skip
    return Entry(
        Key(**(named | key)), "walk", "int8", {"columns": 4}, seconds, (seconds,),
        {"walk": "walk", "config": {"columns": 2}, "seconds": 2 * seconds}, time=time, host="here",
    )  # fmt: skip


def test_an_entry_comes_back_as_it_was() -> None:
    one = entry()
    path = cache.append(one)
    assert cache.read(path) == [one] == cache.entries()
    assert path.parent == cache.folder() and "made-up-3000" in path.name
    assert one.ratio == 2


def test_the_last_of_a_key_wins() -> None:
    old, new = entry(), entry(seconds=2e-3, time="2026-01-02T00:00:00+00:00")
    other = entry(n=128)
    for one in (old, other, new):
        cache.append(one)
    assert cache.winners(cache.entries()) == [new, other]


def test_a_line_of_version_1_is_read() -> None:
    data = entry().as_dict()
    data["v"] = 1
    for name in ("front", "provenance", "runner_up", "rms_error"):
        del data[name]
    del data["key"]["objective"]
    data["key"] |= {name.lower(): size for name, size in data["key"].pop("sizes").items()}
    data["something new"] = 7
    found = cache.parse(json.dumps(data))
    assert isinstance(found, Entry)
    assert found.key == entry().key and found.provenance == ()


@pytest.mark.parametrize(
    "line",
    ["", "{", "7", "null", "[]", "{}", '{"v": 99}', '{"v": "x"}', '{"v": 2}', '{"v": 2, "key": 3}',
     json.dumps(entry().as_dict() | {"seconds": "quick"}),
     json.dumps(entry().as_dict() | {"seconds": -1}),
     json.dumps(entry().as_dict() | {"config": [1]}), "\x00\xff" * 20],
)  # fmt: skip
def test_what_is_no_entry_is_left_out(line: str) -> None:
    assert isinstance(cache.parse(line), str)
    path = cache.append(entry())
    cache.write_lines(path, [line])
    cache.append(entry(n=128))
    assert [one.key.shape[1] for one in cache.read(path)] == [64, 128]


def test_a_foreign_file_and_an_unreadable_one_harm_nothing(tmp_path: Path) -> None:
    cache.append(entry())
    (cache.folder() / "picture.jsonl").write_bytes(os.urandom(5000))
    (cache.folder() / "folder.jsonl").mkdir()
    assert len(cache.entries()) == 1


def test_a_torn_line_is_ignored_and_spoils_no_other() -> None:
    path = cache.append(entry())
    whole = path.read_bytes()
    for cut in (1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        assert len(cache.read(path)) == 1 + (cut == len(whole) - 1)  # all but the line break
        cache.append(entry(n=128))
        assert [one.key.shape[1] for one in cache.read(path)][-1] == 128
        assert cache.read(path)[0] == entry()


WRITER = """
import sys
sys.path.insert(0, {root!r})
from tests.tuner.test_cache import entry
from kernelgen.tuner import cache
number, path = int(sys.argv[1]), cache.folder() / "shared.jsonl"
print("ready", flush=True)
for count in range(1, 1_000_000):
    cache.append(entry(n=count, m=number), path)
    print(count, flush=True)
"""


def test_nothing_is_lost_when_writers_are_killed(tmp_path: Path) -> None:
    """Four writers at once, one after the other killed without warning, twenty times."""
    root = Path(__file__).resolve().parents[2]
    script = tmp_path / "writer.py"
    script.write_text(WRITER.format(root=str(root)))
    said: dict[int, Path] = {}
    running: dict[int, subprocess.Popen[bytes]] = {}
    environment = os.environ | {"PYTHONPATH": str(root)}

    def start(number: int) -> None:
        said[number] = tmp_path / f"said-{number}"
        with said[number].open("wb") as file:
            running[number] = subprocess.Popen(
                [sys.executable, str(script), str(number)], stdout=file, env=environment
            )

    def lines(number: int) -> list[bytes]:
        return said[number].read_bytes().split(b"\n")[:-1]

    try:
        for number in range(1, 5):
            start(number)
        deadline = time.monotonic() + 300  # of a busy machine
        for kill in range(20):
            victim = kill + 1
            while len(lines(victim)) < 4:
                assert time.monotonic() < deadline, "writers do not get on"
                time.sleep(0.005)
            running[victim].send_signal(signal.SIGKILL)
            running.pop(victim).wait()
            if kill + 5 <= 20:
                start(kill + 5)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    path = cache.folder() / "shared.jsonl"
    found = {one.key.shape[:2] for one in cache.read(path)}
    for number in said:
        for count in map(int, lines(number)[1:]):  # what a writer said is written
            assert (number, count) in found
    cache.append(entry(n=7, m=99), path)
    assert cache.read(path)[-1].key.shape[0] == 99


def test_an_entry_moves_between_machines(tmp_path: Path) -> None:
    old, new = entry(), entry(seconds=5e-4, time="2026-02-01T00:00:00+00:00")
    other = entry(n=128)
    theirs = tmp_path / "theirs.jsonl"
    assert ledger.export(theirs, [new, other]) == 2
    cache.append(old)
    found, wrong = ledger.load(theirs)
    assert (found, wrong) == ([new, other], [])
    done = ledger.merge(found, "theirs.jsonl")
    assert [a for a, _ in done.replaced] == [old] and done.added == [other]
    winners = cache.winners(cache.entries())
    assert {one.seconds for one in winners} == {5e-4, 1e-3}
    assert all(one.provenance == ("theirs.jsonl",) for one in winners)
    again = ledger.merge(found, "theirs.jsonl")
    assert len(again.known) == 2 and not again.added and not again.replaced
    assert ledger.merge([old], "old.jsonl").kept  # the later one stays
    with pytest.raises(FileError, match="no file"):
        ledger.load(tmp_path / "nowhere")


def test_the_same_time_is_decided_by_trials_then_speed() -> None:
    one = entry()
    assert ledger.wins(dataclasses.replace(one, trials=9), one)
    assert ledger.wins(entry(seconds=1e-4), one) and not ledger.wins(one, one)


def test_prune_takes_what_serves_nothing() -> None:
    path = cache.append(entry())
    cache.append(entry(seconds=2e-3, time="2026-01-02T00:00:00+00:00"))
    cache.write_lines(path, ["garbage", '{"v": 99, "from": "the future"}'])
    done = ledger.prune({})
    assert (done.replaced, done.damaged, done.stale) == (1, 1, 0)
    assert "the future" in path.read_text() and len(cache.read(path)) == 1
    assert ledger.prune({}, stale_too=True).stale == 1
    assert cache.read(path) == []


def test_devices_are_told_apart() -> None:
    one = described({"device": "GPU 4090", "compute_capability": "8.9", "multiprocessors": 128})
    assert one == Device("GPU 4090", "", 128, "8.9") and one.family == "8.9"
    sibling = dataclasses.replace(one, name="GPU 4080", units=76)
    assert one.unlike(one) == (0, 0) < (one.unlike(sibling) or ())
    assert one.unlike(Device("other", isa="9.0")) is None
    assert Device("Radeon RX 7900").unlike(Device("Radeon RX 7600")) is not None
    assert one.digest != sibling.digest
