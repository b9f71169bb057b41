"""What the commands say about the choice of a target: which one serves, and why others do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from kernelgen.dispatch import Decision, decide


def as_dict() -> dict[str, Any]:
    """What serves numpy arrays on this machine, for --json."""
    return asdict(decide())


def serves(target: str) -> dict[str, Any]:
    """Whether a target serves numpy arrays on this machine, and why (not), for --json."""
    found = decide()
    if target == found.target:
        return {"default": True, "why": found.why, "fallback": False}
    for one in found.passed:
        if one.target == target:
            return {"default": False, "why": one.reason, "fallback": one.expected}
    why = f"target {found.target} comes before it, or it serves arrays of its device only"
    return {"default": False, "why": why, "fallback": False}


def lines() -> Iterator[str]:
    """The same for people."""
    found = decide()
    yield f"numpy arrays: target {found.target}, {found.why}"
    yield from passed(found)


def passed(found: Decision) -> Iterator[str]:
    """A line for each target that was looked at and does not serve."""
    for one in found.passed:
        mark = "fallback from" if one.expected else "not"
        yield f"  {mark} {one.target}: {one.reason}"
