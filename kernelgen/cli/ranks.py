"""Several processes for a command, started by torchrun or here; only the first prints."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from kernelgen import models
from kernelgen.errors import KernelgenError, RankError
from kernelgen.models.ranks import local
from kernelgen.models.ranks.mesh import SharedError

Tensor = Annotated[
    int, typer.Option("--tp", min=0, help="Ranks that cut each matrix; 0: all that torchrun began.")
]
Stages = Annotated[int, typer.Option("--pp", min=1, help="Stages, each of some of the layers.")]
Replicas = Annotated[int, typer.Option("--dp", min=1, help="Replicas, which share the prompts.")]
Micro = Annotated[
    int, typer.Option("--micro", min=0, help="Micro-batches of a call, for stages; 0: as it fits.")
]
Backend = Annotated[
    str | None,
    typer.Option("--backend", metavar="B", help="Of torch.distributed, such as gloo or nccl."),
]

#: seconds that the other processes have when one failed
_PATIENCE = 30.0


def across_ranks(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes `ranks`, with the options that say how many there are."""

    @functools.wraps(command)
    def run(*, tp: int, pp: int, dp: int, micro: int, backend: str | None, **given: Any) -> None:
        if "WORLD_SIZE" not in os.environ and (tp or 1) * pp * dp > 1:
            raise typer.Exit(_start((tp or 1) * pp * dp))
        made = models.connect(tp=tp, pp=pp, dp=dp, micro=micro, backend=backend)
        with made as ranks, _quiet(ranks):
            command(ranks=ranks, **given)

    options = inspect.signature(_options, eval_str=True).parameters.values()
    own = inspect.signature(command, eval_str=True)
    kept = [one for name, one in own.parameters.items() if name != "ranks"]
    signature = own.replace(
        parameters=[one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*kept, *options)]
    )
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in signature.parameters.values()}
    return run


def _options(
    tp: Tensor = 0, pp: Stages = 1, dp: Replicas = 1, micro: Micro = 0, backend: Backend = None
) -> None:
    """What each such command has besides its own."""


@contextlib.contextmanager
def _quiet(ranks: models.Ranks) -> Iterator[None]:
    """Prints of all ranks but the first go nowhere; of their errors those are told that the first
    does not have."""
    if not ranks.rank:
        yield
        return
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield
    except SharedError:
        raise typer.Exit(1) from None
    except RankError:
        raise
    except KernelgenError as error:
        raise RankError(f"rank {ranks.rank}: {error}") from error


def _start(count: int) -> int:
    """This command line in so many processes on this machine; gives the exit code."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    command = [sys.executable, "-m", "kernelgen", *sys.argv[1:]]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for environment in local.environments(count):
            processes.append(subprocess.Popen(command, env=threads | environment))
        while all(one.poll() in (None, 0) for one in processes):
            if all(one.poll() == 0 for one in processes):
                return 0
            time.sleep(0.1)
        end = time.monotonic() + _PATIENCE  # in which the others say what they missed
        for one in processes:
            one.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    except KeyboardInterrupt:
        return 130
    finally:
        for one in processes:
            if one.poll() is None:
                one.terminate()
                one.wait()
    return 1
