"""Many processes on one study: nothing is lost, and nothing is measured twice."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernelgen.models.ranks.local import free_port
from kernelgen.tuner import space
from tests.tuner import made_up_target
from tests.tuner.made_up_target import SMALL

pytest.importorskip("optuna")
pytestmark = pytest.mark.slow  # one process is waited for until it is taken for dead

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 4


def postgres_tools() -> Path | None:
    """The folder of initdb and pg_ctl; Debian keeps it off the path."""
    found = shutil.which("pg_ctl")
    if found:
        return Path(found).parent
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    return places[-1].parent if places else None


def unprivileged() -> dict[str, Any]:
    """How to start a program that refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    import pwd

    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root, and there is no other user to run it")


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a database server that lives as long as these tests."""
    tools = postgres_tools()
    if tools is None:
        pytest.skip("needs PostgreSQL (on Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="needs psycopg, PostgreSQL's driver")
    import tempfile

    # not below pytest's own folder, which only we may enter
    with tempfile.TemporaryDirectory() as folder:
        user = unprivileged()
        data = Path(folder) / "data"
        os.chmod(folder, 0o755)
        data.mkdir()
        if user:
            os.chown(data, user["user"], user["group"])
        port = free_port()

        def call(*command: str) -> None:
            done = subprocess.run(
                [str(tools / command[0]), "-D", str(data), *command[1:]],
                cwd=data, capture_output=True, text=True, timeout=120, **user,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr

        call("initdb", "-U", "tuner", "--auth", "trust", "--no-sync", "-E", "UTF8", "--locale", "C")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {data} -c fsync=off"
        call("pg_ctl", "start", "-w", "-o", options, "-l", str(data / "log"))
        try:
            yield f"postgresql+psycopg://tuner@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "stop", "-m", "immediate")


def start(url: str, log: Path, number: int, hang: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.tuner.fleet", url, str(log), str(number), str(hang)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def said(log: Path) -> list[list[Any]]:
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def fleet(url: str, folder: Path) -> None:
    """Four processes, of which one is killed in the middle of a measurement."""
    log = folder / "log"
    workers = [start(url, log, n, hang=2 if n == 0 else 0) for n in range(WORKERS)]
    try:
        deadline = time.monotonic() + 90
        while not any(what == "hangs" for what, *_ in said(log)):
            assert time.monotonic() < deadline, "the one that is to be killed never got to work"
            assert workers[0].poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        workers[0].send_signal(signal.SIGKILL)
        results = [json.loads(one.communicate(timeout=120)[0]) for one in workers[1:]]
    finally:
        for one in workers:
            one.kill()
            one.wait()
    target, runtime = made_up_target.factory()
    every = {one.id for one in space.explore(target, runtime.capabilities(), SMALL).legal}
    lines = said(log)
    (lost,) = (name for what, _, name in lines if what == "hangs")
    ended = collections.Counter(name for what, _, name in lines if what == "end")
    assert set(ended) == every, "a trial was lost"
    assert set(ended.values()) == {1}, "a trial was measured twice"
    began = collections.Counter(name for what, _, name in lines if what == "begin")
    assert {name for name, count in began.items() if count > 1} == {lost}
    assert len({number for what, number, _ in lines if what == "end"}) >= 3, "one did all the work"
    # everyone knows all results in the end, and agrees about the best
    for one in results:
        assert one["trials"] == len(every) and one["stopped"] == "everything was tried"
    assert len({one["best"] for one in results}) == 1


def test_four_processes_share_a_study_in_postgresql(postgres: str, tmp_path: Path) -> None:
    fleet(postgres, tmp_path)


@pytest.mark.parametrize("name", ["study.db", "study.log"], ids=["sqlite", "journal"])
def test_four_processes_share_a_study_in_a_file(name: str, tmp_path: Path) -> None:
    fleet(str(tmp_path / name), tmp_path)
