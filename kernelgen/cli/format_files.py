"""Formats that a user describes in a Python file, which options take by the file's name."""

from __future__ import annotations

import runpy
from collections.abc import Iterable
from pathlib import Path

from kernelgen.errors import FormatError, KernelgenError
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat

SUFFIX = ".py"

_loaded: dict[Path, tuple[BlockFormat, ...]] = {}


def formats_of(name: str) -> tuple[BlockFormat, ...]:
    """The format of that name; of a name that ends in .py, those of the file, which is run.

    FormatError   the format is not known; the file cannot be run or describes none
    """
    if not name.endswith(SUFFIX):
        return (formats.get(name),)
    path = Path(name).resolve()
    if path not in _loaded:
        _loaded[path] = tuple(map(formats.register, _described(path)))
    return _loaded[path]


def format_of(name: str) -> BlockFormat:
    """The same where one is wanted."""
    found = formats_of(name)
    if len(found) > 1:
        raise FormatError(
            f"{name} describes {', '.join(fmt.name for fmt in found)}; one is wanted here: put it"
            " into a file of its own"
        )
    return found[0]


def _described(path: Path) -> Iterable[BlockFormat]:
    try:
        scope = runpy.run_path(str(path))
    except KernelgenError:
        raise
    except OSError as error:
        raise FormatError(
            f"{path} could not be read: {error.strerror}; `kernelgen new-format NAME` writes such a"
            " file"
        ) from error
    except Exception as error:  # of any kind: the file is not ours
        raise FormatError(
            f"{path} cannot be run, as it raised {type(error).__name__}: {error}; try it with"
            " python by itself"
        ) from error
    found = [value for value in scope.values() if isinstance(value, BlockFormat)]
    if not found:
        raise FormatError(
            f"{path} describes no format; it is to have a BlockFormat under a name of its module,"
            " as the file that `kernelgen new-format NAME` writes"
        )
    return dict.fromkeys(found)
