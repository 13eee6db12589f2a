"""Attention maps of the pooling token: the formula, and the record that hooks fill and a caller reads.

Imports towers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fvg_adapter.errors import FVGError
from fvg_adapter.modes import full_precision
from fvg_adapter.towers import Layout, attention_scale, head_dim, projected


def pooling_attention(query: Tensor, keys: Tensor, heads: int, scale: float) -> Tensor:
    """Softmax attention of one token over all tokens, per head: softmax_n(scale · q_h · k_hn).

    Args:
        query: (B, D) projected query of the pooling token.
        keys: (B, N, D) projected keys of all tokens.
        heads: number of heads; D is split into `heads` consecutive parts.
        scale: factor on the products.

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
        return torch.softmax((split @ one).squeeze(-1) * scale, dim=-1)  # (B, heads, N)


class AttentionRecord:
    """What `recording` or `record_attention` saw: the maps of the last forward, and no module once the block ends.

    Attributes:
        layers: 0-based numbers of the recorded layers, in the order of the maps.
        differentiable: whether the maps carry a gradient.
    """

    def __init__(self, layers: tuple[int, ...], layout: Layout, differentiable: bool = False) -> None:
        self.layers = layers
        self.differentiable = differentiable
        self._layout = layout
        self._grid: tuple[int, int] | None = None
        self._grad_enabled = False
        self._graph_lost = False
        self._rows: dict[int, Tensor] = {}  # position in `layers` -> (B, heads, N)
        self._first: dict[int, int] = {}
        self._pending: dict[int, tuple[nn.Module, Tensor]] = {}

    def attention(self) -> Tensor:
        """Attention of the pooling token over the patches, of the last forward inside the block.

        Returns:
            (B, layers, heads, h, w), float32; softmax over all tokens, so that a map sums to 1 minus the share of the
            tokens that are no patches (pooling token, prompts). Before dropout.

        Raises:
            FVGError: no forward was seen, or it did not finish; the layer's tokens do not hold the h·w patches; or
                reentrant gradient checkpointing cut the graph that `differentiable=True` asked for.
        """
        self.complete()
        if self._grid is None or not self._rows:
            raise FVGError(
                "no forward was recorded; run the vision tower inside the block, in the same thread. A model that was "
                "compiled before the hooks were attached never calls them: attach first, or call torch._dynamo.reset()."
            )
        absent = [layer for position, layer in enumerate(self.layers) if position not in self._rows]
        if absent:
            raise FVGError(
                f"the last forward did not reach layers {absent}; it failed, or their attention was replaced."
            )
        if self._graph_lost:
            raise FVGError(
                "reentrant gradient checkpointing cuts the graph through the attention maps. Use "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}), or set "
                "gradient_checkpointing = False on the recorded layers."
            )
        maps = [self._patches(position, self._grid) for position in range(len(self.layers))]
        return torch.stack([m.to(maps[0].device) for m in maps], dim=1)  # (B, layers, heads, h, w)

    def _patches(self, position: int, grid: tuple[int, int]) -> Tensor:
        row, first = self._rows[position], self._first[position]
        last = first + grid[0] * grid[1]
        if not 0 <= first < last <= row.shape[-1]:
            raise FVGError(
                f"layer {self.layers[position]} has {row.shape[-1]} tokens, which do not hold {grid[0]}x{grid[1]} "
                f"patches from token {first} on; give first_patch the index of the first patch token of each layer."
            )
        return row[..., first:last].reshape(*row.shape[:2], *grid)  # (B, heads, h·w) -> (B, heads, h, w)

    # -- called by the hooks ---------------------------------------------------------------------------------------

    def begin(self, grid: tuple[int, int]) -> None:
        """A forward starts: what an earlier one left is dropped."""
        self._grid = grid
        self._grad_enabled = torch.is_grad_enabled()
        self._graph_lost = False
        for kept in (self._rows, self._first, self._pending):
            kept.clear()

    def capture(self, position: int, module: nn.Module, hidden: Tensor, first: int) -> None:
        """Hidden states (B, N, D) enter a layer's attention. Only the first time counts: again means recomputation.

        A differentiable row is left for `complete`: operations recorded inside a checkpointed layer would have to be
        repeated by its recomputation, when this block may be over.
        """
        if position in self._first:
            return
        self._first[position] = first
        if self.differentiable:
            self._graph_lost |= self._grad_enabled and not torch.is_grad_enabled()
            self._pending[position] = (module, hidden)
        else:
            with torch.no_grad():
                self._rows[position] = _row(self._layout, module, hidden)

    def complete(self) -> None:
        """All layers have run."""
        for position, (module, hidden) in self._pending.items():
            self._rows[position] = _row(self._layout, module, hidden)
        self._pending.clear()

    def close(self) -> None:
        """The block is over: what no map was made of is dropped."""
        self._pending.clear()


def _row(layout: Layout, module: nn.Module, hidden: Tensor) -> Tensor:
    """(B, heads, N) attention of token 0 for hidden states (B, N, D), by the projections that the module has now."""
    query = projected(module, layout.query, hidden[:, :1]).squeeze(1)  # (B, D)
    keys = projected(module, layout.key, hidden)  # (B, N, D)
    width = query.shape[-1]
    return pooling_attention(query, keys, width // head_dim(module, width), attention_scale(module, width))
