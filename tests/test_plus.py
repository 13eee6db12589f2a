"""The plus preset: its config, the attended view against naive loops, banks, files, and the page."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from conftest import CLASSES, NEW_CLASSES
from fvg_adapter import FeatureBank, FVGConfig, FVGModel, evaluate, load, record_attention, wrap
from fvg_adapter import losses as L
from fvg_adapter.attended import blend, zoom_on_mask
from fvg_adapter.config import PRESETS
from fvg_adapter.errors import FVGError
from fvg_adapter.foreground import attention_mask_from_map
from fvg_adapter.model import answer_score
from fvg_adapter.tuners import TUNERS

PLUS = {"preset": "plus", "attention_threshold": 1.0}
BOTH = [*CLASSES, *NEW_CLASSES]


class Pictures:
    """Random pictures with masks."""

    def __init__(self, pixels: Tensor, classes: list[str]) -> None:
        self.pixels, self.classes = pixels, classes
        self.labels = [i % len(classes) for i in range(len(pixels))]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        mask = torch.zeros(1, *self.pixels.shape[-2:])
        mask[:, 4:20, 8:30] = 1
        return {"pixel_values": self.pixels[index], "labels": self.labels[index], "foreground_mask": mask}


def test_a_preset_fills_what_is_not_given() -> None:
    plus = FVGConfig(preset="plus")
    for name, value in PRESETS["plus"].items():
        assert getattr(plus, name) == value != getattr(FVGConfig(), name)
    own = FVGConfig(preset="plus", lambda_distill=10.0, attention_layers=(-1,))
    assert (own.lambda_distill, own.attention_layers, own.attended_view) == (10.0, (-1,), 0.4)
    assert FVGConfig(preset="paper") == FVGConfig()
    assert FVGConfig(64, 32, 1e-3, 2.0, 1.0, 10.0, preset="plus").lambda_distill == 10.0  # given by position
    assert FVGConfig.from_dict({"preset": "plus"}) == plus


def test_a_saved_config_loads_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FVGConfig(preset="plus", group_temperature=1.5)
    saved = config.to_dict()
    monkeypatch.setitem(PRESETS, "plus", {"lambda_distill": 7.0, "attended_view": 0.9})  # type: ignore[index]
    assert FVGConfig.from_dict(saved) == config
    old = {k: v for k, v in FVGConfig().to_dict().items() if k not in _NEW}
    assert FVGConfig.from_dict(old) == FVGConfig()


_NEW = ("group_temperature", "attended_view", "attended_margin", "preset")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("preset", "pluss", "Did you mean 'plus'"),
        ("attended_view", 1.0, r"\[0, 1\)"),
        ("attended_view", -0.1, r"\[0, 1\)"),
        ("attended_view", "half", "finite number"),
        ("attended_margin", 0.5, "at least 1"),
        ("group_temperature", 0.0, "above 0"),
    ],
)
def test_bad_values_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(FVGError, match=message):
        FVGConfig(**{field: value})


def test_group_temperature_against_a_loop() -> None:
    torch.manual_seed(0)
    prior, base, new = torch.randn(3, 4, 5).unbind()
    is_base = [True, False, True, False, False]
    found = L.joint_log_probs(prior, base, new, torch.tensor(is_base), group_temperature=2.5)
    for i in range(4):
        weights = [math.exp(float(z) / 2.5) for z in prior[i]]
        for c in range(5):
            mates = [k for k in range(5) if is_base[k] == is_base[c]]
            group = sum(weights[k] for k in mates) / sum(weights)
            z = base[i] if is_base[c] else new[i]
            inside = math.exp(float(z[c])) / sum(math.exp(float(z[k])) for k in mates)
            assert float(found[i, c]) == pytest.approx(math.log(group * inside), abs=1e-5)
    close(L.joint_log_probs(prior, base, new, torch.tensor(is_base), group_temperature=1.0),
          L.joint_log_probs(prior, base, new, torch.tensor(is_base)))  # fmt: skip


def close(one: Tensor, other: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


@pytest.mark.parametrize(
    ("top", "left", "height", "width"), [(10, 12, 8, 12), (0, 0, 2, 2), (20, 3, 12, 12), (0, 0, 32, 32)]
)
def test_zoom_against_a_window_cut_by_hand(top: int, left: int, height: int, width: int) -> None:
    """A linear ramp stays linear under bicubic sampling, so that every pixel says where it was taken from."""
    size, margin = 32, 1.2
    ramp = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")).unsqueeze(0)
    mask = torch.zeros(1, 1, 32, 32)
    mask[:, :, top : top + height, left : left + width] = 1
    side = min(max(max(height, width) * margin, 3 / 8 * size), size)
    found = zoom_on_mask(ramp, mask, margin)[0]
    for axis, middle in ((0, top + height / 2), (1, left + width / 2)):
        middle = min(max(middle, side / 2), size - side / 2)
        for i in range(3, size - 3):
            wanted = middle - side / 2 + (i + 0.5) * side / size - 0.5
            line = found[axis, i, 16] if axis == 0 else found[axis, 16, i]
            if 2 < wanted < size - 3:
                assert float(line) == pytest.approx(wanted, abs=0.1)  # bicubic at a = -0.75 is off a line by up to 0.07


def test_an_empty_mask_leaves_the_picture() -> None:
    pixels = torch.randn(2, 3, 16, 16)
    close(zoom_on_mask(pixels, torch.zeros(2, 1, 16, 16)), pixels, 1e-4)


def test_blend_keeps_the_norm() -> None:
    whole, other = torch.randn(3, 8) * 4, torch.randn(3, 8)
    found = blend(whole, other, 0.3)
    for f, a, b in zip(found, whole, other, strict=True):
        moved = [0.7 * float(x) + 0.3 * float(y) for x, y in zip(a, b, strict=True)]
        norm = math.sqrt(sum(v * v for v in moved))
        for value, v in zip(f, moved, strict=True):
            assert float(value) == pytest.approx(float(a.norm()) * v / norm, abs=1e-5)
    close(blend(whole, other, 0.0), whole)


@pytest.fixture(params=["coop", "mmrl"])
def model(request: pytest.FixtureRequest, small_clip: CLIPModel, tokenizer: Any) -> FVGModel:
    """Plus behind a tuner that leaves the images alone, and behind one that does not."""
    torch.manual_seed(0)
    options = {"rep_layers": (1,), "rep_dim": 16} if request.param == "mmrl" else {}
    tuner = TUNERS[request.param](small_clip, tokenizer, CLASSES, **options)
    return wrap(tuner, config=FVGConfig(init_std=0.1, **PLUS), foreground="given").eval()  # type: ignore[arg-type]


@torch.no_grad()
def by_hand(model: FVGModel, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Base, new and prior features with the attended view, one picture at a time."""
    config, tuner, rows = model.config, model.tuner, []
    for picture in pixels.unsqueeze(1):
        attention = model.views(picture, measure=True).attention
        assert attention is not None
        mask = attention_mask_from_map(attention, (32, 32), threshold=config.attention_threshold)
        view = zoom_on_mask(picture * mask, mask, config.attended_margin)
        if not 0.02 <= float(mask.mean()) <= 0.98:
            view = picture
        pairs = zip(
            (*tuner.branch_image_features(picture), tuner.prior_image_features(picture)),
            (*tuner.branch_image_features(view), tuner.prior_image_features(view)),
            strict=True,
        )
        w = config.attended_view
        rows.append([f.norm() * F.normalize((1 - w) * f + w * a, dim=-1) for f, a in pairs])
    base, new, prior = (torch.cat(column) for column in zip(*rows, strict=True))
    return base, new, prior


