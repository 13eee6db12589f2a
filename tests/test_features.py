"""FeatureBank and evaluate: the same numbers as the slow way, and refused where they do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from transformers import CLIPModel

from conftest import CLASSES, NEW_CLASSES
from fvg_adapter import FeatureBank, FVGModel, evaluate, wrap
from fvg_adapter.data.controls import OtherMasks
from fvg_adapter.errors import FVGError
from fvg_adapter.evaluation import score
from fvg_adapter.features import attention_in_mask
from fvg_adapter.losses import kl_divergence, log_probs
from fvg_adapter.tuners import CoOp


class Pictures(Dataset[dict[str, Any]]):
    """Random images with box masks; with `noisy`, another view at each access."""

    def __init__(
        self, classes: list[str], n: int = 10, seed: int = 0, *, noisy: bool = False, masks: bool = True
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.images = torch.randn(n, 3, 32, 32, generator=draw)
        self.masks = torch.zeros(n, 1, 32, 32)
        for i in range(n):
            self.masks[i, :, 4 : 14 + i, 6:28] = 1
        self.labels = [i % len(classes) for i in range(n)]
        self.classes, self.noisy, self.has_masks = classes, noisy, masks

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index] + (torch.randn(3, 32, 32) if self.noisy else 0)
        item = {"pixel_values": image, "labels": self.labels[index]}
        return {**item, "foreground_mask": self.masks[index]} if self.has_masks else item


@pytest.fixture
def model(small_clip: CLIPModel, tokenizer: Any) -> FVGModel:
    torch.manual_seed(0)
    model = wrap(CoOp(small_clip, tokenizer, CLASSES, ctx_init=""), foreground="given")
    with torch.no_grad():
        for head in (model.visual_adapter, model.text_adapter):
            head.up.weight.normal_(std=0.1)
    return model


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_training_from_a_bank_equals_training_on_the_images(model: FVGModel) -> None:
    pictures = Pictures(CLASSES)
    bank = FeatureBank.encode(model, pictures, batch_size=4)
    stored = default_collate([bank[i] for i in range(len(bank))])
    batch = default_collate([pictures[i] for i in range(len(pictures))])
    from_bank, from_pixels = model(**stored), model(**batch)
    close(from_bank.loss, from_pixels.loss)
    for name, term in from_pixels.losses.items():
        close(from_bank.losses[name], term)
    close(from_bank.foreground_trust, from_pixels.foreground_trust)


def test_a_text_only_tuner_learns_from_a_bank(model: FVGModel) -> None:
    tuner = model.release()
    pictures = Pictures(CLASSES)
    bank = FeatureBank.encode(tuner, pictures)
    batch = default_collate([pictures[i] for i in range(len(pictures))])
    slow = tuner(batch["pixel_values"], batch["labels"]).loss
    (expected,) = torch.autograd.grad(slow, [tuner.ctx])
    fast = tuner(**default_collate([bank[i] for i in range(len(bank))])).loss
    close(fast, slow)
    close(torch.autograd.grad(fast, [tuner.ctx])[0], expected)


def test_views_depend_on_seed_view_and_index_only(model: FVGModel) -> None:
    pictures = Pictures(CLASSES, noisy=True)
    first = FeatureBank.encode(model, pictures, views=3, batch_size=4, seed=5)
    torch.manual_seed(99)
    again = FeatureBank.encode(model, pictures, views=3, batch_size=7, seed=5)
    close(first.features["image"], again.features["image"])
    assert (first.features["image"][:, 0] - first.features["image"][:, 1]).abs().max() > 1e-2
    other = FeatureBank.encode(model, pictures, views=3, seed=6)
    assert (first.features["image"] - other.features["image"]).abs().max() > 1e-2
    assert first.views == 3 and len(first) == 10
    seen = {tuple(first[2]["features"]["image"].tolist()) for _ in range(60)}
    assert len(seen) == 3


def test_other_masks_change_the_foreground_only(model: FVGModel) -> None:
    pictures = Pictures(CLASSES, noisy=True)
    shuffled = OtherMasks(pictures, seed=1)
    assert all(i != j for i, j in shuffled.other.items()) and sorted(shuffled.other.values()) == list(range(10))
    own, others = (FeatureBank.encode(model, d, views=2, seed=3) for d in (pictures, shuffled))
    close(own.features["image"], others.features["image"])
    assert (own.features["foreground"] - others.features["foreground"]).abs().max() > 1e-3


def test_encoding_leaves_a_tuner_as_found(model: FVGModel) -> None:
    tuner = model.release()
    before = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in tuner.modules()]
    FeatureBank.encode(tuner, Pictures(CLASSES), measure=True)
    assert before == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in tuner.modules()]
    assert tuner.ctx.requires_grad


def test_evaluate_against_a_loop(model: FVGModel) -> None:
    sets = Pictures(CLASSES, 12, 1), Pictures(NEW_CLASSES, 10, 2)
    model.train()
    found = evaluate(model, *sets, batch_size=5)
    assert model.training and model.classes == tuple(CLASSES)
    model.eval()
    right, joint, divergence, inside = [], [], [], []
    for data, offset in zip(sets, (0, len(CLASSES)), strict=True):
        hits, joint_hits = 0, 0
        for item in data:
            pixels, mask = item["pixel_values"][None], item["foreground_mask"][None]
            with torch.no_grad(), model.use_classes(data.classes):
                whole = model(pixels, foreground_mask=mask, return_attention=True)
                view = model(pixels * mask)
            hits += int(whole.logits.argmax()) == item["labels"]
            divergence.append(float(kl_divergence(log_probs(whole.logits), log_probs(view.logits))))
            inside.append(float(attention_in_mask(whole.foreground_attention, mask)))
            with torch.no_grad(), model.use_classes([*CLASSES, *NEW_CLASSES]):
                joint_hits += int(model(pixels).logits.argmax()) == item["labels"] + offset
        right.append(100 * hits / len(data))
        joint.append(100 * joint_hits / len(data))
    assert (found["base"], found["new"]) == pytest.approx(tuple(right))
    assert (found["joint_base"], found["joint_new"]) == pytest.approx(tuple(joint))
    assert found["hm"] == pytest.approx(2 * right[0] * right[1] / (right[0] + right[1]) if sum(right) else 0)
    assert found["d_fg"] == pytest.approx(sum(divergence) / len(divergence), abs=1e-5)
    assert found["attention_in_mask"] == pytest.approx(sum(inside) / len(inside), abs=1e-5)
    assert 0 <= found["ece"] <= 100 and found["entropy"] > 0


def test_evaluate_a_tuner_and_sets_without_masks(model: FVGModel) -> None:
    tuner = model.release()
    sets = Pictures(CLASSES, 12, 1, masks=False), Pictures(NEW_CLASSES, 10, 2, masks=False)
    found = evaluate(tuner, *sets)
    assert found["d_fg"] != found["d_fg"] and found["attention_in_mask"] != found["attention_in_mask"]  # NaN
    banks = [FeatureBank.encode(tuner, s, measure=True) for s in sets]
    assert evaluate(tuner, *banks)["hm"] == found["hm"]


def test_ablation_branches(model: FVGModel) -> None:
    sets = Pictures(CLASSES, 12, 1), Pictures(NEW_CLASSES, 10, 2)
    tuner_rows = evaluate(model, *sets, branches=("tuner", "tuner"))
    expected = evaluate(model.tuner, *sets)
    assert (tuner_rows["base"], tuner_rows["new"]) == (expected["base"], expected["new"])
    with pytest.raises(FVGError, match="branch 'bse'"):
        evaluate(model, *sets, branches=("bse", "new"))
    with pytest.raises(FVGError, match="share the classes"):
        evaluate(model, sets[0], sets[0])
    with pytest.raises(FVGError, match="no class names"):
        evaluate(model, sets[0], [1, 2, 3])


class SomeMasks(Pictures):
    """Only the first five pictures have a mask."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        if index >= 5:
            del item["foreground_mask"]
        return item


