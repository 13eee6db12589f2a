"""Attention of the token that pools, from what enters an attention module: the formulas, for every kind of module.

Plain multi-head attention, `nn.MultiheadAttention` with a learned probe (SigLIP), and a head whose query is learned and
not projected (AIMv2). Imports layouts and towers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvg_adapter.layouts import Layout
from fvg_adapter.modes import full_precision
from fvg_adapter.towers import attention_scale, head_dim, hidden_of, linear_weight, projected


def pooling_attention(query: Tensor, keys: Tensor, heads: int, scale: float, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of one token over all tokens, per head: softmax_n(scale · q_h · k_hn + bias_hn).

    Args:
        query: (B, D) projected query of the pooling token.
        keys: (B, N, D) projected keys of all tokens.
        heads: number of heads; D is split into `heads` consecutive parts.
        scale: factor on the products.
        bias: (B, heads, N) or what broadcasts to it, added before the softmax: a padding mask, say.

    Returns:
        (B, heads, N), rows sum to 1; float32 (float64 for float64 input), also under autocast.

    Example:
        >>> query, keys = torch.tensor([[1.0]]), torch.tensor([[[0.0], [1.0986123]]])  # e^0 : e^1.0986 = 1 : 3
        >>> pooling_attention(query, keys, heads=1, scale=1.0)
        tensor([[[0.2500, 0.7500]]])
    """
    query, keys = full_precision(query), full_precision(keys)
    with torch.autocast(keys.device.type, enabled=False):
        split = keys.reshape(*keys.shape[:2], heads, -1).transpose(1, 2)  # (B, N, D) -> (B, heads, N, d)
        one = query.reshape(len(query), heads, -1, 1)  # (B, D) -> (B, heads, d, 1)
        scores = (split @ one).squeeze(-1) * scale  # (B, heads, N)
        return torch.softmax(scores if bias is None else scores + bias, dim=-1)


