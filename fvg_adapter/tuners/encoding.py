"""Prompts through a text tower in passes of bounded memory, with and without gradients (DESIGN decision 4).

Every pass is trimmed to its own longest prompt. Where the graph of all prompts would outgrow a limit, passes keep the
inputs of their layers alone, and layers run again in backward (gradient checkpointing); the gradients are the same.
Imports prompts and towers.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fvg_adapter.towers import DualEncoder
from fvg_adapter.tuners.prompts import Prompts

TEXTS_PER_CHUNK = 256
"""Prompts encoded at once at most."""
KEPT_PER_TOKEN = 16
"""Numbers that autograd keeps for a token in a layer, in widths: 14 (CoOp, PromptSRC) to 16 (MMRL), measured."""

_LOCK = threading.RLock()

Encode = Callable[[Tensor, Tensor, Tensor], Tensor]


def encode_in_passes(encode: Encode, prompts: Prompts, encoder: DualEncoder, memory: int | None) -> Tensor:
    """Features (N, D) of prompts, in their order.

    Args:
        encode: (rows (n,) of the prompts, input_ids (n, l), attention_mask (n, l)) to features (n, D).
        prompts: N prompts; where the tower allows, passes take them by length and are trimmed.
        encoder: whose text tower it is.
        memory: bytes that the graph of all passes may take; where it is estimated to take more, passes of at most half
            of that, but for the last, are computed again in backward, layer by layer. None: never.
    """
    device = encoder.token_embedding.weight.device
    lengths = prompts.attention_mask.sum(1) if encoder.layout.trims_text else None
    graph = graph_bytes(encoder, prompts.input_ids.numel())
    again = memory is not None and torch.is_grad_enabled() and graph > memory and _may_run_again(encoder.text_layers)
    tokens = max(1, (memory or 0) // 2 // graph_bytes(encoder, 1)) if again else None
    rows = list(_rows(prompts, lengths, tokens))
    parts: list[Tensor] = []
    for number, some in enumerate(rows):
        chunk = prompts[some].to(device)
        if lengths is not None:
            longest = int(lengths[some].max())
            chunk = Prompts(chunk.input_ids[:, :longest], chunk.attention_mask[:, :longest])
        last = number == len(rows) - 1  # backward begins with it: its graph is gone before others are made again
        with layers_run_again(encoder.text_layers) if again and not last else contextlib.nullcontext():
            parts.append(encode(some, chunk.input_ids, chunk.attention_mask))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.cat(rows).argsort().to(device)]


def graph_bytes(encoder: DualEncoder, tokens: int) -> int:
    """About how much autograd keeps of so many tokens on their way through the text tower."""
    size = encoder.token_embedding.weight.element_size()
    return tokens * len(encoder.text_layers) * KEPT_PER_TOKEN * encoder.text_width * size


def _rows(prompts: Prompts, lengths: Tensor | None, tokens: int | None) -> Iterator[Tensor]:
    """Which prompts go together: at most TEXTS_PER_CHUNK of them, and at most `tokens` tokens."""
    count = len(prompts)
    if tokens is None and count <= TEXTS_PER_CHUNK:
        yield torch.arange(count)
        return
    sizes = lengths if lengths is not None else torch.full((count,), prompts.input_ids.shape[1])
    order = sizes.argsort(stable=True)
    room = TEXTS_PER_CHUNK if tokens is None else tokens
    start = 0
    for end, length in enumerate(sizes[order].tolist()):  # ascending: the newest is the longest
        used = end - start + 1 if tokens is None else (end - start + 1) * length
        if end > start and (used > room or end - start == TEXTS_PER_CHUNK):
            yield order[start:end]
            start = end
    yield order[start:]


def _may_run_again(layers: Sequence[nn.Module]) -> bool:
    """Not where layers do so by themselves (the user's own gradient checkpointing), nor while compiling."""
    own = any(getattr(m, "gradient_checkpointing", True) and m.training for m in layers)
    return not own and not torch.compiler.is_compiling()


@contextlib.contextmanager
def layers_run_again(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, transformers' encoder layers keep their inputs alone; behind it they are what they were.

    By layers rather than by passes: autograd needs nothing of what a layer computes last, so that a third of its
    multiplications are not repeated.
    """
    drawn = any(module.training for layer in layers for module in layer.modules())  # dropout, of LoRA say
    function = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=drawn)
    settings = {"gradient_checkpointing": True, "training": True, "_gradient_checkpointing_func": function}
    with _LOCK:
        before = [{k: layer.__dict__[k] for k in settings if k in layer.__dict__} for layer in layers]
        try:
            for layer in layers:
                layer.__dict__.update(settings)  # the layer's own mode: its dropouts keep theirs
            yield
        finally:
            for layer, found in zip(layers, before, strict=True):
                for name in settings:
                    layer.__dict__.pop(name, None)
                layer.__dict__.update(found)