def test_figures_do_not_depend_on_batches_when_some_masks_are_missing(model: FVGModel) -> None:
    sets = SomeMasks(CLASSES, 12, 1), SomeMasks(NEW_CLASSES, 10, 2)
    one, other = (evaluate(model, *sets, batch_size=size) for size in (5, 12))
    for metric, value in one.items():
        assert value == pytest.approx(other[metric], abs=1e-4), metric
    assert one["attention_in_mask"] > 0 and one["d_fg"] > 0


def test_labels_out_of_range_are_refused(model: FVGModel) -> None:
    sets = Pictures(CLASSES, 12, 1), Pictures(NEW_CLASSES, 10, 2)
    sets[1].labels = [6 + label for label in sets[1].labels]
    with pytest.raises(FVGError, match="out of range for 5 classes"):
        evaluate(model, *sets)


def test_features_come_without_masks_and_attention(model: FVGModel) -> None:
    batch = default_collate([FeatureBank.encode(model, Pictures(CLASSES))[i] for i in range(3)])
    with pytest.raises(FVGError, match="belong to pixels"):
        model(**batch, foreground_mask=torch.ones(3, 32, 32))
    with pytest.raises(FVGError, match="lack 'image'"):
        model(features={"foreground": torch.zeros(3, 16)})


