"""The commands, on a tiny CLIP and a tiny folder: what they print, write and say about mistakes."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import BertConfig, BertModel, CLIPModel, CLIPTokenizer
from typer.testing import CliRunner

import fvg_adapter
from conftest import GOLDEN, small_config
from fvg_adapter.cli import app
from fvg_adapter.cli.console import load_base, printable
from fvg_adapter.data import PairedTransform
from fvg_adapter.errors import FVGError
from fvg_adapter.tuners import ZeroShot

CLASSES = ["apple", "hot-air balloon", "cat", "dog"]
HERE = ("--device", "cpu", "--threads", "1")
QUICK = ("--shots", "2", "--views", "2", "--tune-epochs", "2", "--epochs", "2", *HERE)


def run(*arguments: Any) -> Any:
    """A command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def draw(path: Path, index: int, size: tuple[int, int] = (40, 32)) -> None:
    """A bright rectangle on noise, and its mask beside it."""
    random = np.random.default_rng(index)
    picture = random.integers(0, 80, (size[1], size[0], 3), dtype=np.uint8)
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    picture[8:24, 10:30] = random.integers(120, 255, 3)
    mask[8:24, 10:30] = 255
    split, name = path.parts[-3], path.parts[-2]
    for array, target in ((picture, path), (mask, path.parents[2] / "mask" / split / name / path.name)):
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(target)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("base") / "clip"
    torch.manual_seed(0)
    model = CLIPModel(small_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    CLIPTokenizer.from_pretrained(GOLDEN / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/classes.txt, ROOT/train, ROOT/test, ROOT/mask."""
    root = tmp_path_factory.mktemp("data") / "things"
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(CLASSES):
            for i in range(count):
                draw(root / split / name.replace(" ", "_") / f"{i}.png", 100 * label + 10 * i + len(split))
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n", "utf-8")
    return root


@pytest.fixture(scope="session")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One `train --json` that the other tests look at."""
    output = tmp_path_factory.mktemp("output") / "run"
    options = ("--seeds", "1,2", "--lambda-distill", "3", "--output", output, "--json", *QUICK)
    result = run("train", data, "--model", base, *options)
    assert result.exit_code == 0, result.stderr
    return SimpleNamespace(result=result, output=output, adapter=output / "adapter", rows=json.loads(result.stdout))


def assert_mistake(result: Any, *told: str) -> None:
    """Exit code 2, one message on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1
    for text in told:
        assert text in result.stderr, result.stderr


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, "train", "eval", "predict", "info", "push", "convert", "reproduce", "masks"])
def test_help_teaches_with_examples(command: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    result = run(*([command] if command else []), "--help")
    assert result.exit_code == 0
    assert f"fvg-adapter {command or 'train'}" in result.stdout
    if command not in ("info", "push"):
        assert "openai/clip-vit-base-patch16" in result.stdout


def test_help_does_not_import_torch_and_the_script_works_outside_of_tests() -> None:
    code = "import sys, fvg_adapter.cli as c\ntry: c.main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    package = str(Path(fvg_adapter.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}

    def script(*arguments: str) -> Any:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)

    shown = script("train", "--help")
    assert (shown.returncode, shown.stderr.split()) == (0, ["False"])
    assert script("--version").stdout.strip() == f"fvg-adapter {fvg_adapter.__version__}"
    assert script("eval", "--nonsense").returncode == 2
    missing = script("info", "nowhere/at/all")
    assert missing.returncode == 2
    assert missing.stdout == ""
    assert "Traceback" not in missing.stderr
    assert "nowhere/at/all" in missing.stderr


@pytest.mark.parametrize(
    ("options", "prompt"),
    [((), "a photo of a {}."), (("--dataset", "dtd"), "{} texture."), (("--template", "my {}."), "my {}.")],
)
def test_a_data_set_brings_its_prompt(
    options: tuple[str, ...], prompt: str, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def noted(*unused: Any, **given: Any) -> None:
        seen.update(given)
        raise FVGError("enough")

    monkeypatch.setattr("fvg_adapter.protocols.base_to_new", noted)
    assert_mistake(run("train", data, "--model", base, *options, *HERE), "enough")
    assert seen["tuner_options"]["template"] == prompt
    assert_mistake(run("train", data, "--model", base, "--tuner", "kgcoop", *options, *HERE), "enough")
    teacher = "a photo of a {}, a type of texture." if prompt == "{} texture." else prompt
    assert seen["tuner_options"]["teacher_template"] == teacher
    assert_mistake(run("train", data, "--model", base, "--dataset", "EuroSAT", *HERE), "enough")
    assert (seen["tune"].epochs, seen["heads"].epochs) == (20, 20)


# -- train -------------------------------------------------------------------------------------------------------------


def test_train_writes_rows_for_people_and_machines(trained: Any) -> None:
    rows = trained.rows
    controls = {f"coop+fvg [{name}]" for name in ("x_fg=x", "lambda_d=0", "shuffled masks")}
    assert {"clip", "coop", "coop+fvg", "settings", *controls} <= set(rows)
    for name in ("clip", "coop", "coop+fvg"):
        for metric in ("base", "new", "hm", "joint_hm"):
            assert len(rows[name][metric]) == 2
            assert all(0 <= value <= 100 for value in rows[name][metric])
    assert json.loads((trained.output / "results.json").read_text("utf-8"))["coop+fvg"] == rows["coop+fvg"]
    assert rows["settings"]["config"]["lambda_distill"] == 3
    assert rows["settings"]["tune"]["epochs"] == 2
    assert rows["settings"]["heads"]["epochs"] == 2
    names = {path.name for path in trained.adapter.iterdir()}
    assert names == {"README.md", "attention.png", "config.json", "fvg_heads.safetensors", "tuner.safetensors"}
    card = ModelCard.load(trained.adapter / "README.md")
    assert "seeds 1, 2" in card.text and "**Here: HM" in card.text  # what the foreground is worth, whatever the sign
    assert card.data.eval_results[0].metric_value == pytest.approx(statistics.fmean(rows["coop+fvg"]["base"]), abs=0.01)
    assert str(trained.output) not in card.text
    assert (trained.adapter / "attention.png").read_bytes()[:4] == b"\x89PNG"
    assert trained.result.stderr == ""  # not a terminal: quiet


def test_train_prints_a_table_and_reads_a_config(base: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"bottleneck": 8, "lambda_distill": 1.5}')
    options = ("--config", config, "--seeds", "3", "--no-controls", "--tuner", "zero_shot", "--views", "0")
    result = run("train", data, "--model", base, *options, "--shots", "1", "--epochs", "1", *HERE)
    assert result.exit_code == 0, result.stderr
    for text in ("model", "base", "new", "HM", "joint HM", "clip", "zero_shot+fvg"):
        assert text in result.stdout
    assert "[x_fg=x]" not in result.stdout
    assert "±" not in result.stdout  # one seed has no spread


def test_pixels_are_normalised_as_the_model_says(base: Path, data: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(base, half)
    (half / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    options = ("--tuner", "zero_shot", "--no-controls", "--seeds", "1", "--json", "--output", tmp_path / "run")
    result = run("train", data, "--model", half, *options, "--shots", "1", "--epochs", "1", *HERE)
    config = json.loads(result.stdout)["settings"]["config"]
    assert (config["image_mean"], config["image_std"]) == ([0.5] * 3, [0.25] * 3)
    saved = fvg_adapter.load(tmp_path / "run" / "adapter")
    assert saved.config.image_mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("command", ["audit", "show", "eval", "predict"])
def test_pictures_of_a_model_without_heads_are_normalised_as_its_base_says(
    command: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, seen = tmp_path / "half", []
    shutil.copytree(base, half)
    (half / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))

    def noted(self: PairedTransform, size: Any, mean: Any = None, std: Any = None, **options: Any) -> None:
        seen.append((list(mean), list(std)))
        raise FVGError("that is enough")

    clip, tokenizer = load_base(str(half), "cpu")
    saved = ZeroShot(clip, tokenizer, ["a", "b"]).save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(PairedTransform, "__init__", noted)
    picture = next((data / "test").rglob("*.png"))
    more = {"show": (half, picture, "--plain", "--classes", "a,b"), "audit": (half, data, "--plain")}
    told = more.get(command, (saved, data if command == "eval" else picture))
    result = run(command, *told, *(("--output", tmp_path / "a.png") if command == "show" else ()))
    assert "that is enough" in result.stderr and seen == [([0.5] * 3, [0.25] * 3)]


def test_info_of_odd_files_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/config.json").write_text("[" * 100_000)
    result = run("info", tmp_path / "deep")
    assert result.exit_code == 2 and "unexpected" not in result.stderr
    (tmp_path / "deep/config.json").write_text('{"model_type": "clip", "vision_config": "large"}')
    assert "a base model, not an adapter" in run("info", tmp_path / "deep").stdout
    (tmp_path / "run").mkdir()
    (tmp_path / "run/trainer_state.json").write_text("{}")
    (tmp_path / "run/model.safetensors").write_bytes(b"torn")
    result = run("info", tmp_path / "run")
    assert result.exit_code == 2 and "no whole safetensors file" in result.stderr


def test_a_second_run_starts_from_the_bank(base: Path, data: Path, tmp_path: Path) -> None:
    options = ("--seeds", "1", "--bank", tmp_path / "bank", "--json", *QUICK)
    first = run("train", data, "--model", base, *options)
    assert first.exit_code == 0, first.stderr
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "bank").rglob("*.safetensors")}
    names = {"tune-2shots-seed1", "shuffled-2shots-seed1", "test-base", "test-new"}
    assert {file.parent.name for file in written} == names
    again = run("train", data, "--model", base, *options, "--lambda-distill", "1")
    assert again.exit_code == 0, again.stderr
    assert written == {file: file.stat().st_mtime_ns for file in (tmp_path / "bank").rglob("*.safetensors")}
    rows = [json.loads(result.stdout) for result in (first, again)]
    assert rows[0]["coop"] == rows[1]["coop"] and rows[0]["settings"]["config"] != rows[1]["settings"]["config"]
    assert_mistake(run("train", data, "--model", base, *options, "--views", "3"), "another bank", "views (2, 3)")
    assert_mistake(run("train", data, "--model", base, *options, "--views", "0"), "a bank needs views")


def test_tables_of_several_seeds_have_a_spread_and_name_the_foreground_effect(trained: Any) -> None:
    from rich.console import Console

    from fvg_adapter.cli.results import remarks_on, table_of, title_of
    from fvg_adapter.protocols import Results

    rows = {"clip": 50.0, "coop": 60.0, "coop+fvg": 70.0, "coop+fvg [x_fg=x]": 68.0}
    results = Results()
    for row, value in rows.items():
        for shift in (-1.0, 1.0) if row != "coop" else (0.0, 0.0):
            results.add(row, dict.fromkeys(("base", "new", "hm", "joint_hm"), value + shift))
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(table_of(results))
    longest = "promptsrc+fvg [shuffled masks]"
    for shift in (-1.0, 1.0):
        results.add(longest, dict.fromkeys(("base", "new", "hm", "joint_hm"), 70.0 + shift))
    console.print(table_of(results))
    text = console.export_text()
    assert text.count("70.0 ± 1.4") == 4 + 8 and "…" not in text and longest in text
    assert title_of("pets", [1, 2]).endswith("over the seeds 1, 2")
    remarks = remarks_on(results, "coop", None)
    assert remarks[0] == "FVG-PT over coop alone: HM +10.0 ± 1.4"
    assert remarks[1].startswith("foreground effect") and remarks[1].endswith("HM +2.0 ± 0.0")


# -- eval --------------------------------------------------------------------------------------------------------------


def test_eval_gives_the_figures_of_the_training(trained: Any, data: Path, base: Path) -> None:
    result = run("eval", trained.adapter, data, "--json", *HERE)
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["pictures"] == 8
    assert (figures["base_classes"], figures["new_classes"]) == (2, 2)
    for metric in ("base", "new", "hm", "joint_hm", "d_fg", "ece"):
        assert figures[metric] == pytest.approx(trained.rows["coop+fvg"][metric][0], abs=1e-3)
    assert result.stderr == ""
    again = run("eval", trained.adapter, data, "--model", base, "--batch", "3", *HERE)
    assert again.exit_code == 0, again.stderr
    assert "HM: harmonic mean" in again.stdout


def test_eval_of_one_group_gives_one_accuracy(trained: Any, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "unseen"
    for name in CLASSES[2:]:
        shutil.copytree(data / "test" / name, root / "test" / name)
    result = run("eval", trained.adapter, root, "--json", *HERE)
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert (figures["base_classes"], figures["new_classes"], figures["pictures"]) == (0, 2, 4)
    assert figures["accuracy"] == pytest.approx(trained.rows["coop+fvg"]["new"][0])
    assert "hm" not in figures


def test_eval_without_masks_leaves_their_figures_out(trained: Any, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "test", tmp_path / "bare" / "test")
    (tmp_path / "bare" / "classes.txt").write_text("\n".join(CLASSES))
    document = json.loads(run("eval", trained.adapter, tmp_path / "bare", "--json", *HERE).stdout)
    assert document["d_fg"] is None  # JSON has no NaN
    shown = run("eval", trained.adapter, tmp_path / "bare", *HERE)
    assert "D_fg" not in shown.stdout
    assert "nan" not in shown.stdout


# -- predict -----------------------------------------------------------------------------------------------------------


def test_predict_names_pictures(trained: Any, data: Path) -> None:
    pictures = sorted((data / "test").rglob("*.png"))
    result = run("predict", trained.adapter, *pictures, "--json", *HERE)
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["image"] for row in rows] == [str(p) for p in pictures]
    for row in rows:
        chances = [answer["probability"] for answer in row["predictions"]]
        assert chances == sorted(chances, reverse=True)
        assert math.isclose(sum(chances), 1.0, abs_tol=1e-5)  # two base classes, both shown
        assert {answer["class"] for answer in row["predictions"]} == set(CLASSES[:2])
    model = fvg_adapter.load(trained.adapter)
    expected = model.predict(Image.open(pictures[0]))
    assert rows[0]["predictions"][0]["class"] == expected[0].name
    assert rows[0]["predictions"][0]["probability"] == pytest.approx(expected[0].probability, abs=1e-5)


def test_predict_takes_any_classes(trained: Any, data: Path, tmp_path: Path) -> None:
    picture = data / "test" / "cat" / "0.png"
    (tmp_path / "names.txt").write_text("zebra\n\n apple \n")
    from_file = run("predict", trained.adapter, picture, "--classes", f"@{tmp_path / 'names.txt'}", "--json", *HERE)
    assert {a["class"] for a in json.loads(from_file.stdout)[0]["predictions"]} == {"zebra", "apple"}
    shown = run("predict", trained.adapter, picture, "--classes", "zebra, apple,lion", "--top-k", "1", *HERE)
    assert shown.exit_code == 0
    assert sum(name in shown.stdout for name in ("zebra", "apple", "lion")) == 1


def test_predict_names_unreadable_pictures_and_scores_the_others(trained: Any, data: Path, tmp_path: Path) -> None:
    good = data / "test" / "cat" / "0.png"
    torn = tmp_path / "torn.png"
    torn.write_bytes(good.read_bytes()[:200])
    result = run("predict", trained.adapter, torn, good, tmp_path / "absent.png", "--json", *HERE)
    assert result.exit_code == 2
    rows = json.loads(result.stdout)
    assert ["error" in row for row in rows] == [True, False, True]
    assert "torn.png" in result.stderr and "absent.png" in result.stderr
    assert "2 of 3 pictures could not be read" in result.stderr
    assert "Traceback" not in result.stderr
    nothing = run("predict", trained.adapter, torn, *HERE)
    assert_mistake(nothing, "1 of 1 pictures")


def test_a_tuner_alone_can_be_evaluated_and_asked(base: Path, data: Path, tmp_path: Path) -> None:
    from fvg_adapter.tuners import CoOp

    clip = CLIPModel.from_pretrained(base)
    CoOp(clip, CLIPTokenizer.from_pretrained(base), CLASSES[:2]).save_pretrained(tmp_path / "coop")
    assert json.loads(run("eval", tmp_path / "coop", data, "--model", base, "--json", *HERE).stdout)["pictures"] == 8
    picture = data / "test" / "cat" / "0.png"
    answer = run("predict", tmp_path / "coop", picture, "--model", base, "--json", *HERE)
    assert len(json.loads(answer.stdout)[0]["predictions"]) == 2
    about = json.loads(run("info", tmp_path / "coop", "--json").stdout)
    assert (about["kind"], about["tuner"]) == ("tuner", "coop")


# -- info --------------------------------------------------------------------------------------------------------------


def test_info_explains_an_adapter(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    about = json.loads(run("info", trained.adapter, "--json").stdout)
    assert (about["kind"], about["tuner"], about["base_classes"]) == ("fvg", "coop", CLASSES[:2])
    assert about["different_from_defaults"] == {"lambda_distill": 3.0}
    assert about["base_model"]["class"] == "CLIPModel"
    assert about["parameters"]["tuner.safetensors"] == 4 * 24
    heads = sum(p.numel() for p in fvg_adapter.load(trained.adapter).trainable_parameters())
    assert about["parameters"]["fvg_heads.safetensors"] == heads
    assert about["files"]["fvg_heads.safetensors"] == (trained.adapter / "fvg_heads.safetensors").stat().st_size
    assert "torch" in about["versions"]
    shown = run("info", trained.adapter)
    assert shown.exit_code == 0
    for text in ("FVG-PT behind a tuner", "coop", "hot-air balloon", "lambda_distill=3.0", "CLIPModel"):
        assert text in shown.stdout


def test_class_names_cannot_write_to_the_terminal(trained: Any, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(trained.adapter, folder)
    config = json.loads((folder / "config.json").read_text())
    config["classes"] = config["base_classes"] = ["\x1b]0;owned\x07", "[red]markup[/red]"]
    (folder / "config.json").write_text(json.dumps(config))
    shown = run("info", folder)
    assert shown.exit_code == 0
    assert "\x1b" not in shown.stdout and "\x07" not in shown.stdout
    assert "[red]markup[/red]" in shown.stdout
    assert printable("a\x1bb") == "a\ufffdb"


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is no CLIP."""
    folder = tmp_path_factory.mktemp("bert")
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(GOLDEN / "tokenizer").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--seeds", "1,x"), "no list of whole numbers"),
        (("--seeds", "1,1"), "differ from the others"),
        (("--tuner", "co-op"), "Did you mean 'coop'?"),
        (("--tuner", "zero_shot", "--tune-lr", "1"), "learns nothing in stage one"),
        (("--tuner-options", "{n_ctx"), "must be a JSON object"),
        (("--tuner-options", "[1]"), "must be a JSON object"),
        (("--foreground", "mask"), "foreground source 'mask' is unknown"),
        (("--precision", "bf61"), "Did you mean 'bf16'?"),
        (("--lr", "-1"), "--lr must be a finite number above 0"),
        (("--lambda-distill", "-1"), "lambda_distill must not be negative"),
        (("--config", "nowhere.json"), "nowhere.json"),
        (("--test-split", "tets"), "no split 'tets'"),
        (("--template", "a photo"), "a photo"),
        (("--device", "abacus"), "'abacus' cannot be used"),
        (("--output", __file__), "is a file"),
    ],
)
def test_wrong_options_are_told(options: tuple[str, ...], told: str, base: Path, data: Path) -> None:
    assert_mistake(run("train", data, "--model", base, *QUICK, *options), told)


