"""Pushing and loading over HTTP inside the test's own process: quick, and every line of ours can be watched.

The client reads its settings once on import; here they are put in their places. What depends on how a real process is
set up (tokens, caches, offline mode, two machines at once) is in test_hub and test_hub_sharing.
"""

from __future__ import annotations

import errno
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, LoopbackHub, Repo, serving
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from test_card import RESULTS
from torch import Tensor
from transformers import CLIPModel

from conftest import CLASSES, NEW_CLASSES
from fvg_adapter import FVGModel, load, wrap
from fvg_adapter.errors import FVGError
from fvg_adapter.hub import push_folder, update_card
from fvg_adapter.publishing import ATTEMPTS, _way_out, config_to_push
from fvg_adapter.tuners import CoOp

OURS = {"README.md", "config.json", "fvg_heads.safetensors", "tuner.safetensors"}
LOGIN = {"token": TOKEN}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub that this process's client talks to."""
    with serving(regular=("me/x",), mute=("me/cut",)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture
def model(small_clip: CLIPModel, tokenizer: Any) -> FVGModel:
    torch.manual_seed(0)
    return wrap(CoOp(small_clip, tokenizer, CLASSES, ctx_init=""), foreground="given").eval()


def files(hub: LoopbackHub, name: str, revision: str = "main") -> dict[str, bytes]:
    return hub.repos[name].files(revision)


def config_of(hub: LoopbackHub, name: str, revision: str = "main") -> dict[str, Any]:
    return json.loads(files(hub, name, revision)["config.json"])


def upload(hub: LoopbackHub, name: str, **changed: bytes | None) -> None:
    """What somebody else does to a repository; None takes a file away. `__` stands for the dot."""
    repo = hub.repos.setdefault(name, Repo(name, private=False))
    new = {**repo.files(), **{k.replace("__", "."): v for k, v in changed.items()}}
    repo.commit("main", {k: v for k, v in new.items() if v is not None})


def moved(model: FVGModel) -> FVGModel:
    with torch.no_grad():
        model.visual_adapter.up.weight.add_(0.1)
    return model


# -- pushing -----------------------------------------------------------------------------------------------------------


def test_pushed_and_loaded_by_id(
    hub: LoopbackHub, model: FVGModel, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor, caplog: Any
) -> None:
    with caplog.at_level(logging.INFO, logger="fvg_adapter"):
        url = model.push_to_hub("me/x", **LOGIN)
    first = hub.repos["me/x"].sha("main")
    assert url == f"{hub.url}/me/x/commit/{first}"
    assert f"pushed FVGModel to {url}" in caplog.messages
    assert set(files(hub, "me/x")) == {*OURS, ".gitattributes"} and not hub.repos["me/x"].private
    assert hub.repos["me/x"].messages == ["Upload with fvg_adapter"]
    with torch.no_grad():
        before = model(pixels).logits
        after = moved(model)(pixels).logits
    model.push_to_hub("me/x", commit_message="Moved", **LOGIN)
    assert hub.repos["me/x"].messages[-1] == "Moved"
    assert not torch.equal(before, after)
    for revision, expected in ((None, after), (first, before)):
        loaded = load("me/x", small_clip, revision=revision, tokenizer=tokenizer)
        assert isinstance(loaded, FVGModel) and not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded(pixels).logits, expected)
        loaded.release()
    other = load("me/x", small_clip, NEW_CLASSES, tokenizer=tokenizer)
    assert other.classes == tuple(NEW_CLASSES)


