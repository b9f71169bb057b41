"""Calls of kernels that are made once through all that Python does, and again without it.

As streams of GPUs are captured into graphs: within `record`, the functions of `kernelgen.api` and
its siblings run as ever, and what they launch is noted, with the arrays that it was given.
`replay` launches the same again, over what these arrays hold by then.  Nothing else is repeated: no
choice of a kernel, no check, no array that numpy made in between.

So a launch may read what the caller said will change, what an earlier launch wrote, what cannot
change (weights, arrays that are read-only), and nothing else; where one does, `refused` says so.
What numpy has to do in between is given to `on_host`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_thread = threading.local()


class Recording:
    """Launches in order.

    inputs   arrays whose contents differ from one replay to the next
    refused  why replays would not compute the same, or None
    """

    def __init__(self, inputs: Iterable[Array]) -> None:
        self.refused: str | None = None
        self._calls: list[Callable[[], object]] = []
        # owners of memory, kept so that no other array comes to have their numbers
        self._known: dict[int, Any] = {}
        self._know(inputs)

    def replay(self) -> None:
        """Launch all again, where nothing was refused; for one thread at a time."""
        for call in self._calls:
            call()

    def add(
        self, call: Callable[[], object], reads: Iterable[Array], fills: Iterable[Array]
    ) -> None:
        """Note a call that was made."""
        for one in reads:
            owner = _owner(one)
            fixed = isinstance(owner, np.ndarray) and not owner.flags.writeable
            if id(owner) not in self._known and not fixed:
                self.refused = self.refused or (
                    f"an array of {one.dtype} {one.shape} is read that no launch before has written"
                )
        if self.refused:  # so nobody needs what was kept
            self._calls.clear()
            self._known.clear()
            return
        self._know(fills)
        self._calls.append(call)

    def _know(self, arrays: Iterable[Array]) -> None:
        for one in arrays:
            owner = _owner(one)
            self._known[id(owner)] = owner


@contextlib.contextmanager
def record(inputs: Iterable[Array]) -> Iterator[Recording]:
    """What this thread launches within."""
    made = Recording(inputs)
    with _set(made):
        yield made


@contextlib.contextmanager
def _set(recording: Recording | None) -> Iterator[None]:
    before = _current()
    _thread.recording = recording
    try:
        yield
    finally:
        _thread.recording = before


def _current() -> Recording | None:
    found: Recording | None = getattr(_thread, "recording", None)
    return found


def launch(run: Callable[..., object], *given: Any, fills: Iterable[Array]) -> None:
    """Call run(*given), which fills some of the arrays given, alone or in mappings.

    A function that has a method `bind` gives by it what is called in a replay.
    """
    run(*given)
    if _current() is not None:
        filled = list(fills)
        owners = {id(_owner(one)) for one in filled}
        reads = [one for one in _arrays(given) if id(_owner(one)) not in owners]
        bind = getattr(run, "bind", None)
        note(functools.partial(run, *given) if bind is None else bind(*given), reads, filled)


def on_host(run: Callable[[], object], reads: Iterable[Array], fills: Iterable[Array] = ()) -> None:
    """Call run(), now and in every replay; what it launches itself is not noted."""
    with _set(None):
        run()
    note(run, reads, fills)


def note(call: Callable[[], object], reads: Iterable[Array], fills: Iterable[Array]) -> None:
    """What a replay is to call for what was just done."""
    recording = _current()
    if recording is not None:
        recording.add(call, reads, fills)


def contiguous(array: Array) -> Array:
    """As np.ascontiguousarray, in every replay."""
    if array.flags.c_contiguous:
        return array
    made = np.ascontiguousarray(array)
    note(functools.partial(np.copyto, made, array), (array,), (made,))
    return made


def _arrays(given: Iterable[Any]) -> Iterator[Array]:
    for one in given:
        if isinstance(one, np.ndarray):
            yield one
        elif isinstance(one, Mapping):
            yield from _arrays(one.values())


def _owner(array: Array) -> Any:
    """Whose memory a view shows."""
    found: Any = array
    while getattr(found, "base", None) is not None:
        found = found.base
    return found
