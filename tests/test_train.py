"""fit: Dassl's schedule, repeatable batches, resume, accumulation, autocast, checkpoints, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from fvg_adapter.errors import FVGError
from fvg_adapter.features import FeatureBank
from fvg_adapter.model import FVGModel
from fvg_adapter.train import FitResult, fit
from fvg_adapter.train.batches import Batches
from fvg_adapter.tuners import CoOp, ZeroShot
from fvg_adapter.tuners.recipes import RECIPES, Stage
from fvg_adapter.wrapping import wrap

NAMES = ["cat", "dog", "hot-air balloon"]
RECIPE = Stage("sgd", 0.005, batch_size=4, epochs=3, source="tests")


class Pictures(Dataset[dict[str, Any]]):
    """Random pictures with masks; with `noise`, every access draws from torch's, numpy's and Python's generators."""

    def __init__(
        self, count: int = 12, noise: float = 0.0, masks: bool = True, classes: list[str] | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        self.classes = classes or NAMES
        self.labels = [i % len(NAMES) for i in range(count)]
        self.pixels = torch.randn(count, 3, 32, 32, generator=generator)
        self.masks = (torch.rand(count, 1, 32, 32, generator=generator) > 0.4).float()
        self.masks[::3] = 0  # unusable
        self.noise, self.with_masks = noise, masks
        self.seen: list[tuple[int, float]] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shift = self.noise * (float(torch.rand(())) + random.random() + float(np.random.rand()))
        self.seen.append((index, shift))
        item = {"pixel_values": self.pixels[index] + shift, "labels": self.labels[index]}
        return {**item, "foreground_mask": self.masks[index]} if self.with_masks else item


Make = Callable[[], FVGModel]


@pytest.fixture
def heads(small_clip: Any, tokenizer: Any) -> Make:
    """Makes a freshly wrapped model, the same each time."""

    def make() -> FVGModel:
        torch.manual_seed(3)
        return wrap(ZeroShot(small_clip, tokenizer, NAMES), foreground="given")

    return make


def own(model: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def changed(recipe: Stage = RECIPE, **fields: Any) -> Stage:
    return dataclasses.replace(recipe, **fields)


# -- against a loop written out by hand --------------------------------------------------------------------------------


def by_hand(model: Any, data: Pictures, recipe: Stage, seed: int, keys: tuple[str, ...]) -> list[float]:
    """METHOD.md section 7 as a plain loop over the same batches."""
    optimizer = recipe.make_optimizer(model.trainable_parameters())
    batches = Batches(len(data), recipe.batch_size, accumulate=1, world=1, rank=0, seed=seed)
    losses = []
    model.train()
    for epoch in range(recipe.epochs):
        optimizer.param_groups[0]["lr"] = recipe.learning_rate(epoch)
        batches.set_epoch(epoch)
        total = 0.0
        for batch in batches:
            items = [data[index] for _, index in batch]
            inputs = {k: torch.stack([torch.as_tensor(item[k]) for item in items]) for k in keys}
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) / len(batches)
        losses.append(total)
    model.eval()
    return losses


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_equals_a_plain_loop(heads: Make, optimizer: Any) -> None:
    recipe = changed(optimizer=optimizer)
    expected, model = heads(), heads()
    losses = by_hand(expected, Pictures(), recipe, 1, ("pixel_values", "labels", "foreground_mask"))
    result = fit(model, Pictures(), recipe=recipe)
    assert distance(own(model), own(expected)) == 0.0
    assert result.losses == pytest.approx(losses, rel=1e-6)
    assert result.steps == 9
    assert set(result.terms[0]) == {"base_ce", "frg", "distill", "new_ce", "new_kl"}
    first, config = result.terms[0], model.config
    total = (
        first["base_ce"] + first["frg"] + config.lambda_distill * first["distill"] + first["new_ce"] + first["new_kl"]
    )
    assert total == pytest.approx(result.losses[0], abs=1e-5)


def test_tunes_prompts_like_a_plain_loop_and_leaves_masks_out(small_clip: Any, tokenizer: Any) -> None:
    expected, model = (CoOp(small_clip, tokenizer, NAMES) for _ in range(2))
    before = own(model)
    by_hand(expected, Pictures(), RECIPE, 1, ("pixel_values", "labels"))
    result = fit(model, Pictures(), recipe=RECIPE)
    assert distance(own(model), own(expected)) == 0.0
    assert distance(own(model), before) > 1e-4
    assert list(result.terms[0]) == ["ce"]


def test_rates_are_those_of_dassl(heads: Make, golden: Any) -> None:
    case = golden("coop_init_end")
    schedule = case.config["lr_schedule"]
    recipe = changed(lr=schedule["base_lr"], epochs=schedule["max_epoch"], batch_size=3)
    for accumulate in (1, 3):  # 4 batches: a whole and a part step
        result = fit(heads(), Pictures(), recipe=recipe, accumulate=accumulate)
        assert result.learning_rates == pytest.approx(case["lr_schedule"].tolist(), rel=1e-12)


def test_published_recipes_are_the_default(heads: Make, small_clip: Any, tokenizer: Any) -> None:
    result = fit(heads(), Pictures(4), recipe=None)
    assert result.learning_rates[1] == RECIPES["zero_shot"].fvg.lr
    assert len(result.losses) == RECIPES["zero_shot"].fvg.epochs
    with pytest.raises(FVGError, match="nothing to train"):
        fit(ZeroShot(small_clip, tokenizer, NAMES), Pictures(4))


def test_a_bank_trains_heads_and_prompts(heads: Make, small_clip: Any, tokenizer: Any) -> None:
    model = heads()
    bank = FeatureBank.encode(model, Pictures(), views=1)
    fit(model, bank, recipe=RECIPE)
    in_the_loop = heads()
    fit(in_the_loop, Pictures(), recipe=RECIPE)
    assert distance(own(model), own(in_the_loop)) < 1e-5
    tuner = CoOp(small_clip, tokenizer, NAMES)
    assert len(fit(tuner, bank, recipe=RECIPE).losses) == 3


# -- what a step sees --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "batch", "accumulate", "world"), [(13, 4, 1, 1), (13, 2, 2, 1), (13, 2, 1, 2), (5, 4, 1, 2)]
)
def test_parts_of_a_step_are_equal_and_disjoint(size: int, batch: int, accumulate: int, world: int) -> None:
    parts = [Batches(size, batch, accumulate=accumulate, world=world, rank=r, seed=1) for r in range(world)]
    whole = Batches(size, batch * accumulate * world, accumulate=1, world=1, rank=0, seed=1)
    taken = [list(part) for part in parts]
    assert {len(b) for part in taken for b in part} == {parts[0].batch_size}
    flat = [k for part in taken for b in part for k in b]
    assert len(set(flat)) == len(flat)
    if size >= batch * accumulate * world:  # whole steps of the same pictures
        for step, expected in enumerate(whole):
            mine = [b for part in taken for b in part[step * accumulate : (step + 1) * accumulate]]
            assert sorted(k for b in mine for k in b) == sorted(expected)


