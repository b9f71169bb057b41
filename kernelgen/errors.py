"""Every error kernelgen raises on purpose.

Each message is one sentence that says what was asked, what was seen, what is allowed and what to
do next.  The command line prints the message alone; a traceback means a bug.
"""

from __future__ import annotations


class KernelgenError(Exception):
    """Base of all errors that kernelgen raises on purpose."""


class FormatError(KernelgenError):
    """A format is unknown, or its description contradicts itself."""


class ExprError(KernelgenError):
    """An expression of the IR is not well formed."""


class ShapeError(KernelgenError, ValueError):
    """An array has the wrong shape, dtype or size for what was asked."""


class FileError(KernelgenError):
    """A file is missing, truncated, corrupt, or of a kind kernelgen does not read."""


class TargetError(KernelgenError):
    """A target is unknown, not available on this machine, or cannot do what was asked."""


class FallbackError(TargetError):
    """Something else than what was wanted would serve, and on_fallback="error" forbids that."""


class CompileError(TargetError):
    """A compiler or driver rejected generated source."""


class ConfigError(KernelgenError, ValueError):
    """A configuration value lies outside its range, or the combination is not legal."""


class TuningError(KernelgenError):
    """A tuned configuration is missing where one is required, or a study cannot be made."""


class RankError(KernelgenError):
    """Another rank is gone, failed, or does something else."""
