"""The record of an attention recording: what hooks fill and a caller reads. Imports attention_kernels and _flow."""

from __future__ import annotations

import torch
from torch import Tensor

from fvg_adapter.attention_flow import Flow
from fvg_adapter.attention_kernels import Seen, row_of
from fvg_adapter.errors import FVGError
from fvg_adapter.layouts import Layout


class AttentionRecord:
    """What `recording` or `record_attention` saw: the maps of the last forward.

    No module is held once the block ends, but where relevance was asked for: then what it needs, with its graph.

    Attributes:
        layers: 0-based numbers of the recorded layers, in the order of the maps.
        differentiable: whether the maps carry a gradient.
    """

    def __init__(
        self, layers: tuple[int, ...], layout: Layout, differentiable: bool = False, flow: Flow | None = None
    ) -> None:
        self.layers = layers
        self.differentiable = differentiable
        self._layout = layout
        self._flow = flow
        self._grid: tuple[int, int] | None = None
        self._grad_enabled = False
        self._graph_lost = False
        self._rows: dict[int, Tensor] = {}  # position in `layers` -> (B, heads, N)
        self._first: dict[int, int] = {}
        self._pending: dict[int, Seen] = {}

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

    def rollout(self) -> Tensor:
        """Attention rollout: the share of each patch in what the token that pools holds after the last layer.

        Returns:
            (B, h, w), float32, not negative; the rest up to 1 is what came from tokens that are no patches.

        Raises:
            FVGError: the recording was not opened with rollout=True, or no forward was seen.

        Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, with heads averaged.
        """
        return (self._flow or _no_flow("rollout")).rollout()

    def relevance(self, score: Tensor) -> Tensor:
        """Class relevance: attention weighted by the gradient of a score, positive part, mean over heads.

        Args:
            score: (B,) or () what the patches may speak for, such as one logit an image, with its graph; the forward
                ran in the block with gradients on. Several scores may be asked for, one after the other.

        Returns:
            (B, h, w), float32, not negative, in units of the score.

        Raises:
            FVGError: the recording was not opened with relevance=True, or the score has no graph to what was recorded.

        Source: Chefer et al., "Generic Attention-model Explainability", ICCV 2021, equations 5 and 6; over the layers
            of the recording, so that layers=[-1] follows the last one alone, as their CLIP notebook does.
        """
        return (self._flow or _no_flow("relevance")).relevance(score)

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

    def capture(self, position: int, seen: Seen, first: int) -> None:
        """Tokens enter a layer's attention. Only the first time counts: again means recomputation.

        A differentiable row is left for `complete`: operations recorded inside a checkpointed layer would have to be
        repeated by its recomputation, when this block may be over.
        """
        if position in self._first:
            return
        self._first[position] = first
        if self.differentiable:
            self._graph_lost |= self._grad_enabled and not torch.is_grad_enabled()
            self._pending[position] = seen
        else:
            with torch.no_grad():
                self._rows[position] = row_of(self._layout, seen)

    def complete(self) -> None:
        """All layers have run."""
        for position, seen in self._pending.items():
            self._rows[position] = row_of(self._layout, seen)
        self._pending.clear()

    def close(self) -> None:
        """The block is over: what no map was made of is dropped."""
        self._pending.clear()


def _no_flow(what: str) -> Flow:
    raise FVGError(f"this recording has no {what}; open it with record_attention(model, {what}=True).")