def test_what_is_said_of_a_push_reaches_the_hub(hub: LoopbackHub, model: FVGModel, tmp_path: Path) -> None:
    Image.new("RGB", (12, 8), "red").save(tmp_path / "overlay.png")
    about = {"results": RESULTS, "picture": tmp_path / "overlay.png", "dataset": "me/noise", "license": "mit"}
    model.push_to_hub("me/x", private=True, **about, **LOGIN)
    assert hub.repos["me/x"].private
    found = config_of(hub, "me/x")["about"]
    assert (found["dataset"], found["license"]) == ("me/noise", "mit") and found["results"]
    assert files(hub, "me/x")["attention.png"].startswith(b"\x89PNG")
    card = files(hub, "me/x")["README.md"].decode()
    assert "license: mit" in card and "me/noise" in card and "83.0" in card and "attention.png" in card
    with pytest.raises(FVGError, match="could not be pushed to the Hub: .*hf auth login"):
        moved(model).push_to_hub("me/x", token="hf_of_nobody")
    with pytest.raises(FVGError, match="could not be loaded from the Hub"):
        load("me/x", model.tuner.clip)
    assert load("me/x", model.tuner.clip, tokenizer=model.tuner.tokenizer, **LOGIN).classes == tuple(CLASSES)


def test_branches_proposals_and_parents(hub: LoopbackHub, model: FVGModel) -> None:
    model.push_to_hub("me/x", **LOGIN)
    repo = hub.repos["me/x"]
    first, card = repo.sha("main"), repo.files()["README.md"]
    for _ in range(2):  # the branch is there the second time
        moved(model).push_to_hub("me/x", branch="warm", **LOGIN)
    assert repo.sha("main") == first and repo.sha("warm") != first
    assert b'revision="warm"' in repo.files("warm")["README.md"] and b"revision=" not in card
    repo.commit("warm", {**repo.files("warm"), "README.md": b"# Theirs"})
    moved(model).push_to_hub("me/x", branch="warm", **LOGIN)  # edited on the branch, not on main
    assert repo.files("warm")["README.md"] == b"# Theirs" and repo.files()["README.md"] == card
    url = moved(model).push_to_hub("me/x", create_pr=True, **LOGIN)
    assert set(repo.refs) == {"main", "warm", "refs/pr/1"} and repo.sha("main") == first
    assert repo.sha("refs/pr/1") in url
    moved(model).push_to_hub("me/x", parent_commit=first, **LOGIN)
    second = repo.sha("main")
    with pytest.raises(FVGError, match=rf"'me/x' could not be pushed: another push.*{first!r} is not the last"):
        moved(model).push_to_hub("me/x", parent_commit=first, **LOGIN)
    assert repo.sha("main") == second != first


@pytest.mark.parametrize("times", [1, ATTEMPTS - 1, ATTEMPTS])
def test_a_push_that_is_overtaken_starts_over(hub: LoopbackHub, model: FVGModel, times: int) -> None:
    model.push_to_hub("me/x", **LOGIN)
    repo, left = hub.repos["me/x"], [times]

    def come_in_between(repo: Repo) -> None:
        left[0] -= 1
        if left[0]:
            hub.meanwhile["me/x", "mine"] = come_in_between
        repo.commit("main", {**repo.files(), "notes.txt": str(left[0]).encode()})

    hub.meanwhile["me/x", "mine"] = come_in_between
    moved(model)
    if times == ATTEMPTS:
        with pytest.raises(FVGError, match=rf"came in between {ATTEMPTS} times"):
            model.push_to_hub("me/x", commit_message="mine", **LOGIN)
        assert "mine" not in repo.messages
        return
    model.push_to_hub("me/x", commit_message="mine", **LOGIN)
    assert repo.messages[-1] == "mine" and repo.files()["notes.txt"] == b"0"  # on top of what came in between
    assert left == [0]


def test_what_cannot_be_pushed_says_what_to_do(hub: LoopbackHub, model: FVGModel) -> None:
    for name, options, said in [
        ("me/cut", {}, "'me/cut' could not be pushed to the Hub: .*"),
        ("me/a/b", {}, "Give an id like 'me/pets-fvg', and a token that may write there"),
        ("me/odd", {"license": "nobody-knows"}, "The Hub refuses the card's header: change what it names"),
    ]:
        with pytest.raises(FVGError, match=said) as raised:
            model.push_to_hub(name, **options, **LOGIN)
        assert not str(raised.value).count("None") and ".. " not in str(raised.value)


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("Xet is not there", "HF_HUB_DISABLE_XET=1"),
        ("bad Metadata", "refuses the card's header"),
        ("no YAML", "refuses the card's header"),
        ("Connection refused", "Check the connection"),
        ("we are OFFLINE", "Check the connection"),
        ("401 Unauthorized", "hf auth login"),
    ],
)
def test_advice(said: str, advice: str) -> None:
    assert advice in _way_out(said)