def test_inference_against_one_picture_at_a_time(model: FVGModel, pixels: Tensor) -> None:
    base, new, prior = by_hand(model, pixels)
    plain = {"image": base, "image_new": new, "prior": prior}
    with model.use_classes(BOTH):
        found = {b: model(pixels, branch=b).logits for b in ("base", "new", "joint")}
        model.config.attended_view = 0.0
        for branch, logits in found.items():
            close(logits, model(features=plain, branch=branch).logits, 1e-3)
            assert not torch.allclose(logits, model(pixels, branch=branch).logits, atol=1e-3)


@pytest.mark.parametrize("flow", [{}, {"rollout": True}, {"relevance": True}])
def test_what_is_recorded_is_the_whole_picture_and_not_the_cut_out(
    model: FVGModel, pixels: Tensor, flow: dict[str, bool]
) -> None:
    with record_attention(model.tuner, **flow) as alone, torch.set_grad_enabled("relevance" in flow):
        model.tuner(pixels.clone().requires_grad_("relevance" in flow))
    with record_attention(model, **flow) as recorded, torch.set_grad_enabled("relevance" in flow):
        output = model(pixels.clone().requires_grad_("relevance" in flow))
    close(recorded.attention(), alone.attention(), 1e-6)
    if "rollout" in flow:
        close(recorded.rollout(), alone.rollout(), 1e-6)
    if "relevance" in flow:  # in the frame of the picture: what the whole picture's pass gave to the blended features
        found = recorded.relevance(answer_score(model, output))
        model.config.attended_view = 1e-9
        with record_attention(model, relevance=True) as recorded:
            output = model(pixels.clone().requires_grad_())
        whole = recorded.relevance(answer_score(model, output))
        assert float(F.cosine_similarity(found.flatten(1), whole.flatten(1)).mean()) > 0.5


