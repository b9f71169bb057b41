"""Entries on their way between files and machines: export, import, diff, merge, prune.

Rules of a merge, in this order, for entries with the same key: the same measurement (time, host,
seconds) is one entry; the later one wins; of two of the same time the one with more trials, then
the faster.  An entry of another device has another key, so that it never replaces one of this.
The loser stays in the file until `prune`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kernelgen.errors import FileError, KernelgenError
from kernelgen.targets.base import Target
from kernelgen.tuner import cache, space
from kernelgen.tuner.cache import Entry, Key
from kernelgen.tuner.problems import subject_named


def load(path: Path) -> tuple[list[Entry], list[str]]:
    """Entries of a file that someone gave, and what was wrong with its other lines."""
    if not path.is_file():
        raise FileError(f"{path} was given, and is no file; `kernelgen cache export` writes one")
    path.open("rb").close()  # what cannot be read is an error here
    found: list[Entry] = []
    wrong: list[str] = []
    for number, _, entry in cache.lines(path):
        if isinstance(entry, Entry):
            found.append(entry)
        else:
            wrong.append(f"{path}:{number} is left out: {entry}")
    return found, wrong


def export(path: Path, entries: Iterable[Entry], preset: bool = False) -> int:
    """Write entries to a file that others can import; how many they were.  A preset says nothing
    about the machine but its device, and lacks what only people would read."""
    chosen = list(entries)
    if preset:
        bare = {"host": "", "provenance": (), "samples": (), "front": (), "runner_up": None}
        chosen = [dataclasses.replace(one, **bare) for one in chosen]  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(cache.dumps(one) + "\n" for one in chosen), encoding="utf-8")
    return len(chosen)


@dataclass
class Merged:
    """What a merge did.

    added      entries of new keys
    replaced   (old, new): the new one won
    kept       (old, new): the old one won
    known      entries that were there already
    """

    added: list[Entry] = field(default_factory=list)
    replaced: list[tuple[Entry, Entry]] = field(default_factory=list)
    kept: list[tuple[Entry, Entry]] = field(default_factory=list)
    known: list[Entry] = field(default_factory=list)


def same(one: Entry, other: Entry) -> bool:
    """Whether two entries are one measurement."""
    return (one.key, one.time, one.host, one.seconds) == (
        other.key, other.time, other.host, other.seconds
    )  # fmt: skip


def wins(new: Entry, old: Entry) -> bool:
    """Whether an entry replaces another with the same key."""
    return (new.time, new.trials, -new.seconds) > (old.time, old.trials, -old.seconds)


def compare(mine: Iterable[Entry], theirs: Iterable[Entry]) -> Merged:
    """What a merge of theirs into mine would do."""
    result = Merged()
    known: dict[Key, Entry] = {one.key: one for one in cache.winners(mine)}
    for new in cache.winners(theirs):
        old = known.get(new.key)
        if old is None:
            result.added.append(new)
        elif same(old, new):
            result.known.append(new)
        elif wins(new, old):
            result.replaced.append((old, new))
        else:
            result.kept.append((old, new))
    return result


def merge(theirs: Iterable[Entry], source: str) -> Merged:
    """Put entries into the user's cache; each remembers the file that it came from."""
    result = compare(cache.entries(), theirs)
    for entry in (*result.added, *(new for _, new in result.replaced)):
        cache.append(dataclasses.replace(entry, provenance=(*entry.provenance, source)))
    return result


@dataclass
class Pruned:
    """What `prune` took away: entries that later ones replaced, that are stale, and lines that
    are no entries."""

    replaced: int = 0
    stale: int = 0
    damaged: int = 0

    @property
    def count(self) -> int:
        """All of them."""
        return self.replaced + self.stale + self.damaged


def stale(entry: Entry, target: Target | None) -> str | None:
    """Why an entry cannot be used by this kernelgen, on any device, or None."""
    if target is None:
        return f"there is no target {entry.key.target}"
    walk = space.walk_named(target, entry.key.op, entry.walk)
    if walk is None:
        return f"there is no walk {entry.walk}"
    try:
        subject = subject_named(entry.key.op, entry.key.format)
        if space.walk_hash(walk, subject, target) != entry.key.hash:
            return "the walk or the format has changed since"
        walk.config.from_dict(entry.config)
    except (KernelgenError, TypeError) as error:
        return str(error)
    return None


def prune(targets: dict[str, Target], *, stale_too: bool = False) -> Pruned:
    """Take lines away that serve nothing.  Lines of versions to come are kept, and entries of
    formats that are not registered now, unless stale ones are to go too."""
    result = Pruned()
    for path in sorted(cache.folder().glob("*.jsonl")):
        with cache.locked(path):
            keep: list[str] = []
            every = list(cache.lines(path))
            last = cache.winners(e for _, _, e in every if isinstance(e, Entry))
            for _, text, entry in every:
                if not isinstance(entry, Entry):
                    if entry.startswith("it is of version"):
                        keep.append(text)
                    else:
                        result.damaged += 1
                elif not any(entry is one for one in last):
                    result.replaced += 1
                elif stale_too and stale(entry, targets.get(entry.key.target)):
                    result.stale += 1
                else:
                    keep.append(text)
            if len(keep) != len(every):
                cache.rewrite(path, keep)
    return result
