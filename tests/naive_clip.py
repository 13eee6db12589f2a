"""CLIP written out with loops from a CLIPModel's weights: the oracle for prompts in the middle of its towers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

Edit = Callable[[int, Tensor], Tensor]
"""What happens to hidden states (N, L, d) before layer 1, 2, …"""


def block(clip: CLIPModel, name: str, x: Tensor, heads: int, causal: bool) -> Tensor:
    """One transformer layer, by weight names; every head on its own."""
    weights = clip.state_dict(keep_vars=True)

    def linear(part: str, value: Tensor) -> Tensor:
        return value @ weights[f"{name}.{part}.weight"].T + weights[f"{name}.{part}.bias"]

    def norm(part: str, value: Tensor) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], weights[f"{name}.{part}.weight"], weights[f"{name}.{part}.bias"])

    h = norm("layer_norm1", x)
    q, k, v = (linear(f"self_attn.{p}_proj", h) for p in "qkv")
    width, length, parts = x.shape[-1] // heads, x.shape[1], []
    for i in range(heads):
        cut = slice(i * width, (i + 1) * width)
        scores = q[..., cut] @ k[..., cut].transpose(1, 2) / width**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        parts.append(scores.softmax(-1) @ v[..., cut])
    x = x + linear("self_attn.out_proj", torch.cat(parts, -1))
    h = linear("mlp.fc1", norm("layer_norm2", x))
    return x + linear("mlp.fc2", h * torch.sigmoid(1.702 * h))


def text(clip: CLIPModel, tokens: Tensor, eot: Tensor, edit: Edit, shift: int = 0) -> Tensor:
    """Raw text features (N, D) of token embeddings (N, L, d), read at `eot + shift`."""
    model, config = clip.text_model, clip.config.text_config
    x = tokens + model.embeddings.position_embedding.weight[: tokens.shape[1]]
    for k in range(1, config.num_hidden_layers + 1):
        x = block(clip, f"text_model.encoder.layers.{k - 1}", edit(k, x), config.num_attention_heads, True)
    x = model.final_layer_norm(x)
    return x[torch.arange(len(x)), eot + shift] @ clip.text_projection.weight.T


def vision(clip: CLIPModel, pixels: Tensor, edit: Edit, behind: Tensor | None = None) -> Tensor:
    """Last hidden states (B, N, d) of images; `behind` (n, d) is appended before the first LayerNorm."""
    model, config = clip.vision_model, clip.config.vision_config
    size = config.patch_size
    patches = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ model.embeddings.patch_embedding.weight.flatten(1).T
    x = (
        torch.cat([model.embeddings.class_embedding.expand(len(x), 1, -1), x], 1)
        + model.embeddings.position_embedding.weight
    )
    if behind is not None:
        x = torch.cat([x, behind.expand(len(x), -1, -1)], 1)
    x = model.pre_layrnorm(x)
    for k in range(1, config.num_hidden_layers + 1):
        x = block(clip, f"vision_model.encoder.layers.{k - 1}", edit(k, x), config.num_attention_heads, False)
    return x


def image(clip: CLIPModel, hidden: Tensor) -> Tensor:
    """Raw image features (B, D) of last hidden states."""
    return clip.vision_model.post_layernorm(hidden[:, 0]) @ clip.visual_projection.weight.T


def embedded(clip: CLIPModel, tokenizer: object, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token embeddings (N, L, d) of texts and the positions of their ends; padded with token 0, as OpenAI does."""
    rows = [tokenizer(t)["input_ids"] for t in texts]  # type: ignore[operator]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return clip.text_model.embeddings.token_embedding.weight[ids], torch.tensor([len(r) - 1 for r in rows])


def put(x: Tensor, tokens: Tensor, first: int) -> Tensor:
    """`tokens` (n, d) at positions first, first + 1, … of hidden states."""
    return torch.cat([x[:, :first], tokens.expand(len(x), -1, -1), x[:, first + len(tokens) :]], 1)


def insert(x: Tensor, tokens: Tensor) -> Tensor:
    """`tokens` (n, d) behind position 0."""
    return torch.cat([x[:, :1], tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
