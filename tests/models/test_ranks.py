"""Models over several ranks: what one process computes, and what happens where a rank is gone."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kernelgen
from kernelgen import models
from kernelgen.api import runtime_of
from kernelgen.errors import ConfigError
from kernelgen.models.hyperparameters import Hyperparameters
from kernelgen.models.ranks import outline
from kernelgen.models.ranks.group import Ranks, Turn, split
from kernelgen.models.ranks.plan import Part, Plan, shares
from kernelgen.models.ranks.watch import SILENT, Watch
from tests.models import ranks as many
from tests.models import tiny, vocabularies
from tests.test_cli import run

#: seconds after which a rank that waits is thought to wait for ever: they take a few, but a machine
#: may have twenty other things to do for each of its cores
PATIENCE = 600

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [5, 5, 5]]
COUNT = 5


# ---- what the model does, with ranks that are threads -----------------------------------------


class Threads:
    """What the ranks of one replica share: numpy in the place of an engine."""

    def __init__(self, tp: int, pp: int, micro: int) -> None:
        self.tp, self.pp, self.micro = tp, pp, micro
        self.barriers = [threading.Barrier(tp, timeout=PATIENCE) for _ in range(pp)]
        self.all = threading.Barrier(tp * pp, timeout=PATIENCE)
        self.slots: list[list[Any]] = [[None] * tp for _ in range(pp)]
        self.ways: list[list[queue.Queue[Any]]] = [
            [queue.Queue() for _ in range(tp)] for _ in range(pp)
        ]
        self.found: Any = None
        self.messages = 0


class Threaded(Ranks):
    """One of them."""

    def __init__(self, of: Threads, stage: int, tensor: int) -> None:
        self.of, self.stage, self.tensor = of, stage, tensor
        self.rank, self.count = stage * of.tp + tensor, of.tp * of.pp

    def plan(self, shape: Hyperparameters, tensors: Mapping[str, Any], where: str) -> Part:
        made = Plan(shape, tensors, tp=self.of.tp, pp=self.of.pp, where=where)
        return made.part(self.stage, self.tensor)

    def pieces(self, turns: Sequence[Turn]) -> list[list[Turn]]:
        return split(turns, self.of.micro)

    def _all(self, x: Any) -> list[Any]:
        slots, barrier = self.of.slots[self.stage], self.of.barriers[self.stage]
        slots[self.tensor] = x
        barrier.wait()
        found = list(slots)
        barrier.wait()
        return found

    def sum(self, x: Any) -> Any:
        return np.sum(self._all(x), axis=0)

    def receive(self, shape: tuple[int, ...]) -> Any:
        x = self.of.ways[self.stage][self.tensor].get(timeout=PATIENCE)
        assert x.shape == shape
        return x

    def send(self, x: Any) -> None:
        self.of.messages += self.tensor == 0
        self.of.ways[self.stage + 1][self.tensor].put(x)

    def logits(self, make: Callable[[], Any], rows: int, vocabulary: int) -> Any:
        if self.stage == self.of.pp - 1:
            parts = self._all(make())
            assert [x.shape[1] for x in parts] == [len(n) for n in shares(vocabulary, self.of.tp)]
            self.of.found = np.concatenate(parts, axis=1)
        self.of.all.wait()
        found = self.of.found
        self.of.all.wait()
        assert found.shape == (rows, vocabulary)
        return found


def in_threads(tp: int, pp: int, micro: int, do: Callable[[Ranks], Any]) -> list[Any]:
    """What `do` gives on each rank."""
    of = Threads(tp, pp, micro)
    found: list[Any] = [None] * (tp * pp)

    def one(rank: int) -> None:
        try:
            found[rank] = do(Threaded(of, *divmod(rank, tp)))
        except BaseException as error:
            found[rank] = error
            for barrier in (*of.barriers, of.all):
                barrier.abort()

    threads = [threading.Thread(target=one, args=(n,), daemon=True) for n in range(tp * pp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), f"a rank has not ended after {PATIENCE} s"
    for one_found in found:
        if isinstance(one_found, BaseException):
            raise one_found
    return found


@pytest.mark.parametrize(
    ("cut", "options"),
    [
        ((2, 1, 1), {"architecture": "qwen2", "tied": True}),
        ((2, 2, 3), {"architecture": "qwen3", "tied": True}),
        ((1, 2, 1), {"fmt": "q8_0", "value_fmt": "q4_0"}),
        # three blocks of the network for two ranks
        ((2, 2, 2), {"fmt": "q8_0", "vocabulary": 67}),
    ],
)
def test_parts_of_a_model_make_the_whole(
    cut: tuple[int, int, int], options: dict[str, Any], tmp_path: Path
) -> None:
    path = tiny.write(tmp_path / "model.gguf", **options)
    alone = many.called(models.open(path, "numpy", "fp32"), PROMPTS, COUNT)

    def do(ranks: Ranks) -> Any:
        return many.called(models.open(path, "numpy", "fp32", ranks), PROMPTS, COUNT)

    found = in_threads(*cut, do)
    check(alone, found, 1e-4)
    # no more than the norms, and a tied embedding, is there twice
    most = alone["bytes"] + (bool(options.get("tied")) and cut[1] > 1) * tiny.WIDTH * 64 * 2
    assert sum(one["bytes"] for one in found) == most
    assert sum(one["kv"] for one in found) == alone["kv"]


def check(alone: dict[str, Any], found: Sequence[dict[str, Any]], most: float) -> None:
    for one in found:
        for which in ("every", "next"):
            size = np.abs(alone[which]).max()
            assert np.abs(one[which] - alone[which]).max() < most * size
        assert one["tokens"] == one["served"] == alone["tokens"]


def test_micro_batches_go_through_stages_one_by_one(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "model.gguf")
    sent: list[int] = []

    def do(ranks: Ranks) -> Any:
        model = models.open(path, "numpy", "fp32", ranks)
        model.forward([(0, PROMPTS[0])], model.sequences(capacity=16))
        sent.append(ranks.of.messages)  # type: ignore[attr-defined]

    in_threads(1, 2, 3, do)
    assert sent[0] == 3


def test_biases_of_sums_are_added_once(tmp_path: Path) -> None:
    extra = {
        f"blk.{n}.{name}.bias": np.linspace(-1, 1, tiny.WIDTH, dtype=np.float32)
        for n in range(tiny.LAYERS)
        for name in ("attn_output", "ffn_down")
    } | {
        f"blk.{n}.{name}.bias": np.linspace(-1, 1, tiny.HIDDEN, dtype=np.float32)
        for n in range(tiny.LAYERS)
        for name in ("ffn_gate", "ffn_up")
    }
    path = tiny.write(tmp_path / "model.gguf", extra=extra)
    model = models.open(path, "numpy", "fp32")
    alone = model.forward([(0, PROMPTS[0])], model.sequences(capacity=16))

    def do(ranks: Ranks) -> Any:
        model = models.open(path, "numpy", "fp32", ranks)
        return model.forward([(0, PROMPTS[0])], model.sequences(capacity=16))

    for found in in_threads(2, 1, 1, do):
        assert np.abs(found - alone).max() < 1e-4 * np.abs(alone).max()


# ---- with an engine ----------------------------------------------------------------------------


def needs_torch() -> None:
    torch = pytest.importorskip("torch")
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")


def made(path: Path, fmt: str, layers: int = 3) -> Path:
    """A model whose blocks of 256 can be cut in two; with random weights."""
    shape: dict[str, Any] = {
        "general.architecture": "llama", "llama.block_count": layers,
        "llama.embedding_length": 256, "llama.feed_forward_length": 768,
        "llama.attention.head_count": 8, "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 64, "llama.attention.value_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.context_length": 512,
    }  # fmt: skip
    tensors = outline._sizes(Hyperparameters.of(shape), 97, False)
    rng = np.random.default_rng(1)
    found: dict[str, Any] = {}
    for name, size in tensors.items():
        x = rng.standard_normal(size).astype(np.float32)
        if len(size) == 1:
            found[name] = 1 + 0.1 * x
        else:
            found[name] = kernelgen.quantize(x / np.sqrt(size[1]), fmt)
    kernelgen.save(path, found, shape)
    return path


def wait_for(process: Any, word: str, seconds: float) -> None:
    """Until a process prints a line."""
    found: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: found.put(process.stdout.readline()), daemon=True).start()
    try:
        said = found.get(timeout=seconds)
    except queue.Empty:
        process.kill()
        said = f"nothing in {seconds} s: "
    assert said.strip() == word, said + process.stderr.read()


def run_until_one_is_gone(
    tmp_path: Path, path: Path, which: int, how: int, **cut: int
) -> tuple[list[Any], list[tuple[int, str, str]]]:
    """Results of ranks of which one then gets a signal, and how the others end; within 30 s."""
    count = int(np.prod(list(cut.values())))
    given = {"paths": [str(path)], "prompts": PROMPTS, "count": COUNT, "forever": True, **cut}
    command = ["-c", many.MAIN, "results", str(tmp_path), many.json.dumps(given)]
    processes = many.start(count, command)
    others = [one for n, one in enumerate(processes) if n != which]
    try:
        for one in processes:
            wait_for(one, "runs", PATIENCE)
        processes[which].send_signal(how)
        begin = time.monotonic()
        said = many.end(others, 60)
        assert time.monotonic() - begin < 30
    finally:
        for one in processes:
            one.kill()
            one.wait()
    return many.found(count, tmp_path), said


def check_ends(said: list[tuple[int, str, str]], gone: int) -> None:
    """Each says in its last line who is gone, and fails."""
    for code, _, err in said:
        assert code == 1, (code, err)
        last = err.strip().splitlines()[-1]
        assert f"rank {gone} (process " in last and "no sign of life" in last, err
        assert "start all ranks again" in last


def test_two_ranks_compute_what_one_does_and_none_outlives_the_other(tmp_path: Path) -> None:
    needs_torch()
    path = tiny.write(tmp_path / "model.gguf", fmt="q8_0")
    alone = many.called(models.open(path, "numpy", "fp32"), PROMPTS, COUNT)
    found, said = run_until_one_is_gone(tmp_path, path, 1, signal.SIGKILL, tp=2)
    check(alone, [one for (one,) in found], 1e-4)
    assert sum(one["bytes"] for (one,) in found) == alone["bytes"]
    check_ends(said, 1)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
@pytest.mark.parametrize("which", [0, 3])
def test_four_ranks_end_where_one_is_gone(which: int, how: int, tmp_path: Path) -> None:
    needs_torch()
    path = tiny.write(tmp_path / "model.gguf")
    _, said = run_until_one_is_gone(tmp_path, path, which, how, tp=2, pp=2)
    for code, _, err in said:
        last = err.strip().splitlines()[-1]
        assert code == 1, (code, err)
        # rank 0 has the store through which ranks know of each other
        assert "no sign of life" in last or "ranks meet at" in last, err


CUTS: tuple[dict[str, int], ...] = (
    {"tp": 2}, {"pp": 2}, {"pp": 2, "micro": 3}, {"dp": 2}, {"tp": 2, "pp": 2},
    {"tp": 2, "dp": 2},
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_ranks_compute_what_one_process_does(cut: dict[str, int], tmp_path: Path) -> None:
    needs_torch()
    if (reason := runtime_of("c").available()) is not None:
        pytest.skip(reason)
    paths = [made(tmp_path / f"{fmt}.gguf", fmt) for fmt in ("f16", "q8_0", "q4_K")]
    alone = [many.called(models.open(path, "c", "fp32"), PROMPTS, COUNT) for path in paths]
    count = int(np.prod([n for name, n in cut.items() if name != "micro"]))
    given: dict[str, Any] = {"prompts": PROMPTS, "target": "c", "count": COUNT, **cut}
    by_rank = many.everywhere(count, "results", tmp_path, paths=list(map(str, paths)), **given)
    replicas = cut.get("dp", 1)
    for one, found in zip(alone, zip(*by_rank, strict=True), strict=True):
        check(one, found, 1e-3)
        assert sum(each["bytes"] for each in found) == replicas * one["bytes"]
        assert sum(each["kv"] for each in found) == replicas * one["kv"]
        if replicas > 1:
            assert {each["mine"] for each in found} == {1, 2}


@pytest.mark.slow
def test_mistakes_of_one_rank_are_told_to_all(tmp_path: Path) -> None:
    needs_torch()
    good = tiny.write(tmp_path / "good.gguf")
    tiny.write(tmp_path / "file0.gguf")
    tiny.write(tmp_path / "file1.gguf", tied=True)
    half = tiny.write(tmp_path / "half.gguf", without="blk.1.ffn_up.weight")
    odd = tiny.write(tmp_path / "odd.gguf", extra={"blk.1.what.weight": np.ones(3, np.float32)})
    paths = [
        str(tmp_path / name)
        for name in ("good.gguf", "missing.gguf", "fileRANK.gguf", half.name, odd.name, "good.gguf")
    ]
    first, second = many.everywhere(2, "mistakes", tmp_path, paths=paths, pp=2)
    assert len(first) == len(second) == len(paths)
    wanted = (
        "tokens 1048576 to 1048576 were given", "missing.gguf does not exist",
        "rank 1 was given another model than rank 0", "rank 1: ", "rank 1: ",
        "tokens 1048576 to 1048576",
    )  # fmt: skip
    for said in (first, second):
        for sentence, want in zip(said, wanted, strict=True):
            assert want in sentence and "\n" not in sentence
    assert "no tensor 'blk.1.ffn_up.weight'" in first[3]
    assert "no place for (blk.1.what.weight)" in first[4]
    assert good.exists()
    # what no rank can do, each refuses with the same sentence
    said = many.everywhere(3, "mistakes", tmp_path, paths=[str(good)], tp=3)
    assert len(set(map(str, said))) == 1 and "2 heads of keys" in said[0][0]


def test_without_ranks_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert type(models.connect()) is Ranks
    with pytest.raises(ConfigError, match="start as many, by torchrun --nproc-per-node"):
        models.connect(tp=2)
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ConfigError, match="6 ranks were started"):
        models.connect(tp=2, pp=2)


@pytest.mark.parametrize("said", ["abc", "-1", "0", ""])
def test_an_environment_that_torchrun_did_not_set(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", said)
    with pytest.raises(ConfigError, match="start by it, or unset"):
        models.connect(tp=0)


class Store:
    """Of torch.distributed, without it."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.dead = False

    def set(self, key: str, value: str) -> None:
        if self.dead:
            raise RuntimeError("gone")
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        if self.dead:
            raise RuntimeError("gone")
        return [self.values[key] for key in keys]


