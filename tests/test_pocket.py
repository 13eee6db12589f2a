"""The pocket suite: frozen pictures, a model that loads like any CLIP, and tables whose arithmetic is right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from examples.pocket import results, suite, tables, tasks, trust  # noqa: E402
from fvg_adapter import FeatureBank, FVGConfig  # noqa: E402
from fvg_adapter.data import MaskedImageFolder, PairedTransform  # noqa: E402
from fvg_adapter.reproduce import statistics  # noqa: E402
from fvg_adapter.tuners import TUNERS, ZeroShot  # noqa: E402

POCKET = ROOT / "examples" / "pocket"


def test_a_task_has_the_same_pixels_on_every_machine() -> None:
    expected = json.loads((POCKET / "tasks.json").read_text())
    assert tasks.digest("fruit_vegetables") == expected["fruit_vegetables"]["sha256"]


def test_the_committed_task_and_model_fit_together() -> None:
    clip = CLIPModel.from_pretrained(POCKET / "model")
    assert sum(p.numel() for p in clip.parameters()) < 2.5e6 and clip.dtype == torch.float32
    processor = CLIPImageProcessor.from_pretrained(POCKET / "model")
    transform = PairedTransform(64, processor.image_mean, processor.image_std, train=False)
    pictures = MaskedImageFolder(POCKET / "data", "test", masks="require", transform=transform)
    assert pictures.classes == tasks.class_names("fruit_vegetables")
    tuner = ZeroShot(clip, CLIPTokenizer.from_pretrained(POCKET / "model"), pictures.classes)
    picked = range(0, len(pictures), 6)
    images = torch.stack([pictures[i]["pixel_values"] for i in picked])
    with torch.no_grad():
        right = tuner(images).logits.argmax(-1) == torch.tensor([pictures.labels[i] for i in picked])
    assert right.float().mean() > 0.5  # 24 classes: chance is 4 %


def test_spoiled_masks_are_a_quarter_of_the_training_masks_only() -> None:
    spoiled = json.loads((POCKET / "data" / "spoiled.json").read_text())
    train = len(MaskedImageFolder(POCKET / "data", "train").samples)
    names = spoiled if isinstance(spoiled, list) else list(spoiled)
    assert 0.15 < len(names) / train < 0.35
    assert all("test" not in str(name).split("/")[0] for name in names)


def test_sign_flip_by_hand() -> None:
    assert statistics.sign_flip([1.0, 1.0, 1.0]) == pytest.approx(2 / 8)
    assert statistics.sign_flip([1.0, -1.0]) == 1.0
    assert statistics.sign_flip([3.0, 1.0]) == pytest.approx(2 / 4)


def test_averages_and_paired_differences_by_hand() -> None:
    one = {"a": [1.0, 3.0], "b": [5.0, 7.0]}
    other = {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert statistics.average(one) == (4.0, pytest.approx(2**0.5))  # per seed: 3 and 5
    mean, spread, p, above = statistics.paired(one, other)
    assert (mean, p, above) == (2.5, 0.5, 2)
    assert spread == pytest.approx(4.5**0.5)


def test_the_results_page_is_what_the_measured_files_say() -> None:
    page = results.page(results.MEASURED, [1, 2, 3])
    assert page == results.PAGE.read_text("utf-8"), "run python -m examples.pocket.results"


def test_every_tuner_was_measured_with_every_control_on_all_its_tasks_and_seeds() -> None:
    for kind, setting in suite.SETTINGS.items():
        for split in suite.SPLITS:
            rows = tables.gather(results.MEASURED / kind, setting.tasks, split)
            for row in ("clip", *results.row_names(kind, ablation=setting.ablation)):
                assert set(rows[row]["joint_hm"]) == set(setting.tasks)
                assert all(len(values) == 3 for values in rows[row]["hm"].values())
    assert len(suite.SETTINGS["coop"].tasks) == len(suite.SETTINGS["kgcoop"].tasks) == 9


def test_measured_files_name_no_folder_of_a_machine() -> None:
    files = [f for kind in suite.SETTINGS for f in (results.MEASURED / kind).glob("*.json")]
    assert files
    for file in files:
        assert json.loads(file.read_text("utf-8"))["settings"]["data"] == file.stem


def test_the_settings_fit_the_pocket_model() -> None:
    clip, tokenizer = suite.pocket_clip()
    for kind, setting in suite.SETTINGS.items():
        tuner = TUNERS[kind](clip, tokenizer, ["fox", "pear"], **setting.options)
        assert tuner(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 2)
        tuner.detach()
        assert suite.stages(kind)["tune"].crop_scale == suite.CROP


def test_true_masks_change_no_picture() -> None:
    whole = tasks.compose_split("fruit_vegetables", "train", true_masks=True)
    spoiled = tasks.compose_split("fruit_vegetables", "train")
    assert (whole.pictures == spoiled.pictures).all() and not whole.spoiled.any()
    same = (whole.masks == spoiled.masks).all((1, 2))
    assert (same == ~spoiled.spoiled).mean() > 0.99  # a random box is hardly ever the true mask


def test_trust_in_right_and_wrong_masks_by_hand() -> None:
    class Model:
        config = FVGConfig()

        class tuner:
            text_features = staticmethod(lambda: torch.eye(2))
            scores = staticmethod(lambda image, text: image @ text.T)

        def eval(self) -> None: ...

        def __call__(self, features: dict[str, torch.Tensor], labels: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(foreground_trust=features["mask_area"])

    sure, unsure = torch.tensor([4.0, 0.0]), torch.tensor([1.0, 0.0])
    features = {  # of right, right, wrong, wrong masks
        "image": torch.stack([unsure, sure, sure, unsure]).unsqueeze(1),
        "foreground": torch.stack([sure, unsure, unsure, unsure]).unsqueeze(
            1
        ),  # better only in the first: r* = 1 0 0 0
        "mask_area": torch.tensor([0.9, 0.4, 0.6, 0.1]).unsqueeze(1),  # stands for r: 3 of 4 pairs in order
    }
    bank = FeatureBank(features, [0, 0, 0, 0], ["a", "b"])
    figures = trust.gate_figures(Model(), bank, torch.tensor([False, False, True, True]))
    assert figures["AUROC of r"] == pytest.approx(0.75) and figures["AUROC of r*"] == pytest.approx(0.75)
    assert figures["r, right masks"] == pytest.approx(0.65) and figures["r, wrong masks"] == pytest.approx(0.35)


def test_overlap_of_masks_by_hand() -> None:
    def data(masks: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        return [{"foreground_mask": mask} for mask in masks]

    truth = torch.zeros(2, 1, 2, 2)
    truth[:, :, 0] = 1
    other = truth.clone()
    other[1, :, 1] = 1  # everything: half of it is right
    assert trust.overlap(data(other), data(truth)).tolist() == [1.0, 0.5]
