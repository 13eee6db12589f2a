"""The pocket suite: frozen pictures, a model that loads like any CLIP, and tables whose arithmetic is right."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
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


def test_the_command_and_the_suites_own_loop_find_the_same() -> None:
    """`fvg-adapter reproduce` wrote docs/pocket_tables.md, `examples.pocket.results` the measured files: one method."""
    page = (ROOT / "docs" / "pocket_tables.md").read_text("utf-8")
    seen = 0
    for section in page.split("\n## ")[1:]:
        kind, split = section.split(":")[0].lower(), (re.findall(r"\(`(test_\w+)`\)\n", section) or ["test"])[0]
        ours = f"{kind}+fvg"
        names = ("clip", kind, ours, f"{ours} [x_fg=x]", f"{ours} [lambda_d=0]", f"{ours} [shuffled masks]")
        for line in re.findall(r"^\| (\w+) \|(( [\d.]+ / [\d.]+ / [\d.]+ \|){6})$", section, re.MULTILINE):
            for name, cell in zip(names, line[1].split("|"), strict=False):
                rows = tables.gather(results.MEASURED / kind, [line[0]], split)[name]
                measured = [fmean(rows[metric][line[0]]) for metric in ("base", "new", "hm")]
                assert [float(value) for value in cell.split(" / ")] == pytest.approx(measured, abs=0.11), (name, line)
                seen += 1
    assert seen == 2 * 3 * 9 * 6


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


def test_one_command_makes_the_page_again_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuners' tables of the page from nothing: one task of four classes, one epoch, one seed, two tuners."""
    names = ["banana", "purple turnip", "pear", "lemon"]
    small = tmp_path / "pictures"
    for split in ("train", *suite.SPLITS):
        for name in names:
            for part in ("", "mask/"):
                target = small / part / split / name.replace(" ", "_")
                target.mkdir(parents=True)
                for file in sorted((POCKET / "data" / part / split / target.name).glob("*.webp"))[:3]:
                    shutil.copy(file, target / file.name)
    (small / "classes.txt").write_text("\n".join(names) + "\n")
    asked: list[str] = []

    def pictures(task: str) -> Path:
        asked.append(task)
        return small

    monkeypatch.setattr(suite, "data_of", pictures)
    one = {"tune": {"epochs": 1}, "heads": {"epochs": 1}, "tasks": ("fruit_vegetables",)}
    settings = {kind: replace(suite.SETTINGS[kind], **one) for kind in ("coop", "kgcoop")}
    for module in (suite, results):
        monkeypatch.setattr(module, "SETTINGS", settings)
        monkeypatch.setattr(module, "THREE", ("fruit_vegetables",))
    monkeypatch.setattr(suite, "SUITE", replace(suite.SUITE, settings=settings))
    monkeypatch.setattr(suite, "UNITS", tmp_path / "units")
    monkeypatch.setattr(results, "FURTHER", {})
    arguments = ["results", "--tuners", "coop", "kgcoop", "--seeds", "1", "--processes", "1"]
    out, page = tmp_path / "measured", tmp_path / "results.md"
    monkeypatch.setattr(sys, "argv", [*arguments, "--output", str(out), "--page", str(page)])
    results.main()
    record = json.loads((out / "coop" / "fruit_vegetables.json").read_text())
    assert set(record["also"]) == {"test_swapped", "test_home"} and record["settings"]["data"] == "fruit_vegetables"
    line = next(row for row in page.read_text("utf-8").splitlines() if row.startswith("| **CoOp + FVG-PT** |"))
    assert line.startswith(f"| **CoOp + FVG-PT** | {record['coop+fvg']['base'][0]:.1f} ± 0.0 |")
    assert asked and (tmp_path / "units/kgcoop/results.csv").exists()
    asked.clear()
    results.main()  # what is there is not run again
    assert not asked


def test_sections_that_are_missing_are_measured_by_their_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def noted(command: list[str], **options: object) -> None:
        commands.append(command)
        if "planted" not in command[2]:
            (tmp_path / missing[len(commands) - 1]).write_text("{}")

    monkeypatch.setattr(results.subprocess, "run", noted)
    (tmp_path / "trust.json").write_text("{}")
    missing = [name for name in results.FURTHER if name != "trust.json"]
    assert {f.name for f in results.MEASURED.glob("*.json")} == set(results.FURTHER)  # every section of the page
    with pytest.raises(SystemExit, match=r"examples\.pocket\.planted .*has not written planted\.json"):
        results.run_further(tmp_path)
    assert commands[0][1:] == ["-m", "examples.pocket.causes", "--output", str(tmp_path), "--tuners", "coop"]
    assert not any("trust" in command[2] for command in commands)
    modules = {f"{arguments[0]}.py" for arguments in results.FURTHER.values()}
    assert modules <= {path.name for path in POCKET.glob("*.py")}