def test_worst_class_and_group_and_joint_calibration_by_hand(model: FVGModel) -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    sets = Pictures(CLASSES, 12, 1), Pictures(NEW_CLASSES, 10, 2)
    groups = [[i % 2 for i in range(len(data))] for data in sets]
    found = evaluate(model, *sets, groups=(groups[0], groups[1]))
    own: dict[Any, list[bool]] = {}
    joint: dict[Any, list[bool]] = {}
    cells: dict[Any, list[bool]] = {}
    every, truth = [], []
    model.eval()
    for data, part, offset in zip(sets, groups, (0, len(CLASSES)), strict=True):
        for i, item in enumerate(data):
            label = item["labels"]
            with torch.no_grad(), model.use_classes(data.classes):
                hit = int(model(item["pixel_values"][None]).logits.argmax()) == label
            own.setdefault((offset, label), []).append(hit)
            cells.setdefault((offset, label, part[i]), []).append(hit)
            with torch.no_grad(), model.use_classes([*CLASSES, *NEW_CLASSES]):
                logits = model(item["pixel_values"][None]).logits
            joint.setdefault((offset, label), []).append(int(logits.argmax()) == label + offset)
            every.append(logits[0])
            truth.append(label + offset)

    def lowest(hits: dict[Any, list[bool]]) -> float:
        return 100 * min(sum(h) / len(h) for h in hits.values())

    assert found["worst_class"] == pytest.approx(lowest(own)) and found["worst_group"] == pytest.approx(lowest(cells))
    assert found["joint_worst_class"] == pytest.approx(lowest(joint))
    number = len(CLASSES) + len(NEW_CLASSES)
    error = multiclass_calibration_error(
        torch.stack(every).softmax(-1), torch.tensor(truth), num_classes=number, n_bins=15, norm="l1"
    )
    assert found["joint_ece"] == pytest.approx(100 * float(error), abs=1e-3)
    with pytest.raises(FVGError, match="12 images came with 3 groups"):
        evaluate(model, *sets, groups=([0] * 3, groups[1]))
    assert "worst_group" not in evaluate(model, *sets)


def test_score_asks_one_branch_whatever_was_tuned_on(model: FVGModel) -> None:
    data = Pictures(CLASSES, 12, 1)
    base, new, tuner = (score(model, data, branch=branch) for branch in ("base", "new", "tuner"))
    both = evaluate(model, data, Pictures(NEW_CLASSES, 10, 2))
    assert base["accuracy"] == both["base"] and len({base["entropy"], new["entropy"], tuner["entropy"]}) == 3
    assert tuner == score(model.tuner, data)
    with pytest.raises(FVGError, match="branch 'nwe'"):
        score(model, data, branch="nwe")


def test_mmrl_alone_scores_another_data_set_with_its_new_features(small_clip: CLIPModel, tokenizer: Any) -> None:
    from fvg_adapter.tuners import MMRL

    tuner = MMRL(small_clip, tokenizer, CLASSES, rep_layers=(1, 2), rep_dim=8)
    data = Pictures(CLASSES, 6, 1)
    base, new = (score(tuner, data, branch=branch)["entropy"] for branch in ("base", "new"))
    assert base != new
    with torch.no_grad():
        rows = [tuner.logits(item["pixel_values"][None], branch="new").softmax(-1) for item in data]
    expected = -torch.cat(rows).mul(torch.cat(rows).log()).sum(-1).mean()
    assert new == pytest.approx(float(expected), abs=1e-4)