def test_order_changes_with_epoch_and_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = Batches(20, 5, accumulate=1, world=1, rank=0, seed=seed)
        batches.set_epoch(epoch)
        return [index for batch in batches for _, index in batch]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_augmentation_depends_on_seed_epoch_and_picture_alone(heads: Make) -> None:
    runs = {}
    for name, options in {"one": {}, "two": {"accumulate": 2}}.items():
        data = Pictures(noise=1.0)
        fit(heads(), data, recipe=changed(batch_size=4 if name == "one" else 2), **options)
        runs[name] = sorted(data.seen[1:])  # the first was the check's
    assert runs["one"] == runs["two"]
    assert len({shift for _, shift in runs["one"]}) == 36  # 12 pictures in 3 epochs, all different


def test_a_step_of_two_batches_equals_one_of_twice_the_size(heads: Make) -> None:
    whole, halves = heads(), heads()
    fit(whole, Pictures(14), recipe=changed(batch_size=4))
    result = fit(halves, Pictures(14), recipe=changed(batch_size=2), accumulate=2)
    assert result.steps == 9
    assert distance(own(whole), own(halves)) < 1e-5


def test_fewer_pictures_than_a_batch_are_one_step(heads: Make) -> None:
    assert fit(heads(), Pictures(3), recipe=changed(batch_size=32)).steps == 3
    with pytest.raises(FVGError, match=r"3 pictures cannot be shared"):
        fit(heads(), Pictures(3), recipe=RECIPE, accumulate=4)