@pytest.mark.parametrize("options", [("--foreground", "mask"), ("--precision", "bf61"), ("--tuner", "co-op")])
def test_wrong_options_are_told_before_anything_is_trained(
    options: tuple[str, str], base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*unused: Any, **unused_too: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr("fvg_adapter.protocols.base_to_new", never)
    assert_mistake(run("train", data, "--model", base, *options, *HERE), options[1])


def test_wrong_files_are_told(base: Path, data: Path, bert: Path, trained: Any, tmp_path: Path) -> None:
    assert_mistake(run("train", tmp_path / "absent", "--model", base, *QUICK), "does not exist")
    assert_mistake(run("train", data, "--model", tmp_path / "absent", *QUICK), "could not be loaded")
    assert_mistake(run("train", data, "--model", tmp_path / "absent", *QUICK), "is no folder here")
    assert_mistake(run("train", data, "--model", base / "config.json", *QUICK), "is a file, not a folder")
    assert_mistake(run("train", data, "--model", bert, *QUICK), "BertModel")
    config = tmp_path / "config.json"
    config.write_text('{"bottelneck": 3}')
    assert_mistake(run("train", data, "--model", base, "--config", config, *QUICK), "Did you mean 'bottleneck'?")
    config.write_text('{"bottleneck": 0}')
    assert_mistake(run("train", data, "--model", base, "--config", config, *QUICK), "bottleneck must be above 0")
    config.write_text("[]")
    assert_mistake(run("train", data, "--model", base, "--config", config, *QUICK), "one JSON object")
    assert_mistake(run("info", data), "has no config.json")
    assert_mistake(run("info", config), "is a file; give the folder")
    assert_mistake(run("audit", trained.adapter, data, "--output", config, *HERE), "is a file; give a folder")
    flat = run("eval", trained.adapter, data / "test", "--split", ".", *HERE)
    assert flat.exit_code == 0, flat.output
    assert_mistake(run("eval", trained.adapter, data, "--split", "val", *HERE), "no split 'val'")
    assert_mistake(run("predict", trained.adapter, "a.png", "--classes", " , ", *HERE), "holds no names")
    assert_mistake(run("predict", trained.adapter, "a.png", "--classes", "@absent.txt", *HERE), "absent.txt")
    assert_mistake(run("predict", trained.adapter, "a.png", "--classes", "cat,cat", *HERE), "cat")


def test_adapters_that_do_not_fit_are_told(data: Path, trained: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    CLIPModel(small_config()).save_pretrained(tmp_path / "other")
    CLIPTokenizer.from_pretrained(GOLDEN / "tokenizer").save_pretrained(tmp_path / "other")
    other = run("eval", trained.adapter, data, "--model", tmp_path / "other", *HERE)
    assert_mistake(other, "made for base model", "hash")
    newer = tmp_path / "newer"
    shutil.copytree(trained.adapter, newer)
    config = json.loads((newer / "config.json").read_text())
    (newer / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    assert_mistake(run("info", newer), "format version 99", "upgrade")
    torn = tmp_path / "torn"
    shutil.copytree(trained.adapter, torn)
    heads = torn / "fvg_heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:100])
    assert_mistake(run("predict", torn, data / "test" / "cat" / "0.png", *HERE), "no whole safetensors file")


def test_unreadable_pictures_are_counted_and_named(base: Path, data: Path, trained: Any, tmp_path: Path) -> None:
    root = tmp_path / "things"
    shutil.copytree(data, root)
    for split in ("train", "test"):
        torn = root / split / "apple" / "0.png"
        torn.write_bytes(torn.read_bytes()[:150])
    result = run("train", root, "--model", base, "--shots", "3", "--seeds", "1", "--json", "--epochs", "1", *HERE)
    assert result.exit_code == 0, result.stderr
    assert set(json.loads(result.stdout)) > {"clip", "coop", "coop+fvg"}
    for split in ("train", "test"):
        assert f"{split}/apple/0.png" in result.stderr
    assert "warning: 1 of 6 pictures cannot be read" in result.stderr
    scored = run("eval", trained.adapter, root, "--json", *HERE)
    assert "test/apple/0.png" in scored.stderr
    document = json.loads(scored.stdout)
    assert (document["pictures"], document["unreadable"]) == (7, 1)


def test_nothing_is_written_where_no_picture_can_be_read(base: Path, data: Path, tmp_path: Path) -> None:
    root = tmp_path / "things"
    shutil.copytree(data, root)
    for picture in (root / "train").rglob("*.png"):
        picture.write_bytes(picture.read_bytes()[:150])
    result = run("train", root, "--model", base, "--output", tmp_path / "output", *QUICK)
    assert_mistake(result, "apple")
    assert not (tmp_path / "output").exists()


def test_unexpected_errors_end_with_1_and_debug_shows_them(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*unused: Any) -> None:
        raise ZeroDivisionError("a bug of ours")

    assert_mistake(run("info", data))
    told = run("info", data, "--debug")
    assert told.exit_code == 2
    assert "Traceback" in told.stderr and "FVGError" in told.stderr
    monkeypatch.setattr("fvg_adapter.storage.read_config", broken)
    result = run("info", data)
    assert result.exit_code == 1
    assert "unexpected ZeroDivisionError: a bug of ours" in result.stderr
    assert "--debug" in result.stderr and "Traceback" not in result.stderr
    assert "Traceback" in run("info", data, "--debug").stderr
