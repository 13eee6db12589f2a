"""`fvg-adapter convert`: a checkpoint of the Dassl family becomes files that load anywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer
from typer.testing import CliRunner

from conftest import GOLDEN, small_config
from fvg_adapter import load
from fvg_adapter.cli import app
from fvg_adapter.tuners import CoOp

NAMES = ["tabby cat", "hot-air balloon", "dog"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "clip"
    torch.manual_seed(0)
    CLIPModel(small_config()).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(GOLDEN / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "seed1" / "prompt_learner"
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    state = {"ctx": torch.randn(4, 24), "token_prefix": torch.zeros(3, 1, 24), "token_suffix": torch.zeros(3, 7, 24)}
    torch.save({"state_dict": state, "epoch": 10}, folder / "model.pth.tar-10")
    return folder


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_the_files_give_the_checkpoint_s_logits_for_any_names(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n", "utf-8")
    output = tmp_path / "ours"
    result = run(checkpoint, "--model", base, "--classes", f"@{tmp_path / 'names.txt'}", "--output", output, "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert (record["tuner"], record["epoch"], record["kept"]) == ("coop", 10, {"ctx": ["ctx"]})
    assert set(record["dropped"]) == {"token_prefix", "token_suffix"}
    expected = CoOp(
        CLIPModel.from_pretrained(base), CLIPTokenizer.from_pretrained(base), NAMES, n_ctx=4, ctx_init=""
    ).eval()
    with torch.no_grad():
        expected.ctx.copy_(torch.load(checkpoint / "model.pth.tar-10", weights_only=True)["state_dict"]["ctx"])
    loaded = load(output)
    pixels = torch.randn(2, 3, *loaded.encoder.image_size)
    for names in (NAMES, ["red fox", "pear"]):
        with expected.use_classes(names), loaded.use_classes(names), torch.no_grad():
            torch.testing.assert_close(loaded(pixels).logits, expected(pixels).logits)


def test_what_became_of_each_tensor_is_shown(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--template", "a picture of {}.", "--tuner", "coop", "--output", tmp_path / "ours")
    result = run(checkpoint, "--model", base, "--classes", ",".join(NAMES), *options)
    assert result.exit_code == 0, result.stderr
    assert "coop of epoch 10, tuned on 3 classes" in result.stdout.replace("\n", " ")
    assert "token_suffix" in result.stdout and "dropped: depends on the class names" in result.stdout
    assert load(tmp_path / "ours").template == "a picture of {}."


def test_mistakes_are_told_and_write_nothing(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "ours"

    def told(*options: Any) -> str:
        result = run(*options, "--model", base, "--output", output)
        assert result.exit_code == 2 and not output.exists(), result.stdout
        return str(result.stderr)

    names = ("--classes", ",".join(NAMES))
    assert "asked for" in told(checkpoint, *names, "--tuner", "mmrl")
    assert "no checkpoint" in told(tmp_path / "absent", *names)
    assert "holds no names" in told(checkpoint, "--classes", ", ,")
    assert "do not fit CoOp" in told(checkpoint, *names, "--tuner-options", '{"depth": 3}')
    torch.save({"state_dict": {"ctx": torch.zeros(4, 99)}}, tmp_path / "model.pth.tar-1")
    assert "width 99" in told(tmp_path / "model.pth.tar-1", *names)


def test_code_in_a_checkpoint_is_never_run(base: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'it_ran'}",)

    torch.save({"state_dict": {"ctx": torch.zeros(4, 24)}, "scheduler": Evil()}, tmp_path / "model.pth.tar-1")
    options = ("--model", base, "--classes", "cat", "--output", tmp_path / "ours")
    result = run(tmp_path / "model.pth.tar-1", *options)
    assert result.exit_code == 2 and "refused" in result.stderr, result.stderr
    assert not (tmp_path / "it_ran").exists() and not (tmp_path / "ours").exists()