def test_workers_give_the_same(heads: Make) -> None:
    alone, helped = heads(), heads()
    fit(alone, Pictures(noise=1.0), recipe=RECIPE)
    fit(helped, Pictures(noise=1.0), recipe=RECIPE, workers=2)
    assert distance(own(alone), own(helped)) == 0.0


def test_batches_without_a_usable_mask_train(heads: Make) -> None:
    blank = Pictures()
    blank.masks.zero_()
    model = heads()
    before = own(model)
    result = fit(model, blank, recipe=RECIPE)
    assert all(terms["frg"] == 0.0 for terms in result.terms)
    assert distance(own(model), before) > 1e-6


# -- seeds, precision, state -------------------------------------------------------------------------------------------


def test_a_seed_decides_everything(heads: Make) -> None:
    models = [heads() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(seed)  # whatever was drawn before does not matter
        fit(model, Pictures(noise=1.0), recipe=RECIPE, seed=seed)
    assert distance(own(models[0]), own(models[1])) == 0.0
    assert distance(own(models[0]), own(models[2])) > 1e-6


def test_bf16_trains_full_precision_heads(small_clip: Any, tokenizer: Any, heads: Make) -> None:
    full, low = heads(), heads()
    fit(full, Pictures(), recipe=RECIPE)
    result = fit(low, Pictures(), recipe=RECIPE, precision="bf16")
    assert all(p.dtype == torch.float32 for p in low.trainable_parameters())
    assert np.isfinite(result.losses).all()
    assert 0 < distance(own(full), own(low)) < 0.05
    tuner = CoOp(small_clip, tokenizer, NAMES)
    assert np.isfinite(fit(tuner, Pictures(), recipe=RECIPE, precision="bf16").losses).all()
    assert tuner.ctx.dtype == torch.float32
    again = heads()
    fit(again, Pictures(), recipe=RECIPE)  # and autocast is gone
    assert distance(own(again), own(full)) == 0.0


def test_leaves_everything_else_as_found(heads: Make, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    model = heads()
    model.train()
    attributes = set(model.__dict__)
    frozen = {k: v.clone() for k, v in model.tuner.clip.state_dict().items()}
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    fit(model, Pictures(noise=1.0), recipe=RECIPE, precision="bf16")
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.random.get_state()[1].tolist() == states[2]
    assert set(model.__dict__) == attributes
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, frozen[k]) for k, v in model.tuner.clip.state_dict().items())
    import os

    assert "ACCELERATE_MIXED_PRECISION" not in os.environ
    assert capfd.readouterr().out == ""  # a library does not print


