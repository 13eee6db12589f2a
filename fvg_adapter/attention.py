"""Where the pooling token looks: the attention of its query over the patches, read by hooks (DESIGN decision 2).

Hooks sit on the *input* of the attention modules and use the query and key projections found there at that moment, so
that LoRA injected later is seen; the model keeps its attention implementation, and the cost is that of one row of the
attention matrix. Imports attention_maps, attention_kernels, attention_flow and towers.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fvg_adapter.attention_flow import Flow
from fvg_adapter.attention_kernels import Seen, pooling_attention
from fvg_adapter.attention_maps import AttentionRecord
from fvg_adapter.errors import FVGError
from fvg_adapter.layouts import layout_of, vision_tower
from fvg_adapter.towers import DualEncoder, unwrap_peft

__all__ = ["AttentionProbe", "AttentionRecord", "pooling_attention", "record_attention"]

Layers = int | str | Iterable[int]
FirstPatch = Callable[[int], int]
Skip = Callable[[], bool]
Kwargs = Mapping[str, Any]
_NONE: Kwargs = MappingProxyType({})
"""What a pass of another thread hands over while this one attaches or removes a hook: torch does so in two steps, and
between them leaves keyword arguments out. Such a pass is not recorded in this thread, so nothing is lost."""
_PARALLEL = (DataParallel, DistributedDataParallel)


class AttentionProbe:
    """Permanent hooks on a vision tower that record attention on request, and otherwise do nothing.

    Attach before `torch.compile`. Deep copies and pickles of a model carry their own working probe.

    Args:
        encoder: a DualEncoder, or a model that one can be made of.
        layers: encoder layers to read, 0-based, negative from the end; one number, several, or "all".
        first_patch: index of the first patch token among the tokens that enter a layer (0-based), asked at every
            forward; the layout's number of leading tokens when None.
        skip: asked at every forward whether it does not count: a tuner's passes through its untouched CLIP do not.

    Raises:
        FVGError: no such layer.
        TypeError: the model is no supported dual encoder.

    Example:
        >>> probe = AttentionProbe(clip)                                                    # doctest: +SKIP
        >>> with probe.recording() as record:                                               # doctest: +SKIP
        ...     features = clip.get_image_features(pixel_values)
        >>> record.attention().mean((1, 2))                # (B, h, w)                      # doctest: +SKIP
    """

    def __init__(
        self,
        encoder: DualEncoder | nn.Module,
        layers: Layers = (-1,),
        first_patch: FirstPatch | None = None,
        skip: Skip | None = None,
    ) -> None:
        self.encoder: DualEncoder = encoder if isinstance(encoder, DualEncoder) else DualEncoder(encoder)
        pooling = self.encoder.pooling_attention
        self.layers: tuple[int, ...] = _resolve(layers, len(pooling), self.encoder.layout.head is not None)
        self._first_patch, self._skip = first_patch, skip
        modules = [pooling[layer] for layer in self.layers]
        self._handles = [self.encoder.vision_embeddings.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for position, module in enumerate(modules):
            tap = _Tap(self, position)
            self._handles.append(module.register_forward_pre_hook(tap.capture, with_kwargs=True))
        self._handles.append(self.encoder.pooling_end.register_forward_hook(self._complete))

    @contextlib.contextmanager
    def recording(self, differentiable: bool = False, flow: Flow | None = None) -> Iterator[AttentionRecord]:
        """Records the forwards that this thread runs inside the block; blocks can be nested.

        Args:
            differentiable: keep the graph from the maps to the model's inputs and parameters. Exact with gradient
                checkpointing of single layers (non-reentrant); a tower inside one checkpoint raises CheckpointError.
            flow: what follows rollout and relevance, if they are wanted.
        """
        record = AttentionRecord(self.layers, self.encoder.layout, differentiable, flow)
        _THREAD.recordings.append((self, record))
        try:
            yield record
            record.complete()
        finally:
            # In place: what a compiled forward binds anew in a threading.local is lost, and the record would stay.
            _THREAD.recordings[:] = [entry for entry in _THREAD.recordings if entry[1] is not record]
            record.close()

    def first_patch(self, layer: int) -> int:
        """Index of the first patch token among the tokens that enter a layer (0-based)."""
        return self.encoder.leading_tokens if self._first_patch is None else self._first_patch(layer)

    def detach(self) -> None:
        """Takes every hook off; nothing is left on the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def hook_count(self) -> int:
        """Hooks of this probe on the user's model."""
        return len(self._handles)

    def _active(self) -> list[AttentionRecord]:
        found = [record for probe, record in _THREAD.recordings if probe is self]
        return [] if found and self._skip is not None and self._skip() else found

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs = _NONE) -> None:
        """Hook on the embeddings: pixels come in."""
        active = self._active()
        if not active or _in_backward():  # a tower that is checkpointed as a whole runs again in backward
            return
        for record in active:
            record.begin(self.encoder.grid_of_call(args, kwargs))

    def _complete(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook on the stack of layers: all have run."""
        for record in self._active():
            record.complete()


class _Tap:
    """The hook of one layer: an object, so that it knows its place among the layers and still copies and pickles."""

    def __init__(self, probe: AttentionProbe, position: int) -> None:
        self.probe, self.position = probe, position

    def capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs = _NONE) -> None:
        """Pre-hook on an attention module. `module` may be a replica of the one that the hook was put on."""
        active = self.probe._active()
        if active:
            first = self.probe.first_patch(self.probe.layers[self.position])
            seen = Seen.of(self.probe.encoder.layout, module, args, dict(kwargs))
            for record in active:
                record.capture(self.position, seen, first)


@contextlib.contextmanager
def record_attention(
    model: nn.Module,
    layers: Layers = (-1,),
    *,
    differentiable: bool = False,
    rollout: bool = False,
    relevance: bool = False,
) -> Iterator[AttentionRecord]:
    """Records where a vision tower's pooling token looks, without changing how the model computes.

    Equal to `output_attentions=True` of an eager model, under any attention implementation. The hooks are gone when
    the block ends, also after an exception. Of several forwards in one block the last one counts; of a tuner or an
    FVGModel the last of the tuned passes, not the one of the plain CLIP beside it, nor the one over an attended view's
    cut-out. Projections with dropout of their own (LoRA in training mode) are drawn once more for the map.

    Args:
        model: CLIPModel or another supported dual encoder, its vision tower, a PeftModel around one, a tuner or an
            FVGModel; of DataParallel, DistributedDataParallel or torch.compile the model inside; of a larger model
            (LLaVA, CLIPSegForImageSegmentation, also in a PeftModel) the one tower in it.
        layers: encoder layers to read, 0-based, negative from the end; one number, several, or "all". A tower that is
            pooled by an attention head (SigLIP, AIMv2) has no token that looks at the patches in its layers: there the
            head alone is read, as layer 0 or -1. Where the head was left out, as in the towers of PaliGemma and
            Gemma 3, layers are read again: what all patches look at, on average.
        differentiable: keep the graph from the maps to the model's inputs and parameters.
        rollout: follow all layers too, for `record.rollout()`: O(patches²) for each.
        relevance: keep what `record.relevance(score)` needs of these layers.

    Raises:
        FVGError: no such layer.
        TypeError: the model is no supported dual encoder.

    Example:
        >>> from transformers import CLIPVisionConfig, CLIPVisionModel
        >>> vision_model = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=1, image_size=64, patch_size=16)).eval()
        >>> with record_attention(vision_model, layers=[-1]) as record:
        ...     output = vision_model(torch.zeros(5, 3, 64, 64))
        >>> record.attention().shape  # (B, layers, heads, h, w)
        torch.Size([5, 1, 12, 4, 4])
    """
    encoder, first_patch, skip = _target(model)
    probe = AttentionProbe(encoder, layers, first_patch, skip)
    flow = None
    try:
        if rollout or relevance:
            followed = probe.layers if relevance and encoder.layout.head is None else () if relevance else None
            flow = Flow(encoder, probe.first_patch, rollout=rollout, relevance=followed, skip=skip)
        with probe.recording(differentiable, flow) as record:
            yield record
    finally:
        probe.detach()
        if flow is not None:
            flow.detach()


class _Recordings(threading.local):
    """The open recordings of each thread, outermost first."""

    def __init__(self) -> None:
        self.recordings: list[tuple[AttentionProbe, AttentionRecord]] = []


_THREAD = _Recordings()


def _target(model: nn.Module) -> tuple[DualEncoder, FirstPatch | None, Skip | None]:
    outer: Any = model
    while outer is not None:  # torch.compile keeps the model as _orig_mod
        model = outer
        outer = model.module if isinstance(model, _PARALLEL) else getattr(model, "_orig_mod", None)
    target = getattr(model, "attention_target", None)
    if not callable(target):
        return DualEncoder(_tower_in(model)), None, None
    inner, first_patch, *skip = target()
    return DualEncoder(inner), first_patch, skip[0] if skip else None


def _tower_in(model: nn.Module) -> nn.Module:
    """The model itself, or of a larger one that holds a single supported vision tower that one.

    Raises:
        FVGError: several towers.
    """
    if not isinstance(model, nn.Module) or _has_tower(unwrap_peft(model)):
        return model
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not any(name.startswith(f"{outer}.") for outer in found) and _has_tower(module):
            found[name] = module
    if len(found) > 1:
        raise FVGError(
            f"{type(model).__name__} holds {len(found)} vision towers ({', '.join(found)}); give one of them: "
            f"record_attention(model.{next(iter(found))})."
        )
    return next(iter(found.values()), model)


def _has_tower(module: nn.Module) -> bool:
    layout = layout_of(getattr(module, "config", None))
    return layout is not None and vision_tower(module, layout) is not None


def _resolve(layers: Layers, count: int, head: bool) -> tuple[int, ...]:
    """0-based layer numbers."""
    wanted: Any = range(count) if layers == "all" else (layers,) if isinstance(layers, (int, str)) else tuple(layers)
    for layer in wanted:
        if type(layer) is not int or not -count <= layer < count:
            if head:
                raise FVGError(
                    f"layer {layer!r} cannot be read: this vision tower has no class token, and its pooling head alone "
                    "looks at the patches; give layers=[-1]."
                )
            raise FVGError(
                f"layer {layer!r} does not exist: the vision tower has {count} layers, "
                f"numbered 0 to {count - 1}, or -{count} to -1 from the end; give such numbers or layers='all'."
            )
    if not wanted:
        raise FVGError("layers is empty; give at least one layer number, or layers='all'.")
    return tuple(layer % count for layer in wanted)


def _in_backward() -> bool:
    """Whether a gradient is being computed in this thread, so that a forward seen now is a recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
