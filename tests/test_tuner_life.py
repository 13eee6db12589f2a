"""What holds for every tuner: copies, files, half precision, checkpointing, company on one CLIP, a clean way out."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel

from conftest import checkpoint_activations
from fvg_adapter import FVGConfig, load, unwrap, wrap
from fvg_adapter.errors import FVGError
from fvg_adapter.tuners import MMRL, CoOp, KgCoOp, LoRA, PromptSRC, Tuner, tuner_named

NAMES = ["cat", "dog", "hot_air_balloon"]
LABELS = torch.tensor([0, 1, 2, 0])
FEW = ("a photo of a {}.", "the plastic {}.")
Make = Callable[[CLIPModel, Any], Tuner]

MAKERS: dict[str, Make] = {
    "coop": lambda clip, tok: CoOp(clip, tok, NAMES),
    "kgcoop": lambda clip, tok: KgCoOp(clip, tok, NAMES, teacher_template="one {}."),
    "promptsrc": lambda clip, tok: PromptSRC(
        clip, tok, NAMES, prompt_depth_text=2, prompt_depth_vision=2, teacher_templates=FEW
    ),
    "mmrl": lambda clip, tok: MMRL(clip, tok, NAMES, rep_layers=[1, 2], rep_dim=8),
    "lora": lambda clip, tok: LoRA(clip, tok, NAMES),
}


def made(kind: str, clip: CLIPModel, tokenizer: Any, seed: int = 0) -> Tuner:
    """A tuner whose parameters are away from where they start."""
    torch.manual_seed(seed)
    tuner = MAKERS[kind](clip, tokenizer)
    with torch.no_grad():
        for parameter in tuner.trainable_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return tuner


def close(actual: Any, expected: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual.detach().float(), expected.detach().float(), atol=atol, rtol=0)


def scores(tuner: Tuner, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return tuner.eval()(pixels).logits


def hooks(clip: CLIPModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in clip.modules())


def image_of(clip: CLIPModel, pixels: Tensor) -> Tensor:
    output = clip.get_image_features(pixel_values=pixels)
    return output if isinstance(output, Tensor) else output.pooler_output


def text_of(clip: CLIPModel, tokenizer: Any) -> Tensor:
    output = clip.get_text_features(**tokenizer(["a photo of a cat.", "a dog"], padding=True, return_tensors="pt"))
    return output if isinstance(output, Tensor) else output.pooler_output


@pytest.fixture(params=MAKERS)
def kind(request: Any) -> str:
    return str(request.param)


@pytest.fixture(params=["promptsrc", "mmrl", "lora"])
def image_kind(request: Any) -> str:
    return str(request.param)


def test_copies_are_independent(kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    tuner = made(kind, small_clip, tokenizer)
    before = scores(tuner, pixels)
    for twin in (copy.deepcopy(tuner), pickle.loads(pickle.dumps(tuner))):
        close(scores(twin, pixels), before)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.add_(0.5)
        assert float((scores(twin, pixels) - before).abs().max()) > 1e-2
        close(scores(tuner, pixels), before, 0)
        assert hooks(twin.detach()) == 0
    assert hooks(small_clip) == tuner.hook_count


def test_the_prior_is_the_plain_clip(kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    images = torch.nn.functional.normalize(image_of(small_clip, pixels), dim=-1)
    tuner = made(kind, small_clip, tokenizer)
    assert tuner.changes_images == (kind not in ("coop", "kgcoop"))
    close(tuner.prior_image_features(pixels), images)
    moved = float((tuner.image_features(pixels, branch="new") - images).detach().abs().max())
    assert (moved > 1e-3) == tuner.changes_images
    assert not tuner.prior_image_features(pixels).requires_grad
    flags = [p.requires_grad for p in tuner.parameters()]
    tuner.prior_text_features()
    assert [p.requires_grad for p in tuner.parameters()] == flags


def test_the_way_out(kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    small_clip.text_model.train()
    small_clip.logit_scale.requires_grad_(False)
    state = {k: v.clone() for k, v in small_clip.state_dict().items()}
    attributes, modes = set(small_clip.__dict__), [m.training for m in small_clip.modules()]
    flags, names = [p.requires_grad for p in small_clip.parameters()], [n for n, _ in small_clip.named_modules()]
    with torch.no_grad():
        before = image_of(small_clip, pixels)
    tuner = made(kind, small_clip, tokenizer)
    tuner(pixels, LABELS).loss.backward()
    assert tuner.detach() is small_clip
    after = small_clip.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert (hooks(small_clip), set(small_clip.__dict__)) == (0, attributes)
    assert [m.training for m in small_clip.modules()] == modes
    assert [p.requires_grad for p in small_clip.parameters()] == flags
    assert [n for n, _ in small_clip.named_modules()] == names
    assert all(p.grad is None for p in small_clip.parameters())
    with torch.no_grad():
        close(image_of(small_clip, pixels), before, 0)


def test_direct_calls(image_kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    """The owner who calls the CLIP gets tuned images (and, but for LoRA, plain texts), in any thread."""
    with torch.no_grad():
        plain_text = text_of(small_clip, tokenizer)
        tuner = made(image_kind, small_clip, tokenizer)
        expected = tuner.image_features(pixels, branch="new")
        seen: list[Tensor] = []

        def run() -> None:
            with torch.no_grad():
                seen.append(torch.nn.functional.normalize(image_of(small_clip, pixels), dim=-1))

        worker = threading.Thread(target=run)
        worker.start()
        worker.join()
        run()
        for features in seen:
            close(features, expected)
        if image_kind != "lora":
            close(text_of(small_clip, tokenizer), plain_text)


@pytest.mark.parametrize(
    "order", [("promptsrc", "mmrl", "coop"), ("mmrl", "coop", "promptsrc"), ("lora", "mmrl", "kgcoop")]
)
def test_several_on_one_clip(order: tuple[str, ...], small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    alone = {k: scores(made(k, copy.deepcopy(small_clip), tokenizer), pixels) for k in order}
    plain = torch.nn.functional.normalize(image_of(small_clip, pixels), dim=-1)
    tuners = {k: made(k, small_clip, tokenizer) for k in order if k != "lora"}
    if "lora" in order:
        tuners["lora"] = made("lora", small_clip, tokenizer)
    for name, tuner in tuners.items():
        close(scores(tuner, pixels), alone[name])
        close(tuner.prior_image_features(pixels), plain)


def gradients(tuner: Tuner, pixels: Tensor, thread: bool = False) -> list[Tensor | None]:
    for module in tuner.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = tuner.train()(pixels, LABELS).loss
    if thread:  # as the backward of a GPU does
        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()
    else:
        loss.backward()
    return [p.grad for p in tuner.trainable_parameters()]


def _count(calls: list[int], function: Any, *args: Any, **kwargs: Any) -> Any:
    calls.append(1)
    return function(*args, **kwargs)


def counted(clip: CLIPModel) -> list[int]:
    """Grows by one at every checkpointed call of a layer."""
    calls: list[int] = []
    for module in clip.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None:
            module._gradient_checkpointing_func = functools.partial(_count, calls, function, **function.keywords)
    return calls


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("thread", [False, True])
def test_gradient_checkpointing(
    kind: str, thread: bool, reentrant: bool, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor
) -> None:
    twin = copy.deepcopy(small_clip)
    expected = gradients(made(kind, small_clip, tokenizer), pixels)
    checkpoint_activations(twin, use_reentrant=reentrant)
    calls = counted(twin)
    tuner = made(kind, twin, tokenizer)
    actual = gradients(tuner, pixels, thread)
    assert len(calls) >= 2  # it is used, and not lost with the CLIP's training mode
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours is not None
        assert theirs is not None
        close(ours, theirs, 1e-4 * max(1e-6, float(theirs.abs().max())))


@pytest.mark.parametrize("second", ["promptsrc", "mmrl"])
def test_checkpointing_with_another_tuner_on_the_clip(
    second: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor
) -> None:
    """Layers that are computed again during backward see the hooks of the pass that they belong to."""
    first = "mmrl" if second == "promptsrc" else "promptsrc"
    expected = gradients(made(first, copy.deepcopy(small_clip), tokenizer), pixels)
    checkpoint_activations(small_clip, use_reentrant=False)
    tuner = made(first, small_clip, tokenizer)
    made(second, small_clip, tokenizer, seed=1)
    for ours, theirs in zip(gradients(tuner, pixels, thread=True), expected, strict=True):
        assert ours is not None
        close(ours, theirs, 1e-4 * max(1e-6, float(theirs.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_clip(
    kind: str, dtype: torch.dtype, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor
) -> None:
    exact = made(kind, copy.deepcopy(small_clip), tokenizer)
    tuner = made(kind, small_clip.to(dtype), tokenizer)
    with torch.no_grad():  # the same parameters: some started from the table in half precision
        for ours, theirs in zip(tuner.trainable_parameters(), exact.trainable_parameters(), strict=True):
            ours.copy_(theirs)
    assert all(p.dtype == torch.float32 for p in tuner.trainable_parameters())
    f, g = tuner.image_features(pixels.to(dtype)), tuner.text_features()
    assert (f.dtype, g.dtype) == (torch.float32, torch.float32)
    close(f, exact.image_features(pixels), 0.1)
    close(g, exact.text_features(), 0.1)
    loss = tuner.train()(pixels.to(dtype), LABELS).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in tuner.trainable_parameters() if p.grad is not None)


def test_half_and_double_of_a_tuner(kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    tuner = made(kind, small_clip, tokenizer)
    own = {n: p.detach().clone() for n, p in tuner.named_parameters() if p.requires_grad}
    tuner.half()
    assert small_clip.visual_projection.weight.dtype == torch.float16
    for name, parameter in tuner.named_parameters():
        if name in own:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, own[name])
    tuner.double()
    assert tuner.image_features(pixels.double()).dtype == torch.float64


def test_autocast(kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    tuner = made(kind, small_clip, tokenizer)
    expected = tuner.text_features().detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tuner.eval()(pixels, LABELS)
        close(tuner.text_features(), expected, 0.1)
    assert output.logits.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in tuner.trainable_parameters())


def test_files(kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor, tmp_path: Any) -> None:
    plain = copy.deepcopy(small_clip)
    tuner = made(kind, small_clip, tokenizer)
    before = scores(tuner, pixels)
    folder = tuner.save_pretrained(tmp_path / "tuner")
    again = load(folder, clip=copy.deepcopy(plain), tokenizer=tokenizer)
    assert type(again) is type(tuner)
    close(scores(again, pixels), before, 0)
    assert not again.training
    new = ["snow_leopard", "bicycle"]
    with tuner.use_classes(new), again.use_classes(new):
        close(scores(again, pixels), scores(tuner, pixels), 0)
    model = wrap(tuner)
    expected = model.eval()(pixels).logits
    folder = model.save_pretrained(tmp_path / "fvg")
    again = load(folder, clip=plain, tokenizer=tokenizer)
    close(again(pixels).logits, expected, 0)


def test_checkpoints_of_other_loops_hold_what_was_learned(
    kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor
) -> None:
    tuner = made(kind, small_clip, tokenizer)
    learned = {n for n, p in tuner.named_parameters() if p.requires_grad}
    state = {k: v.clone() for k, v in tuner.state_dict().items()}
    assert set(state) == learned
    before = scores(tuner, pixels)
    with torch.no_grad():
        for parameter in tuner.trainable_parameters():
            parameter.zero_()
    tuner.load_state_dict(state)
    close(scores(tuner, pixels), before, 0)


def test_fvg_behind_it(kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    tuner = made(kind, small_clip, tokenizer)
    count = hooks(small_clip)
    base = scores(tuner, pixels)
    own = [p.detach().clone() for p in tuner.trainable_parameters()]
    model = wrap(tuner, config=FVGConfig(init_std=0.0))
    close(model.eval()(pixels).logits, base, 1e-4)
    optimizer = torch.optim.SGD(model.train().trainable_parameters(), lr=0.01)
    mask = torch.zeros(4, 32, 32)
    mask[:, 8:24, 8:24] = 1
    for given in (mask, None):  # a given mask, and the model's own attention
        output = model(pixels, LABELS, given)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        assert torch.isfinite(output.loss)
    assert not any(m.training for m in tuner.modules())
    assert unwrap(model) is tuner
    assert all(torch.equal(a, b) for a, b in zip(own, tuner.trainable_parameters(), strict=True))
    assert hooks(small_clip) == count
    close(scores(tuner, pixels), base)


@pytest.mark.parametrize("half", [False, True])
def test_200_steps_stay_finite(kind: str, half: bool, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    """Heads behind a tuner, under bf16 autocast and with a bf16 CLIP."""
    clip = small_clip.to(torch.bfloat16) if half else small_clip
    model = wrap(made(kind, clip, tokenizer), foreground="given").train()
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.0035, momentum=0.9, weight_decay=5e-4)
    mask = torch.zeros(4, 32, 32)
    mask[:, 8:24, 8:24] = 1
    views = model.views(pixels.to(model.tuner.encoder.dtype), mask)
    bank = {"image": views.base, "image_new": views.new, "foreground": views.foreground, "prior": views.prior}
    bank |= {"mask_area": views.area, "usable": views.usable}
    for step in range(200):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not half):
            batch = (
                {"features": bank} if step % 50 else {"pixel_values": pixels.to(clip.dtype), "foreground_mask": mask}
            )
            loss = model(labels=LABELS, **batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in model.trainable_parameters())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"n_ctx": 0, "ctx_init": ""}, "n_ctx is 0"),
        ({"n_ctx": 3}, "has 4 words, but n_ctx is 3"),
        ({"csc": True}, 'give ctx_init=""'),
        ({"class_token_position": "midle"}, "Did you mean 'middle'"),
        ({"n_ctx": 76, "ctx_init": ""}, "the text tower holds"),
    ],
    ids=["none", "words", "csc", "position", "long"],
)
def test_contexts_that_cannot_be(given: dict[str, Any], said: str, small_clip: CLIPModel, tokenizer: Any) -> None:
    with pytest.raises(FVGError, match=said):
        CoOp(small_clip, tokenizer, NAMES, **given)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in small_clip.modules())


def test_tuners_are_found_by_their_names() -> None:
    assert tuner_named("coop") is tuner_named("fvg_adapter.tuners.coop:CoOp") is CoOp
    for name, said in [
        ("fvg_adapter.tuners:Absent", "'fvg_adapter.tuners:Absent' could not be imported"),
        ("no_such_module:CoOp", "could not be imported"),
        ("fvg_adapter.tuners:tuner_named", "is no tuner"),
        ("fvg_adapter:FVGModel", "is no tuner"),
        ("co-op", "'co-op' is unknown. Did you mean 'coop'.*package.module:Class"),
    ]:
        with pytest.raises(FVGError, match=said):
            tuner_named(name)
