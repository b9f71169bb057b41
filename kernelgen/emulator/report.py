"""What a run of a kernel has to say."""

from __future__ import annotations

from dataclasses import dataclass, field

Place = tuple[int, int, int]

#: every kind of finding, and what it means
KINDS = {
    "race": "two threads use the same shared memory, one writes, and nothing orders them",
    "uninitialised": "shared memory is read that no thread has written",
    "async": "shared memory is used whose asynchronous copy has not been waited for",
    "proxy": "an asynchronous unit uses what threads wrote without fence.proxy.async between",
    "bounds": "memory outside every buffer is used",
    "misaligned": "an address is not a multiple of what the access needs",
    "barrier": "threads of a block wait at different barriers, or some at none",
    "mask": "lanes of a warp or subgroup disagree on who takes part",
    "undefined": "arithmetic without a result, such as a division by zero",
    "instruction": "assembly that the emulator does not know",
    "trap": "the kernel stopped itself: an assertion or a trap",
    "overflow": "a thread used up its stack",
    "hang": "the limit of CPU time was reached",
    "order": "the result depends on the order of the threads, and no other finding says why",
    "crash": "the emulator itself, or a kernel that overwrote it, failed",
}


@dataclass(frozen=True)
class Finding:
    """One thing that a kernel did wrong; `line` is 0 where it is not known."""

    kind: str
    message: str
    line: int
    block: Place
    thread: Place
    count: int = 1
    order: str = "forward"

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        return (
            f"line {self.line or '?'}: {self.kind}: {self.message}; block {self.block},"
            f" thread {self.thread}{times}"
        )


@dataclass
class Report:
    """What came of a launch.  `notes` are no faults, but worth a look."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.findings

    def kinds(self) -> set[str]:
        """The kinds of findings that there are."""
        return {f.kind for f in self.findings}

    def __str__(self) -> str:
        lines = [str(f) for f in self.findings] or ["no findings"]
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])
