"""Models: `run`, `bench-model`, `perplexity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kernelgen import bench as benchmark
from kernelgen import generate, models
from kernelgen.cli.ranks import across_ranks
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
DecodePrecision = Annotated[
    str | None,
    typer.Option(
        "--decode-precision",
        metavar="P",
        help="Of products of single tokens that follow; by default as of prompts.",
    ),
]
CacheFormat = Annotated[
    str,
    typer.Option(
        "--cache", metavar="F[,F]", help="Format of keys and of values, such as q8_0 or q8_0,q4_0."
    ),
]


def run(
    file: File,
    ranks: models.Ranks,
    prompt: Annotated[
        list[str],
        typer.Option("--prompt", "-p", help="What the text begins with; may be repeated."),
    ],
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
    decode_precision: DecodePrecision = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text, or each of some; then say how fast it was, and which kernels ran."""
    model = models.open(file, target, precision, ranks, decode_precision)
    keys, values = _formats(cache)
    mine = ranks.own(prompt)
    with ranks.together():
        tokenizer = _tokenizer(model)

        def begun(text: str) -> models.Generation:
            asked = tokenizer.chat([{"role": "user", "content": text}]) if chat else text
            ids = tokenizer.encode(asked, special=True)
            room = min(len(ids) + count, max(model.shape.context, len(ids)))
            return models.Generation(
                model, ids, count, sampler=models.Sampler(temperature, top_k, top_p, seed),
                ends=tokenizer.ends,
                cache=model.sequences(capacity=max(1, room), format=keys, value_format=values),
            )  # fmt: skip

        begun_all = [begun(text) for text in mine]
    before = set(generate.generated())
    streams = not as_json and ranks.replicas == 1

    def answer(making: models.Generation) -> dict[str, Any]:
        pieces = []
        for piece in tokenizer.stream(making):
            pieces.append(piece)
            if streams:
                typer.echo(piece, nl=False)
        if streams:
            typer.echo()
        read = len(making.prompt)
        return {
            "text": "".join(pieces),
            "target": model.target,
            "prompt_tokens": read,
            "prompt_per_second": _rate(read, making.prompt_seconds),
            "tokens": making.tokens,
            # the first comes from the prompt
            "tokens_per_second": _rate(making.tokens - 1, making.seconds),
        }

    found = ranks.collect([answer(one) for one in begun_all])
    kernels = [one.name for one in generate.generated() if one not in before]
    if as_json:
        answers = [one | {"kernels": kernels} for one in found]
        print_json(answers[0] if len(answers) == 1 else answers)
        return
    for one in found:
        if not streams:
            typer.echo(one["text"])
        complain(
            f"target {model.target}: prompt {one['prompt_tokens']} tokens,"
            f" {one['prompt_per_second']:.2f} tokens/s (with compiling and repacking);"
            f" then {one['tokens']} tokens, {one['tokens_per_second']:.2f} tokens/s"
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
    ranks: models.Ranks,
    prompt: Annotated[int, typer.Option("-p", min=0, help="Tokens of the prompt; 0: none.")] = 512,
    tokens: Annotated[int, typer.Option("-n", min=0, help="Tokens that follow; 0: none.")] = 128,
    tenants: Annotated[int, typer.Option(min=1, help="Sequences over the same weights.")] = 1,
    repeats: Annotated[int, typer.Option("-r", min=1, help="Runs of each test.")] = 5,
    cache: CacheFormat = "f16",
    target: TargetName = None,
    precision: Precision = "auto",
    decode_precision: DecodePrecision = None,
    as_json: AsJson = False,
) -> None:
    """Time a model: tokens of a prompt (pp) and tokens that follow (tg) in a second."""
    model = models.open(file, target, precision, ranks, decode_precision)
    warning = benchmark.busy()
    keys, values = _formats(cache)
    found = measure.speeds(
        model, prompt=prompt, tokens=tokens, tenants=tenants, repeats=repeats, format=keys,
        value_format=values,
    )  # fmt: skip
    if warning:
        complain(f"warning: {warning}")
    if as_json:
        data = {"target": model.target, "ranks": ranks.count}
        print_json(data | {"tests": [one.as_dict() for one in found]})
        return
    numbers = ["size", "cache", "tokens/s"]
    shown = table("model", "size", "target", "tenants", "cache", "test", "tokens/s", right=numbers)
    for one in found:
        name = f"{model.shape.architecture} {file.stem}"
        shown.add_row(
            f"{name} ({ranks})" if ranks.count > 1 else name, human_bytes(model.file.nbytes),
            model.target, str(one.tenants), human_bytes(one.cache_bytes), one.test,
            f"{one.mean:.2f} ± {one.deviation:.2f}",
        )  # fmt: skip
    console().print(shown)


def perplexity(
    file: File,
    ranks: models.Ranks,
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
    model = models.open(file, target, precision, ranks)
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
    app.command("run")(across_ranks(run))
    app.command("bench-model")(across_ranks(bench_model))
    app.command("perplexity")(across_ranks(perplexity))
