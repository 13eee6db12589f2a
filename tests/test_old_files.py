"""Files of earlier releases give what they gave; those of later ones are refused by name (tests/fixtures/write.py)."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fvg_adapter import FeatureBank, load, storage
from fvg_adapter.bank_files import VERSION
from fvg_adapter.errors import FVGError
from fvg_adapter.tuners.registry import TUNERS as KINDS
from tests.fixtures.write import CLASS_LISTS, TUNERS, base_model, pocket

FIXTURES = Path(__file__).parent / "fixtures"
RELEASES = sorted(p for p in FIXTURES.glob("v*") if p.is_dir())
SAVED = [pytest.param(r / name, id=f"{r.name}-{name}") for r in RELEASES for name in (*TUNERS, "fvg")]


def close(found: Tensor, expected: Tensor) -> bool:
    """Equal as far as another torch or transformers computes the same."""
    return torch.allclose(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("folder", SAVED)
def test_saved_models_score_as_they_did(folder: Path) -> None:
    clip, tokenizer = base_model()
    model: Any = load(folder, clip=clip, tokenizer=tokenizer)
    pixels = load_file(folder.parent / "pixels.safetensors")["pixels"]
    expected = load_file(folder / "expected.safetensors")
    assert expected.keys() >= {"logits_base"}
    for name, logits in expected.items():
        with model.use_classes(CLASS_LISTS[name.removeprefix("logits_")]), torch.no_grad():
            found = model(pixels).logits
        assert close(found, logits), (name, float((found - logits).abs().max()))
        assert logits.std() > 0.1  # or anything would be close


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.name)
def test_banks_hold_what_they_held(release: Path) -> None:
    clip, tokenizer = base_model()
    model: Any = load(release / "fvg", clip=clip, tokenizer=tokenizer)
    bank = FeatureBank.load(release / "bank", model)
    assert (len(bank), bank.views, list(bank.classes)) == (5, 2, CLASS_LISTS["base"])
    expected = load_file(release / "bank_expected.safetensors")
    features = bank.batch(range(5), [0, 1, 0, 1, 0])["features"]
    assert features.keys() == expected.keys()
    assert all(torch.equal(features[name], tensor) for name, tensor in expected.items())
    pixels = load_file(release / "pixels.safetensors")["pixels"]
    with torch.no_grad():
        from_bank = model(features={k: v[:, 0] for k, v in bank.features.items()}).logits
        assert close(from_bank, model(pixels).logits)


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.name)
def test_a_training_left_figures_and_an_adapter(release: Path) -> None:
    results = json.loads((release / "train" / "results.json").read_text("utf-8"))
    for row in ("clip", "coop", "coop+fvg"):
        for metric in ("base", "new", "hm", "joint_base", "joint_new", "joint_hm", "d_fg", "entropy", "ece"):
            assert [math.isfinite(value) for value in results[row][metric]] == [True], (row, metric)
    expected = load_file(release / "train" / "expected.safetensors")
    model: Any = load(release / "train" / "adapter", **pocket())
    with torch.no_grad():
        assert close(model(expected["pixels"]).logits, expected["logits"])


def test_every_kind_has_a_file() -> None:
    assert {"v1"} <= {r.name for r in RELEASES} and RELEASES[-1].name == f"v{storage.FORMAT_VERSION}"
    saved = {json.loads((FIXTURES / "v1" / name / "config.json").read_text())["tuner"]["kind"] for name in TUNERS}
    ours = {name for name, kind in KINDS.items() if kind.__module__.startswith("fvg_adapter.")}
    assert ours - {"external"} == saved  # no file holds an External's functions


def test_files_of_a_later_release_are_refused_by_name(tmp_path: Path) -> None:
    clip, tokenizer = base_model()
    for name, version in (("coop", storage.FORMAT_VERSION + 1), ("fvg", 99)):
        folder = Path(shutil.copytree(RELEASES[-1] / name, tmp_path / name))
        config = {**json.loads((folder / "config.json").read_text("utf-8")), "format_version": version}
        (folder / "config.json").write_text(json.dumps(config))
        said = f"has format version {version}, but this fvg_adapter reads up to {storage.FORMAT_VERSION}; upgrade"
        with pytest.raises(FVGError, match=said):
            load(folder, clip=clip, tokenizer=tokenizer)
    bank = Path(shutil.copytree(RELEASES[-1] / "bank", tmp_path / "bank"))
    index = {**json.loads((bank / "index.json").read_text()), "version": VERSION + 1}
    (bank / "index.json").write_text(json.dumps(index))
    with pytest.raises(FVGError, match=f"has format version {VERSION + 1}, but this fvg_adapter reads {VERSION}"):
        FeatureBank.load(bank)


def test_what_is_written_now_says_what_was_written(tmp_path: Path) -> None:
    from tests.fixtures.write import answers

    torch.manual_seed(0)
    clip, tokenizer = base_model()
    pixels = load_file(RELEASES[-1] / "pixels.safetensors")["pixels"]
    for name, make in TUNERS.items():
        tuner = make(clip, tokenizer)
        tuner.save_pretrained(tmp_path / name)
        old = json.loads((RELEASES[-1] / name / "config.json").read_text("utf-8"))
        new = json.loads((tmp_path / name / "config.json").read_text("utf-8"))
        assert old["tuner"] == new["tuner"] and old.keys() <= new.keys()  # what is written now is what was written
        assert answers(tuner, pixels)["logits_base"].shape == (5, 3)
        tuner.detach()
