"""Sharing over real HTTP: train, push with a card, load by the id alone; and everything that goes wrong on the way.

This file is the tests and the script of the processes. `author` trains and pushes, logged in. `reader` is a machine
that knows the id alone; `cut_off` is the same machine when the Hub is gone. `racers` push at the same time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import urllib.request
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_process import Found, Report, finish, logits, message, own_base, prompts, run, start, work
from hub_server import TOKEN, LoopbackHub, card_problems, serving
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from conftest import CLASSES, GOLDEN, NEW_CLASSES
from fvg_adapter import evaluate, load, wrap
from fvg_adapter.cli import app
from fvg_adapter.hub import push_folder, update_card
from fvg_adapter.tuners import CoOp

NEW_CLIENT = int(version("huggingface_hub").split(".")[0]) >= 1
BROKEN = b"---\ntags: [\n---\n# Broken on the Hub"


class Noise(list[dict[str, Tensor]]):
    """Pictures of nothing, with labels and masks."""

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes
        generator = torch.Generator().manual_seed(len(classes))
        mask = torch.zeros(1, 64, 64)
        mask[:, 8:48, 8:48] = 1
        for label in range(len(classes)):
            pixels = torch.randn(3, 64, 64, generator=generator)
            self.append({"pixel_values": pixels, "labels": torch.tensor(label), "foreground_mask": mask})


def trained() -> tuple[Any, dict[str, float]]:
    """CoOp and FVG-PT after some steps on noise, and their figures on it."""
    torch.manual_seed(0)
    pictures = Noise(CLASSES)
    pixels, labels, masks = (torch.stack([p[key] for p in pictures]) for key in pictures[0])
    tuner = CoOp(*own_base("me/clip"), CLASSES)
    optimizer = torch.optim.SGD(tuner.trainable_parameters(), lr=0.5)
    for _ in range(2):
        tuner(pixels, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = wrap(tuner, foreground="given")
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.5)
    for _ in range(2):
        model(pixels, labels, masks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), evaluate(model, pictures, Noise(NEW_CLASSES))


def run_page() -> None:
    """The blocks of the page on sharing, in order, its base model being the tiny one."""
    page = (Path(__file__).parent.parent / "docs/howto/sharing.md").read_text("utf-8")
    names: dict[str, Any] = {"__name__": "page"}
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", page, re.DOTALL):
        if language == "python":
            exec(compile(block, "docs/howto/sharing.md", "exec"), names)
        else:
            for line in block.splitlines():
                done = CliRunner().invoke(app, line.split()[1:])
                assert done.exit_code == 0, done.stderr


# -- the processes -----------------------------------------------------------------------------------------------------


def author(folder: Path) -> Found:
    """Logged in."""
    from huggingface_hub import EvalResult, HfApi, ModelCard

    warnings.simplefilter("ignore")
    api = HfApi()
    for name in ("me/clip", "openai/clip-vit-base-patch16"):
        api.create_repo(name)
        for part in ("model", "tokenizer"):
            api.upload_folder(repo_id=name, folder_path=GOLDEN / part)
    run_page()
    model, figures = trained()
    report: Report = {"figures": figures, "learned": float(model.tuner.ctx.std())}
    Image.new("RGB", (12, 8), "red").save(folder / "overlay.png")
    everything = {"results": figures, "picture": folder / "overlay.png", "dataset": "me/noise", "license": "mit"}
    model.push_to_hub("me/fvg", commit_message="With figures", **everything)
    found = {"fvg": logits(model), "fvg-new": logits(model, NEW_CLASSES), "prompts": logits(model.tuner)}
    found["fvg-both"] = logits(model, [*CLASSES[:2], *NEW_CLASSES[:2]])
    model.tuner.push_to_hub("me/prompts", private=True, license="mit")

    card = ModelCard.load("me/fvg")  # with huggingface_hub's own tools, from the Hub
    if NEW_CLIENT:  # before, it asks huggingface.co whatever HF_ENDPOINT says; a push asks the loopback anyway
        card.validate()
    report["card"] = {**card.data.to_dict(), "picture": "](attention.png)" in card.text}
    same = [EvalResult(**vars(result)) for result in card.data.eval_results]
    report["values"] = [result.metric_value for result in same]

    local = model.save_pretrained(folder / "saved", results=figures)
    api.create_repo("me/copied")
    report["pushed folder"] = push_folder(local, "me/copied")
    (local / "fvg_heads.safetensors").write_bytes((local / "fvg_heads.safetensors").read_bytes()[:-50])
    report["truncated folder"] = message(lambda: push_folder(local, "me/copied"))
    model.save_pretrained(local)

    told = CliRunner().invoke(app, ["push", str(local), "me/by-command", "--private", "--license", "mit", "--json"])
    report["command"] = json.loads(told.stdout)
    report["mistake"] = CliRunner().invoke(app, ["push", str(folder / "home"), "me/by-command"]).stderr

    # cards of people, on the Hub and here
    for name in ("me/edited", "me/broken", "me/meanwhile", "me/follows"):
        model.push_to_hub(name)
    api.upload_file(repo_id="me/edited", path_in_repo="README.md", path_or_fileobj=b"# Written by hand")
    with torch.no_grad():
        model.visual_adapter.up.weight.add_(0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.push_to_hub("me/edited")
        report["warned of an edit"] = [str(w.message) for w in caught if w.category is UserWarning]
        model.push_to_hub("me/broken", commit_message="overtaken")  # the server breaks the header in between
        report["warned of a header"] = [str(w.message) for w in caught if "header" in str(w.message)]
    (folder / "mine.md").write_text("---\nlicense: mit\n---\n# A card of mine")
    (folder / "bad.md").write_text("---\nlicense: [mit\n---\n# A card of mine")
    report["bad card"] = message(lambda: model.push_to_hub("me/unborn", card=folder / "bad.md"))
    report["absent card"] = message(lambda: model.push_to_hub("me/unborn", card=folder / "absent.md"))
    report["refused licence"] = message(lambda: model.push_to_hub("me/odd", license="nobody-knows"))
    model.push_to_hub("me/given", card=folder / "mine.md")
    (local / "README.md").write_text("# Edited in the folder")
    push_folder(local, "me/from-folder")
    (local / "README.md").write_text("---\ntags: [\n---\n# Broken in the folder")
    push_folder(local, "me/mended")
    report["kept here"] = (local / "README.md").read_text()

    # pushes that are overtaken, and one that loses its end
    model.push_to_hub("me/meanwhile", commit_message="overtaken")  # the server edits the card in between
    first = api.repo_info("me/follows").sha
    model.push_to_hub("me/follows", license="mit", parent_commit=first)
    report["overtaken"] = message(lambda: model.push_to_hub("me/follows", license="apache-2.0", parent_commit=first))
    before = {path.name: path.read_bytes() for path in local.iterdir()}
    report["short upload"] = message(lambda: model.push_to_hub("me/short"))
    update_card(local, license="mit")
    report["short push"] = message(lambda: push_folder(local, "me/never"))
    unchanged = [name for name, data in before.items() if name != "config.json" and (local / name).read_bytes() == data]
    report["unchanged"] = sorted(unchanged)
    report["short, again"] = model.push_to_hub("me/short")
    found["moved"] = logits(model)

    # what others put there
    for name in ("me/pickled", "me/disguised", "me/bert", "me/cut", "me/gone"):
        model.push_to_hub(name)
    torch.save({"x": torch.zeros(1)}, folder / "heads.bin")
    pickle = {"path_or_fileobj": folder / "heads.bin"}
    api.upload_file(repo_id="me/pickled", path_in_repo="fvg_heads.bin", **pickle)
    api.upload_file(repo_id="me/disguised", path_in_repo="fvg_heads.safetensors", **pickle)
    api.upload_file(repo_id="me/bert", path_in_repo="config.json", path_or_fileobj=b'{"model_type": "bert"}')
    api.create_repo("me/only-pickle")
    api.upload_file(repo_id="me/only-pickle", path_in_repo="pytorch_model.bin", **pickle)
    api.create_repo("me/peft")
    api.upload_file(repo_id="me/peft", path_in_repo="adapter_config.json", path_or_fileobj=b"{}")
    return report, found


def reader(folder: Path) -> Found:
    """Knows ids alone, and is not logged in."""
    import contextlib
    import io

    from huggingface_hub import ModelCard

    model: Any = load("me/fvg")
    found = {"fvg": logits(model), "fvg-new": logits(load("me/fvg", classes=NEW_CLASSES))}
    found["fvg-both"] = logits(model, [*CLASSES[:2], *NEW_CLASSES[:2]])
    found["prompts"] = logits(load("me/prompts", token=TOKEN))
    found["moved"] = logits(load("me/short"))
    (snippet,) = re.findall(r"```python\n(.*?)```", ModelCard.load("me/fvg").text, re.DOTALL)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(snippet, "card of me/fvg", "exec"), {})
    report: Report = {"snippet": snippet, "said": said.getvalue(), "errors": {}}
    names = ["unknown", "prompts", "pickled", "disguised", "only-pickle", "bert", "peft"]
    clip, tokenizer = model.tuner.clip, model.tuner.tokenizer
    empty = {"cache_dir": folder / "empty"}
    for name in names:
        report["errors"][name] = message(lambda name=name: load(f"me/{name}", clip=clip, tokenizer=tokenizer, **empty))
    report["errors"]["revision"] = message(lambda: load("me/fvg", revision="nowhere"))

    if not NEW_CLIENT:  # huggingface_hub 0.36 gives up at the first interruption; the next attempt goes on
        report["errors"]["cut"] = message(lambda: load("me/cut", clip=clip, tokenizer=tokenizer))
    found["cut"] = logits(load("me/cut", clip=clip, tokenizer=tokenizer))  # broken off once: goes on in the middle
    report["errors"]["gone"] = message(lambda: load("me/gone", clip=clip, tokenizer=tokenizer))
    kept = Path(os.environ["HF_HOME"]) / "hub/models--me--gone"
    report["there"] = sorted(path.name for path in kept.glob("snapshots/*/*"))
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/heal").close()
    found["gone"] = logits(load("me/gone", clip=clip, tokenizer=tokenizer))  # the Hub is well again
    again = load("me/fvg", clip=clip, tokenizer=tokenizer)
    again.save_pretrained(folder / "again")
    report["figures"] = json.loads((folder / "again/config.json").read_text())["about"]["results"]["rows"]
    return report, found


def cut_off(folder: Path) -> Found:
    """The reader, when nothing answers at the Hub's address; HF_HUB_OFFLINE is not set."""
    found = {"fvg": logits(load("me/fvg"))}
    report = {"load": message(lambda: load("me/other")), "revision": message(lambda: load("me/fvg", revision="warm"))}
    model = load("me/fvg")
    report["push"] = message(lambda: model.push_to_hub("me/fvg", token=TOKEN))
    report["whole"] = torch.equal(logits(model), found["fvg"])
    return report, found


