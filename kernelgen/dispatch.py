"""Which target serves a call: by where its data lies, else the best device of the machine.

What serves less well than something that should be there is a `Fallback`: it is kept on record,
logged once with its reason and its cost, and an error where the user does not want any.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from kernelgen import arrays
from kernelgen import targets as target_list
from kernelgen.errors import ConfigError, FallbackError, TargetError
from kernelgen.generate import generate_walk
from kernelgen.problem import acceptable
from kernelgen.targets.base import Runtime, Subject, Target
from kernelgen.targets.device import DeviceRuntime
from kernelgen.targets.driver import Resident
from kernelgen.tuner.lookup import Choice

log = logging.getLogger("kernelgen")

P = ParamSpec("P")
R = TypeVar("R")

#: what may become of a fallback
ON_FALLBACK = ("log", "error")

#: says so for all calls that do not
VARIABLE = "KERNELGEN_ON_FALLBACK"


@dataclass(frozen=True)
class Fallback:
    """Something that was wanted and is not to be had.

    what    was wanted
    reason  why it is not to be had
    cost    what serves instead, and what that costs
    """

    what: str
    reason: str
    cost: str

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}; {self.cost}"


@dataclass(frozen=True)
class Passed:
    """A target that was looked at and does not serve.

    expected  whether the machine looks as if it should
    """

    target: str
    reason: str
    expected: bool


@dataclass(frozen=True)
class Decision:
    """The target that serves data of one place.

    passed     those that were looked at before it, in order
    fallbacks  those of them that should have served
    """

    target: str
    why: str
    passed: tuple[Passed, ...]
    fallbacks: tuple[Fallback, ...]


# ---- which target ---------------------------------------------------------------------------


#: results that `once` keeps of a function; the oldest are forgotten first
_KEPT = 4096


def once(function: Callable[P, R]) -> Callable[P, R]:
    """A cache like functools.cache, whose function runs once for each set of arguments however
    many threads ask at the same time; others wait only for what they asked for themselves."""
    found: dict[Hashable, R] = {}
    locks: dict[Hashable, threading.RLock] = {}
    guard = threading.Lock()

    @functools.wraps(function)
    def cached(*args: P.args, **kwargs: P.kwargs) -> R:
        key = (args, *sorted(kwargs.items())) if kwargs else args
        try:
            return found[key]
        except KeyError:
            pass
        with guard:
            lock = locks.setdefault(key, threading.RLock())
        with lock:
            if key in found:
                return found[key]
            result = function(*args, **kwargs)
            with guard:
                while len(found) >= _KEPT:
                    locks.pop(oldest := next(iter(found)), None)
                    del found[oldest]
                found[key] = result
            return result

    def clear() -> None:
        found.clear()

    cached.cache_clear = clear  # type: ignore[attr-defined]
    return cached


@functools.cache
def runtime_of(target: str) -> Runtime:
    """The runtime of a target, opened once."""
    return target_list.get(target).runtime()


def _judge(name: str) -> Passed | None:
    """Why a target does not serve the data of a CPU, or data on its own device; None if it does."""
    runtime = runtime_of(name)
    expected = runtime.expected()
    if expected is None:
        return Passed(name, "nothing on this machine says that it has such a device", False)
    try:
        reason = runtime.available()
        on_cpu = reason is None and runtime.on_cpu()
    except Exception as error:  # half an installation of a driver must not end what others can do
        said = " ".join(str(error).split()) or type(error).__name__
        return Passed(name, f"its driver fails ({said}); install it anew", True)
    if reason is not None:
        return Passed(name, reason, True)
    if on_cpu and name not in target_list.PREFERENCE:
        first = target_list.PREFERENCE[0]
        return Passed(name, f"its device here is the CPU, which target {first} uses better", False)
    return None


@once
def decide(kind: int | None = None) -> Decision:
    """What serves data on a kind of device (DLPack's number), or, by default, data of the host
    that no device was chosen for.

    Raises TargetError where nothing can run.
    """
    passed: list[Passed] = []
    own = target_list.serving(kind)
    for name in own:
        found = _judge(name)
        if found is None:
            why = "it runs where the data lies" if kind is not None else _best(name, passed)
            return Decision(name, why, tuple(passed), _fallbacks(name, passed))
        passed.append(found)
    reason = "; ".join(f"target {p.target} cannot run here: {p.reason}" for p in passed)
    if kind is None or kind in arrays.HOST_KINDS:
        raise TargetError(reason)
    host = decide(arrays.HOST_KINDS[0])
    copies = Fallback(
        f"kernels where the data lies (a device of DLPack's kind {kind})",
        reason or "no target reaches such a device",
        f"target {host.target} serves instead: arrays are copied to the host and back in each call",
    )
    why = "nothing runs where the data lies"
    return Decision(host.target, why, (*passed, *host.passed), (copies, *host.fallbacks))


def _best(name: str, passed: Iterable[Passed]) -> str:
    others = ", ".join(one.target for one in passed)
    return f"the best device here: {runtime_of(name).expected()}" + (
        f", and {others} cannot serve" if others else ""
    )


def _fallbacks(name: str, passed: Iterable[Passed]) -> tuple[Fallback, ...]:
    cost = f"target {name} serves instead, which is slower"
    return tuple(Fallback(f"target {p.target}", p.reason, cost) for p in passed if p.expected)


def target_for(kind: int | None, asked: str | None, on_fallback: str | None = None) -> str:
    """The target of a call: what it asks for, else what serves data of its place."""
    if asked is not None:
        return asked
    decision = decide(kind)
    if decision.fallbacks:
        report(decision.fallbacks, on_fallback)
    return decision.target


# ---- fallbacks ------------------------------------------------------------------------------

_reported: dict[Fallback, None] = {}
_reporting = threading.Lock()


def fallbacks() -> tuple[Fallback, ...]:
    """Those that calls of this process met with, in order."""
    return tuple(_reported)


def report(found: Iterable[Fallback], on_fallback: str | None = None) -> None:
    """Put fallbacks on record, and log those that are new; raise FallbackError for the first
    where `on_fallback`, or else the variable KERNELGEN_ON_FALLBACK, is "error"."""
    wanted = on_fallback or os.environ.get(VARIABLE) or ON_FALLBACK[0]
    if wanted not in ON_FALLBACK:
        raise ConfigError(
            f"on_fallback={wanted!r} was asked for (or {VARIABLE} has it); allowed are"
            f" {', '.join(ON_FALLBACK)}"
        )
    for one in found:
        if wanted == "error":
            raise FallbackError(
                f'{one}; on_fallback="error" forbids that: mend it, or name the target to use'
            )
        with _reporting:
            new = one not in _reported
            _reported[one] = None
        if new:
            log.warning("%s", one)


def of_choice(
    target: Target, choice: Choice, subject: Subject, asked: str, max_error: float | None = None
) -> tuple[Fallback, ...]:
    """What the kernel that the tuner's look-up chose does less well than could be wished: another
    precision than the one that `asked` stands for, decode lane by lane."""
    kernel = generate_walk(choice.walk, subject, target, choice.config)
    wanted = acceptable(asked, subject)[0]
    better = wanted in choice.walk.instead_of
    if asked == "auto" and (better or max_error is not None or choice.entry is not None):
        wanted = kernel.precision  # a bound, or what was measured, decides about it
    found = []
    if kernel.precision not in ("", wanted):
        which = wanted if asked == wanted else f"{wanted} (for {asked})"
        found.append(
            Fallback(
                f"{kernel.op} of {subject.name} in {which}",
                f"target {target.name} has no walk for it that this device can run",
                f"{kernel.precision} serves instead, never less exact but slower",
            )
        )
    for note in dict.fromkeys(kernel.notes):
        what, cost = f"packed decode of {subject.name}", "slower than packed decode"
        found.append(Fallback(what, f"on target {target.name} it is {note}", cost))
    return tuple(found)


# ---- arrays of any library ------------------------------------------------------------------


def any_array(
    on_device: Callable[..., Any] | None = None,
    on_host: Callable[[Any], Any] = arrays.host,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator for functions of numpy arrays with an option `target`: they then take arrays of
    any library, and give such arrays back, of the same library, device and element type.

    The target is chosen by where the first of these arrays lies.  `on_device`, with the function's
    own arguments, serves arrays that lie where the target's kernels can work on them; else they are
    brought to the host by `on_host`, without a copy where they lie there, and so is the result.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            for one in (*args, *kwargs.values()):
                if arrays.is_foreign(one):
                    result: R = _foreign(function, on_device, on_host, one, args, kwargs)
                    return result
            return function(*args, **kwargs)

        return wrapped

    return decorate


def _foreign(
    function: Callable[..., Any],
    on_device: Callable[..., Any] | None,
    on_host: Callable[[Any], Any],
    first: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A call with arrays of another library, of which `first` says which, and where."""
    kind, on_fallback = arrays.kind_of(first), kwargs.get("on_fallback")
    asked = kwargs.get("target")
    name = target_for(kind, asked, on_fallback)
    kwargs = {**kwargs, "target": name}
    if on_device is not None and takes(name, first):
        there = on_device(*args, **kwargs)
        if there is not NotImplemented:
            return there
    if asked is None and kind not in arrays.HOST_KINDS and name in target_list.serving(kind):
        cost = "arrays are copied to the host and back in each call"
        reason = f"target {name} takes what this computes with from the host only"
        what = f"{function.__name__} of arrays where they lie"
        report([Fallback(what, reason, cost)], on_fallback)

    def inside(one: Any) -> Any:
        return on_host(one) if arrays.is_foreign(one) else one

    given = {key: inside(one) for key, one in kwargs.items()}
    share_cores(name)
    result = function(*map(inside, args), **given)
    out = kwargs.get("out")
    if out is not None and result is given["out"]:
        _fill(out, result)
        return out
    return _outside(result, first)


def _fill(out: Any, result: Any) -> None:
    """Bring a result into the array that the user gave for it, unless it is there already."""
    if arrays.kind_of(out) in arrays.HOST_KINDS and arrays.dtype_name(out) != "bfloat16":
        return
    out[...] = arrays.give_back(result, out)


def _outside(result: Any, like: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_outside(one, like) for one in result)
    return arrays.give_back(result, like) if hasattr(result, "dtype") else result


@once
def _resident(target: str) -> Any:
    """The driver of a target whose kernels work on arrays of other libraries, or None."""
    runtime = runtime_of(target)
    if runtime.available() is not None or not isinstance(runtime, DeviceRuntime):
        return None
    driver = runtime.driver()
    return driver if isinstance(driver, Resident) else None


_sharing = threading.local()


def share_cores(target: str) -> None:
    """Before a call whose arrays are of a library that computes with threads of its own: kernels on
    the same cores are not to keep these while it does.  Each thread of the caller says so once."""
    if not hasattr(_sharing, target):
        share = getattr(runtime_of(target), "share_cores", None)
        if share is None or share():
            setattr(_sharing, target, True)


def takes(target: str, array: Any) -> bool:
    """Whether a target's kernels can work on an array of another library where it lies."""
    driver = _resident(target)
    return driver is not None and driver.takes(array)