def folded_attention(
    query: Tensor, weight: Tensor, hidden: Tensor, heads: int, scale: float, bias: Tensor | None = None
) -> Tensor:
    """`pooling_attention` for keys k_n = W x_n (+ b), without forming them: q · (W x) = (Wᵀ q) · x.

    That is N · D · heads products for an image instead of N · D². The keys' own bias adds the same to all tokens of a
    head, which no softmax sees.

    Args:
        query: (B, D) projected query of the pooling token. weight: (D, width) W. hidden: (B, N, width) tokens.
        heads, scale, bias: as for `pooling_attention`.

    Example:
        >>> hidden = torch.tensor([[[0.0], [0.5493061]]])
        >>> folded_attention(torch.tensor([[1.0]]), torch.tensor([[2.0]]), hidden, heads=1, scale=1.0)
        tensor([[[0.2500, 0.7500]]])
    """
    query, weight, hidden = full_precision(query), full_precision(weight), full_precision(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        one = query.reshape(len(query), heads, -1).transpose(0, 1)  # (B, D) -> (heads, B, d)
        folded = one @ weight.reshape(heads, -1, weight.shape[-1])  # (heads, B, width): no copy of W for each image
        scores = folded.transpose(0, 1) @ hidden.mT * scale  # (B, heads, N)
        return torch.softmax(scores if bias is None else scores + bias, dim=-1)


@dataclass(frozen=True)
class Seen:
    """What entered an attention module: enough to work out its attention later.

    Attributes:
        module: the module, with the projections that it has now.
        hidden: (B, N, D) the tokens that are looked at.
        probe: (B, 1, D) the learned probe that looks, where it is no token.
        mask: additive or boolean mask as the module got it, or None.
    """

    module: nn.Module
    hidden: Tensor
    probe: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, layout: Layout, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Seen:
        """Reads the arguments of an attention module of a family."""
        if layout.head == "probe" and isinstance(module, nn.MultiheadAttention):
            probe = args[0] if args else kwargs["query"]
            hidden = args[1] if len(args) > 1 else kwargs["key"]
            return cls(module, hidden, probe, kwargs.get("attn_mask"))
        return cls(module, hidden_of(args, kwargs), mask=_mask(args, kwargs))


def row_of(layout: Layout, seen: Seen) -> Tensor:
    """(B, heads, N) attention of the token that pools, by the projections that the module has now."""
    module, hidden = seen.module, seen.hidden
    if layout.averaged:
        return _mean_row(layout, seen)
    if seen.probe is not None:
        return _probe_row(module, seen)  # type: ignore[arg-type]
    if layout.head == "learned query" and not hasattr(module, layout.query):
        heads = int(module.num_heads)  # type: ignore[arg-type]
        query = module.cls_token.expand(len(hidden), -1, -1)[:, 0]  # type: ignore[operator]
        return _row(layout, seen, query, heads, (query.shape[-1] // heads) ** -0.5, None)
    query = projected(module, layout.query, hidden[:, :1]).squeeze(1)  # (B, D)
    width = query.shape[-1]
    bias = None if seen.mask is None else _additive(seen.mask)[:, :, 0]  # (B, 1 or heads, N)
    return _row(layout, seen, query, width // head_dim(module, width), attention_scale(module, width), bias)


def _row(layout: Layout, seen: Seen, query: Tensor, heads: int, scale: float, bias: Tensor | None) -> Tensor:
    weight = None if torch.is_grad_enabled() else linear_weight(seen.module, layout.key)
    if weight is not None and weight.shape == (query.shape[-1], seen.hidden.shape[-1]):
        return folded_attention(query, weight, seen.hidden, heads, scale, bias)
    return pooling_attention(query, projected(seen.module, layout.key, seen.hidden), heads, scale, bias)


def _mean_row(layout: Layout, seen: Seen) -> Tensor:
    """(B, heads, N): the mean over all tokens that are no padding of what they look at."""
    rows = [averaged(seen, matrix_of(layout, seen, head)) for head in range(heads_of(layout, seen))]
    return torch.stack(rows, 1)


def averaged(seen: Seen, matrix: Tensor) -> Tensor:
    """(B, M): the mean of (B, N, M) over tokens that are no padding."""
    if seen.mask is None:
        return matrix.mean(1)
    there = (_additive(seen.mask)[:, 0, 0] > -1e4).to(matrix)  # (B, N)
    return (there.unsqueeze(1) @ matrix).squeeze(1) / there.sum(1, keepdim=True)


def _probe_row(module: nn.MultiheadAttention, seen: Seen) -> Tensor:
    assert seen.probe is not None
    width, heads = module.embed_dim, module.num_heads
    weight, bias = module.in_proj_weight, module.in_proj_bias  # (3D, D), (3D,)
    query = F.linear(seen.probe[:, 0], weight[:width], None if bias is None else bias[:width])  # (B, D)
    added = None if seen.mask is None else _additive(seen.mask).reshape(len(query), heads, -1)  # (B·heads, 1, N)
    return folded_attention(query, weight[width : 2 * width], seen.hidden, heads, (width // heads) ** -0.5, added)


def heads_of(layout: Layout, seen: Seen) -> int:
    """Number of heads of an attention module."""
    if isinstance(seen.module, nn.MultiheadAttention) or not layout.query:
        return int(seen.module.num_heads)  # type: ignore[arg-type]
    count = getattr(seen.module, "num_heads", None) or getattr(seen.module, "num_attention_heads", None)
    width = seen.hidden.shape[-1]
    return int(count) if count else width // head_dim(seen.module, width)


def matrix_of(layout: Layout, seen: Seen, head: int) -> Tensor:
    """(B, N, N) attention of every token over every token in one head of an encoder layer."""
    query, keys = (
        _head(projected(seen.module, n, seen.hidden), layout, seen, head) for n in (layout.query, layout.key)
    )
    with torch.autocast(keys.device.type, enabled=False):
        scores = full_precision(query) @ full_precision(keys).mT * attention_scale(seen.module, seen.hidden.shape[-1])
        if seen.mask is not None:
            added = _additive(seen.mask)  # (B, 1 or heads, N, N)
            scores = scores + added[:, head if added.shape[1] > 1 else 0]
        return torch.softmax(scores, dim=-1)


def _head(tokens: Tensor, layout: Layout, seen: Seen, head: int) -> Tensor:
    """(B, N, d) of one head of projected tokens (B, N, D)."""
    heads = heads_of(layout, seen)
    return tokens.reshape(*tokens.shape[:2], heads, -1)[:, :, head]


def values_of(layout: Layout, seen: Seen) -> Tensor:
    """(B, N, D) the values of an attention module."""
    if isinstance(seen.module, nn.MultiheadAttention):
        width = seen.module.embed_dim
        weight, bias = seen.module.in_proj_weight, seen.module.in_proj_bias
        return F.linear(seen.hidden, weight[2 * width :], None if bias is None else bias[2 * width :])
    return projected(seen.module, layout.value, seen.hidden)


def _mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    found = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    return found if isinstance(found, Tensor) and found.dim() == 4 else None


def _additive(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, torch.finfo(torch.float32).min)
    return full_precision(mask)
