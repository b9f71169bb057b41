"""Quantizes a model in place: its linear layers become `QuantLinear`s."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from kernelgen.errors import ShapeError
from kernelgen.ir import formats
from kernelgen.ir.block import BlockFormat
from kernelgen.tensor import human_bytes
from kernelgen.torch.linear import QuantLinear

log = logging.getLogger("kernelgen")

#: why a layer stays that the caller wants to stay
_ASKED = "it was to be left alone"

#: a format for a layer, by its name and the layer, or None to leave it alone
Choice = Callable[[str, Any], "str | BlockFormat | None"]


@dataclass
class Replaced:
    """What `replace_linears` did.

    formats  the format of each layer that was replaced, by its name in the model
    skipped  why each other linear layer was left alone
    before   bytes of the weights that were replaced, and `after` of their blocks
    """

    formats: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    before: int = 0
    after: int = 0

    def __str__(self) -> str:
        lines = [
            f"{len(self.formats)} linear layers quantized, {human_bytes(self.before)} ->"
            f" {human_bytes(self.after)}, {len(self.skipped)} left alone"
        ]
        return "\n".join([*lines, *(f"  {name}: {why}" for name, why in self.skipped.items())])


def replace_linears(
    model: Any,
    format: str | BlockFormat | Choice,
    skip: Iterable[str] = (),
    fallback: str | BlockFormat | None = None,
    precision: str = "auto",
    importance: Callable[[str], Any] | None = None,
) -> Replaced:
    """Replace the torch.nn.Linear layers of a model by quantized ones, in place, one by one.

    format      of the weights; or a function (name, layer) that gives one, or None to skip it
    skip        names of layers that stay: whole, the last part, or a pattern as "blocks.0.*"
    fallback    a format for layers whose K is no multiple of the format's block; by default these
                stay, and a warning says so
    precision   as in `kernelgen.matmul`
    importance  gives, for a layer's name, the weight of each column's error (K,), or None

    A layer that the model has under several names becomes one layer under all of them.  Layers that
    others read the weights of (those of torch.nn.MultiheadAttention) stay, as do those with a
    forward of their own.  Raises FormatError for unknown formats.
    """
    if isinstance(model, torch.nn.Linear):
        raise ShapeError(
            "the model is a linear layer itself, which cannot be replaced in place; use"
            " QuantLinear.from_linear"
        )
    patterns, report = tuple(skip), Replaced()
    spare = None if fallback is None else _known(fallback)
    by_name: Any = format if _is_choice(format) else _constant(_known(format))
    done: dict[int, QuantLinear | str] = {}
    for parent_name, parent in list(model.named_modules()):
        for child, layer in list(parent._modules.items()):
            if not isinstance(layer, torch.nn.Linear):
                continue
            name = f"{parent_name}.{child}" if parent_name else child
            if id(layer) not in done:
                chosen = _stays(name, parent, layer, patterns)
                chosen = chosen or _format_for(layer, by_name(name, layer), spare)
                if not isinstance(chosen, str):
                    weights = None if importance is None else importance(name)
                    chosen = QuantLinear.from_linear(layer, chosen, weights, precision)
                    report.before += layer.weight.numel() * layer.weight.element_size()
                    report.after += chosen.blocks.numel()
                    log.debug("%s: %s", name, chosen)
                done[id(layer)] = chosen
            made = done[id(layer)]
            if isinstance(made, str):
                report.skipped[name] = made
                continue
            setattr(parent, child, made)
            _no_fast_path(parent)
            report.formats[name] = made.quant_format.name
    _say(report)
    return report


def _known(given: Any) -> BlockFormat:
    return given if isinstance(given, BlockFormat) else formats.get(given)


def _is_choice(given: Any) -> bool:
    return callable(given) and not isinstance(given, BlockFormat)


def _constant(fmt: BlockFormat) -> Choice:
    return lambda name, layer: fmt


def _stays(name: str, parent: Any, layer: Any, patterns: tuple[str, ...]) -> str | None:
    """Why a layer is left alone, whatever its shape, or None."""
    last = name.rpartition(".")[2]
    for one in patterns:
        if one in (name, last) or fnmatch.fnmatchcase(name, one):
            return f"{_ASKED} ({one})"
    if isinstance(parent, torch.nn.MultiheadAttention):
        return "torch.nn.MultiheadAttention reads its weights itself"
    if type(layer).forward is not torch.nn.Linear.forward or "forward" in vars(layer):
        return f"{type(layer).__name__} has a forward of its own"
    return None


def _format_for(layer: Any, wanted: Any, spare: BlockFormat | None) -> Any:
    """The format of a layer, or the reason why there is none."""
    if wanted is None:
        return _ASKED
    fmt, k = _known(wanted), layer.in_features
    if k % fmt.block == 0:
        return fmt
    reason = f"K={k} is no multiple of the {fmt.block} elements of a {fmt.name} block"
    if spare is not None and k % spare.block == 0:
        return spare
    return reason if spare is None else f"{reason}, nor of {spare.name}'s {spare.block}"


def _no_fast_path(parent: Any) -> None:
    """torch's encoder layers hand the weights of their linear layers to a kernel of torch's where
    they see no reason against it; here is one that they look for."""
    if isinstance(parent, torch.nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0


def _say(report: Replaced) -> None:
    log.info("%s", report)
    odd = {name: why for name, why in report.skipped.items() if not why.startswith(_ASKED)}
    if odd:
        name, why = next(iter(odd.items()))
        log.warning(
            "%d linear layers keep their floats, so that they are not faster: %s (%s)%s",
            len(odd), name, why, "" if len(odd) == 1 else " and others",
        )  # fmt: skip
