"""Quality of life: info about any file, names that are nearly right, the log, bars, seeds, shell completion."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import NAMES, RECIPE, Pictures, changed, distance, own
from typer.testing import CliRunner

from conftest import CLASSES
from fvg_adapter import FeatureBank, FVGConfig, load, wrap
from fvg_adapter.audit import audit
from fvg_adapter.cli import COMMANDS, app
from fvg_adapter.data import DataError, MaskedImageFolder
from fvg_adapter.errors import FVGError
from fvg_adapter.progress import counting
from fvg_adapter.train import fit
from fvg_adapter.tuners import MMRL, CoOp, ZeroShot

ROOT = Path(__file__).parent.parent
POCKET = ROOT / "examples" / "pocket"


def info(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["info", *map(str, arguments)])


# -- info about what is no adapter of ours -----------------------------------------------------------------------------


def test_info_knows_a_base_model() -> None:
    about = json.loads(info(POCKET / "model", "--json").stdout)
    assert (about["kind"], about["model_type"]) == ("base model", "clip")
    assert "64 pixels in patches of 8" in about["what"] and "not an adapter" in about["what"]
    assert f"--model {POCKET / 'model'}" in about["next"]


def test_info_knows_a_model_that_is_no_dual_encoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    about = json.loads(info(tmp_path, "--json").stdout)
    assert "wrap takes dual encoders: clip" in about["next"]


def test_info_knows_dassl_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "seed1" / "prompt_learner"
    folder.mkdir(parents=True)
    file = folder / "model.pth.tar-50"
    torch.save({"state_dict": {"ctx": torch.zeros(4, 128)}, "epoch": 50}, file)
    for path in (file, folder):
        about = json.loads(info(path, "--json").stdout)
        assert (about["kind"], about["tuner"], about["epoch"]) == ("Dassl checkpoint", "coop", 50)
        assert about["tensors"] == {"ctx": [4, 128]}
        assert about["next"].startswith(f"fvg-adapter convert {path} --classes")
    assert "learners prompt_learner" in " ".join(info(tmp_path / "seed1").stdout.split())
    torch.save({"state_dict": {"meta_net.linear2.weight": torch.zeros(2)}}, file)
    assert json.loads(info(file, "--json").stdout)["tuner"] == "unknown"


def test_info_runs_nothing_of_a_pickle(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"state_dict": Evil()}, tmp_path / "model.pth.tar-1")
    told = info(tmp_path / "model.pth.tar-1")
    assert told.exit_code == 2 and "is refused" in told.stderr and not (tmp_path / "run").exists()


def test_info_knows_checkpoints_banks_and_peft(small_clip: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = wrap(ZeroShot(small_clip, tokenizer, NAMES), foreground="given")
    made = fit(model, Pictures(), recipe=RECIPE, output_dir=tmp_path / "run").checkpoint
    about = json.loads(info(made, "--json").stdout)
    assert about["kind"] == "training checkpoint" and "with FVG-PT at step 9, 16 tensors" in about["what"]
    FeatureBank.encode(model, Pictures(), views=2).save(tmp_path / "bank")
    about = json.loads(info(tmp_path / "bank", "--json").stdout)
    assert about["what"] == "features of 12 pictures of 3 classes, 2 views each"
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/clip"}')
    assert "written by PEFT for some/clip" in json.loads(info(tmp_path, "--json").stdout)["what"]


# -- names that are nearly right ---------------------------------------------------------------------------------------


def test_a_name_that_is_nearly_right_is_suggested(small_clip: Any, tokenizer: Any, tmp_path: Path) -> None:
    given = {name: torch.randn(16) for name in ("cat", "dog")}
    (tmp_path / "pets-fvg").mkdir()
    mmrl = MMRL(small_clip, tokenizer, CLASSES, rep_layers=[1, 2], rep_dim=8)
    mistakes = [
        (lambda: FVGConfig(lambda_distil=5), "Did you mean 'lambda_distill'"),
        (lambda: MaskedImageFolder(POCKET / "data", "train", masks="requir"), "Did you mean 'require'"),
        (lambda: MaskedImageFolder(POCKET / "data", "tests"), "Did you mean 'test'"),
        (lambda: mmrl.image_features(torch.zeros(1, 3, 32, 32), branch="bases"), "Did you mean 'base'"),
        (lambda: ZeroShot(small_clip, None, given).set_classes(["cat", "dogs"]), "Did you mean 'dog'"),
        (
            lambda: CoOp(small_clip, tokenizer, ["cat", "dog"], csc=True, ctx_init=None).set_classes(["cats"]),
            "Did you mean 'cat'",
        ),
        (lambda: changed(optimizer="adam").make_optimizer([torch.zeros(1)]), "Did you mean 'adamw'"),
        (lambda: load(tmp_path / "pet-fvg"), f"Did you mean '{tmp_path / 'pets-fvg'}'"),
    ]
    for mistake, hint in mistakes:
        with pytest.raises((FVGError, DataError)) as told:
            mistake()
        assert hint in str(told.value)


def test_an_option_of_a_tuner_is_suggested() -> None:
    options = ["--model", POCKET / "model", "--tuner-options", '{"n_ct": 8}', "--shots", 1, "--seeds", 1]
    told = CliRunner().invoke(app, ["train", str(POCKET / "data"), *map(str, options)])
    assert told.exit_code == 2 and "Did you mean 'n_ctx'?" in told.stderr


# -- the log, bars and seeds -------------------------------------------------------------------------------------------


def test_the_log_is_the_standard_one_and_quiet_by_default(
    small_clip: Any, tokenizer: Any, tmp_path: Path, caplog: Any, capfd: Any
) -> None:
    def work() -> None:
        model = wrap(ZeroShot(small_clip, tokenizer, NAMES), foreground="given")
        bank = FeatureBank.encode(model, Pictures())
        fit(model, bank, recipe=RECIPE)
        fit(model, Pictures(), recipe=RECIPE)
        model.save_pretrained(tmp_path / "saved")

    work()
    assert capfd.readouterr() == ("", "") and not caplog.records
    with caplog.at_level(logging.INFO, logger="fvg_adapter"):
        work()
    said = [record.getMessage() for record in caplog.records]
    assert {record.name.partition(".")[0] for record in caplog.records} == {"fvg_adapter"}
    assert "encoding 1 views of 12 items" in said and f"saved FVGModel to {tmp_path / 'saved'}" in said
    assert sum(line.startswith("epoch 3 of 3: loss ") for line in said) == 2  # from the bank, and by the Trainer


def test_long_work_shows_a_bar_on_a_terminal_only(
    small_clip: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap(ZeroShot(small_clip, tokenizer, NAMES), foreground="given")
    works = {
        "encoding": lambda: FeatureBank.encode(model, Pictures()),
        "auditing": lambda: audit(model, Pictures(), relevance=False),
        "epoch 0": lambda: fit(model, Pictures(), recipe=RECIPE),
    }
    for what, work in works.items():
        for terminal in (False, True):
            stream = io.StringIO()
            stream.isatty = lambda terminal=terminal: terminal  # type: ignore[method-assign, misc]
            monkeypatch.setattr(sys, "stderr", stream)
            monkeypatch.setenv("TERM", "xterm")
            work()
            assert (what in stream.getvalue()) is terminal, what
    seen: list[tuple[int, int]] = []
    FeatureBank.encode(model, Pictures(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(12, 12)]


def test_of_several_processes_one_shows_a_bar(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with counting(True, "encoding", 3) as tell:
        tell(3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    """Two runs of the command, in processes of their own."""
    common = ["--model", POCKET / "model", "--shots", 1, "--seeds", 2, "--views", 1, "--tune-epochs", 1, "--epochs", 1]
    files = []
    for name in ("one", "other"):
        command = [sys.executable, "-m", "fvg_adapter.cli", "train", POCKET / "data", *common, "--no-controls"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(len(name))}
        subprocess.run([*map(str, command), "--output", str(tmp_path / name)], check=True, env=environment, timeout=300)
        folder = tmp_path / name / "adapter"
        files.append({f.name: f.read_bytes() for f in folder.glob("*.safetensors")})
    assert files[0] == files[1] and len(files[0]) == 2


def test_seeds_decide_the_bits(small_clip: Any, tokenizer: Any) -> None:
    def trained(seed: int) -> Any:
        torch.manual_seed(seed)
        model = wrap(ZeroShot(small_clip, tokenizer, NAMES), foreground="given")
        fit(model, Pictures(noise=0.3), recipe=RECIPE, seed=seed)
        return own(model)

    assert distance(trained(1), trained(1)) == 0.0
    assert distance(trained(1), trained(2)) > 0.0


# -- shell completion --------------------------------------------------------------------------------------------------


def test_the_help_of_all_reads_no_command() -> None:
    code = (
        "import sys; from fvg_adapter.cli import app; app(['--help'], standalone_mode=False); "
        "print([m for m in sys.modules if m.startswith('fvg_adapter.cli.')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    shown, _, modules = found.stdout.rstrip().rpartition("\n")
    assert modules == "[]" and all(name in shown for name in COMMANDS)


def test_the_nearest_command_is_named() -> None:
    found = CliRunner().invoke(app, ["audt"])
    assert found.exit_code == 2 and "'audit'" in found.output


def complete(shell: str, words: str, **more: str) -> str:
    """What the command answers to a shell that asks how a line could go on."""
    code = "from fvg_adapter.cli import app; app(prog_name='fvg-adapter')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_FVG_ADAPTER_COMPLETE": f"complete_{shell}", **more}
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment | asked, capture_output=True, text=True, timeout=60
    ).stdout


def test_commands_and_options_complete() -> None:
    assert complete("bash", "fvg-adapter tr").split() == ["train"]
    assert {"train", "eval", "predict", "info", "convert", "audit"} <= set(complete("bash", "fvg-adapter ").split())
    assert complete("bash", "fvg-adapter train --tune-e").split() == ["--tune-epochs"]
    more = {"_TYPER_COMPLETE_ARGS": "fvg-adapter au", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert "audit" in complete("zsh", "", **more)
    assert "audit" in complete("fish", "", **more)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_command(shell: str) -> None:
    code = "from fvg_adapter.cli import app; app(prog_name='fvg-adapter')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code, "--show-completion", shell], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0 and "fvg-adapter" in found.stdout and "_FVG_ADAPTER_COMPLETE" in found.stdout


def test_bash_completes_after_installation(tmp_path: Path) -> None:
    """A real bash, with what --install-completion wrote into its home."""
    command = tmp_path / "bin" / "fvg-adapter"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fvg_adapter.cli "$@"\n')
    command.chmod(0o755)
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    subprocess.run(["fvg-adapter", "--install-completion", "bash"], env=environment, check=True, capture_output=True)
    assert ".bash_completions" in (tmp_path / ".bashrc").read_text("utf-8")
    script = """
    source ~/.bashrc
    COMP_WORDS=(fvg-adapter con) COMP_CWORD=1
    $(complete -p fvg-adapter | sed 's/.*-F \\([^ ]*\\).*/\\1/') fvg-adapter con fvg-adapter
    echo "${COMPREPLY[@]}"
    """
    found = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == ["convert"], found.stderr
