"""The attention formulas against torch's own MultiheadAttention and eager layers: biases, masks, several heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fvg_adapter.attention_flow import Flow
from fvg_adapter.attention_kernels import Seen, heads_of, matrix_of, pooling_attention, row_of, values_of
from fvg_adapter.layouts import LAYOUTS
from fvg_adapter.towers import DualEncoder

SIGLIP, CLIP = LAYOUTS["siglip"], LAYOUTS["clip"]
B, N, D, HEADS = 3, 5, 12, 3


def packed(bias: bool = True) -> nn.MultiheadAttention:
    """A pooling head with biases that are not zero, as a trained one has."""
    torch.manual_seed(0)
    head = nn.MultiheadAttention(D, HEADS, bias=bias, batch_first=True)
    if bias:
        nn.init.normal_(head.in_proj_bias)
    return head.eval()


def masks(kind: str) -> Tensor | None:
    """(B·heads, 1, N), as nn.MultiheadAttention takes it: the last two tokens of the second image are padding."""
    hidden = torch.zeros(B, 1, N, dtype=torch.bool)
    hidden[1, :, 3:] = True
    if kind == "none":
        return None
    if kind == "bool":
        return hidden.repeat_interleave(HEADS, 0)
    if kind == "per head":
        return torch.randn(B * HEADS, 1, N, generator=torch.Generator().manual_seed(3))
    return torch.zeros(B, 1, N).masked_fill(hidden, float("-inf")).repeat_interleave(HEADS, 0)


def expected_row(head: nn.MultiheadAttention, probe: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
    with torch.no_grad():
        return head(probe, hidden, hidden, attn_mask=mask, average_attn_weights=False)[1][:, :, 0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["none", "float", "per head"])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_pooling_head_equals_torch(bias: bool, kind: str, by_name: bool) -> None:
    head, mask = packed(bias), masks(kind)
    probe, hidden = torch.randn(B, 1, D), torch.randn(B, N, D)
    args = () if by_name else (probe, hidden, hidden)
    kwargs = {"query": probe, "key": hidden, "value": hidden} if by_name else {}
    seen = Seen.of(SIGLIP, head, args, {**kwargs, "attn_mask": mask})
    row = row_of(SIGLIP, seen)
    assert row.shape == (B, HEADS, N)
    torch.testing.assert_close(row.detach(), expected_row(head, probe, hidden, mask), atol=1e-6, rtol=0)
    if kind == "float":
        assert bool((row[1, :, 3:] == 0).all()) and bool((row[0] > 0).all())


def test_arguments_of_a_pooling_head_in_any_form() -> None:
    head = packed()
    probe, keys, values = torch.randn(B, 1, D), torch.randn(B, N, D), torch.randn(B, N, D)
    for args, kwargs in [
        ((probe, keys, values), {}),
        ((probe, keys), {"value": values}),
        ((probe,), {"key": keys, "value": values}),
    ]:
        seen = Seen.of(SIGLIP, head, args, kwargs)
        assert seen.probe is probe and seen.hidden is keys and seen.mask is None


def test_every_head_of_a_pooling_head_counts() -> None:
    head = packed()
    probe, hidden = torch.randn(B, 1, D), torch.randn(B, N, D)
    row = row_of(SIGLIP, Seen.of(SIGLIP, head, (probe, hidden, hidden), {}))
    assert not torch.allclose(row[:, 0], row[:, 1])
    assert heads_of(SIGLIP, Seen(head, hidden)) == HEADS


@pytest.mark.parametrize("bias", [True, False])
def test_values_of_a_pooling_head(bias: bool) -> None:
    """The head's output is its attention times these values, through its output projection."""
    head = packed(bias)
    probe, hidden = torch.randn(B, 1, D), torch.randn(B, N, D)
    with torch.no_grad():
        seen = Seen.of(SIGLIP, head, (probe, hidden, hidden), {})
        values = values_of(SIGLIP, seen).reshape(B, N, HEADS, -1).transpose(1, 2)  # (B, heads, N, d)
        mixed = (row_of(SIGLIP, seen).unsqueeze(2) @ values).reshape(B, D)
        torch.testing.assert_close(head.out_proj(mixed), head(probe, hidden, hidden)[0][:, 0], atol=1e-6, rtol=0)


