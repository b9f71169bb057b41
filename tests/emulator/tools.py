"""What the emulator's tests share."""

from __future__ import annotations

import pytest

from kernelgen.emulator import EmulatorError
from kernelgen.emulator.compiler import clang, cxx


def _missing(find: object) -> str:
    try:
        find()  # type: ignore[operator]
    except EmulatorError as error:
        return str(error)
    return ""


NO_CXX = _missing(cxx)
NO_CLANG = _missing(clang)
needs_compiler = pytest.mark.skipif(bool(NO_CXX), reason=NO_CXX or "-")
needs_clang = pytest.mark.skipif(bool(NO_CXX or NO_CLANG), reason=NO_CLANG or NO_CXX or "-")
