"""The audit: figures against naive ones, a planted shortcut found, and what is left as it was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPModel
from typer.testing import CliRunner

from conftest import small_config
from examples.pocket import planted
from examples.pocket.suite import pocket_clip
from fvg_adapter import FVGConfig, wrap
from fvg_adapter.audit import Audit, audit, boxes, other_classes
from fvg_adapter.cli import app
from fvg_adapter.config import CLIP_MEAN, CLIP_STD
from fvg_adapter.data import MaskedImageFolder, PairedTransform
from fvg_adapter.errors import FVGError
from fvg_adapter.reports import suspicious, varied, write_report
from fvg_adapter.tuners import MMRL, External, PromptSRC, ZeroShot
from fvg_adapter.visualize import overlay

NAMES = ["cat", "dog", "car"]


class Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    """Noise with a mask in a corner; class k of `planted` has background k everywhere."""

    def __init__(self, count: int = 12, planted: tuple[int, ...] = (), masks: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        self.classes, self.labels = NAMES, [i % 3 for i in range(count)]
        self.pixels = torch.randn(count, 3, 32, 32, generator=generator)
        self.masks = torch.zeros(count, 1, 32, 32)
        self.masks[:, :, 4:20, 6:22] = 1
        for i, label in enumerate(self.labels):
            if label in planted:
                self.pixels[i] = torch.where(self.masks[i] > 0, self.pixels[i], torch.tensor(float(label + 1)))
        self.with_masks = masks

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = {"pixel_values": self.pixels[i], "labels": self.labels[i]}
        return {**item, "foreground_mask": self.masks[i]} if self.with_masks else item


class Some(torch.utils.data.Dataset[dict[str, Any]]):
    """Some items of a data set."""

    def __init__(self, dataset: Any, chosen: Any) -> None:
        self.dataset, self.chosen, self.classes = dataset, list(chosen), dataset.classes
        self.labels = [dataset.labels[i] for i in self.chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = self.dataset[self.chosen[index]]
        return item


@pytest.fixture
def tuner(small_clip: CLIPModel, tokenizer: Any) -> ZeroShot:
    return ZeroShot(small_clip, tokenizer, NAMES)


def test_figures_are_the_naive_ones(tuner: ZeroShot) -> None:
    data = Pictures()
    found = audit(tuner, data, batch_size=5)
    with torch.no_grad():
        whole = tuner(data.pixels).logits.softmax(-1)
        fg = tuner(data.pixels * data.masks).logits.softmax(-1)
        bg = tuner(data.pixels * (1 - data.masks)).logits.softmax(-1)
        chosen = other_classes(torch.tensor(data.labels), 2, 0)
        differs = torch.zeros(12, 3)
        for k in range(2):
            hole = (1 - data.masks) * (1 - data.masks[chosen[:, k]])
            own, theirs = (tuner(p * hole).logits.log_softmax(-1) for p in (data.pixels, data.pixels[chosen[:, k]]))
            differs += (own - theirs) / 2
    for i, row in enumerate(found.pictures):
        label = data.labels[i]
        assert row.index == i and row.label == NAMES[label] and row.answer == NAMES[int(whole[i].argmax())]
        assert row.answer_foreground == NAMES[int(fg[i].argmax())]
        assert row.answer_background == NAMES[int(bg[i].argmax())]
        given = (row.p_whole, row.p_foreground, row.p_background)
        assert given == pytest.approx([float(p[i, label]) for p in (whole, fg, bg)], abs=1e-5)
        assert row.d_fg == pytest.approx(float((whole[i] * (whole[i] / fg[i]).log()).sum()), abs=1e-4)
        assert row.entropy == pytest.approx(float(-(whole[i] * whole[i].log()).sum()), abs=1e-4)
        assert row.lean == pytest.approx(float(differs[i, int(whole[i].argmax())]), abs=1e-4)
        assert row.area == 0.25 and 0 <= row.attention_in_mask <= 1 and 0 <= row.relevance_in_mask <= 1
    for entry in found.classes:
        mine = torch.tensor(data.labels) == NAMES.index(entry.name)
        own = differs[mine, NAMES.index(entry.name)]
        assert entry.pictures == 4
        assert entry.lean == pytest.approx(float(own.mean()), abs=1e-4)
        assert entry.evidence == pytest.approx(float(own.mean() / (own.var() / 4).sqrt()), abs=1e-3)
        right = (bg.argmax(-1) == torch.tensor(data.labels))[mine].float().mean()
        assert entry.background == pytest.approx(100 * float(right))
    assert [c.evidence for c in found.classes] == sorted((c.evidence for c in found.classes), reverse=True)
    assert found.summary.pictures == 12 and found.left_out == 0
    assert found.summary.whole == pytest.approx(
        100 * float((whole.argmax(-1) == torch.tensor(data.labels)).float().mean())
    )
    assert [p.lean for p in found.leaning(3)] == sorted((p.lean for p in found.pictures), reverse=True)[:3]
    json.dumps(found.to_json())


class Biased(nn.Module):
    """A model that knows class 1 by its background and the others by nothing but a constant."""

    def image(self, pixels: Tensor) -> Tensor:
        level = pixels.flatten(2).median(-1).values.mean(1)  # what most of the picture is
        return torch.stack(
            [torch.ones_like(level), torch.where(level > 1.5, 3.0, 0.0), 0.5 * torch.ones_like(level)], 1
        )


def test_a_planted_shortcut_comes_first(tokenizer: Any) -> None:
    torch.manual_seed(0)
    clip, biased = CLIPModel(small_config()).eval(), Biased()

    def text(names: Any) -> Tensor:
        return torch.eye(3)[[NAMES.index(n) for n in names]]

    def seen(pixels: Tensor) -> Tensor:  # the CLIP runs, so that there is attention to see
        clip.vision_model(pixel_values=pixels)
        return biased.image(pixels)

    tuner = External(seen, text, classes=NAMES, clip=clip, tokenizer=tokenizer, logit_scale=5.0, feature_dim=3)
    found = audit(tuner, Pictures(30, planted=(1,)), relevance=False)
    assert found.classes[0].name == "dog" and found.classes[0].background == 100
    assert found.classes[0].lean > 1 > found.classes[1].lean
    assert {p.label for p in found.leaning(10)} == {"dog"}
    with pytest.raises(FVGError, match="1 classes have pictures"):
        other_classes(torch.zeros(3), 2, 0)
    chosen = other_classes(torch.arange(9) % 3, 4, 0)
    assert all(int(j) % 3 != i % 3 for i, row in enumerate(chosen) for j in row)
    assert math.isnan(found.summary.relevance_in_mask)


def test_fvg_models_and_class_lists(tuner: ZeroShot) -> None:
    model = wrap(tuner, config=FVGConfig())
    before = [m.training for m in model.modules()]
    found = audit(model, Pictures())
    assert found.branch == "base" and found.summary.relevance_in_mask == found.summary.relevance_in_mask
    assert [m.training for m in model.modules()] == before and model.classes == tuple(NAMES)
    data = Pictures()
    data.classes = ["cat", "fox", "owl"]
    assert audit(model, data).branch == "joint"
    assert model.classes == tuple(NAMES)


def test_gradients_reach_pixels_that_ask_for_them(tuner: ZeroShot, pixels: Tensor) -> None:
    model = wrap(tuner).eval()
    pixels.requires_grad_()
    model(pixels).logits[:, 0].sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0
    assert all(p.grad is None for p in tuner.parameters())


def test_pictures_without_masks_are_left_out_and_counted(tuner: ZeroShot) -> None:
    data = Pictures()
    data.masks[:5] = 0
    found = audit(tuner, data)
    assert found.left_out == 5 and [p.index for p in found.pictures] == list(range(5, 12))
    assert isinstance(found, Audit)
    with pytest.raises(FVGError, match="none of the 12 pictures has a usable mask"):
        audit(tuner, Pictures(masks=False))


def test_what_cannot_be_audited(tuner: ZeroShot) -> None:
    data = Pictures()
    data.classes = ["cat"]
    with pytest.raises(FVGError, match="at least 2 classes"):
        audit(tuner, data)
    data.classes, data.labels = NAMES, [7] * 12
    with pytest.raises(FVGError, match="label 7 is out of range"):
        audit(tuner, data)
    assert not any(m._forward_hooks for m in tuner.clip.modules())


# -- report and command ------------------------------------------------------------------------------------------------


def test_report_shows_pictures_and_escapes_names(tuner: ZeroShot, tmp_path: Any) -> None:
    data = Pictures()
    data.classes = ["cat", "<b>dog", "car"]
    found = audit(tuner, data)
    page = write_report(tmp_path / "a" / "report.html", found, tuner, data, title="x <y>", pictures=3).read_text(
        "utf-8"
    )
    assert page.count("data:image/webp;base64,") == 9 and page.count("<tr") == 5
    assert "<b>dog" not in page and "&lt;b&gt;dog" in page and "x &lt;y&gt;" in page
    assert page.count("class=lean") == sum(c.evidence > 3 for c in found.classes) and page.count("class=all") == 1
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["report.html"]


def test_overlay_changes_what_it_should(pixels: Tensor) -> None:
    attention = torch.zeros(4, 4)
    attention[0, 0] = 1
    plain_picture = overlay(pixels[0])
    with_map, with_mask = overlay(pixels[0], attention), overlay(pixels[0], mask=torch.eye(2))
    assert plain_picture.size == (32, 32) == with_map.size
    bright, dark = with_map.getpixel((1, 1)), with_map.getpixel((30, 30))
    assert sum(bright) > sum(dark)
    assert with_mask.getpixel((16, 8)) == (227, 0, 125) and with_mask.getpixel((4, 4)) == plain_picture.getpixel((4, 4))
    assert overlay(plain_picture).tobytes() == plain_picture.tobytes()
    with pytest.raises(FVGError, match=r"attention must be one map \(h, w\), but has shape \(2, 4, 4\)"):
        overlay(pixels[0], torch.zeros(2, 4, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures each of four classes of the pocket data, with masks."""
    root, source = tmp_path_factory.mktemp("pictures"), Path("examples/pocket/data")
    for name in ("avocado", "banana", "carrot", "grapes"):
        for i in range(5):
            for part in ("test_home", "mask/test_home"):
                (root / part / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(source / part / name / f"{i:02}.webp", root / part / name)
    return root


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = CliRunner().invoke
    command = ["audit", "examples/pocket/model", str(folder), "--plain", "--split", "test_home"]
    result = run(app, [*command, "--output", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    written = json.loads((tmp_path / "audit.json").read_text("utf-8"))
    assert told["summary"]["pictures"] == written["summary"]["pictures"] == 20
    assert told["summary"]["relevance_in_mask"] == pytest.approx(written["summary"]["relevance_in_mask"])
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Pictures that lean" in page and page.count("<figure>") == 12  # at most 3 of a class
    shown = run(app, [*command, "--no-relevance", "--top", "2"])
    assert shown.exit_code == 0 and "right on whole pictures" in " ".join(shown.stdout.split())
    table = shown.stdout.splitlines()[1:5]
    assert [line.split()[0] for line in table[2:]] == [c["name"] for c in told["classes"][:2]]
    assert all(len(line) <= 80 for line in table)  # one line a class, whole words
    first = max(told["pictures"], key=lambda p: p["lean"])
    assert f"test_home/{first['label']}/{Path(first['name']).name}: {first['label']}" in shown.stdout
    missing = run(app, ["audit", "examples/pocket/model", str(folder)])
    assert missing.exit_code == 2


def test_the_command_without_relevance_reports_attention_alone(folder: Path, tmp_path: Path) -> None:
    command = ["audit", "examples/pocket/model", str(folder), "--plain", "--split", "test_home", "--no-relevance"]
    assert CliRunner().invoke(app, [*command, "--output", str(tmp_path)]).exit_code == 0
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("data:image/webp") == 2 * page.count("<figure>") > 0
    assert "NaN" not in (tmp_path / "audit.json").read_text("utf-8")


@pytest.mark.parametrize("kind", [PromptSRC, MMRL])
@pytest.mark.parametrize("names", [["cat", "fox", "owl"], ["bear", "fox", "owl"]], ids=["joint", "new"])
def test_tuners_of_the_image_tower_and_classes_not_tuned_on(
    kind: Any, names: list[str], small_clip: CLIPModel, tokenizer: Any
) -> None:
    """Their forward runs plain CLIP last, which is not what is looked at."""
    options = {"rep_layers": [2], "rep_dim": 8} if kind is MMRL else {"prompt_depth_text": 2, "prompt_depth_vision": 2}
    tuner = kind(small_clip, tokenizer, NAMES, **options)
    with torch.no_grad():
        for parameter in tuner.trainable_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    data = Pictures()
    data.classes = names
    found, alone = audit(wrap(tuner).eval(), data), audit(tuner, data)
    assert found.branch == ("joint" if "cat" in names else "new")
    seen = [[p.attention_in_mask for p in each.pictures] for each in (found, alone)]
    assert seen[0] == pytest.approx(seen[1], abs=1e-6)
    assert all(0 <= p.relevance_in_mask <= 1 for p in found.pictures)


def test_pictures_of_a_report_vary() -> None:
    rows = [SimpleNamespace(label=name) for name in "aaaabbc"]
    assert [row.label for row in varied(rows, 5)] == list("aaabb")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_pocket_suites_planted_classes_come_first() -> None:
    train, test, plan = planted.compose_planted("fruit_vegetables", 1)
    tuner = planted.tuned("CoOp, a context a class", train, 1)
    figures = planted.ranked(tuner, test, plan)
    assert figures["AUROC"] > 0.9 and figures["evidence, planted"] > 2 * figures["evidence, others"]


def test_an_outline_is_no_background() -> None:
    """With random backgrounds there is nothing to find; with the training ones most classes lean."""
    found = {}
    for split in ("test", "test_home"):
        transform = PairedTransform(64, CLIP_MEAN, CLIP_STD, train=False)
        pictures = MaskedImageFolder("examples/pocket/data", split, transform=transform)
        clip, tokenizer = pocket_clip()
        few = Some(pictures, range(0, len(pictures), 3))  # 7 or 6 of each of the 24 classes
        found[split] = suspicious(audit(ZeroShot(clip, tokenizer, few.classes), few, relevance=False).classes)
    assert len(found["test"]) <= 1 and len(found["test_home"]) > 12


def test_boxes() -> None:
    masks = torch.zeros(3, 1, 6, 7)
    masks[0, 0, 1, 2] = masks[0, 0, 4, 5] = 1
    masks[2] = 1
    expected = torch.zeros(3, 1, 6, 7)
    expected[0, 0, 1:5, 2:6] = 1
    expected[2] = 1
    assert torch.equal(boxes(masks), expected)
