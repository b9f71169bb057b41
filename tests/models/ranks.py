"""Several ranks of one test, as torchrun would start them, and what each of them found."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from kernelgen.models.ranks import local

ROOT = Path(__file__).resolve().parent.parent.parent

#: what a rank runs: the name of a function of this module, and its arguments in JSON
MAIN = "import sys; from tests.models import ranks; ranks.main(*sys.argv[1:])"


def start(count: int, command: list[str], **popen: Any) -> list[subprocess.Popen[str]]:
    """Processes with the environment that torchrun gives, of one thread each."""
    more = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, *command], env=environment | more, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen,
        )
        for environment in local.environments(count)
    ]  # fmt: skip


def end(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; those that are late are killed, which fails."""
    limit, found = time.monotonic() + seconds, []
    try:
        for one in processes:
            out, err = one.communicate(timeout=max(0.1, limit - time.monotonic()))
            found.append((one.returncode, out, err))
    finally:
        for one in processes:
            if one.poll() is None:
                one.kill()
                one.communicate()
    return found


def everywhere(count: int, name: str, folder: Path, /, **given: Any) -> Any:
    """What a function of this module gives on each rank."""
    command = ["-c", MAIN, name, str(folder), json.dumps(given)]
    for code, out, err in end(start(count, command), 900):
        assert code == 0, f"{out}\n{err}"
    return found(count, folder)


def found(count: int, folder: Path) -> list[Any]:
    """What a function of this module gave on each rank."""
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(count)]


def main(name: str, folder: str, given: str) -> None:
    """What each process runs."""
    globals()[name](Path(folder, f"{os.environ['RANK']}.pickle"), **json.loads(given))


def results(
    to: Path, paths: list[str], prompts: list[list[int]], target: str = "numpy",
    precision: str = "fp32", count: int = 6, forever: bool = False, **cut: int,
) -> None:  # fmt: skip
    """What each of some models makes of prompts: see `called`.

    forever  then tokens without end, and a word when they flow
    """
    from kernelgen import models

    if forever:
        signal.alarm(600)  # whatever becomes of the test
    with models.connect(**cut) as ranks:
        loaded = [models.open(path, target, precision, ranks) for path in paths]
        to.write_bytes(pickle.dumps([called(model, prompts, count) for model in loaded]))
        cache = loaded[0].sequences(capacity=64)
        turns = 0
        while forever:
            turns += 1
            if turns == 3:
                print("runs", flush=True)
            cache.truncate()
            loaded[0].forward([(0, [1, 2, 3])], cache)


def called(model: Any, prompts: list[list[int]], count: int) -> dict[str, Any]:
    """Logits of a model in all ways in which it is called, tokens, and what it holds."""
    from kernelgen import models

    cache = model.sequences(2, capacity=64)
    prompt = prompts[0]
    ranks = model.ranks
    found: dict[str, Any] = {
        "every": model.forward([(0, prompt)], cache, every=True),
        "next": model.forward([(0, prompt[:1]), (1, prompt[:7])], cache),
        "kv": cache.nbytes,
        "bytes": sum(w.nbytes for w in held(model)),
        "layers": list(model.part.layers),
    }
    mine = [list(models.Generation(model, one, count)) for one in ranks.own(prompts)]
    found["mine"] = len(mine)
    found["tokens"] = ranks.collect(mine)
    server = models.Server(model, 3, capacity=64)
    requests = [server.submit(one, count) for one in prompts]
    server.run()
    found["served"] = [one.tokens for one in requests]
    return found


def held(model: Any) -> list[Any]:
    """The matrices that a rank has."""
    kinds = ("q", "k", "v", "out", "gate", "up", "down")
    found = [getattr(layer, kind).w for layer in model.layers for kind in kinds]
    if model.part.first or (model.part.last and model.part.tied):
        found.append(model.embedding)
    if model.part.last and not model.part.tied:
        found.append(model.output.w)
    return found


def mistakes(to: Path, paths: list[str], **cut: int) -> None:
    """What is said on each rank where something is wrong on some; all go on."""
    from kernelgen import models
    from kernelgen.errors import KernelgenError

    said = []
    with models.connect(**cut) as ranks:
        for path in paths:
            try:
                model = models.open(path.replace("RANK", str(ranks.rank)), "numpy", "fp32", ranks)
                model.forward([(0, [1 << 20])], model.sequences(capacity=8))
            except KernelgenError as error:
                said.append(str(error))
        to.write_bytes(pickle.dumps(said))
