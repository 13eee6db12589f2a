"""The six loops of examples/loops: what the pages show is what changes, and each program runs, before and after.

The programs push to a Hub on the loopback. huggingface_hub reads its address once, so they run in a process of their
own, which this file is the script of; it writes what it found as JSON for the tests to judge.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fvg_adapter
from examples.loops.diffs import LOOPS, MOST, PAGES, SHOWN, changed_lines, diff, refreshed

ROOT = Path(__file__).parent.parent
PROGRAMS = ROOT / "examples" / "loops"
Report = dict[str, Any]

# -- what the pages show -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOOPS)
def test_at_most_four_lines_change(name: str) -> None:
    assert 0 < changed_lines(name) <= MOST
    before, after = ((PROGRAMS / f"{name}_{when}.py").read_text("utf-8") for when in ("before", "after"))
    assert "fvg_adapter" not in before and "from fvg_adapter import wrap" in after
    assert 'push_to_hub("me/pets")' in after


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_show_what_changes(page: Path) -> None:
    text = page.read_text("utf-8")
    assert refreshed(text) == text, "run python -m examples.loops.diffs"
    assert text.count("```diff") == len(SHOWN.findall(text)), "a diff that is not made from the programs"


@pytest.mark.parametrize("page", ["README.md", "docs/howto/loops.md"])
def test_every_loop_is_shown(page: str) -> None:
    shown = [found[1] for found in SHOWN.findall((ROOT / page).read_text("utf-8"))]
    assert sorted(shown) == sorted(LOOPS)


def test_a_changed_program_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for when, loss in (("before", "loss = ce(clip(x), y)"), ("after", "loss = model(x, y).loss")):
        (tmp_path / f"plain_{when}.py").write_text(f"import torch\n\n\n{loss}\n" + "pass\n" * 5 + f"{when}\n", "utf-8")
    monkeypatch.setattr("examples.loops.diffs.HERE", tmp_path)
    assert changed_lines("plain") == 2
    assert diff("plain", 0) == ("- loss = ce(clip(x), y)\n+ loss = model(x, y).loss\n  ...\n- before\n+ after\n")
    page = "<!-- diff: plain, 0 lines around -->\n```diff\n- old\n```\n"
    assert refreshed(page) == page.replace("- old\n", diff("plain", 0))


# -- the process that runs the programs --------------------------------------------------------------------------------


class PowerCut(Exception):
    """What stops a program in the middle."""


@contextlib.contextmanager
def power_cut(calls: int) -> Iterator[None]:
    """The model's forward fails after some calls."""
    from fvg_adapter import FVGModel

    forward, left = FVGModel.forward, [calls]

    @functools.wraps(forward)
    def failing(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise PowerCut
        return forward(*args, **kwargs)

    FVGModel.forward = failing  # type: ignore[method-assign]
    try:
        yield
    finally:
        FVGModel.forward = forward  # type: ignore[method-assign]


def program(name: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Runs a program in a folder as a person would; gives its names and what it printed."""
    from accelerate.state import AcceleratorState

    folder.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (folder / "examples").symlink_to(ROOT / "examples")
    os.chdir(folder)
    AcceleratorState._reset_state(True)  # what a process of its own would not have
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        names = runpy.run_path(str(PROGRAMS / f"{name}.py"), run_name="__main__")
    return names, said.getvalue()


def wrapped_model(name: str, names: dict[str, Any]) -> Any:
    """The FVGModel of a program that has run."""
    if name == "accelerate":
        return names["accelerator"].unwrap_model(names["model"])
    model = {"lightning": "module", "dassl": "trainer"}.get(name)
    found = names["model"] if model is None else names[model].model
    return getattr(found, "_orig_mod", found)


def state(model: Any) -> dict[str, Any]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def distance(one: Any, other: Any) -> float:
    assert one.keys() == other.keys()
    return max(float((one[k].float() - other[k].float()).abs().max()) for k in one if one[k].numel())


def sizes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def run_all(folder: Path, hub: Any) -> Report:
    """Every program; then what a person would try with each of the loops."""
    import torch
    from pictures import Pictures
    from safetensors.torch import load as load_heads
    from transformers import CLIPModel, CLIPTokenizer

    from fvg_adapter import load

    report: Report = {}
    pixels = torch.stack([item["pixel_values"] for item in map(Pictures(str(DATA), "test", 1).__getitem__, range(6))])
    finals: dict[str, Any] = {}
    for name in LOOPS:
        hub.repos.clear()
        _, said = program(f"{name}_before", folder / f"{name}_before")
        report[f"{name}_before"] = {"said": said, "pushed": {k: sorted(r.files()) for k, r in hub.repos.items()}}
        hub.repos.clear()
        names, said = program(f"{name}_after", folder / f"{name}_after")
        model = wrapped_model(name, names).eval()
        finals[name] = state(model)
        pushed = {k: len(v) for k, v in hub.repos["me/pets"].files().items()}
        clip, tokenizer = CLIPModel.from_pretrained(MODEL), CLIPTokenizer.from_pretrained(MODEL)
        again = load("me/pets", clip=clip, tokenizer=tokenizer, cache_dir=folder / "cache" / name)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=name == "accelerate")  # which its model still has
        with torch.no_grad(), autocast:
            same = torch.equal(again(pixels).logits, model(pixels).logits)
        report[f"{name}_after"] = {"said": said, "pushed": pushed, "same": same, "output": sizes(Path.cwd())}
        report[name] = FURTHER[name](names, folder, finals[name]) if name in FURTHER else {}
        if name == "accelerate":
            hub.repos.clear()
            two_processes("accelerate_after", folder / "two")
            pushed = load_heads(hub.repos["me/pets"].files()["fvg_heads.safetensors"])
            report[name]["two"] = distance(pushed, finals[name])
    report["compile"] = {"distance": distance(finals["compile"], finals["plain"])}
    return report


def two_processes(name: str, folder: Path) -> None:
    """A program in two processes over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    settings = {"GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, *launcher, __file__, str(folder), name],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[:4000] + done.stderr[-4000:]


def further_trainer(names: dict[str, Any], folder: Path, final: Any) -> Report:
    from safetensors.torch import load_file

    output = Path.cwd() / "output" / "trainer"
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    best = json.loads((checkpoints[-1] / "trainer_state.json").read_text())["best_model_checkpoint"]
    kept = load_file(Path(best) / "model.safetensors")
    heads = sorted(kept)
    with contextlib.suppress(PowerCut), power_cut(calls=2 * 4 + 2):  # 3 steps and 1 batch to evaluate on an epoch
        program("trainer_after", folder / "trainer_broken")
    left = sorted(p.name for p in (Path.cwd() / "output" / "trainer").glob("checkpoint-*"))
    resumed, _ = program("trainer_after", folder / "trainer_broken")
    history = resumed["trainer"].state.log_history
    return {
        "heads": heads,
        "best": distance(kept, final),
        "left": left,
        "resumed": distance(state(resumed["model"]), final),
        "losses": [row["eval_loss"] for row in history if "eval_loss" in row],
        "unbroken": [row["eval_loss"] for row in names["trainer"].state.log_history if "eval_loss" in row],
    }


def further_lightning(names: dict[str, Any], folder: Path, final: Any) -> Report:
    import torch

    checkpoint = torch.load("output/lightning/last.ckpt", weights_only=False)
    fresh = names["FewShot"](names["few"].classes)
    fresh.load_state_dict(checkpoint["state_dict"], strict=True)
    del checkpoint["state_dict"]["model.backbone_gate.out.bias"]
    try:
        fresh.load_state_dict(checkpoint["state_dict"], strict=True)
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    with contextlib.suppress(PowerCut), power_cut(calls=1 + 4 + 1):  # a check, an epoch, a step of the next
        program("lightning_after", folder / "lightning_broken")
    saved = torch.load("output/lightning/last.ckpt", weights_only=False)
    resumed, _ = program("lightning_after", folder / "lightning_broken")
    return {
        "keys": sorted(checkpoint["state_dict"]),
        "strict": distance(state(fresh.model), final),
        "refused": refused,
        "saved_step": saved["global_step"],
        "steps": [names["trainer"].global_step, resumed["trainer"].global_step],
        "epochs": resumed["trainer"].current_epoch,
        "moved": distance(
            {k.removeprefix("model."): v for k, v in saved["state_dict"].items()}, state(resumed["module"].model)
        ),
    }


def further_accelerate(names: dict[str, Any], folder: Path, final: Any) -> Report:
    import torch

    accelerator, model = names["accelerator"], names["model"]
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(1.0)
    accelerator.load_state("output/accelerate")
    return {"restored": distance(state(accelerator.unwrap_model(model)), final)}


def further_dassl(names: dict[str, Any], folder: Path, final: Any) -> Report:
    import torch

    trainer = names["trainer"]
    with torch.no_grad():
        for parameter in trainer.model.trainable_parameters():
            parameter.add_(1.0)
    trainer.load_model(2)
    kept = torch.load("output/dassl/clip/model.pth.tar-2", weights_only=True)["state_dict"]
    return {"restored": distance(state(trainer.model), final), "keys": sorted(kept)}


FURTHER: dict[str, Callable[[dict[str, Any], Path, Any], Report]] = {
    "trainer": further_trainer,
    "lightning": further_lightning,
    "accelerate": further_accelerate,
    "dassl": further_dassl,
}
MODEL, DATA = ROOT / "examples" / "pocket" / "model", ROOT / "examples" / "pocket" / "data"

# -- the tests of the programs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What the process found."""
    return in_a_process(tmp_path_factory.mktemp("loops"), "eager")


def in_a_process(folder: Path, backend: str) -> Report:
    here = os.pathsep.join(
        [str(Path(fvg_adapter.__file__).parents[1]), str(PROGRAMS), os.environ.get("PYTHONPATH", "")]
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    environment |= {"PYTHONPATH": here, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, __file__, str(folder), backend]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-6000:]
    found: Report = json.loads((folder / "report.json").read_text("utf-8"))
    return found


@pytest.mark.parametrize("name", LOOPS)
def test_before(name: str, report: Report) -> None:
    pushed = [file for files in report[f"{name}_before"]["pushed"].values() for file in files]
    assert ("model.safetensors" in pushed) is (name != "dassl") and "fvg_heads.safetensors" not in pushed
    assert "accuracy" in report[f"{name}_before"]["said"]


@pytest.mark.parametrize("name", LOOPS)
def test_after(name: str, report: Report) -> None:
    found = report[f"{name}_after"]
    assert found["pushed"].keys() >= {"config.json", "fvg_heads.safetensors"}
    assert sum(found["pushed"].values()) < 400_000
    assert found["same"], "what comes back from the Hub answers as the trained model did"
    accuracy = re.search(r"accuracy:? ([0-9.]+)", found["said"])
    assert accuracy is not None and float(accuracy[1]) > 40  # 24 classes


def test_checkpoints_hold_only_our_tensors(report: Report) -> None:
    for name in ("trainer", "accelerate", "lightning", "dassl"):
        kept = {k: v for k, v in report[f"{name}_after"]["output"].items() if k.startswith("output")}
        assert kept and max(kept.values()) < 400_000, kept  # 34 thousand numbers and their momentum; the CLIP is 9 MB
    assert not [k for k in report["trainer"]["heads"] + report["dassl"]["keys"] if "clip" in k]


def test_trainer_goes_on_where_it_was_and_keeps_the_best(report: Report) -> None:
    found = report["trainer"]
    assert found["left"] == ["checkpoint-3", "checkpoint-6"]
    assert found["resumed"] == 0.0 and found["losses"] == found["unbroken"]
    assert found["best"] == 0.0


def test_the_trainer_keeps_what_the_forward_names(small_clip: Any, tokenizer: Any, tmp_path: Path) -> None:
    """With remove_unused_columns as it is by default: masks reach the model, other columns do not."""
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from fvg_adapter import wrap

    columns = {
        "pixel_values": torch.randn(2, 3, 32, 32).tolist(),
        "labels": [0, 1],
        "foreground_mask": torch.ones(2, 32, 32).tolist(),
        "name": ["a.jpg", "b.jpg"],
    }
    model = wrap(small_clip, tokenizer, ["cat", "dog"])
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict(columns).with_format("torch"))
    batch = next(iter(trainer.get_train_dataloader()))
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "pixel_values": (2, 3, 32, 32),
        "labels": (2,),
        "foreground_mask": (2, 32, 32),
    }


def test_lightning_goes_on_and_loads_strictly(report: Report) -> None:
    found = report["lightning"]
    assert found["strict"] == 0.0
    assert "backbone_gate.out.bias" in found["refused"] and "clip" not in found["refused"]
    assert all(key.startswith("model.") and "clip" not in key for key in found["keys"])
    assert (found["saved_step"], found["steps"], found["epochs"]) == (3, [6, 6], 2)
    assert found["moved"] > 0.0


def test_accelerate_and_dassl(report: Report) -> None:
    assert report["accelerate"]["restored"] == 0.0
    assert report["accelerate"]["two"] < 1e-5, "two processes end as one does"
    assert report["dassl"]["restored"] == 0.0


def test_a_compiled_loop_trains_to_the_same_heads(report: Report) -> None:
    assert report["compile"]["distance"] < 1e-5


def serve_and_run(folder: Path, backend: str) -> None:
    """What the process does: a Hub on the loopback, then every program."""
    from hub_server import TOKEN, serving

    with serving() as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        import torch

        torch.set_num_threads(1)
        torch.compile = functools.partial(torch.compile, backend=backend)  # type: ignore[assignment]
        found = run_all(folder, hub)
    (folder / "report.json").write_text(json.dumps(found), "utf-8")


def one_of_two(folder: Path, name: str) -> None:
    import torch

    torch.set_num_threads(1)
    program(name, folder)
    gc.collect()  # DDP in a cycle keeps the threads of gloo, and C++ aborts when they outlive the interpreter


if __name__ == "__main__":
    from pictures import Pictures

    Pictures.__init__.__defaults__ = (2,)  # two pictures a class are enough here
    (one_of_two if "RANK" in os.environ else serve_and_run)(Path(sys.argv[1]), sys.argv[2])
