"""Attention under the name and with the arguments of torch's own."""

from __future__ import annotations

from typing import Any

import torch

from kernelgen.errors import ShapeError


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """What torch.nn.functional.scaled_dot_product_attention computes, by kernelgen's kernels, which
    keep no matrix of scores.

    query       float32, float16 or bfloat16 (N, ..., HQ, L, E); also (N, L, E) and (L, E)
    key, value  (N, ..., H, S, E) and (N, ..., H, S, EV)
    attn_mask   broadcasts to (N, ..., HQ, L, S): booleans, True where a query sees a key, or floats
                that are added to the scores
    dropout_p   0 only
    is_causal   query l sees keys up to l, counted from the first of both; without attn_mask only
    scale       1 / sqrt(E) by default
    enable_gqa  HQ may be a multiple of H

    A query that sees no key gives zeros.  Returns (N, ..., HQ, L, EV) of query's dtype; there is no
    gradient.  Raises ShapeError, KernelgenError.
    """
    if dropout_p != 0.0:
        raise ShapeError(
            f"dropout_p={dropout_p} was given; kernels for inference have no dropout, give 0"
        )
    if is_causal and attn_mask is not None:
        raise ShapeError("attn_mask and is_causal were both given; give one, the other inside it")
    rank = query.dim()
    if rank < 2 or key.dim() != rank or value.dim() != rank:
        raise ShapeError(
            f"query, key and value have {rank}, {key.dim()} and {value.dim()} dimensions; all have"
            " the same number, at least (L, E)"
        )
    q, k, v, lead = _four(query, key, value, enable_gqa)
    mask = None if attn_mask is None else _mask(attn_mask, rank, lead, (*q.shape[:3], k.shape[2]))
    rows, keys = q.shape[2], k.shape[2]
    if is_causal and keys > rows:  # the last keys are nobody's
        k, v = k[:, :, :rows], v[:, :, :rows]
    elif is_causal and keys < rows:
        is_causal, mask = False, torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril()
    if mask is not None and keys < rows:  # kernels count queries from the last key
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, rows - keys)) for x in (k, v))
        never = False if mask.dtype == torch.bool else float("-inf")
        mask = torch.nn.functional.pad(mask, (0, rows - keys), value=never)
    y = torch.ops.kernelgen.attention(q, k, v, mask, is_causal, scale)
    return y.reshape(*query.shape[:-1], v.shape[-1]) if rank <= 4 else y.unflatten(0, lead)


def _four(query: Any, key: Any, value: Any, enable_gqa: bool) -> tuple[Any, Any, Any, Any]:
    """The three as (batch, head, position, element), and the dimensions that became the batch."""
    if query.dim() < 4:
        missing = 4 - query.dim()
        shape = (1, 1) if missing == 2 else None
        q, k, v = (
            x.reshape(*shape, *x.shape) if shape else x.unsqueeze(1) for x in (query, key, value)
        )
        return *_batched(q, k, v), None
    heads = [x.shape[-3] for x in (query, key, value)]
    if heads[1] != heads[2] or heads[0] % max(heads[1], 1):
        raise ShapeError(
            f"query, key and value have {heads[0]}, {heads[1]} and {heads[2]} heads; those of key"
            " and value are as many, and divide those of query"
        )
    if heads[0] != heads[1] and heads[1] != 1 and not enable_gqa:
        raise ShapeError(
            f"query has {heads[0]} heads and key {heads[1]}; give enable_gqa=True to share them"
        )
    lead = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    q, k, v = (
        x.expand(*lead, *x.shape[-3:]).reshape(-1, *x.shape[-3:]) for x in (query, key, value)
    )
    return q, k, v, lead


def _batched(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    size = torch.broadcast_shapes(q.shape[:1], k.shape[:1], v.shape[:1])
    return tuple(x.expand(*size, *x.shape[1:]) for x in (q, k, v))


def _mask(mask: Any, rank: int, lead: Any, shape: tuple[int, ...]) -> Any:
    """A mask as booleans or float32 that broadcast to (batch, head, query, key)."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ShapeError(f"attn_mask is of {mask.dtype}; booleans and floats are allowed")
    if rank == 3 and mask.dim() == 3:
        mask = mask.unsqueeze(1)
    if lead is not None and len(lead) > 1:
        mask = mask.expand(*lead, *shape[1:]).reshape(shape)
    mask = mask.expand(*mask.shape[:-1], shape[3]) if mask.dim() else mask.expand(shape)
    return mask if mask.dtype == torch.bool else mask.float()