class Plain(nn.Module):
    """An attention module of the CLIP family, with three heads and biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D) for _ in range(3))
        self.num_heads, self.head_dim, self.scale = HEADS, D // HEADS, (D // HEADS) ** -0.5


def by_loops(module: Any, hidden: Tensor, added: Tensor | None) -> Tensor:
    """(B, heads, N, N), one weight at a time."""
    query, keys = module.q_proj(hidden).detach(), module.k_proj(hidden).detach()
    result, d = torch.zeros(B, HEADS, N, N), D // HEADS
    for b in range(B):
        for h in range(HEADS):
            for i in range(N):
                scores = [
                    float(query[b, i, h * d : (h + 1) * d] @ keys[b, j, h * d : (h + 1) * d]) / math.sqrt(d)
                    + (0.0 if added is None else float(added[b, h % added.shape[1], i, j]))
                    for j in range(N)
                ]
                top = max(scores)
                weights = [math.exp(s - top) for s in scores]
                result[b, h, i] = torch.tensor([w / sum(weights) for w in weights])
    return result


@pytest.mark.parametrize("form", [None, "shared", "per head", "bool"])
@pytest.mark.parametrize("positional", [True, False])
@pytest.mark.parametrize("learning", [True, False])
def test_rows_and_matrices_with_masks(form: str | None, positional: bool, learning: bool) -> None:
    with torch.set_grad_enabled(learning):  # where a gradient may be wanted, the keys are formed
        rows_and_matrices_with_masks(form, positional)


def rows_and_matrices_with_masks(form: str | None, positional: bool) -> None:
    module, hidden = Plain(), torch.randn(B, N, D)
    added = None if form is None else torch.randn(B, HEADS if form == "per head" else 1, N, N)
    given = added
    if form == "bool":
        given = torch.rand(B, 1, N, N) > 0.3
        given[..., 0] = True
        added = torch.where(given, 0.0, -1e9)
    args = (hidden, given) if positional else (hidden,)
    seen = Seen.of(CLIP, module, args, {} if positional else {"attention_mask": given})
    expected = by_loops(module, hidden, added)
    for head in range(HEADS):
        torch.testing.assert_close(matrix_of(CLIP, seen, head), expected[:, head], atol=1e-5, rtol=0)
    torch.testing.assert_close(row_of(CLIP, seen), expected[:, :, 0], atol=1e-5, rtol=0)


def test_masks_of_two_heads_are_two() -> None:
    module, hidden = Plain(), torch.randn(B, N, D)
    module.num_heads, module.head_dim = 2, D // 2
    added = torch.randn(B, 2, N, N)
    shared = [Seen.of(CLIP, module, (hidden,), {"attention_mask": added[:, h : h + 1]}) for h in range(2)]
    seen = Seen.of(CLIP, module, (hidden,), {"attention_mask": added})
    for head in range(2):
        assert torch.equal(matrix_of(CLIP, seen, head), matrix_of(CLIP, shared[head], head))
    assert not torch.allclose(matrix_of(CLIP, seen, 1), matrix_of(CLIP, shared[0], 1))


def test_a_mask_of_another_rank_is_not_taken_for_one() -> None:
    module, hidden = Plain(), torch.randn(B, N, D)
    assert Seen.of(CLIP, module, (hidden, torch.ones(B, N)), {}).mask is None  # a padding mask (B, N): another meaning
    assert Seen.of(CLIP, module, (hidden,), {"attention_mask": None}).mask is None
    assert Seen.of(CLIP, module, (hidden, "causal"), {}).mask is None


def test_number_of_heads_by_any_name() -> None:
    hidden = torch.zeros(1, 1, D)
    module = Plain()
    assert heads_of(CLIP, Seen(module, hidden)) == HEADS
    module.num_heads = 6  # says more than what follows
    assert heads_of(CLIP, Seen(module, hidden)) == 6
    del module.num_heads
    found = heads_of(CLIP, Seen(module, hidden))
    assert found == HEADS and type(found) is int  # from the width of one
    module.num_attention_heads = 2  # type: ignore[assignment]
    assert heads_of(CLIP, Seen(module, hidden)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_are_in_full_precision(dtype: torch.dtype) -> None:
    query, keys = torch.randn(2, 8).to(dtype), torch.randn(2, 5, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = pooling_attention(query, keys, heads=2, scale=0.5)
    assert row.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(row.sum(-1), torch.ones_like(row.sum(-1)))


def test_a_flow_without_a_forward_says_what_to_do(small_clip: Any) -> None:
    encoder = DualEncoder(small_clip)
    flow = Flow(encoder, lambda layer: 1, rollout=True, relevance=None)
    try:
        with pytest.raises(ValueError, match=r"^no rollout was recorded; run the tower inside the block"):
            flow.rollout()
        with pytest.raises(ValueError, match=r"^nothing was recorded for relevance; run the tower inside"):
            flow.relevance(torch.ones(1, requires_grad=True))
    finally:
        flow.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small_clip.modules())