def test_training_never_sees_the_attended_view(model: FVGModel, pixels: Tensor) -> None:
    labels, masks = torch.arange(len(pixels)), torch.ones(len(pixels), 32, 32)
    masks[:, :8] = 0
    model.train()
    with_view = model(pixels, labels, masks).loss.detach()
    model.config.attended_view = 0.0
    assert float(model(pixels, labels, masks).loss.detach()) == float(with_view)
    assert "attended" not in FeatureBank.encode(model, Pictures(pixels, CLASSES), views=2).features


def test_a_bank_gives_what_pixels_give(model: FVGModel, pixels: Tensor, tmp_path: Path) -> None:
    bank = FeatureBank.encode(model, Pictures(pixels, CLASSES), measure=True, output=tmp_path / "bank")
    ((features, _),) = bank.batches()
    with model.use_classes(BOTH):
        for branch in ("base", "new", "joint"):
            close(model(features=features, branch=branch).logits, model(pixels, branch=branch).logits, 1e-3)
    model.config.attention_layers = (-1,)
    with pytest.raises(FVGError, match="attention_layers"):
        bank.check(model)
    model.config.attended_view = 0.0
    bank.check(model)
    sets = (Pictures(pixels, CLASSES), Pictures(pixels, NEW_CLASSES))
    without = FeatureBank.encode(model, sets[0], measure=True)
    model.config.attended_view = 0.4
    with pytest.raises(FVGError, match="lack 'attended'"):
        model(features=without.batches()[0][0])


def test_evaluate_scores_what_forward_says(model: FVGModel, pixels: Tensor) -> None:
    sets = (Pictures(pixels, CLASSES), Pictures(pixels, NEW_CLASSES))
    figures = evaluate(model, *sets)
    with model.use_classes(BOTH):
        said = model(pixels, branch="joint").logits.argmax(-1)
    for name, data, offset in (("joint_base", sets[0], 0), ("joint_new", sets[1], len(CLASSES))):
        right = [int(s) == label + offset for s, label in zip(said, data.labels, strict=True)]
        assert figures[name] == pytest.approx(100 * sum(right) / len(right))
    prior = evaluate(model, *sets, branches=("prior", "prior"))
    _, _, features = by_hand(model, pixels)
    z = model.tuner.scores(features, model.tuner.prior_text_features())
    right = [int(s) == label for s, label in zip(z.argmax(-1), sets[0].labels, strict=True)]
    assert prior["base"] == pytest.approx(100 * sum(right) / len(right))


