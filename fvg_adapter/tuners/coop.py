"""CoOp: learned context words shared by all classes (Zhou et al. 2022)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fvg_adapter.errors import FVGError, closest, nearest
from fvg_adapter.tuners.base import Tuner
from fvg_adapter.tuners.prompts import DEFAULT_TEMPLATE, Position, Prompts, check_context, plain, with_context
from fvg_adapter.untrusted import room_for

_POSITIONS: tuple[Position, ...] = ("end", "front", "middle")
_THREAD = threading.local()


class CoOp(Tuner):
    """Context optimisation: `ctx` takes the place of the words around the class name in the text tower's input.

    Args:
        model, tokenizer, classes, template: as for `Tuner`; the template is only the prior's.
        n_ctx: context tokens. With init words it must be their number.
        ctx_init: words that the context starts from, or "" for N(0, 0.02²) (the authors' run script).
        csc: class-specific contexts (C, n_ctx, d); they can score the tuned classes only.
        class_token_position: "end" (the authors' run script), "front" or "middle".

    Learns:
        ctx: (n_ctx, d) or (C, n_ctx, d), float32, d the text width.

    Raises:
        FVGError: init words together with another n_ctx or csc, an unknown position, names longer than the window.

    Source: trainers/coop.py of KaiyangZhou/CoOp. Where that code ignores n_ctx and csc beside init words, this raises.
    """

    kind: ClassVar[str] = "coop"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        classes: Sequence[str],
        *,
        n_ctx: int = 4,
        ctx_init: str | None = "a photo of a",
        csc: bool = False,
        class_token_position: Position = "end",
        template: str = DEFAULT_TEMPLATE,
    ) -> None:
        check_context("n_ctx", n_ctx, ctx_init)
        words = (ctx_init or "").replace("_", " ").strip()
        if class_token_position not in _POSITIONS:
            raise FVGError(
                f"class_token_position {class_token_position!r} is unknown. {nearest(class_token_position, _POSITIONS)}"
            )
        if n_ctx < 1:
            raise FVGError(f"n_ctx is {n_ctx}, but a context needs at least 1 token.")
        if words and len(words.split(" ")) != n_ctx:
            raise FVGError(
                f"ctx_init {words!r} has {len(words.split(' '))} words, but n_ctx is {n_ctx}; give the matching n_ctx, "
                'or ctx_init="" for a random context of n_ctx tokens.'
            )
        if words and csc:
            raise FVGError('class-specific contexts (csc=True) start at random; give ctx_init="" with them.')
        self._words = words or " ".join(["X"] * n_ctx)
        self._ctx_init, self._n_ctx, self._csc, self._position = words, n_ctx, csc, class_token_position
        super().__init__(model, tokenizer, classes, template=template)
        self.ctx: nn.Parameter = nn.Parameter(self._initial_context())
        self._handles.append(self.encoder.token_embedding.register_forward_hook(self._insert_context))

    def _initial_context(self) -> Tensor:
        table = self.encoder.token_embedding.weight
        if self._ctx_init:
            room_for("ctx", self._n_ctx, self.encoder.text_width)
            ids = self.tokenized([self._ctx_init]).input_ids[0, 1 : 1 + self._n_ctx]
            return table.detach()[ids.to(table.device)].float().clone()  # (n_ctx, d)
        rows = (len(self.base_classes),) if self._csc else ()
        room_for("ctx", *rows, self._n_ctx, self.encoder.text_width)
        return torch.empty(*rows, self._n_ctx, self.encoder.text_width, device=table.device).normal_(std=0.02)

    def _check_prompts(self, classes: tuple[str, ...]) -> None:
        super()._check_prompts(classes)
        self.prompts(classes)
        tuned = {plain(c) for c in self.base_classes}
        unknown = [c for c in classes if self._csc and plain(c) not in tuned]
        if unknown:
            raise FVGError(
                f"class-specific contexts were tuned for {len(self.base_classes)} classes and cannot score others, "
                f"such as {unknown[:3]}. {closest(unknown[0], self.base_classes)}Tune with csc=False to score any list."
            )

    def prompts(self, classes: Sequence[str]) -> Prompts:
        """Tokenised prompts of the classes with the positions that the context takes."""
        encoder = self.encoder
        return self._tokenized_once(
            "context",
            classes,
            lambda: with_context(
                self.tokenizer,
                classes,
                encoder.text_length,
                words=self._words,
                n_ctx=self._n_ctx,
                position=self._position,
                pad_to_limit=not encoder.layout.trims_text,
            ),
        )

    def _prompt_features(self, classes: Sequence[str]) -> Tensor:
        prompts = self.prompts(classes)
        context: Tensor = self.ctx
        if self._csc:
            tuned = {plain(c): k for k, c in enumerate(self.base_classes)}
            context = context[[tuned[plain(c)] for c in classes]]  # (C, n_ctx, d)
        positions = prompts.context
        assert positions is not None

        @contextlib.contextmanager
        def placed(rows: Tensor) -> Iterator[None]:
            own = context[rows.to(context.device)] if self._csc else context.expand(len(rows), -1, -1)
            _THREAD.placed = (self, own, positions[rows].to(context.device))
            try:
                yield
            finally:
                _THREAD.placed = None

        return self._encode(prompts, placed)

    def _insert_context(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Hook on the token embedding: puts the context where placeholder words lie, in our own passes only."""
        placed = getattr(_THREAD, "placed", None)
        if placed is None or placed[0] is not self:
            return None
        _, context, positions = placed
        index = positions.unsqueeze(-1).expand(-1, -1, output.shape[-1])  # (C, n_ctx, d)
        return output.scatter(1, index, context.to(output.dtype))

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that make this tuner again."""
        return {
            **super().arguments(),
            "n_ctx": self._n_ctx,
            "ctx_init": self._ctx_init,
            "csc": self._csc,
            "class_token_position": self._position,
        }
