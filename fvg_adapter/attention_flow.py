"""Where an answer comes from, through several layers: attention rollout, and the relevance of the patches to a score.

Rollout (Abnar and Zuidema 2020): the product of the layers' attention, each averaged with the identity that stands for
the residual connection. Relevance (Chefer, Gur and Wolf, ICCV 2021, equations 5 and 6): attention times its gradient,
positive part, averaged over heads. The gradient with respect to attention weights is worked out from the gradient at
the module's output and its values, which is exact under every attention implementation: fused kernels form no weights.
One matrix (B, N, patches) is kept, whatever the number of layers. Imports attention_kernels and towers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fvg_adapter.attention_kernels import Seen, averaged, heads_of, matrix_of, row_of, values_of
from fvg_adapter.errors import FVGError
from fvg_adapter.layouts import at
from fvg_adapter.modes import full_precision
from fvg_adapter.towers import DualEncoder

FirstPatch = Callable[[int], int]
Skip = Callable[[], bool]
_NONE: Mapping[str, Any] = MappingProxyType({})
_UNSEEN = (
    "run the tower inside the block, in the same thread. Hooks of rollout and relevance do not run in compiled models: "
    "give the model that torch.compile was given."
)


class Flow:
    """Hooks for one recording: what entered the attention of encoder layers and, for relevance, what came out.

    Learned tokens (prompts, representation tokens) count as fresh in every layer: what flows into them is not followed.

    Args:
        encoder: whose vision tower is read. first_patch: index of the first patch in a layer's tokens.
        rollout: follow every layer. relevance: encoder layers (0-based; the pooling head comes by itself) to follow for
            `relevance`, or None. skip: asked at every forward whether it does not count.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        first_patch: FirstPatch,
        *,
        rollout: bool,
        relevance: Sequence[int] | None,
        skip: Skip | None = None,
    ) -> None:
        self.encoder: DualEncoder = encoder
        self._skip = skip
        self._first_patch, self._rollout = first_patch, rollout
        self._wanted = relevance
        self._thread = threading.get_ident()
        self._grid: tuple[int, int] | None = None
        self._followed: Tensor | None = None  # (B, N, patches)
        self._last: Seen | None = None  # the last layer that was followed
        self._first = 0
        self._outputs: dict[int, tuple[Seen, Tensor, int]] = {}
        layers = [encoder.attention_of(layer) for layer in encoder.vision_layers]
        self._head = None if encoder.layout.head is None else len(layers)
        modules = layers if self._head is None else [*layers, *encoder.pooling_attention]
        self._handles = [encoder.vision_embeddings.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for number, module in enumerate(modules):
            if rollout or (relevance is not None and (number in relevance or number == self._head)):
                self._handles.append(module.register_forward_hook(_Tap(self, number), with_kwargs=True))

    def detach(self) -> None:
        """Takes every hook off. What was seen stays as long as the record does, for `relevance` behind the block."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # -- hooks -----------------------------------------------------------------------------------------------------

    def _mine(self) -> bool:
        if torch.compiler.is_compiling() or threading.get_ident() != self._thread:
            return False
        return torch._C._current_graph_task_id() == -1 and not (self._skip is not None and self._skip())

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NONE) -> None:
        if self._mine():
            self._grid = self.encoder.grid_of_call(args, kwargs)
            self._followed = self._last = None
            self._outputs.clear()

    def see(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A layer's attention has run."""
        if not self._mine():
            return
        seen = Seen.of(self.encoder.layout, module, args, kwargs)
        first = self.encoder.leading_tokens if number == self._head else self._first_patch(number)
        if self._wanted is not None:
            self._outputs[number] = (seen, output[0] if isinstance(output, tuple) else output, first)
        if self._rollout:
            with torch.no_grad():
                self._follow(number, seen, first)

    def _follow(self, number: int, seen: Seen, first: int) -> None:
        before = self._carried(self._followed, seen, first, self._first)
        if number == self._head:
            row = row_of(self.encoder.layout, seen).mean(1)  # (B, N)
            self._followed = row.unsqueeze(1) @ before
        else:
            heads, mixed = heads_of(self.encoder.layout, seen), torch.zeros_like(before)
            for head in range(heads):
                mixed += matrix_of(self.encoder.layout, seen, head) @ before
            self._followed = 0.5 * (mixed / heads + before)
        self._first, self._last = first, seen

    def _carried(self, before: Tensor | None, seen: Seen, first: int, came_first: int) -> Tensor:
        """What each token that enters a layer holds of each patch (B, N, patches)."""
        assert self._grid is not None
        patches, (batch, tokens, _) = self._grid[0] * self._grid[1], seen.hidden.shape
        held = torch.zeros(batch, tokens, patches, device=seen.hidden.device)
        if before is None:
            held[:, first : first + patches] = torch.eye(patches, device=held.device)
            return held
        held[:, first : first + patches] = before[:, came_first : came_first + patches]
        held[:, : self.encoder.leading_tokens] = before[:, : self.encoder.leading_tokens]
        return held

    # -- answers ---------------------------------------------------------------------------------------------------

    def rollout(self) -> Tensor:
        """(B, h, w): the share of each patch in what the pooling token holds at the end."""
        if not self._rollout or self._followed is None or self._grid is None:
            raise FVGError(f"no rollout was recorded; {_UNSEEN}")
        assert self._last is not None
        return self._pooled(self._followed, self._last).reshape(-1, *self._grid)

    def _pooled(self, held: Tensor, last: Seen) -> Tensor:
        """(B, patches): what the token that pools holds; where nothing pools, what tokens hold on average."""
        return averaged(last, held) if self.encoder.layout.averaged else held[:, 0]

    def relevance(self, score: Tensor) -> Tensor:
        """(B, h, w) relevance of the patches to a score, not negative, in units of the score."""
        if self._wanted is None or not self._outputs or self._grid is None:
            raise FVGError(f"nothing was recorded for relevance; {_UNSEEN}")
        entries = [self._outputs[number] for number in sorted(self._outputs)]
        gradients = _gradients(score, [output for _, output, _ in entries])
        held: Tensor | None = None
        came_first = 0
        with torch.no_grad():
            for position, ((seen, _, first), gradient) in enumerate(zip(entries, gradients, strict=True)):
                before = self._carried(held, seen, first, came_first)
                if (
                    position == len(entries) - 1 and not self.encoder.layout.averaged
                ):  # of the last one the token that pools is all that matters
                    row = self._weighted_row(seen, gradient).unsqueeze(1) @ before  # (B, 1, patches)
                    held = row if self._head is not None else before[:, :1] + row
                else:
                    held = before + self._weighted(seen, gradient) @ before
                came_first = first
            assert held is not None
            return self._pooled(held, entries[-1][0]).reshape(-1, *self._grid)

    def _weighted(self, seen: Seen, gradient: Tensor) -> Tensor:
        """(B, N, N): attention times its gradient, positive part, mean over heads."""
        layout = self.encoder.layout
        heads, total = heads_of(layout, seen), torch.zeros(())
        inside, values = _inside(layout.out, seen, gradient), values_of(layout, seen)
        for head in range(heads):
            weight_gradient = _part(inside, heads, head) @ _part(values, heads, head).mT
            total = total.to(inside) + (weight_gradient * matrix_of(layout, seen, head)).relu()
        return total / heads

    def _weighted_row(self, seen: Seen, gradient: Tensor) -> Tensor:
        """(B, N): the same of the token that pools alone."""
        layout = self.encoder.layout
        row, inside, values = row_of(layout, seen), _inside(layout.out, seen, gradient), values_of(layout, seen)
        heads = row.shape[1]
        parts = [_part(values, heads, h) @ _part(inside[:, :1], heads, h).mT for h in range(heads)]  # each (B, N, 1)
        return (torch.cat(parts, -1).mT * row).relu().mean(1)


class _Tap:
    """A forward hook that knows its place."""

    def __init__(self, flow: Flow, number: int) -> None:
        self.flow, self.number = flow, number

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        """`rest` is (kwargs, output), or the output alone where another thread is just attaching the hook."""
        kwargs, output = rest if len(rest) == 2 else ({}, rest[0])
        self.flow.see(self.number, module, args, kwargs, output)


def _part(tokens: Tensor, heads: int, head: int) -> Tensor:
    """(B, N, d) of one head, in full precision."""
    return full_precision(tokens.reshape(*tokens.shape[:2], heads, -1)[:, :, head])


def _gradients(score: Tensor, outputs: list[Tensor]) -> tuple[Tensor, ...]:
    advice = (
        "run the forward inside the block with gradients on and pixel_values.requires_grad_(), and score its logits: "
        "record.relevance(model(pixel_values).logits[:, label])."
    )
    if not score.requires_grad:
        raise FVGError(f"the score has no gradient; {advice}")
    if not all(output.requires_grad for output in outputs):
        raise FVGError(
            f"the recorded attention has no gradient; {advice} Reentrant gradient checkpointing cuts the graph: use "
            "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
        )
    found = torch.autograd.grad(score.sum(), outputs, retain_graph=True, allow_unused=True)
    if any(gradient is None for gradient in found):
        raise FVGError(f"the score does not depend on the attention that was recorded; {advice}")
    return found


def _inside(out: str, seen: Seen, gradient: Tensor) -> Tensor:
    """The gradient (B, N, D) before the module's output projection, from the one behind it."""
    module = seen.module
    if isinstance(module, nn.MultiheadAttention):
        return full_precision(gradient @ module.out_proj.weight)
    if gradient.dim() == 2:  # a pooling head gives one vector an image
        gradient = gradient.unsqueeze(1)
    project = at(module, "output_proj" if hasattr(module, "output_proj") else out)
    if project is module:  # the projection lies in another module
        return full_precision(gradient)
    with torch.enable_grad():
        inside = torch.zeros(*gradient.shape[:2], gradient.shape[-1], device=gradient.device, dtype=gradient.dtype)
        behind = project(inside.requires_grad_())
    return full_precision(torch.autograd.grad(behind, inside, gradient)[0])
