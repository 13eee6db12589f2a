"""What a newcomer gets wrong at the command line: each mistake is told, with the way out, and nothing is half done."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import HERE, QUICK, assert_mistake, run
from test_cli import base as base  # the tiny CLIP as a folder
from test_cli import data as data
from test_cli import trained as trained

from fvg_adapter import FeatureBank, wrap
from fvg_adapter.cli.console import load_base
from fvg_adapter.config import FVGConfig
from fvg_adapter.data import MaskedImageFolder, PairedTransform
from fvg_adapter.errors import FVGError
from fvg_adapter.protocols import base_to_new


def test_a_tuner_that_is_made_of_functions_is_refused_before_anything_is_loaded(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*unused: Any) -> None:
        raise AssertionError("the base model was loaded")

    for module in ("training", "reproducing"):
        monkeypatch.setattr(f"fvg_adapter.cli.{module}.load_base", never)
    told = ("External(image_features, text_features", "not from a model, a tokenizer and class names", "'coop'", "wrap")
    result = run("train", data, "--model", base, "--tuner", "external", *QUICK)
    assert_mistake(result, *told)
    assert "Did you mean" not in result.stderr and "positional" not in result.stderr
    options = ("--data", tmp_path, "--model", base, "--output", tmp_path / "out", "--tuners", "coop,external", *HERE)
    assert_mistake(run("reproduce", "base-to-new", *options), *told)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FVGError, match=r"made as External\(image_features"):
        base_to_new(*load_base(str(base), "cpu"), data, tuner="external")


def test_options_that_a_tuner_does_not_have_are_told_before_anything_is_encoded(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*unused: Any, **unused_too: Any) -> None:
        raise AssertionError("pictures were encoded")

    monkeypatch.setattr(FeatureBank, "encode", never)
    result = run("train", data, "--model", base, "--tuner-options", '{"n_ctxx": 8}', *QUICK)
    assert_mistake(result, "--tuner-options do not fit CoOp: it takes no 'n_ctxx'", "Did you mean 'n_ctx'?")
    with pytest.raises(FVGError, match=r"has no option 'n_ctxx'. Did you mean 'n_ctx'\?"):
        base_to_new(*load_base(str(base), "cpu"), data, tuner_options={"n_ctxx": 8})


@pytest.mark.parametrize("command", ["eval", "predict", "show", "audit", "push"])
def test_a_base_model_in_an_adapters_place(command: str, base: Path, data: Path) -> None:
    picture = data / "test" / "cat" / "0.png"
    rest = {"eval": [data], "predict": [picture], "show": [picture], "audit": [data], "push": ["me/things"]}[command]
    result = run(command, base, *rest, *(() if command == "push" else HERE))
    assert_mistake(result, "base model (model_type 'clip')", "fvg-adapter train DATA --model", "--plain")


def test_a_folder_of_pictures_is_predicted_picture_by_picture(trained: Any, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "test", tmp_path / "photos")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    (tmp_path / "photos" / ".hidden.png").write_text("no picture")
    expected = sorted((tmp_path / "photos").rglob("[0-9].png"))
    single = data / "test" / "cat" / "1.png"
    result = run("predict", trained.adapter, tmp_path / "photos", single, "--json", *HERE)
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["image"] for row in rows] == [*map(str, expected), str(single)] and len(rows) == 9
    assert all(row["predictions"] for row in rows)
    (tmp_path / "empty").mkdir()
    assert_mistake(run("predict", trained.adapter, tmp_path / "empty", *HERE), "holds no pictures", ".jpg")
    drawn = run("show", trained.adapter, tmp_path / "photos", "--output", tmp_path / "drawing.png", *HERE)
    assert_mistake(drawn, "photos is a folder", "give picture files")
    single_mask = ("--mask", tmp_path / "photos", "--output", tmp_path / "drawing.png")
    assert_mistake(run("show", trained.adapter, single, *single_mask, *HERE), "photos is a folder")


# -- no masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default::fvg_adapter.errors.ForegroundWarning")
def test_training_without_masks_is_told_once_and_in_one_wording(base: Path, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "things"
    shutil.copytree(data, root, ignore=shutil.ignore_patterns("mask"))
    for views in ("2", "0"):
        result = run("train", root, "--model", base, *QUICK, "--seeds", "1", "--batch", "3", "--views", views)
        assert result.exit_code == 0, result.stderr
        assert result.stderr.count("warning: ") == 1, result.stderr
        for told in ("none of a batch's masks is usable", "r = 0", "--foreground attention"):
            assert told in result.stderr


def test_measuring_without_masks_is_no_mistake(base: Path, data: Path) -> None:
    clip, tokenizer = load_base(str(base), "cpu")
    plain = PairedTransform(32, (0.5,) * 3, (0.5,) * 3, train=False)
    pictures = MaskedImageFolder(data, "test", masks="none", transform=plain)
    model = wrap(clip, tokenizer, pictures.classes, config=FVGConfig(unusable_mask="error"), foreground="given")
    assert model.training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank = FeatureBank.encode(model, pictures, measure=True)
    assert not bool(bank.features["usable"].any())
    with pytest.raises(FVGError, match="8 of 8 masks are missing"):
        FeatureBank.encode(model, pictures)
    with pytest.raises(FVGError, match="2 of 2 masks are missing"):
        model(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))


# -- numbers, options and folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--seeds", "99999999999999999999"), ("--seeds", "from 0 to 4294967295")),
        (("--lr", "inf"), ("--lr must be a finite number above 0, but is inf",)),
        (("--tune-lr", "nan"), ("--tune-lr must be a finite number above 0, but is nan",)),
        (("--tuner-options", '{"n_ctx": "8"}'), ("--tuner-options", "n_ctx is '8'", "a whole number")),
        (("--tuner-options", '{"model": 3}'), ("--tuner-options", "takes no 'model'")),
        (("--output", f"{__file__}/below"), (f"{__file__} is a file", "give a folder")),
    ],
)
def test_what_cannot_be_is_told_before_the_model_is_loaded(
    options: tuple[str, str], told: tuple[str, ...], base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*unused: Any) -> None:
        raise AssertionError("the base model was loaded")

    monkeypatch.setattr("fvg_adapter.cli.training.load_base", never)
    assert_mistake(run("train", data, "--model", base, *QUICK, *options), *told)


def test_an_output_below_a_file_is_told_by_every_command(base: Path, data: Path, trained: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    below, picture = ("--output", tmp_path / "file" / "deep" / "er"), data / "test" / "cat" / "0.png"
    for command in (
        ("audit", trained.adapter, data, *below),
        ("show", trained.adapter, picture, "--output", tmp_path / "file" / "deep" / "x.png"),
        ("masks", data, "--source", "attention", "--model", base, *below),
        ("reproduce", "base-to-new", "--data", tmp_path, "--model", base, *below),
    ):
        assert_mistake(run(*command, *HERE), f"{tmp_path / 'file'} is a file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_adapter_in_a_base_models_place(trained: Any, data: Path, base: Path) -> None:
    result = run("train", data, "--model", trained.adapter, *QUICK)
    assert_mistake(result, "is a saved adapter, not a base model", str(base))


def test_a_split_in_the_data_sets_place(base: Path, data: Path) -> None:
    result = run("train", data / "train", "--model", base, *QUICK)
    assert_mistake(result, "has no split 'train'", f"Did you mean the folder above, {data}?")


def test_more_shots_than_there_are_pictures_is_told(base: Path, data: Path) -> None:
    options = ("--seeds", "1,2", "--no-controls", "--shots", "5")
    result = run("train", data, "--model", base, *QUICK, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("warning: ") == 1
    assert "4 of 4 classes have fewer than 5 training pictures (the fewest: 3 of 'apple')" in result.stderr
    assert "warning: " not in run("train", data, "--model", base, *QUICK, *options[:3], "--shots", "3").stderr


def test_masks_that_are_missing_are_counted(base: Path, data: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(data, half)
    for number in (0, 1):
        (half / "mask" / "train" / "apple" / f"{number}.png").unlink()
    result = run("train", half, "--model", base, *QUICK, "--seeds", "1,2", "--no-controls", "--shots", "3")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("warning: ") == 2
    for seed in (1, 2):
        assert (
            f"seed {seed}: 2 of 6 training pictures have no mask file: 'train/apple/0.png', 'train/apple/1.png'"
            in result.stderr
        )
    assert "fvg-adapter masks" in result.stderr


def test_a_learning_rate_that_is_never_used_is_told(base: Path, data: Path) -> None:
    result = run("train", data, "--model", base, *QUICK, "--seeds", "1", "--epochs", "1", "--lr", "5", "--no-controls")
    assert result.exit_code == 0, result.stderr
    assert "warning: --lr 5.0 is never used: the only epoch is the warm-up, at 1e-05" in result.stderr
    assert "tune-lr" not in result.stderr


def test_debug_shows_the_log_up_to_the_mistake(base: Path, data: Path) -> None:
    handlers = list(logging.getLogger("fvg_adapter").handlers)
    told = run("train", data, "--model", base, *QUICK, "--seeds", "0", "--tuner-options", '{"n_ctx": 0}', "--debug")
    assert told.exit_code == 2 and "n_ctx is 0" in told.stderr
    assert "fvg_adapter.runs: seed 0: reading pictures" in told.stderr and "Traceback" in told.stderr
    assert logging.getLogger("fvg_adapter").handlers == handlers
