"""The command line: `kernelgen` and `python -m kernelgen`.

Each command is a function of one of the modules beside this one.  Results go to stdout, what is
said about them to stderr; an error is one sentence and exit code 1, wrong usage exit code 2.
"""

from __future__ import annotations

import logging
import platform
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kernelgen import __version__
from kernelgen.cli import (
    accuracy,
    building,
    catalogue,
    checking,
    describing,
    emulate,
    models,
    plan,
    tensors,
    tuning,
)
from kernelgen.cli.terminal import complain
from kernelgen.errors import KernelgenError


class _Commands(TyperGroup):
    """Turns errors that are meant for people into one sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # whoever read us has seen enough: typer ends quietly
        except (KernelgenError, OSError, MemoryError) as error:
            if ctx.params.get("debug"):
                raise
            complain(f"error: {_sentence(error)}")
            raise typer.Exit(1) from None


def _sentence(error: KernelgenError | OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return f"the memory does not suffice ({error}); ask for less at once"
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def _print_version(asked: bool) -> None:
    if asked:
        print(f"kernelgen {__version__} (Python {platform.python_version()})")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show what is logged, and errors with a traceback.")
    ] = False,
) -> None:
    """Fused kernels for quantized matrices: written, proven, timed."""
    if debug:
        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s")
        logging.getLogger("asyncio").setLevel(logging.WARNING)


app = typer.Typer(
    name="kernelgen",
    cls=_Commands,
    callback=_options,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in (
    ("list", catalogue.list_kernels),
    ("devices", catalogue.devices),
    ("show", catalogue.show),
    ("build", building.build),
    ("verify", checking.verify),
    ("bench", checking.bench),
    ("accuracy", accuracy.accuracy),
    ("emulate", emulate.emulate),
    ("quantize", tensors.quantize),
    ("inspect", tensors.inspect),
    ("vectors", describing.vectors),
    ("new-format", describing.new_format),
):
    app.command(_name)(_command)
models.register(app)
plan.register(app)
tuning.register(app)


def main() -> None:
    """What `kernelgen` runs."""
    app()