def test_a_model_can_be_trained_again_in_another_precision(heads: Make) -> None:
    full, low = heads(), heads()
    for model in (full, low):
        fit(model, Pictures(), recipe=RECIPE)
    before = own(full)
    fit(full, Pictures(), recipe=RECIPE)
    fit(low, Pictures(), recipe=RECIPE, precision="bf16")
    assert distance(own(full), before) > 1e-6
    assert distance(own(full), own(low)) > 0


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_resume_equals_the_unbroken_run_bit_for_bit(heads: Make, tmp_path: Path) -> None:
    recipe = changed(epochs=4, optimizer="adamw", lr=0.01)
    unbroken, broken = heads(), heads()
    whole = fit(unbroken, Pictures(noise=1.0), recipe=recipe, output_dir=tmp_path / "whole")

    def stop(epoch: int, model: Any) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(broken, Pictures(noise=1.0), recipe=recipe, output_dir=tmp_path / "broken", on_epoch=stop)
    torn = tmp_path / "broken" / "checkpoint-9"  # a save that was cut off
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    for resume in (True, tmp_path / "broken" / "checkpoint-3"):
        resumed = heads()
        rest = fit(resumed, Pictures(noise=1.0), recipe=recipe, output_dir=tmp_path / "broken", resume=resume)
        assert distance(own(resumed), own(unbroken)) == 0.0
        assert rest.losses == whole.losses
        assert rest.learning_rates == whole.learning_rates
        assert rest.steps == whole.steps == 12
        assert rest.checkpoint is not None and rest.checkpoint.name == "checkpoint-12"
        for later in ("checkpoint-9", "checkpoint-12"):
            import shutil

            shutil.rmtree(tmp_path / "broken" / later)


def test_a_script_that_is_started_again_goes_on_by_itself(heads: Make, tmp_path: Path) -> None:
    unbroken = heads()
    fit(unbroken, Pictures(noise=1.0), recipe=RECIPE)

    def stop(epoch: int, at: int) -> None:
        if epoch == at:
            raise KeyboardInterrupt

    for at in (1, 2, 3):  # before the first checkpoint, and behind one
        with pytest.raises(KeyboardInterrupt):
            options: dict[str, Any] = {"output_dir": tmp_path, "resume": "auto"}
            fit(heads(), Pictures(noise=1.0), recipe=RECIPE, on_epoch=lambda n, _, at=at: stop(n, at), **options)
    model = heads()
    result = fit(model, Pictures(noise=1.0), recipe=RECIPE, output_dir=tmp_path, resume="auto")
    assert distance(own(model), own(unbroken)) == 0.0 and result.steps == 9
    again = heads()
    fit(again, Pictures(noise=1.0), recipe=RECIPE, output_dir=tmp_path, resume="auto")  # nothing is left to do
    assert distance(own(again), own(unbroken)) == 0.0
    with pytest.raises(FVGError, match="resume='auto' with an output_dir"):
        fit(heads(), Pictures(), recipe=RECIPE, resume="auto")


