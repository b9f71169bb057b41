"""A runtime without the device: kernels run, as they are, in the emulator.

It needs a C++ compiler.  Every launch runs with the threads in forward and in reverse order, with
guarded buffers and poisoned shared memory, and whatever the emulator finds is an error.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from kernelgen.config import Capabilities
from kernelgen.errors import CompileError, TargetError
from kernelgen.targets.base import Array, Kernel
from kernelgen.targets.device import DeviceRuntime
from kernelgen.targets.driver import Buffer, bytes_of


class EmulatorDriver:
    """Memory of this process as a device's (see kernelgen.targets.driver.Driver)."""

    largest = 2**32 - 4

    def __init__(self, language: str, subgroup: int = 32) -> None:
        self.language, self._subgroup = language, subgroup

    def key(self) -> Hashable:
        """The language, and the threads of a subgroup: there is one emulator."""
        return self.language, self._subgroup

    def upload(self, array: Array) -> Buffer:
        """A copy of the bytes."""
        return bytes_of(array).copy()

    def empty(self, nbytes: int) -> Buffer:
        """Bytes that make NaNs, so that what is not written stays visible."""
        return np.full(max(nbytes, 4), 0xFF, np.uint8)

    def write(self, buffer: Buffer, offset: int, array: Array) -> None:
        """Put bytes into a buffer."""
        raw = bytes_of(array)
        buffer[offset : offset + raw.size] = raw

    def download(self, buffer: Buffer, out: Array) -> None:
        """Copy the bytes back; launches have ended."""
        out.reshape(-1).view(np.uint8)[:] = buffer[: out.nbytes]

    def program(self, kernel: Kernel) -> Any:
        """The kernel, for the emulator."""
        from kernelgen.emulator import Emulator, EmulatorError

        try:
            made = Emulator(
                kernel.source, self.language, name=kernel.entry, subgroup=self._subgroup
            )
        except EmulatorError as error:
            raise CompileError(f"{kernel.op} {kernel.subject.name}: {error}") from error
        launch = kernel.walk.launch(kernel.config, kernel.subject)
        return made, kernel.entry, launch.shared_bytes if launch else 0

    def launch(
        self,
        program: Any,
        groups: tuple[int, int],
        threads: int,
        buffers: Sequence[Buffer],
        sizes: Sequence[int],
    ) -> None:
        """Run a grid in both orders."""
        from kernelgen.emulator import EmulatorError

        emulator, entry, shared_bytes = program
        try:
            arguments = [*buffers, *sizes]
            report = emulator.run(entry, groups, threads, arguments, shared_bytes=shared_bytes)
        except EmulatorError as error:
            raise CompileError(f"{entry} cannot be emulated: {error}") from error
        if not report.ok:
            first = report.findings[0]
            raise TargetError(
                f"the emulator found {first.kind} in {entry} at line {first.line}, block"
                f" {first.block}, thread {first.thread}: {first.message}"
            )


class EmulatedRuntime(DeviceRuntime):
    """A target's kernels in the emulator of its language; `subgroup`: threads of a subgroup."""

    def __init__(
        self, name: str, language: str, capabilities: Capabilities, subgroup: int = 32
    ) -> None:
        super().__init__()
        self.name = f"{name}:emulated"
        self._driver = EmulatorDriver(language, subgroup)
        self._capabilities = capabilities

    def how(self) -> str:
        """What results are worth."""
        return "emulated"

    def expected(self) -> str | None:
        """A CPU is always there."""
        return "the emulator runs on the CPU"

    def on_cpu(self) -> bool:
        """It is."""
        return True

    def available(self) -> str | None:
        """Why kernels cannot be emulated here, or None."""
        from kernelgen.emulator.languages import missing

        return missing(self._driver.language)

    def driver(self) -> EmulatorDriver:
        """The emulator."""
        return self._driver

    def capabilities(self) -> Capabilities:
        """What the emulator offers."""
        return self._capabilities

    def describe(self) -> list[dict[str, Any]]:
        """One device."""
        return [{"device": "emulator on the CPU"}]