class Clock:
    """Time that passes where the test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_what_a_watch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, store = Clock(), Store()
    monkeypatch.setattr("kernelgen.models.ranks.watch.time", clock)
    watches = [Watch(store, n, 3) for n in range(3)]
    for one in watches:
        one._names = dict.fromkeys(range(3), "process 1 on here")

    def pass_time(seconds: int, *living: int) -> list[str | None]:
        for _ in range(seconds):
            clock.now += 1
            for n in living:
                watches[n]._exchange()
        return [watches[n]._missing(SILENT) for n in living]

    assert pass_time(100, 0, 1, 2) == [None] * 3
    assert pass_time(15, 0, 2) == [None] * 2
    assert pass_time(15, 0, 1, 2) == [None] * 3
    clock.now += 1000  # all were stopped, as by a debugger
    assert pass_time(15, 0, 2) == [None] * 2
    assert pass_time(1, 0, 1, 2) == [None] * 3
    for said in pass_time(22, 0, 2):
        assert said in [
            f"rank 1 (process 1 on here) has given no sign of life for {n} s" for n in (21, 22)
        ]
    watches[1].close()  # one that left is not missed
    assert pass_time(60, 0, 2) == [None] * 2
    watches[2].close("no room")
    assert pass_time(1, 0) == ["rank 2 ended: no room"]
    watches[0]._beats = {1: "left", 2: "left"}
    store.dead = True
    with pytest.raises(RuntimeError):
        pass_time(1, 0)
    for _ in range(22):
        clock.now += 1
        watches[0]._look()
    assert "meet at" in str(watches[0]._missing(SILENT))


# ---- commands ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a byte-level vocabulary."""
    needs_torch()
    pytest.importorskip("tokenizers")
    _, metadata = vocabularies.byte_level()
    size = len(metadata["tokenizer.ggml.tokens"])
    path = tmp_path_factory.mktemp("models") / "toy.gguf"
    return tiny.write(path, "qwen2", vocabulary=size, metadata=metadata)


