"""A loaded kernel with what it is to be called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kernelgen.targets.base import Array


class Launch:
    """A function of Python over one of C that takes addresses, then sizes.

    given   what of the caller's arguments are the arrays and the sizes; arrays are C-contiguous
            and of the manifest's dtypes
    """

    def __init__(
        self,
        function: Callable[..., None],
        given: Callable[..., tuple[Sequence[Array], Sequence[int]]],
    ) -> None:
        self._function, self._given = function, given

    def __call__(self, *arguments: Any) -> None:
        """Run the kernel."""
        arrays, sizes = self._given(*arguments)
        self._function(*map(address, arrays), *sizes)

    def bind(self, *arguments: Any) -> Callable[[], None]:
        """A function that runs it on these very arrays, each time over what they then hold: with
        one scratch, so in one thread at a time."""
        arrays, sizes = self._given(*arguments)
        function, values = self._function, (*map(address, arrays), *sizes)

        def run(_kept: object = arrays) -> None:
            function(*values)

        return run


def address(array: Array) -> int:
    """Where an array begins."""
    # a third of what array.ctypes.data costs
    found: int = array.__array_interface__["data"][0]
    return found