def racers(folder: Path) -> Found:
    """One of two that push to the same repository at once; each with context vectors of its own."""
    shift = {"one": 0.1, "two": 0.2}[folder.name]
    tuner = prompts("me/clip", shift)
    report: Report = {"url": tuner.push_to_hub("me/race", commit_message=folder.name)}
    report["by xet"] = message(lambda: wrap(tuner).push_to_hub("me/lfs"))
    return report, {"prompts": logits(tuner)}


# -- the tests ---------------------------------------------------------------------------------------------------------


def edits(repo: Any) -> None:
    """Somebody edits the card while another push is under way."""
    repo.commit("main", {**repo.files(), "README.md": b"# Edited meanwhile"})


def breaks(repo: Any) -> None:
    """Somebody spoils the header of the card meanwhile."""
    repo.commit("main", {**repo.files(), "README.md": BROKEN})


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with serving(regular=("me/race",), meeting=("me/race",)) as server:
        yield server


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("author")


@pytest.fixture(scope="module")
def pushed(hub: LoopbackHub, machine: Path) -> Found:
    hub.meanwhile |= {("me/meanwhile", "overtaken"): edits, ("me/broken", "overtaken"): breaks}
    hub.truncates |= {"me/short": 1, "me/never": -1}
    return run(author, hub, machine, HF_HOME=str(machine / "home"), HF_TOKEN=TOKEN)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reader")


