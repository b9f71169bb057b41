"""Ranks over torch.distributed: gloo between CPUs, NCCL and its like between GPUs.

torch is imported by `connect`, which only those call that have several ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kernelgen.errors import ConfigError, KernelgenError, RankError
from kernelgen.models.hyperparameters import Hyperparameters
from kernelgen.models.ranks.group import Ranks, Turn, dealt, split, undealt
from kernelgen.models.ranks.plan import Part, Plan, shares
from kernelgen.models.ranks.watch import Watch

Array = npt.NDArray[Any]
T = TypeVar("T")

#: tokens of a micro-batch at least; with fewer, reading weights takes longer than computing
LEAST = 32
#: how long the engine waits for ranks that live, or are yet to come: longer than any compile
PATIENCE = datetime.timedelta(minutes=10)


class SharedError(RankError):
    """An error that all ranks have, so that one of them may tell it for all."""


def connect(
    *, tp: int = 0, pp: int = 1, dp: int = 1, micro: int = 0, backend: str | None = None
) -> Ranks:
    """The ranks that torchrun started, this process among them; `Ranks()` where it is alone.

    tp       tensor ranks; 0: as many as there are for pp stages and dp replicas
    pp       stages
    dp       replicas
    micro    micro-batches of a call of the model; 0: up to 4 for each stage, of 32 tokens at least
    backend  of torch.distributed; by default that of the accelerator, gloo where there is none

    Every rank calls this with the same values.  A rank that is killed, or stopped, ends the others
    within 30 s, with a sentence on stderr and exit code 1.
    Raises ConfigError where there are not tp * pp * dp ranks, RankError where they do not meet.
    """
    count = _started()
    if min(tp, pp - 1, dp - 1, micro) < 0 or count != (tp or max(1, count // (pp * dp))) * pp * dp:
        raise ConfigError(
            f"{tp or 'any'} tensor ranks x {pp} stages x {dp} replicas were asked for, and"
            f" {count} ranks were started; start as many, by torchrun --nproc-per-node N"
        )
    if count == 1:
        return Ranks()
    try:
        import torch.distributed
    except ImportError as error:
        raise RankError(
            f"ranks speak through torch.distributed, and torch cannot be imported ({error}); pip"
            " install kernelgen[torch]"
        ) from error
    if not torch.distributed.is_available():
        raise RankError("this build of torch has no torch.distributed; install another")
    made = Mesh(torch, (dp, pp, tp or count // (pp * dp)), micro, backend)
    atexit.register(made.close, "it did not close its ranks before it ended")
    return made


def _started() -> int:
    """Processes that torchrun started."""
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdecimal() or int(said) < 1:
        raise ConfigError(
            f"WORLD_SIZE={said!r} is in the environment; torchrun sets it to the number of ranks:"
            " start by it, or unset the variable"
        )
    return int(said)


class Mesh(Ranks):
    """One of tp * pp * dp ranks; see `connect`."""

    def __init__(
        self, torch: Any, sizes: tuple[int, int, int], micro: int, backend: str | None
    ) -> None:
        self._torch, self._dist = torch, torch.distributed
        self.replicas, self.stages, self._tp = sizes
        self._micro = micro
        self._device = self._own_device(backend)
        self._sent: list[tuple[Any, Any]] = []
        with self._meeting():
            self._dist.init_process_group(
                backend or self._dist.get_default_backend_for_device(self._device),
                timeout=PATIENCE,
            )
            self.rank, self.count = self._dist.get_rank(), self._dist.get_world_size()
            self._watch = Watch(self._store(), self.rank, self.count)
            mesh = self._dist.init_device_mesh(
                self._device.type, sizes, mesh_dim_names=("dp", "pp", "tp")
            )
            self._dist.barrier()
            self._watch.start()
        self.replica, self._stage, self._tensor = mesh.get_coordinate()
        self._of = {name: mesh.get_group(name) for name in ("dp", "pp", "tp")}

    def _own_device(self, backend: str | None) -> Any:
        """Where arrays lie while they travel."""
        accelerator = self._torch.accelerator
        if backend == "gloo" or not accelerator.is_available():
            return self._torch.device("cpu")
        local = int(os.environ.get("LOCAL_RANK", 0)) % accelerator.device_count()
        accelerator.set_device_index(local)
        return self._torch.device(accelerator.current_accelerator().type, local)

    def _store(self) -> Any:
        """A connection of its own to the store through which the ranks met."""
        store = self._dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
            timeout=PATIENCE, wait_for_workers=False,
        )  # fmt: skip
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return self._dist.PrefixStore(f"kernelgen/{attempt}", store)

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, KeyError, AssertionError) as error:
            raise RankError(
                f"rank {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')} did not"
                f" meet the others: {_first_line(error)}; start all ranks by torchrun, with"
                " one address and port"
            ) from error

    @contextlib.contextmanager
    def _engine(self, what: str) -> Iterator[None]:
        """A call of the engine, which fails where another rank is gone."""
        try:
            yield
        except RuntimeError as error:
            lost = self._watch.lost() or f"the engine says: {_first_line(error)}"
            raise RankError(
                f"rank {self.rank} of {self.count} ends in {what}, as {lost}; start all ranks again"
            ) from error

    # ---- what the model asks for ------------------------------------------------------------

    def plan(self, shape: Hyperparameters, tensors: Mapping[str, Any], where: str) -> Part:
        """What this rank holds; RankError where ranks were given different models."""
        listing = [(name, w.format.name, w.shape) for name, w in tensors.items()]
        mine = hashlib.sha256(repr((shape, listing)).encode()).hexdigest()
        found = self.everywhere(mine)
        if other := [n for n, one in enumerate(found) if one != found[0]]:
            raise SharedError(
                f"rank {other[0]} was given another model than rank 0; give all ranks the same file"
            )
        with self.together():
            made = Plan(shape, tensors, tp=self._tp, pp=self.stages, dp=self.replicas, where=where)
        return made.part(self._stage, self._tensor)

    def pieces(self, turns: Sequence[Turn]) -> list[list[Turn]]:
        """Micro-batches, where there is more than one stage."""
        if self.stages == 1:
            return [list(turns)]
        tokens = sum(len(some) for _, some in turns)
        return split(turns, self._micro or max(1, min(4 * self.stages, tokens // LEAST)))

    def sum(self, x: Array) -> Array:
        """All-reduce over the tensor ranks; x itself may be changed."""
        if self._tp == 1:
            return x
        tensor = self._tensor_of(x)
        with self._engine("an all-reduce"):
            self._dist.all_reduce(tensor, group=self._of["tp"])
        return _array(tensor)

    def receive(self, shape: tuple[int, ...]) -> Array:
        """From the same tensor rank of the stage before."""
        tensor = self._torch.empty(shape, dtype=self._torch.float32, device=self._device)
        with self._engine("receiving from the stage before"):
            self._dist.recv(tensor, self.rank - self._tp, group=self._of["pp"])
        return _array(tensor)

    def send(self, x: Array) -> None:
        """To the same tensor rank of the stage behind; waits only for what was sent before."""
        self._finish_sending()
        tensor = self._tensor_of(x)
        with self._engine("sending to the stage behind"):
            work = self._dist.isend(tensor, self.rank + self._tp, group=self._of["pp"])
        self._sent.append((work, tensor))

    def _finish_sending(self) -> None:
        while self._sent:
            work, _ = self._sent.pop()
            with self._engine("sending to the stage behind"):
                work.wait()

    def logits(self, make: Callable[[], Array], rows: int, vocabulary: int) -> Array:
        """Gathered from the tensor ranks of the last stage, and broadcast to the others."""
        self._finish_sending()
        last = self._stage == self.stages - 1
        if last:
            widths = [len(some) for some in shares(vocabulary, self._tp)]
            tensor = self._tensor_of(self._gathered(make(), widths))
        else:
            tensor = self._torch.empty(
                (rows, vocabulary), dtype=self._torch.float32, device=self._device
            )
        if self.stages > 1:
            source = self.rank + (self.stages - 1 - self._stage) * self._tp
            with self._engine("a broadcast"):
                self._dist.broadcast(tensor, source, group=self._of["pp"])
        return _array(tensor)

    def _gathered(self, x: Array, widths: list[int]) -> Array:
        """(rows, all columns) of (rows, own columns)."""
        if self._tp == 1:
            return x
        padded = np.zeros((len(x), widths[0]), np.float32)  # the first are the widest
        padded[:, : x.shape[1]] = x
        tensor = self._tensor_of(padded)
        found = [self._torch.empty_like(tensor) for _ in widths]
        with self._engine("a gather"):
            self._dist.all_gather(found, tensor, group=self._of["tp"])
        parts = [_array(one)[:, :width] for one, width in zip(found, widths, strict=True)]
        return np.concatenate(parts, axis=1)

    # ---- what those who call the model ask for ----------------------------------------------

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """See `Ranks.together`."""
        error: KernelgenError | OSError | None = None
        try:
            yield
        except RankError:
            raise  # all have it already, or somebody is not there to be told
        except (KernelgenError, OSError) as caught:
            error = caught
        found = self.everywhere(None if error is None else str(error))
        failed = [n for n, one in enumerate(found) if one is not None]
        if failed:
            alike = len(failed) == self.count and len(set(found)) == 1
            said = found[failed[0]]
            raise SharedError(said if alike else f"rank {failed[0]}: {said}") from error

    def own(self, prompts: Sequence[T]) -> list[T]:
        """Scattered by rank 0: every replica gets every so many."""
        if self.replicas == 1:
            return list(prompts)
        each = self.stages * self._tp
        hands = [dealt(prompts, rank // each, self.replicas) for rank in range(self.count)]
        found: list[Any] = [None]
        with self._engine("a scatter"):
            self._dist.scatter_object_list(found, hands if self.rank == 0 else None)
        mine: list[T] = found[0]
        return mine

    def collect(self, answers: Sequence[T]) -> list[T]:
        """Gathered from the replicas."""
        if self.replicas == 1:
            return list(answers)
        found: list[Any] = [None] * self.replicas
        with self._engine("a gather"):
            self._dist.all_gather_object(found, list(answers), group=self._of["dp"])
        return list(undealt(found))

    def everywhere(self, what: T) -> list[T]:
        """Gathered from all ranks."""
        found: list[Any] = [None] * self.count
        with self._engine("a gather"):
            self._dist.all_gather_object(found, what)
        return found

    def __str__(self) -> str:
        sizes = {"tp": self._tp, "pp": self.stages, "dp": self.replicas}
        return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)

    def close(self, failure: str | None = None) -> None:
        """Wait for the others and leave; with a failure, leave at once and tell them."""
        if not self._dist.is_initialized():
            return
        if failure is None:
            with self._engine("a barrier"):
                self._dist.barrier()
        self._watch.close(failure)
        with contextlib.suppress(RuntimeError):
            self._dist.destroy_process_group()

    def _tensor_of(self, x: Array) -> Any:
        """x as the engine takes it: in the same memory between CPUs."""
        x = np.ascontiguousarray(x, np.float32)
        return self._torch.from_numpy(x if x.flags.writeable else x.copy()).to(self._device)


def _array(tensor: Any) -> Array:
    found: Array = tensor.cpu().numpy()
    return found


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
