"""base_to_new end to end on a small folder: every row, every control, files, and the base model as it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_wrapping import assert_same, snapshot
from transformers import CLIPModel

from fvg_adapter import load
from fvg_adapter.data.files import HubFiles
from fvg_adapter.errors import FVGError
from fvg_adapter.protocols import (
    ABLATION,
    CONTROLS,
    Results,
    base_to_new,
    base_to_new_split,
    cross_dataset,
    few_shot,
)
from fvg_adapter.runs import settings_of, start_run
from fvg_adapter.tuners.recipes import Stage

NAMES = ["red fox", "blue bird", "green frog", "old boat"]
QUICK = Stage("sgd", 0.01, 4, "a test", epochs=2)
NORMAL = {"size": (32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four classes, six training and three test pictures each, with masks."""
    root, draw = tmp_path / "data", np.random.default_rng(0)
    root.mkdir()
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    for split, count in (("train", 6), ("test", 3), ("other", 2)):
        for name in NAMES:
            for i in range(count):
                mask = np.zeros((32, 32), np.uint8)
                mask[6 : 20 + i, 5:25] = 255
                for folder, pixels in ((root, draw.integers(0, 256, (32, 32, 3), np.uint8)), (root / "mask", mask)):
                    path = folder / split / name.replace(" ", "_") / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path)
    return root


def run(clip: CLIPModel, tokenizer: Any, data: Path, **options: Any) -> Results:
    settings = {"shots": 4, "seeds": (1, 2), "views": 2, "tune": QUICK, "heads": QUICK}
    return base_to_new(clip, tokenizer, data, **{**settings, **options})


def test_all_rows_files_and_the_model_as_it_was(
    small_clip: CLIPModel, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    before = snapshot(small_clip)
    out = tmp_path / "out"
    results = run(small_clip, tokenizer, data, ablation=True, also_test=("other",), output=out)
    assert_same(before, snapshot(small_clip))
    rows = ["clip", "coop", "coop+fvg", *(f"coop+fvg [{n}]" for n in (*ABLATION, *CONTROLS))]
    assert sorted(results.rows) == sorted(rows) == sorted(results.also["other"])
    written = json.loads((out / "results.json").read_text())
    for row in rows:
        for metric in ("base", "new", "hm", "joint_hm"):
            assert len(written[row][metric]) == 2
            assert all(0 <= v <= 100 for v in written[row][metric])
    assert written["settings"]["seeds"] == [1, 2] and written["settings"]["heads"]["epochs"] == 2
    assert (out / "picture.png").stat().st_size > 10_000
    adapter = load(out / "adapter", clip=small_clip, tokenizer=tokenizer)
    assert adapter.classes == tuple(NAMES[:2])
    assert results.difference("coop+fvg", "coop+fvg", "hm") == (0.0, 0.0)
    assert results.rows["coop+fvg [PC only]"]["base"] == results.rows["coop"]["base"]
    assert results.rows["coop+fvg [FDC+PC]"]["new"] == results.rows["coop+fvg"]["new"]  # PC never sees FDC


def test_the_same_seed_gives_the_same_numbers(small_clip: CLIPModel, tokenizer: Any, data: Path) -> None:
    first, again = (run(small_clip, tokenizer, data, seeds=(3,), controls=False) for _ in range(2))
    assert first.rows == again.rows


def test_in_the_loop_with_attention_masks(small_clip: CLIPModel, tokenizer: Any, data: Path) -> None:
    for mask in (data / "mask").rglob("*.png"):
        mask.unlink()
    results = run(small_clip, tokenizer, data, seeds=(1,), views=0, foreground="attention")
    assert "coop+fvg [shuffled masks]" not in results.rows and "coop+fvg [x_fg=x]" in results.rows
    assert results.to_json()["clip"]["d_fg"] == [None]  # no masks, no figure, and valid JSON


def test_the_draw_is_over_all_classes_before_the_cut(data: Path) -> None:
    split = base_to_new_split(data, shots=4, seed=1, **NORMAL)
    assert split.base_classes == NAMES[:2] and split.tests["test"][1].classes == NAMES[2:]
    assert sorted(split.train.labels) == [0] * 4 + [1] * 4
    assert split.tests["test"][1].labels == [0] * 3 + [1] * 3


def test_one_unreadable_picture_is_named_and_counted(
    small_clip: CLIPModel, tokenizer: Any, data: Path, recwarn: pytest.WarningsRecorder
) -> None:
    bad = data / "test" / "red_fox" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    run(small_clip, tokenizer, data, seeds=(1,), controls=False)
    said = [str(w.message) for w in recwarn if "cannot be read" in str(w.message)]
    assert said and "1 of 6 pictures" in said[0] and "1.png" in said[0]


def test_mistakes_are_named(small_clip: CLIPModel, tokenizer: Any, data: Path, tmp_path: Path) -> None:
    for options, message in [
        ({"tuner": "copo"}, "Did you mean 'coop'"),
        ({"seeds": ()}, "seeds is empty"),
        ({"test_split": "tset"}, "test"),
        ({"tune": dataclasses.replace(QUICK, epochs=0)}, "epochs must be above 0"),
    ]:
        with pytest.raises(FVGError, match=message):
            run(small_clip, tokenizer, data, output=tmp_path / "none", **options)
        assert not (tmp_path / "none").exists()
    with pytest.raises(FVGError, match="at least two"):
        (tmp_path / "one/train/cat").mkdir(parents=True)
        (tmp_path / "one/test/cat").mkdir(parents=True)
        for part in ("train", "test"):
            Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "one" / part / "cat" / "a.png")
        run(small_clip, tokenizer, tmp_path / "one")
    assert torch.is_grad_enabled()