def test_an_upload_that_fails_names_its_cause(
    hub: LoopbackHub, model: FVGModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error while uploading.") from OSError("the disk\nof the Hub is full.")

    monkeypatch.setattr("fvg_adapter.publishing.HfApi.create_commit", fails)
    said = r"Error while uploading\. the disk of the Hub is full\. Give an id"
    with pytest.raises(FVGError, match=said) as raised:
        model.push_to_hub("me/x", **LOGIN)
    assert isinstance(raised.value.__cause__, RuntimeError)

    def refuses(*_: Any, **__: Any) -> None:
        raise KeyError("not of the Hub")  # what is no failure of the Hub is not dressed up as one

    monkeypatch.setattr("fvg_adapter.publishing.HfApi.create_commit", refuses)
    with pytest.raises(KeyError):
        model.push_to_hub("me/x", **LOGIN)


def test_a_refused_commit_is_not_tried_again(hub: LoopbackHub, model: FVGModel, monkeypatch: Any) -> None:
    model.push_to_hub("me/x", **LOGIN)
    asked = len(hub.requests)
    with pytest.raises(FVGError, match="refuses the card's header") as raised:
        model.push_to_hub("me/x", license="nobody-knows", **LOGIN)
    assert isinstance(raised.value.__cause__, (HfHubHTTPError, ValueError))
    assert sum("/commit/" in line for line in hub.requests[asked:]) <= 1


# -- cards -------------------------------------------------------------------------------------------------------------


def test_whose_card_goes_up(hub: LoopbackHub, model: FVGModel, tmp_path: Path, caplog: Any) -> None:
    def pushed(*expected: str) -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            push_folder(folder, "me/x", **LOGIN)
        said = [str(w.message) for w in caught if w.category is UserWarning]
        assert len(said) == len(expected), said
        for message, part in zip(said, expected, strict=True):
            assert part in message
        return files(hub, "me/x")["README.md"].decode()

    folder = model.save_pretrained(tmp_path / "a")
    assert 'load("me/x"' in pushed()  # made, for this repository
    (folder / "README.md").write_text("# Mine\n")
    assert pushed() == "# Mine\n"  # edited here, made there
    moved(model).save_pretrained(folder)
    assert pushed() == "# Mine\n"  # both the same edit: nothing to tell
    upload(hub, "me/x", README__md=b"# Theirs\n")
    assert pushed("both the folder's README.md and the card of me/x on the Hub were edited") == "# Theirs\n"
    (folder / "README.md").unlink()
    model.save_pretrained(folder)
    with caplog.at_level(logging.INFO, logger="fvg_adapter"):
        assert pushed() == "# Theirs\n"  # made here, edited there
    assert "the card of me/x on the Hub was edited and is kept as it is; delete it to have one made." in caplog.messages
    upload(hub, "me/x", README__md=b"---\ntags: [\n---\n# Theirs\n")
    assert "# Theirs" in pushed("the card of me/x on the Hub was kept as it is, but its YAML header is broken")
    upload(hub, "me/x", README__md=None)
    (folder / "README.md").write_text("---\ntags: [\n---\n# Mine\n")
    broken = r"the folder's README.md has a broken YAML header"
    assert 'load("me/x"' in pushed(broken)
    assert not any((tmp_path / "cache").rglob("README.md"))  # cards are read without a trace


def test_a_card_that_is_given(hub: LoopbackHub, model: FVGModel, tmp_path: Path) -> None:
    card = tmp_path / "mine.md"
    card.write_text("---\nlicense: mit\n---\n# Größe", "utf-8")
    model.push_to_hub("me/x", card=card, **LOGIN)
    upload(hub, "me/x", README__md=b"# Theirs")
    moved(model).push_to_hub("me/x", card=str(card), **LOGIN)
    assert files(hub, "me/x")["README.md"] == card.read_bytes()
    for content, said in [
        (b"---\nlicense: [mit\n---\n", r"mine.md has a broken YAML header \(.+\); mend .* Nothing was pushed"),
        (b"---\nlicense: mit\n", "never closed"),
        (b"\xff\xfe", "mine.md cannot be read: .*; give a Markdown file in UTF-8"),
        (None, "mine.md cannot be read"),
    ]:
        card.unlink() if content is None else card.write_bytes(content)
        with pytest.raises(FVGError, match=said):
            model.push_to_hub("me/unborn", card=card, **LOGIN)
    assert "me/unborn" not in hub.repos


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_pushed_as_it_was_saved(hub: LoopbackHub, model: FVGModel, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "a", license="mit")
    (folder / "private.txt").write_text("mine")
    url = push_folder(str(folder), "me/x", private=True, commit_message="From a folder", **LOGIN)
    assert hub.repos["me/x"].sha("main") in url and hub.repos["me/x"].private
    assert hub.repos["me/x"].messages == ["From a folder"]
    there = files(hub, "me/x")
    assert set(there) == {*OURS, ".gitattributes"}
    for name in ("fvg_heads.safetensors", "tuner.safetensors"):
        assert there[name] == (folder / name).read_bytes()
    assert there["config.json"].endswith(b"}\n") and config_of(hub, "me/x")["about"]["license"] == "mit"
    heads = folder / "fvg_heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-10])
    with pytest.raises(FVGError, match="no whole safetensors file"):
        push_folder(folder, "me/never", **LOGIN)
    with pytest.raises(FVGError, match="has no config.json"):
        push_folder(tmp_path, "me/never", **LOGIN)
    assert "me/never" not in hub.repos


def test_paths_and_strange_pictures_stay_here(model: FVGModel, tmp_path: Path) -> None:
    Image.new("RGB", (12, 8), "red").save(tmp_path / "overlay.png")
    folder = model.save_pretrained(tmp_path / "a", picture=tmp_path / "overlay.png", license="mit")
    config = json.loads((folder / "config.json").read_text())
    config["base_model"]["path"] = "/home/somebody/clip"
    (folder / "config.json").write_text(json.dumps(config))
    found = config_to_push(folder)
    assert "path" not in found["base_model"]
    del config["base_model"]["path"]
    (folder / "config.json").write_text(json.dumps(config))
    assert config_to_push(folder)["base_model"] == found["base_model"]  # there is none where the base is on the Hub
    assert found["about"]["picture"] and found["about"]["license"] == "mit"
    (folder / "attention.png").write_bytes(b"another")
    assert "picture" not in config_to_push(folder)["about"]
    (folder / "attention.png").unlink()
    assert config_to_push(folder)["about"].keys() == {"license", "weights"}


def test_a_card_is_updated_alone(model: FVGModel, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert update_card(str(folder), license="mit", dataset="pets") == folder
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert (
        after["fvg_heads.safetensors"] == before["fvg_heads.safetensors"] and after["README.md"] != before["README.md"]
    )
    about = json.loads(after["config.json"])["about"]
    assert (about["license"], about["dataset"]) == ("mit", "pets")
    update_card(folder, license="apache-2.0")
    about = json.loads((folder / "config.json").read_text())["about"]
    assert (about["license"], about["dataset"]) == ("apache-2.0", "pets")


def test_a_folder_that_says_nothing_of_its_card_gets_one(model: FVGModel, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    del config["about"]
    (folder / "config.json").write_text(json.dumps(config))
    update_card(folder, license="mit")
    assert json.loads((folder / "config.json").read_text())["about"]["license"] == "mit"


def test_a_disk_that_fails_is_named(model: FVGModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model.save_pretrained(tmp_path / "a")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fvg_adapter.hub.settle", full)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FVGError, match=f"^the card of {folder} could not be written: .*No space left.*It is as it was"):
        update_card(folder, license="mit")
    with pytest.raises(FVGError, match=f"^what a killed save left in {folder} could not be finished: .*No space left"):
        push_folder(folder, "me/x")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# -- loading -----------------------------------------------------------------------------------------------------------


def test_what_lies_there_instead(hub: LoopbackHub, model: FVGModel, tokenizer: Any) -> None:
    clip = model.tuner.clip
    model.push_to_hub("me/whole", **LOGIN)
    whole = files(hub, "me/whole")

    def refused(said: str, **there: bytes) -> None:
        name = f"me/case{len(hub.repos)}"
        upload(hub, name, **there)
        with pytest.raises(FVGError, match=said):
            load(name, clip, tokenizer=tokenizer)

    refused("the Hub repository 'me/case.' has no config.json; nothing was put there by push_to_hub.$", notes__txt=b"")
    pickles = {f"{n}__bin": b"" for n in "abcd"}
    refused(r"push_to_hub. It holds pickle files \(a.bin, b.bin, c.bin\), which can run code", **pickles)
    refused("It holds a PEFT adapter: give PeftModel", adapter_config__json=b"{}")
    refused(
        "has no tuner.safetensors, which its config.json lists; copy or download the whole folder. It holds pickle",
        config__json=whole["config.json"],
        fvg_heads__safetensors=whole["fvg_heads.safetensors"],
        tuner__bin=b"",
    )
    first = hub.repos["me/whole"].sha("main")
    upload(hub, "me/whole", tuner__safetensors=None)
    upload(hub, "me/whole", tuner__pt=b"")
    without, with_pickle = list(hub.repos["me/whole"].commits)[-2:]
    for revision, more in (
        (without, "whole folder.$"),
        (with_pickle, r"whole folder. It holds pickle files \(tuner.pt"),
    ):
        with pytest.raises(FVGError, match=more):
            load("me/whole", clip, tokenizer=tokenizer, revision=revision)
    load("me/whole", clip, tokenizer=tokenizer, revision=first)
    with pytest.raises(
        FVGError, match=r"'me/absent' is no folder here.* could not be loaded from the Hub: [^']*\. Check"
    ):
        load("me/absent", clip)
    with pytest.raises(FVGError, match="could not be loaded from the Hub at revision 'no-such-branch'"):
        load("me/whole", clip, revision="no-such-branch")


def test_a_config_on_the_hub_may_name_no_folder(
    hub: LoopbackHub, model: FVGModel, tokenizer: Any, tmp_path: Path
) -> None:
    model.push_to_hub("me/x", **LOGIN)
    config = config_of(hub, "me/x")
    config["base_model"] |= {"id": "local", "path": str(tmp_path)}
    upload(hub, "me/x", config__json=json.dumps(config).encode())
    with pytest.raises(FVGError, match=rf"the config of me/x names {str(tmp_path)!r} as its base model, a folder on"):
        load("me/x", model.tuner.clip, tokenizer=tokenizer)


def test_settings_of_the_client_reach_it(hub: LoopbackHub, model: FVGModel, tokenizer: Any, tmp_path: Path) -> None:
    model.push_to_hub("me/x", **LOGIN)
    with pytest.raises(FVGError, match="could not be loaded from the Hub"):
        load("me/x", model.tuner.clip, tokenizer=tokenizer, local_files_only=True)
    own = tmp_path / "own"
    load("me/x", model.tuner.clip, tokenizer=tokenizer, cache_dir=own)
    fetched = {path.name for path in own.rglob("snapshots/*/*")}
    assert fetched == OURS - {"README.md"} and not (tmp_path / "cache").exists()  # only what is read
    asked = len(hub.requests)
    load("me/x", model.tuner.clip, tokenizer=tokenizer, cache_dir=own, local_files_only=True)
    (lost,) = own.rglob("snapshots/*/tuner.safetensors")
    lost.unlink()
    with pytest.raises(FVGError, match="tuner.safetensors"):  # newer clients find out by themselves
        load("me/x", model.tuner.clip, tokenizer=tokenizer, cache_dir=own, local_files_only=True)
    assert len(hub.requests) == asked