def test_saved_and_loaded(
    model: FVGModel, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor, tmp_path: Path
) -> None:
    folder = model.save_pretrained(tmp_path / "plus")
    with model.use_classes(BOTH):
        wanted = model(pixels, branch="joint").logits
    tuner = model.release()
    tuner.detach()
    again = load(folder, clip=small_clip, tokenizer=tokenizer, classes=BOTH)
    assert again.config == model.config and again.config.preset == "plus"
    close(again(pixels, branch="joint").logits, wanted, 1e-4)


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def test_the_page_is_what_was_measured() -> None:
    from examples.pocket import plus_page

    assert (ROOT / "docs" / "plus.md").read_text("utf-8") == plus_page.page()


def test_the_paper_s_rows_come_from_the_same_prompts() -> None:
    """What results.py recorded of CLIP and of the tuner is what was measured here, beside its FVG-PT rows."""
    from examples.pocket import plus

    files = sorted(plus.MEASURED.glob("coop/*.test.[123].json"))
    assert files
    for file in files:
        task, _, seed, _ = file.name.split(".")
        record, rows = plus.recorded("coop", task), json.loads(file.read_text("utf-8"))
        assert (record is None) == (plus.PAPER in rows)
        for row, name in ((plus.CLIP, "clip"), (plus.TUNER, "coop")):
            if record is not None:
                known = json.loads(record.read_text("utf-8"))[name]["joint_hm"][int(seed) - 1]
                assert rows[row]["joint_hm"] == pytest.approx(known, abs=0.6)  # a picture or two, by rounding


def test_a_miniature_of_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from examples.pocket import plus, plus_page

    short = {k: replace(v, epochs=1) for k, v in plus.stages("coop").items()}
    monkeypatch.setattr(plus, "stages", lambda kind: short)
    monkeypatch.setattr(plus, "SHOTS", 1)
    monkeypatch.setattr(plus, "recorded", lambda kind, task: None)
    monkeypatch.setattr(plus, "folder_of", lambda task: ROOT / "examples" / "pocket" / "data")
    monkeypatch.setattr(plus_page, "recorded", lambda kind, task: None)
    for controls in (False, True):
        plus.run(["coop"], ["fruit_vegetables"], [1], "test", controls, tmp_path / "out", tmp_path / "banks")
    lines = plus_page.section(tmp_path / "out", "coop", "test", ["fruit_vegetables"], "miniature")
    table = "\n".join(lines)
    for row in (plus.CLIP, plus.TUNER, plus.PAPER, plus.PLUS_ROW, *plus.NO_HEADS, *plus.READINGS, "plus, λ_d = 0"):
        assert row in table
    rows = plus_page.gather(tmp_path / "out", "coop", "test", ["fruit_vegetables"])
    assert 80 < rows[plus.CLIP]["base"]["fruit_vegetables"][0] < 83  # results.md: 81.7
    assert rows[plus.PLUS_ROW] != rows["plus, no attended view"]


def test_more_tasks_are_the_same_everywhere_and_use_what_no_task_uses() -> None:
    from examples.pocket import concepts, tasks

    used = {c.name for c in concepts.load() if c.task}
    for task, names in tasks.MORE.items():
        assert not used & set(names) and tasks.class_names(task) == list(names)
    known = json.loads(tasks.HASHES.read_text("utf-8"))
    assert tasks.digest("plants_drinks") == known["plants_drinks"]["sha256"]


def test_the_command_takes_a_preset(tmp_path: Path) -> None:
    from fvg_adapter.cli.training import fvg_config

    clip = str(ROOT / "examples" / "pocket" / "model")
    config = fvg_config(None, {"lambda_distill": 3.0, "lambda_gate": None}, clip, "plus")
    assert (config.preset, config.lambda_distill, config.attended_view) == ("plus", 3.0, 0.4)
    (tmp_path / "own.json").write_text('{"attended_view": 0.2, "preset": "plus"}')
    assert fvg_config(tmp_path / "own.json", {}, clip).attended_view == 0.2
    assert fvg_config(None, {}, clip).preset == "paper"
    with pytest.raises(FVGError, match="Did you mean 'plus'"):
        fvg_config(None, {}, clip, "pluss")