def test_checkpoints_of_an_earlier_training_are_not_taken_for_this_ones(heads: Make, tmp_path: Path) -> None:
    """A longer training left checkpoints of higher steps, and one of the same step."""
    fit(heads(), Pictures(), recipe=changed(epochs=3), output_dir=tmp_path, seed=7)
    model = heads()
    result = fit(model, Pictures(), recipe=changed(epochs=2), output_dir=tmp_path)
    assert result.checkpoint == tmp_path / "checkpoint-6"
    with safe_open(result.checkpoint / "model.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(name), value) for name, value in model.state_dict().items())
    resumed = heads()
    fit(resumed, Pictures(), recipe=changed(epochs=2), output_dir=tmp_path, resume=True)
    assert distance(own(resumed), own(model)) == 0.0


def test_checkpoints_hold_our_tensors_only(heads: Make, tmp_path: Path) -> None:
    model = heads()
    result = fit(model, Pictures(), recipe=changed(epochs=5), output_dir=tmp_path, save_every_epochs=2)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["checkpoint-12", "checkpoint-15", "checkpoint-6"]
    assert result.checkpoint == tmp_path / "checkpoint-15"
    with safe_open(result.checkpoint / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert not any("clip" in name for name in file.keys())  # noqa: SIM118
    assert sum(path.stat().st_size for path in result.checkpoint.rglob("*")) < 1_000_000
    log = json.loads((result.checkpoint / "trainer_state.json").read_text())["log_history"]
    assert log[-1]["loss"] == result.losses[-1]
    assert log[-1]["loss_distill"] == result.terms[-1]["distill"]


def test_without_a_folder_nothing_is_written(heads: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fit(heads(), Pictures(), recipe=RECIPE).checkpoint is None
    assert list(tmp_path.iterdir()) == []


def test_on_epoch_can_change_the_model_before_it_is_saved(heads: Make, tmp_path: Path) -> None:
    seen = []

    def average(epoch: int, model: Any) -> None:
        seen.append(epoch)
        with torch.no_grad():
            model.backbone_gate.out.bias.fill_(float(epoch))

    model = heads()
    result = fit(model, Pictures(), recipe=RECIPE, output_dir=tmp_path, on_epoch=average)
    assert seen == [1, 2, 3]
    assert model.backbone_gate.out.bias.item() == 3.0
    assert result.checkpoint is not None
    with safe_open(result.checkpoint / "model.safetensors", "pt") as file:
        assert float(file.get_tensor("backbone_gate.out.bias")) == 3.0


class Golden(Dataset[dict[str, Any]]):
    """The four pictures of a golden case."""

    def __init__(self, case: Any) -> None:
        self.images, self.labels = case["images"], case["labels"].tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def test_promptsrc_ends_as_the_authors_epoch_average(
    golden: Any, golden_clip: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """The whole of fit against the authors' code: four epochs, momentum, schedule and averaging, with a resume."""
    from fvg_adapter.tuners.promptsrc import PromptSRC

    case = golden("promptsrc_gpa")
    settings = {k: v for k, v in case.config.items() if k in ("ctx_init", "gpa_mean", "gpa_std")}
    for depth in ("n_ctx_text", "n_ctx_vision", "prompt_depth_text", "prompt_depth_vision"):
        settings[depth] = case.config[depth]
    recipe = Stage("sgd", case.config["optimizer"]["lr"], batch_size=4, epochs=4, source="golden")

    def make() -> PromptSRC:
        tuner = PromptSRC(golden_clip, tokenizer, case.config["classnames"], **settings)
        tuner.load_state_dict(case.under("param"), strict=False)
        return tuner

    tuner = make()
    result = fit(tuner, Golden(case), recipe=recipe, output_dir=tmp_path / "whole")
    assert result.learning_rates == pytest.approx(case["lr_per_epoch"].tolist(), rel=1e-9)
    assert result.losses == pytest.approx(case["losses"].tolist(), abs=1e-3)
    for name, expected in case.under("gpa").items():
        if name != "eval_logits":
            assert float((own(tuner)[name] - expected).abs().max()) < 1e-3, name
    assert float((tuner(case["images"]).logits - case["gpa/eval_logits"]).abs().max()) < 1e-3
    tuner.detach()

    def stop(epoch: int, model: Any) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    broken = make()
    with pytest.raises(KeyboardInterrupt):
        fit(broken, Golden(case), recipe=recipe, output_dir=tmp_path / "broken", on_epoch=stop)
    broken.detach()
    resumed = make()
    fit(resumed, Golden(case), recipe=recipe, output_dir=tmp_path / "broken", resume=True)
    assert distance(own(resumed), own(tuner)) == 0.0
    (tmp_path / "broken" / "checkpoint-2" / "average.safetensors").unlink()
    with pytest.raises(FVGError, match=r"has no whole average.safetensors"):
        fit(resumed, Golden(case), recipe=recipe, resume=tmp_path / "broken" / "checkpoint-2")


def test_a_full_disk_leaves_no_half_checkpoint(heads: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(FVGError, match=r"checkpoint-3 could not be written.*No space left"):
        fit(heads(), Pictures(), recipe=RECIPE, output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_model_is_refused(heads: Make, small_clip: Any, tokenizer: Any, tmp_path: Path) -> None:
    made = fit(heads(), Pictures(), recipe=RECIPE, output_dir=tmp_path / "heads").checkpoint
    assert made is not None
    with pytest.raises(FVGError, match=r"another model: \['backbone_gate"):
        fit(CoOp(small_clip, tokenizer, NAMES), Pictures(), recipe=RECIPE, resume=made)
    with pytest.raises(FVGError, match="no whole checkpoint in"):
        fit(heads(), Pictures(), recipe=RECIPE, output_dir=tmp_path / "empty", resume=True)
    with pytest.raises(FVGError, match="is no whole checkpoint of fit"):
        fit(heads(), Pictures(), recipe=RECIPE, resume=tmp_path / "nowhere")
    weights = made / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(FVGError, match="no whole safetensors file"):
        fit(heads(), Pictures(), recipe=RECIPE, resume=made)


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_an_error_before_it_spreads(heads: Make) -> None:
    data = Pictures()
    data.pixels[7] = float("nan")
    model = heads()
    with pytest.raises(FVGError, match=r"the loss is nan at step \d \(base_ce nan.*Lower the learning rate"):
        fit(model, data, recipe=RECIPE)
    assert all(torch.isfinite(p).all() for p in model.trainable_parameters())
    assert not model.training
    late = Pictures()
    *_, (last, _) = Batches(12, 2, accumulate=6, world=1, rank=0, seed=1)
    late.pixels[last[1]] = float("nan")
    with pytest.raises(FVGError, match="the loss is nan at step 1"):
        fit(model, late, recipe=changed(batch_size=2), accumulate=6)  # five of the six batches have gone through
    assert all(p.grad is None for p in model.trainable_parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": Pictures(0)}, "data set is empty"),
        ({"dataset": iter([])}, "a length and indices"),
        ({"dataset": [1, 2]}, "the first one is a int"),
        ({"dataset": [{"image": 1, "label": 2}]}, r"the first one has \['image', 'label'\]"),
        ({"dataset": Pictures(classes=["dog", "cat", "hot-air balloon"])}, "same classes in another order"),
        ({"recipe": dataclasses.replace(RECIPE, lr=0.0)}, "lr must be above 0"),
        ({"recipe": dataclasses.replace(RECIPE, epochs=0)}, "epochs must be above 0"),
        ({"accumulate": 0}, "accumulate must be above 0"),
        ({"precision": "bf61"}, "Did you mean 'bf16'"),
        ({"precision": "fp16"}, "needs a GPU"),
        ({"seed": -1}, "seed must be"),
        ({"device": "cuda:3"}, "CUDA_VISIBLE_DEVICES"),
        ({"output_dir": __file__}, "is a file; give a folder"),
    ],
)
def test_mistakes_are_named_before_anything_happens(heads: Make, given: dict[str, Any], message: str) -> None:
    model = heads()
    model.train()
    before = own(model)
    with pytest.raises(FVGError, match=message):
        fit(model, **{"dataset": Pictures(), "recipe": RECIPE, **given})
    assert distance(own(model), before) == 0.0
    assert model.training


def test_labels_beyond_the_classes_and_foreign_models_are_refused(small_clip: Any, heads: Make) -> None:
    data = Pictures()
    data.labels[3] = 7
    with pytest.raises(FVGError, match="labels up to 7, but the model has 3 classes"):
        fit(heads(), data, recipe=RECIPE)
    with pytest.raises(FVGError, match="but a CLIPModel was given"):
        fit(small_clip, Pictures(), recipe=RECIPE)


def test_a_bank_of_another_model_is_refused(heads: Make) -> None:
    model = heads()
    bank = FeatureBank.encode(model, Pictures(4))
    bank.fingerprint = "clip:other"
    with pytest.raises(FVGError, match="encoded by clip:other"):
        fit(model, bank, recipe=RECIPE)


def test_the_bar_is_on_stderr_and_only_when_asked_for(heads: Make, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result: FitResult = fit(heads(), Pictures(), recipe=RECIPE)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    assert fit(heads(), Pictures(), recipe=RECIPE, progress=True).losses == result.losses
    out, err = capfd.readouterr()
    assert out == ""
    assert "epoch 3, loss" in err
