"""Prompts in chunks that are computed again in backward: the same numbers as in one pass, with a small graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPModel

from conftest import checkpoint_activations
from fvg_adapter import FVGConfig, wrap
from fvg_adapter.tuners import MMRL, CoOp, KgCoOp, LoRA, PromptSRC, Tuner, ZeroShot, encoding

NAMES = [f"{'very ' * (i % 5)}long thing {i}" for i in range(23)]  # five lengths, mixed
LABELS = torch.tensor([0, 7, 22, 3])
MAKERS: dict[str, Any] = {
    "coop": lambda clip, tok: CoOp(clip, tok, NAMES),
    "coop_csc": lambda clip, tok: CoOp(clip, tok, NAMES, ctx_init="", csc=True, class_token_position="middle"),
    "kgcoop": lambda clip, tok: KgCoOp(clip, tok, NAMES),
    "promptsrc": lambda clip, tok: PromptSRC(
        clip, tok, NAMES, prompt_depth_text=2, prompt_depth_vision=2, teacher_templates=("a {}.", "the plastic {}.")
    ),
    "mmrl": lambda clip, tok: MMRL(clip, tok, NAMES, rep_layers=[1, 2], rep_dim=8),
    "lora": lambda clip, tok: LoRA(
        clip, tok, NAMES, peft_config=LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)
    ),
}


def graph_of(work: Any, model: nn.Module) -> tuple[Any, int]:
    """What the work returns, and how many bytes its graph keeps beside the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    return result, sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


def step(tuner: Tuner, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients, with the same dropout every time."""
    torch.manual_seed(5)
    tuner.zero_grad(set_to_none=True)
    loss = tuner.train()(pixels, LABELS).loss
    loss.backward()
    return loss.detach(), [p.grad for p in tuner.trainable_parameters() if p.grad is not None]


def same(actual: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=tolerance)
    for a, e in zip(actual[1], expected[1], strict=True):
        assert float(e.abs().max()) > 0
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance * float(e.abs().max()))


@pytest.mark.parametrize("kind", [k for k in MAKERS if k != "lora"])
def test_chunks_give_the_gradients_of_one_pass(
    kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor
) -> None:
    tuner = MAKERS[kind](small_clip, tokenizer)
    whole, graph = graph_of(lambda: tuner._text(tuner.classes), small_clip)
    expected = step(tuner, pixels)
    tuner.text_memory = graph // 4
    parts, small = graph_of(lambda: tuner._text(tuner.classes), small_clip)
    assert small < 0.6 * graph  # beside the layers' inputs, which no hook sees
    assert not any("_gradient_checkpointing_func" in m.__dict__ or m.training for m in small_clip.text_model.modules())
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    same(step(tuner, pixels), expected)


def test_the_limit_decides(small_clip: CLIPModel, tokenizer: Any) -> None:
    tuner = CoOp(small_clip, tokenizer, NAMES)
    rows: list[int] = []
    small_clip.text_model.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
    estimate = encoding.graph_bytes(tuner.encoder, tuner.prompts(NAMES).input_ids.numel())
    _, graph = graph_of(lambda: tuner._text(tuple(NAMES)), small_clip)
    assert 0.7 * graph < estimate < 1.6 * graph and rows == [23]
    for memory, passes in ((None, 1), (estimate, 1), (estimate - 1, 2), (0, 23)):
        tuner.text_memory = memory
        rows.clear()
        tuner.text_features()
        assert len(rows) >= passes and sum(rows) == 23 and (passes > 1 or len(rows) == 1)
    with torch.no_grad():  # without a graph nothing is limited
        rows.clear()
        tuner.text_features()
        assert rows == [23]


def test_chunks_are_trimmed_to_their_own_longest_prompt(small_clip: CLIPModel, tokenizer: Any) -> None:
    names = ["thing " * 40, *(f"thing {i}" for i in range(encoding.TEXTS_PER_CHUNK))]
    tuner = ZeroShot(small_clip, tokenizer, names)
    widths: list[int] = []
    small_clip.text_model.register_forward_pre_hook(
        lambda m, a, k: widths.append(k["input_ids"].shape[1]), with_kwargs=True
    )
    features = tuner.text_features()
    assert widths[0] < 12 < 40 < widths[1] == tuner.prior_prompts(names).input_ids.shape[1] and len(widths) == 2
    alone = ZeroShot(small_clip, tokenizer, [names[0], names[100]]).text_features()
    torch.testing.assert_close(features[[0, 100]], alone, rtol=0, atol=1e-6)


def test_dropout_is_the_same_in_the_recomputation(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    """Against the slope of the loss along the gradient, with the same draw: that slope is the gradient's length."""
    tuner = MAKERS["lora"](small_clip, tokenizer)
    tuner.text_memory = 1
    step(tuner, pixels)
    learned = [p for n, p in tuner.named_parameters() if "text_model" in n and "lora_B" in n]
    gradients = [p.grad.clone() for p in learned if p.grad is not None]
    length = float(torch.cat([g.flatten() for g in gradients]).norm())
    losses = []
    for move in (0.01, -0.02):
        with torch.no_grad():
            for parameter, gradient in zip(learned, gradients, strict=True):
                parameter += move * gradient / length
        losses.append(float(step(tuner, pixels)[0]))
    assert (losses[0] - losses[1]) / 0.02 == pytest.approx(length, rel=0.02)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["coop", "promptsrc", "mmrl"])
def test_the_users_checkpointing_goes_first(
    kind: str, reentrant: bool, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor
) -> None:
    tuner = MAKERS[kind](small_clip, tokenizer)
    expected = step(tuner, pixels)
    checkpoint_activations(small_clip, use_reentrant=reentrant)
    tuner.text_memory = 1
    rows: list[int] = []
    small_clip.text_model.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
    same(step(tuner, pixels), expected)
    assert rows[0] == 23


@pytest.mark.parametrize("kind", ["coop", "mmrl"])
def test_under_autocast(kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    tuner = MAKERS[kind](small_clip, tokenizer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = step(tuner, pixels)
        tuner.text_memory = 10_000
        loss = tuner(pixels, LABELS).loss
    gradients = torch.autograd.grad(loss, tuner.trainable_parameters())  # outside autocast: the forward's is restored
    same((loss.detach(), list(gradients)), expected, 3e-2)


def test_a_joint_training_of_prompts_and_heads(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    tuner = CoOp(small_clip, tokenizer, NAMES)
    model = wrap(tuner, foreground="whole", config=FVGConfig(freeze_tuner=False)).train()
    gradients = []
    for memory in (None, 1):
        tuner.text_memory = memory
        loss = model(pixels, LABELS).loss
        gradients.append((loss.detach(), list(torch.autograd.grad(loss, [tuner.ctx]))))
    same(gradients[1], gradients[0])


def test_a_training_tokenises_once(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    calls: list[int] = []

    def counted(texts: Any, **options: Any) -> Any:
        calls.append(len(texts))
        return tokenizer(texts, **options)

    tuner = CoOp(small_clip, counted, NAMES)
    calls.clear()
    for _ in range(3):
        tuner(pixels, LABELS)
    assert not calls
    tuner.tokenizer = lambda texts, **options: counted([t.replace("thing", "cat") for t in texts], **options)
    assert (
        tuner.prompts(NAMES).input_ids.tolist() != CoOp(small_clip, tokenizer, NAMES).prompts(NAMES).input_ids.tolist()
    )
    assert calls == [23]