def test_options_that_a_tuner_does_not_have_are_named(small_clip: CLIPModel, tokenizer: Any, data: Path) -> None:
    with pytest.raises(FVGError, match="a 'coop' tuner has no option 'depth'"):
        run(small_clip, tokenizer, data, tuner_options={"depth": 3})
    with pytest.raises(FVGError, match="the tuner 'external' is made as External"):
        run(small_clip, tokenizer, data, tuner="external")


def test_a_tuner_with_another_crop_sees_the_same_pictures_otherwise(data: Path) -> None:
    same = base_to_new_split(data, shots=2, seed=1, **NORMAL, crop_scale=(0.5, 1.0), tune_crop_scale=(0.5, 1.0))
    assert same.tune is same.train  # so that one bank serves both stages
    split = base_to_new_split(data, shots=2, seed=1, **NORMAL, crop_scale=(0.5, 1.0), tune_crop_scale=(0.1, 0.2))
    assert (split.train.transform.scale, split.tune.transform.scale) == ((0.5, 1.0), (0.1, 0.2))
    assert [s.image for s in split.tune.samples] == [s.image for s in split.train.samples]
    assert split.tune.labels == split.train.labels and split.tune.classes == split.train.classes


def test_the_tuners_own_crop_reaches_it(small_clip: CLIPModel, tokenizer: Any, data: Path) -> None:
    whole = dataclasses.replace(QUICK, crop_scale=(0.9, 1.0))
    one = run(small_clip, tokenizer, data, seeds=(1,), tune=QUICK, controls=False)
    other = run(small_clip, tokenizer, data, seeds=(1,), tune=whole, controls=False)
    assert one.rows["clip"] == other.rows["clip"]
    assert one.rows["coop"]["entropy"] != other.rows["coop"]["entropy"]


def test_few_shot_and_cross_dataset_keep_an_adapter_with_their_figures(
    small_clip: CLIPModel, tokenizer: Any, data: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"shots": 2, "seeds": (1,), "views": 1, "tune": QUICK, "heads": QUICK, "controls": False}
    few = few_shot(small_clip, tokenizer, data, **settings, output=tmp_path / "few")
    across = cross_dataset(small_clip, tokenizer, data, {"again": data}, **settings, output=tmp_path / "across")
    for folder, found in (("few", few), ("across", across)):
        config = json.loads((tmp_path / folder / "adapter/config.json").read_text("utf-8"))
        accuracy = config["about"]["results"]["rows"]["coop+fvg"]["accuracy"]
        assert accuracy == found.rows["coop+fvg"]["accuracy"]
        assert (tmp_path / folder / "picture.png").is_file()
        assert "| **coop+fvg** |" in (tmp_path / folder / "adapter/README.md").read_text("utf-8")


def test_a_card_names_the_release_by_its_id(small_clip: CLIPModel, tokenizer: Any) -> None:
    release = HubFiles.__new__(HubFiles)
    release.name, release.repo = "the data set repository 'me/pets'", "me/pets"
    settings = settings_of(start_run(small_clip, tokenizer, "coop", (1,)), release, 4, (1,), "test")
    assert (settings["data"], settings["from_hub"]) == ("me/pets", True)
