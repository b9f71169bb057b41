"""The winners: one JSON-lines file per device, only ever appended to.

A line is one entry and explains itself.  Crash-safe: a line is written by one write call to the
end of the file and synced; a line that a crash tore is ignored, and the next writer ends it with
a line break.  Safe under many processes: writers hold a lock, readers need none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kernelgen.errors import FileError
from kernelgen.tuner.device import Device

log = logging.getLogger("kernelgen")

#: of the lines that are written; lines of this and all earlier versions are read
VERSION = 4

#: what an entry of version 1 lacked, with what it meant
_SINCE_2: dict[str, Any] = {"provenance": []}


@dataclass(frozen=True)
class Key:
    """What an entry is about.

    op, format, precision  as asked: the precision may be "auto"; `format` is the name of what
                           kernels are specialized for, which for attention says more
    target, device         what it ran on
    sizes                  names and numbers of the shape that was measured; before version 4 there
                           were M, N and K alone
    hash                   of the IR's steps and the walk's template: an entry with another than
                           today's is about another kernel, and is not used
    objective              what was minimized: "time" or "energy"
    max_error              the largest RMS error that was asked for; None where it was left to the
                           precision, as before version 3.  An entry answers only the question that
                           was asked: one found under a wider gate may err too much, and one found
                           under a narrower gate is slower than it need be
    """

    op: str
    format: str
    precision: str
    target: str
    sizes: tuple[tuple[str, int], ...]
    device: Device
    hash: str
    objective: str = "time"
    max_error: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The numbers alone."""
        return tuple(number for _, number in self.sizes)

    @property
    def problem(self) -> tuple[Any, ...]:
        """What two entries share that answer the same question, in whatever version of code."""
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "hash")


@dataclass(frozen=True)
class Entry:
    """A winner, and why it won.

    walk, used, config  what won: the walk, the precision it computes in, its configuration
    seconds, samples    median of a call, and the calls
    baseline            what would be used without tuning: walk, precision, config, seconds
    runner_up           the second best, likewise, or None
    error, tolerance    largest error relative to the reference's RMS on the same inputs, and what
                        was allowed
    rms_error           RMS error that includes what quantized activations add
    roofline            seconds that only reading the weights takes, or None
    front               the fast and the accurate: no other trial is better in both
    trials, failures    how many candidates were tried, and how many failed
    spent               seconds that the study took
    versions            of what was used
    time, host          when and where, UTC
    clock               "device" where seconds are those of its launches, by its own events, "wall"
                        where they are those of a call, copies to and from the device included
    joules              energy of a call, where there was a meter
    provenance          files that it came through, oldest first
    """

    key: Key
    walk: str
    used: str
    config: Mapping[str, Any]
    seconds: float
    samples: tuple[float, ...] = ()
    baseline: Mapping[str, Any] = field(default_factory=dict)
    runner_up: Mapping[str, Any] | None = None
    error: float | None = None
    tolerance: float | None = None
    rms_error: float | None = None
    roofline: float | None = None
    front: tuple[Mapping[str, Any], ...] = ()
    trials: int = 0
    failures: int = 0
    spent: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    time: str = ""
    host: str = ""
    provenance: tuple[str, ...] = ()
    clock: str = "wall"
    joules: float | None = None

    __hash__ = None  # type: ignore[assignment]  # it holds dictionaries

    @property
    def ratio(self) -> float | None:
        """How many times better than the default, measured in the same run."""
        energy = self.key.objective == "energy"
        before = self.baseline.get("joules" if energy else "seconds")
        now = self.joules if energy else self.seconds
        return float(before) / now if before and now else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data: a line of the file."""
        data = asdict(self)
        return {"v": VERSION, **data, "key": {**data["key"], "sizes": dict(self.key.sizes)}}


def parse(line: str) -> Entry | str:
    """The entry of a line, or why it is none."""
    try:
        data = json.loads(line)
    except ValueError:
        return "it is not JSON"
    if not isinstance(data, dict) or "v" not in data:
        return "it is no entry of kernelgen's"
    if not isinstance(data["v"], int) or not 1 <= data["v"] <= VERSION:
        return f"it is of version {data['v']}, and this kernelgen reads 1 to {VERSION}"
    try:
        return _entry({**_SINCE_2, **data} if data["v"] < 2 else data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"it is damaged ({type(error).__name__}: {error})"


def _entry(data: dict[str, Any]) -> Entry:
    key = {f.name: data["key"][f.name] for f in dataclasses.fields(Key) if f.name in data["key"]}
    key["device"] = Device.from_dict(key["device"])
    if data["v"] < 4:
        key["sizes"] = {name.upper(): data["key"][name] for name in ("m", "n", "k")}
    for name, number in key["sizes"].items():
        if not (isinstance(number, int) and number > 0):
            raise ValueError(f"{name} is {number!r}")
    key["sizes"] = tuple(key["sizes"].items())
    known = {f.name: data[f.name] for f in dataclasses.fields(Entry) if f.name in data}
    for name in ("samples", "front", "provenance"):
        known[name] = tuple(known.get(name) or ())
    known["seconds"] = float(known["seconds"])
    if not 0 < known["seconds"] < math.inf or not isinstance(known["config"], dict):
        raise ValueError("seconds or config make no sense")
    return Entry(**{**known, "key": Key(**key)})


# ---- the files --------------------------------------------------------------------------------


def root() -> Path:
    """The user's cache folder for kernelgen, or KERNELGEN_CACHE."""
    import platformdirs

    return Path(os.environ.get("KERNELGEN_CACHE") or platformdirs.user_cache_dir("kernelgen"))


