"""Whether the other ranks live: each writes a beat into a store that all share, and reads theirs.

A rank that waits in an all-reduce for one that is dead, or stopped, would wait for as long as the
engine lets it, and that has to be longer than the longest compile.  Beats come from threads of
their own, whatever the rank computes.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable
from typing import Any

#: seconds between beats, and without one until a rank is given up
EVERY, SILENT = 1.0, 20.0
#: seconds without a look at the clock after which this process was stopped itself
_ASLEEP = 5.0
#: how the beat of a rank begins that ended, well or not
_LEFT, _FAILED = "left", "failed "


class Watch:
    """Watches the ranks 0 ... count - 1, of which this is one.

    store   of torch.distributed, a connection of its own
    end     called, in a thread, with a sentence when another rank is given up; by default it says
            so on stderr and ends this process at once, as its main thread may hang in the engine
    """

    def __init__(
        self, store: Any, rank: int, count: int, *, end: Callable[[str], None] | None = None
    ) -> None:
        self._store, self._rank = store, rank
        self._end = end or self._exit
        self._others = [n for n in range(count) if n != rank]
        now, self._beat = time.monotonic(), 0
        self._beats = dict.fromkeys(self._others, "")
        self._heard = dict.fromkeys(self._others, now)
        self._answered = self._looked = now
        self._closed = threading.Event()
        self._names: dict[int, str] = {}
        store.set(f"name/{rank}", f"process {os.getpid()} on {platform.node()}")
        store.set(f"beat/{rank}", "0")
        self._threads = [
            threading.Thread(target=one, name=f"kernelgen-{one.__name__}", daemon=True)
            for one in (self._talk, self._judge)
        ]

    def start(self) -> None:
        """Begin, once all ranks have been made."""
        for n in self._others:
            self._names[n] = self._store.get(f"name/{n}").decode()
        for one in self._threads:
            one.start()

    def close(self, failure: str | None = None) -> None:
        """Stop watching, and tell the others why, so that they do not wait."""
        if self._closed.is_set():
            return
        self._closed.set()
        for one in self._threads:
            if one.is_alive():
                one.join(2 * EVERY)
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._store.set(f"beat/{self._rank}", _LEFT if failure is None else _FAILED + failure)

    def lost(self, seconds: float = 6 * EVERY) -> str | None:
        """A sentence about a rank that failed, or has given no beat for 3 s, as soon as there is
        one; None where all others live after so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._closed.is_set():
            if (found := self._missing(3 * EVERY)) is not None:
                return found
            time.sleep(EVERY / 10)
        return None

    def _talk(self) -> None:
        """Until the server of the store is gone, which `_judge` notices."""
        with contextlib.suppress(RuntimeError):
            while not self._closed.wait(EVERY):
                self._exchange()

    def _exchange(self) -> None:
        """Write a beat, and read those of the others."""
        self._look()
        self._beat += 1
        self._store.set(f"beat/{self._rank}", str(self._beat))
        found = self._store.multi_get([f"beat/{other}" for other in self._others])
        self._answered = time.monotonic()
        for other, beat in zip(self._others, found, strict=True):
            if beat.decode() != self._beats[other]:
                self._beats[other], self._heard[other] = beat.decode(), self._answered

    def _judge(self) -> None:
        """Touches no store, which may hang."""
        while not self._closed.wait(EVERY / 2):
            self._look()
            if (found := self._missing(SILENT)) is not None:
                self._end(found)
                return

    def _look(self) -> None:
        """Take nobody's silence amiss while this process, and maybe all, was stopped."""
        now = time.monotonic()
        if now - self._looked > _ASLEEP:
            self._answered = now
            self._heard = dict.fromkeys(self._others, now)
        self._looked = now

    def _missing(self, silent: float) -> str | None:
        now = time.monotonic()
        running = [n for n in self._others if not self._beats[n].startswith((_LEFT, _FAILED))]
        for n in running:
            if self._answered - self._heard[n] > silent:
                return (
                    f"rank {n} ({self._names[n]}) has given no sign of life for"
                    f" {now - self._heard[n]:.0f} s"
                )
        for n in self._others:
            if self._beats[n].startswith(_FAILED):
                return f"rank {n} ended: {self._beats[n].removeprefix(_FAILED)}"
        if now - self._answered > silent:
            return (
                "the process that ranks meet at (torchrun's, or that of rank 0) has not answered"
                f" for {now - self._answered:.0f} s"
            )
        return None

    def _exit(self, sentence: str) -> None:
        # not through sys.stderr, which may be redirected, or locked by the main thread
        text = f"error: rank {self._rank} ends, as {sentence}; start all ranks again\n"
        os.write(2, text.encode())
        os._exit(1)