@pytest.fixture(scope="module")
def read(hub: LoopbackHub, pushed: Found, fresh: Path) -> tuple[Report, dict[str, Tensor], list[str]]:
    heads = "fvg_heads.safetensors"
    hub.cuts |= {f"me/cut/{heads}": 1, f"me/gone/{heads}": -1}
    before = len(hub.requests)
    return *run(reader, hub, fresh, HF_HOME=str(fresh / "home")), hub.requests[before:]


@pytest.fixture(scope="module")
def raced(hub: LoopbackHub, pushed: Found, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """Two processes at once; the second one has Xet on, as it is by default."""
    folders = [tmp_path_factory.mktemp("racers") / name for name in ("one", "two")]
    settings = {"HF_TOKEN": TOKEN}
    started = []
    for folder, xet in zip(folders, ("1", None), strict=True):
        folder.mkdir()
        home = {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": xet}
        started.append(start(racers, hub.url, folder, **settings, **home))
    return [finish(process, folder) for process, folder in zip(started, folders, strict=True)]


@pytest.mark.parametrize("name", ["fvg", "fvg-new", "fvg-both", "prompts", "moved"])
def test_trained_pushed_and_loaded_by_id_alone(name: str, pushed: Found, read: Any) -> None:
    assert torch.equal(read[1][name], pushed[1][name])
    assert read[1][name].isfinite().all()


def test_what_was_trained_is_not_where_it_began(pushed: Found) -> None:
    assert not torch.equal(pushed[1]["fvg"], pushed[1]["prompts"])
    assert not torch.equal(pushed[1]["fvg"], pushed[1]["moved"])


# -- the card ----------------------------------------------------------------------------------------------------------


def readme(hub: LoopbackHub, name: str) -> str:
    return hub.repos[name].files()["README.md"].decode()


def test_the_card_on_the_hub(hub: LoopbackHub, pushed: Found) -> None:
    report, card = pushed[0], pushed[0]["card"]
    assert (card["base_model"], card["base_model_relation"], card["license"]) == ("me/clip", "adapter", "mit")
    assert card["datasets"] == ["me/noise"] and card["picture"]
    assert report["values"][0] == round(report["figures"]["base"], 2)
    assert card["model-index"][0]["name"] == "me/fvg"
    assert hub.repos["me/fvg"].files()["attention.png"].startswith(b"\x89PNG")
    assert hub.repos["me/fvg"].messages == ["With figures"]
    revision = hub.repos["me/fvg"].files()["config.json"]
    assert json.loads(revision)["base_model"]["revision"] in readme(hub, "me/fvg")


def test_the_snippet_of_the_card_runs(read: Any) -> None:
    assert 'load("me/fvg")' in read[0]["snippet"]
    assert read[0]["said"].count("Prediction(") == 3 + 3 and "something else" in read[0]["said"]


def test_figures_stay_with_what_was_loaded(pushed: Found, read: Any) -> None:
    assert read[0]["figures"]["this adapter"]["base"] == [round(pushed[0]["figures"]["base"], 4)]


def test_every_card_is_one_that_the_hub_takes(hub: LoopbackHub, pushed: Found) -> None:
    cards = {
        name: repo.files()["README.md"].decode() for name, repo in hub.repos.items() if "README.md" in repo.files()
    }
    assert len(cards) > 12
    assert {name for name, card in cards.items() if card_problems(card)} == {"me/broken"}


def test_a_card_edited_on_the_hub_is_kept(hub: LoopbackHub, pushed: Found) -> None:
    assert readme(hub, "me/edited") == "# Written by hand"
    assert readme(hub, "me/meanwhile") == "# Edited meanwhile"
    for name in ("me/edited", "me/meanwhile"):  # and the weights did go up
        first, *_, last = [files for files in hub.repos[name].commits.values() if "fvg_heads.safetensors" in files]
        assert first["fvg_heads.safetensors"] != last["fvg_heads.safetensors"]
    assert pushed[0]["warned of an edit"] == []


def test_a_broken_header_on_the_hub_is_kept_with_a_warning(hub: LoopbackHub, pushed: Found) -> None:
    assert hub.repos["me/broken"].files()["README.md"] == BROKEN
    (said,) = pushed[0]["warned of a header"]
    assert "the card of me/broken on the Hub was kept as it is, but its YAML header is broken" in said


def test_cards_of_one_s_own(hub: LoopbackHub, pushed: Found) -> None:
    assert readme(hub, "me/given").endswith("# A card of mine")
    assert readme(hub, "me/from-folder") == "# Edited in the folder"
    assert 'load("me/mended")' in readme(hub, "me/mended") and pushed[0]["kept here"].endswith("# Broken in the folder")
    assert "bad.md has a broken YAML header" in pushed[0]["bad card"] and "Nothing was pushed" in pushed[0]["bad card"]
    assert "absent.md cannot be read" in pushed[0]["absent card"] and "me/unborn" not in hub.repos
    assert "license" in pushed[0]["refused licence"] and "could not be pushed" in pushed[0]["refused licence"]
    assert "README.md" not in hub.repos["me/odd"].files()


def test_the_command(hub: LoopbackHub, pushed: Found) -> None:
    repo = hub.repos["me/by-command"]
    assert repo.private and pushed[0]["command"] == {"repo_id": "me/by-command", "commit": commit_of(hub, repo.name)}
    assert "license: mit" in readme(hub, "me/by-command")
    assert "has no config.json" in pushed[0]["mistake"]


def commit_of(hub: LoopbackHub, name: str) -> str:
    return f"{hub.url}/{name}/commit/{hub.repos[name].refs['main']}"


def test_a_folder_is_pushed_without_its_base_model(hub: LoopbackHub, pushed: Found) -> None:
    assert pushed[0]["pushed folder"].startswith(f"{hub.url}/me/copied/commit/")
    assert "no whole safetensors file" in pushed[0]["truncated folder"]
    heads = {name: hub.repos[name].files()["fvg_heads.safetensors"] for name in ("me/copied", "me/fvg")}
    assert heads["me/copied"] == heads["me/fvg"]


# -- pushes that go wrong ----------------------------------------------------------------------------------------------


def test_two_processes_at_once_are_one_after_the_other(hub: LoopbackHub, raced: list[Found]) -> None:
    repo = hub.repos["me/race"]
    assert sorted(repo.messages) == ["one", "two"] and len(repo.commits) == 3
    assert len({report["url"] for report, _ in raced}) == 2
    commits = [files for files in repo.commits.values() if "config.json" in files]
    for files in commits:  # each is whole: its config belongs to its weights
        wanted = json.loads(files["config.json"])["sha256"]["tuner.safetensors"]
        assert hashlib.sha256(files["tuner.safetensors"]).hexdigest() == wanted
    assert commits[0]["tuner.safetensors"] != commits[1]["tuner.safetensors"]
    assert (
        sum("POST /api/models/me/race/commit" in line for line in hub.requests) == 3
    )  # one was refused, and came again


def test_without_the_variable_xet_is_used_or_named(raced: list[Found]) -> None:
    assert raced[0][0]["by xet"].startswith("no error")
    assert raced[1][0]["url"]  # nothing is large in me/race: no Xet is asked for
    said = raced[1][0]["by xet"]
    if NEW_CLIENT:
        assert "'me/lfs' could not be pushed" in said and "HF_HUB_DISABLE_XET=1" in said
    else:
        assert said.startswith("no error")  # 0.36 asks by which way to upload, and takes LFS


def test_the_page_on_sharing_did_what_it_says(hub: LoopbackHub, pushed: Found) -> None:
    repo = hub.repos["me/fruit-fvg"]
    assert set(repo.refs) == {"main", "warm", "refs/pr/1"} and hub.repos["me/secret-fvg"].private
    assert "license: mit" in readme(hub, "me/fruit-fvg") and "Trained for longer" in repo.messages
    assert "license: apache-2.0" in readme(hub, "me/fruit-again")


def test_a_push_that_has_to_follow_a_commit(hub: LoopbackHub, pushed: Found) -> None:
    said = pushed[0]["overtaken"]
    assert "'me/follows' could not be pushed: another push came in between" in said and "parent_commit" in said
    assert "license: mit" in readme(hub, "me/follows")


def test_an_upload_that_loses_its_end(hub: LoopbackHub, pushed: Found) -> None:
    for case, name in (("short upload", "me/short"), ("short push", "me/never")):
        assert f"'{name}' could not be pushed to the Hub" in pushed[0][case]
        assert "Nothing on this machine was changed" in pushed[0][case]
    assert set(hub.repos["me/never"].files()) == {".gitattributes"}  # no half of it is there
    assert pushed[0]["unchanged"] == ["README.md", "fvg_heads.safetensors", "tuner.safetensors"]
    assert pushed[0]["short, again"].startswith(f"{hub.url}/me/short/commit/")


# -- loads that go wrong -----------------------------------------------------------------------------------------------

ERRORS = {
    "unknown": ["'me/unknown'", "Repository Not Found"],
    "prompts": ["'me/prompts'", "private", "token="],
    "revision": ["'me/fvg'", "at revision 'nowhere'", "Revision Not Found"],
    "pickled": ["sha256"],
    "disguised": ["fvg_heads.safetensors", "but a pickle, which can run code", "not opened"],
    "only-pickle": ["has no config.json", "pickle files (pytorch_model.bin)", "never opened"],
    "bert": ["is the config of a base model (model_type 'bert')", "not of an adapter"],
    "peft": ["has no config.json", "PEFT adapter", "LoRA"],
    "gone": ["'me/gone'", "could not be loaded from the Hub", "connection"],
}


@pytest.mark.parametrize("case", [case for case in ERRORS if case != "pickled"])
def test_what_errors_say(case: str, read: Any) -> None:
    for part in ERRORS[case]:
        assert part in read[0]["errors"][case]


def test_a_pickle_beside_our_files_is_not_even_fetched(read: Any) -> None:
    assert read[0]["errors"]["pickled"].startswith("no error")
    assert not [line for line in read[2] if line.endswith(".bin")]


def test_an_interrupted_download_goes_on(pushed: Found, read: Any) -> None:
    for name in ("cut", "gone"):
        assert torch.equal(read[1][name], pushed[1]["moved"])
    gets = [
        line for line in read[2] if line.startswith("GET /me/cut/resolve/") and line.endswith("fvg_heads.safetensors")
    ]
    assert len(gets) == 2  # the second asked for the rest
    assert "fvg_heads.safetensors" not in read[0]["there"]  # no half of a file is ever in the cache
    again = [line for line in read[2] if line.startswith("GET /me/gone/resolve/") and "fvg_heads" not in line]
    assert len(again) == 2  # what was there already was not fetched again


def test_without_a_hub_the_cache_serves(read: Any, pushed: Found, fresh: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    process = start(cut_off, nobody, tmp_path, HF_HOME=str(fresh / "home"))
    report, found = finish(process, tmp_path)
    assert torch.equal(found["fvg"], pushed[1]["fvg"]) and report["whole"]
    assert "'me/other'" in report["load"] and "could not be loaded from the Hub" in report["load"]
    assert "at revision 'warm'" in report["revision"]
    assert "'me/fvg' could not be pushed" in report["push"] and "Nothing on this machine was changed" in report["push"]


if __name__ == "__main__":
    work(author, reader, cut_off, racers)
