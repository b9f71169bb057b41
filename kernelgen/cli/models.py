"""Models: `run`, `bench-model`, `perplexity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kernelgen import bench as benchmark
from kernelgen import generate, models
from kernelgen.cli.terminal import AsJson, complain, console, print_json, progress_bar, table
from kernelgen.errors import FileError
from kernelgen.models import measure
from kernelgen.problem import PRECISIONS
from kernelgen.tensor import human_bytes

File = Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="A decoder of the Llama kind.")]
TargetName = Annotated[
    str | None, typer.Option("--target", metavar="T", help="By default the best that runs here.")
]
Precision = Annotated[
    str, typer.Option("--precision", metavar="P", help=f"Of products: {', '.join(PRECISIONS)}.")
]
CacheFormat = Annotated[
    str,
    typer.Option(
        "--cache", metavar="F[,F]", help="Format of keys and of values, such as q8_0 or q8_0,q4_0."
    ),
]


def run(
    file: File,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the text begins with.")],
    count: Annotated[
        int, typer.Option("--tokens", "-n", min=1, help="Tokens that follow, at most.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most probable token each time.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Only so many tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the most probable up to this sum.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the random numbers.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer the text, by the model's template.")
    ] = False,
    cache: CacheFormat = "f16",
    target: TargetName = None,
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a text; then say how fast it was, and which kernels ran."""
    sampler = models.Sampler(temperature, top_k, top_p, seed)
    model = models.open(file, target, precision)
    tokenizer = _tokenizer(model)
    text = tokenizer.chat([{"role": "user", "content": prompt}]) if chat else prompt
    ids = tokenizer.encode(text, special=True)
    keys, values = _formats(cache)
    room = min(len(ids) + count, max(model.shape.context, len(ids)))
    kept = model.sequences(capacity=max(1, room), format=keys, value_format=values)
    making = models.Generation(
        model, ids, count, sampler=sampler, ends=tokenizer.ends, cache=kept
    )  # fmt: skip
    before = set(generate.generated())
    pieces = []
    for piece in tokenizer.stream(making):
        pieces.append(piece)
        if not as_json:
            typer.echo(piece, nl=False)
    kernels = [one.name for one in generate.generated() if one not in before]
    speeds = {
        "prompt_tokens": len(ids),
        "prompt_per_second": _rate(len(ids), making.prompt_seconds),
        "tokens": making.tokens,
        # the first comes from the prompt
        "tokens_per_second": _rate(making.tokens - 1, making.seconds),
    }
    if as_json:
        print_json({"text": "".join(pieces), "target": model.target, **speeds, "kernels": kernels})
        return
    typer.echo()
    complain(
        f"target {model.target}: prompt {len(ids)} tokens,"
        f" {speeds['prompt_per_second']:.2f} tokens/s (with compiling and repacking);"
        f" then {making.tokens} tokens, {speeds['tokens_per_second']:.2f} tokens/s"
    )
    complain("kernels: " + ", ".join(kernels))


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds and count > 0 else 0.0


def _formats(given: str) -> tuple[str, str | None]:
    """Formats of keys and of values."""
    keys, _, values = given.partition(",")
    return keys.strip(), values.strip() or None


def _tokenizer(model: models.Decoder) -> models.Tokenizer:
    made = models.Tokenizer(model.file.metadata, str(model.file.path))
    if made.size > model.vocabulary:
        raise FileError(
            f"the tokenizer of {model.file.path} has {made.size} tokens, and the model"
            f" {model.vocabulary}; they do not belong together"
        )
    return made


def bench_model(
    file: File,
    prompt: Annotated[int, typer.Option("-p", min=0, help="Tokens of the prompt; 0: none.")] = 512,
    tokens: Annotated[int, typer.Option("-n", min=0, help="Tokens that follow; 0: none.")] = 128,
    tenants: Annotated[int, typer.Option(min=1, help="Sequences over the same weights.")] = 1,
    repeats: Annotated[int, typer.Option("-r", min=1, help="Runs of each test.")] = 5,
    cache: CacheFormat = "f16",
    target: TargetName = None,
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Time a model: tokens of a prompt (pp) and tokens that follow (tg) in a second."""
    model = models.open(file, target, precision)
    warning = benchmark.busy()
    keys, values = _formats(cache)
    found = measure.speeds(
        model, prompt=prompt, tokens=tokens, tenants=tenants, repeats=repeats, format=keys,
        value_format=values,
    )  # fmt: skip
    if warning:
        complain(f"warning: {warning}")
    if as_json:
        print_json({"target": model.target, "tests": [one.as_dict() for one in found]})
        return
    numbers = ["size", "cache", "tokens/s"]
    shown = table("model", "size", "target", "tenants", "cache", "test", "tokens/s", right=numbers)
    for one in found:
        shown.add_row(
            f"{model.shape.architecture} {file.stem}", human_bytes(model.file.nbytes), model.target,
            str(one.tenants), human_bytes(one.cache_bytes), one.test,
            f"{one.mean:.2f} ± {one.deviation:.2f}",
        )  # fmt: skip
    console().print(shown)


def perplexity(
    file: File,
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="A text in UTF-8.")],
    context: Annotated[int, typer.Option("--context", "-c", min=4, help="Tokens of a part.")] = 512,
    cache: CacheFormat = "f16",
    target: TargetName = None,
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """How well a model foretells a text, computed as llama.cpp does."""
    try:
        content = text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FileError(f"{text} is not text in UTF-8; convert it first") from None
    model = models.open(file, target, precision)
    tokenizer = _tokenizer(model)
    ids = tokenizer.encode(content)
    keys, values = _formats(cache)
    with progress_bar(console(stderr=True)) as progress:
        task = progress.add_task("parts", total=None)

        def tell(done: int, of: int, value: float) -> None:
            progress.update(task, total=of, completed=done, description=f"perplexity {value:.4f}")

        found = models.perplexity(
            model, ids, context=context, bos=tokenizer.bos, format=keys, value_format=values,
            tell=tell,
        )  # fmt: skip
    if as_json:
        print_json({"perplexity": found, "tokens": len(ids), "context": context})
        return
    print(f"perplexity {found:.4f} over {len(ids)} tokens in parts of {context}")


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command("run")(run)
    app.command("bench-model")(bench_model)
    app.command("perplexity")(perplexity)