def made(place: Path) -> Path:
    """A folder of the cache, made where it is missing.  Raises FileError where it cannot be."""
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"the cache folder {place} cannot be made ({error.strerror}); set KERNELGEN_CACHE to a"
            " folder that can be written"
        ) from error
    return place


def folder() -> Path:
    """Where the files of winners are."""
    return root() / "tuned"


def presets() -> Path:
    """Where those are that are shipped with kernelgen."""
    return Path(__file__).parent / "presets"


def path_of(target: str, device: Device) -> Path:
    """The file of a device."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")[:48]
    return folder() / f"{target}-{slug or 'device'}-{device.digest}.jsonl"


def read(path: Path) -> list[Entry]:
    """The entries of a file, in the order in which they were written.  What is no entry is left
    out, and said to be in the log."""
    try:
        stat = path.stat()
    except OSError:
        return []
    return list(_read(path, stat.st_mtime_ns, stat.st_size))


@functools.lru_cache(maxsize=256)
def _read(path: Path, changed: int, size: int) -> tuple[Entry, ...]:
    found = []
    for number, _, entry in lines(path):
        if isinstance(entry, Entry):
            found.append(entry)
        else:
            log.info("%s:%d is left out: %s", path, number, entry)
    return tuple(found)


def lines(path: Path) -> Iterator[tuple[int, str, Entry | str]]:
    """Number, text and entry of each line; a sentence in place of an entry where there is none."""
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        log.info("%s cannot be read: %s", path, error.strerror)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line, parse(line)


def entries(where: Path | None = None) -> list[Entry]:
    """All entries of all files of a folder, by default the user's."""
    place = where or folder()
    try:
        paths = sorted(place.glob("*.jsonl"))
    except OSError:
        return []
    return [entry for path in paths for entry in read(path)]


def winners(found: Iterable[Entry]) -> list[Entry]:
    """Of the entries with the same key the last: tuning again replaces."""
    last: dict[Key, Entry] = {}
    for entry in found:
        known = last.get(entry.key)
        if known is None or entry.time >= known.time:
            last[entry.key] = entry
    return list(last.values())


def append(entry: Entry, path: Path | None = None) -> Path:
    """Write an entry to the end of its device's file."""
    path = path or path_of(entry.key.target, entry.key.device)
    write_lines(path, [dumps(entry)])
    return path


def write_lines(path: Path, texts: Iterable[str]) -> None:
    """Append whole lines.  Raises FileError where not all of it could be written."""
    with locked(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            # a line that a crash tore gets its end, so that it spoils no other
            torn = os.lseek(file, 0, os.SEEK_END) > 0
            if torn:
                os.lseek(file, -1, os.SEEK_END)
                torn = os.read(file, 1) != b"\n"
            data = ("\n" * torn + "".join(f"{text}\n" for text in texts)).encode()
            if os.write(file, data) != len(data):
                raise FileError(f"{path} could not be written to its end; is the disk full?")
            os.fsync(file)
        finally:
            os.close(file)


def rewrite(path: Path, keep: Iterable[str]) -> None:
    """Put these lines in place of all; the caller holds the lock.  A reader sees the old file or
    the new one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".new-", delete=False) as file:
        try:
            file.writelines(f"{line}\n" for line in keep)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Held by who writes a file; the system lets go of it when a process dies.  Raises FileError
    where the file's folder cannot be written."""
    from filelock import FileLock

    made(path.parent)
    try:
        held = FileLock(f"{path}.lock", timeout=60).acquire()
    except TimeoutError as error:
        raise FileError(
            f"{path} is written by other processes, and has not been free for 60 s; try again"
        ) from error
    except OSError as error:
        raise FileError(
            f"{path} cannot be written ({error.strerror or error}); set KERNELGEN_CACHE to a folder"
            " that can be"
        ) from error
    with held:
        yield


def dumps(entry: Entry) -> str:
    """An entry as a line."""
    return json.dumps(_finite(entry.as_dict()), separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has neither infinity nor NaN: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