HERE = ["-m", "kernelgen"]
TORCHRUN = [
    "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kernelgen",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "cut"), [(HERE, ["--tp", "2"]), (TORCHRUN, ["--pp", "2"]), (TORCHRUN, ["--dp", "2"])]
)
def test_run_over_ranks_of_which_the_first_prints(
    start: list[str], cut: list[str], toy: Path
) -> None:
    options = ("-p", "The block", "-p", "of", "-n", "4", "--target", "numpy", "--precision", "fp32")
    alone = run("run", toy, *options)
    assert len(alone.stderr.splitlines()) == 3
    code, out, err = command([*start, "run", str(toy), *options, *cut])
    assert code == 0, err
    assert out == alone.stdout
    assert err.count("target numpy: prompt") == 2 and err.count("kernels: ") == 1


@pytest.mark.slow
def test_an_impossible_cut_is_told_once(toy: Path) -> None:
    code, out, err = command([*HERE, "run", str(toy), "-p", "a", "--tp", "3"])
    assert code == 1 and not out
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "2 heads of keys and values" in lines[0], err


@pytest.mark.slow
def test_replicas_share_a_benchmark(toy: Path) -> None:
    sizes = ["-p", "4", "-n", "3", "-r", "2", "--target", "numpy"]
    code, out, err = command([*HERE, "bench-model", str(toy), *sizes, "--dp", "2"])
    assert code == 0 and "(dp 2)" in out and out.count("pp4") == 1, err


@pytest.mark.slow
def test_replicas_share_a_text(toy: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(vocabularies.TEXTS), encoding="utf-8")
    given = ["perplexity", str(toy), str(text), "--context", "64", "--target", "numpy"]
    wanted = run(*given).stdout
    code, out, err = command([*HERE, *given, "--dp", "2"])
    assert (code, out) == (0, wanted), err


def command(words: list[str]) -> tuple[int, str, str]:
    environment = os.environ | {"PYTHONPATH": str(many.ROOT), "OMP_NUM_THREADS": "1"}
    one = many.subprocess.Popen(
        [sys.executable, *words], env=environment, cwd=many.ROOT, text=True,
        stdout=many.subprocess.PIPE, stderr=many.subprocess.PIPE,
    )  # fmt: skip
    return many.end([one], 500)[0]
