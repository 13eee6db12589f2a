"""The Hub over real HTTP: this file is the tests, and the script of the processes whose client talks to a loopback hub.

`publish` pushes everything, logged in. `collect` is a machine that has nothing cached and no token. `stay_offline` is
the same machine with HF_HUB_OFFLINE=1. Each writes what it found as JSON and logits; the tests below judge it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hub_process import Report, heads, logits, message, own_base, prompts, run, work
from hub_server import TOKEN, LoopbackHub, serving
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel

from conftest import CLASSES, GOLDEN, NEW_CLASSES
from fvg_adapter import FVGModel, load
from fvg_adapter.base_models import base_model_record
from fvg_adapter.tuners import CoOp, LoRA

OURS = {"README.md", "config.json", "fvg_heads.safetensors", "tuner.safetensors"}


# -- the processes -----------------------------------------------------------------------------------------------------


def publish(folder: Path) -> tuple[Report, dict[str, Tensor]]:
    """Logged in, with everything in this folder of the machine."""
    from huggingface_hub import HfApi

    api, report, found = HfApi(), {}, {}
    for name in ("me/clip", "me/secret-clip"):
        api.create_repo(name, private="secret" in name)
        api.upload_folder(repo_id=name, folder_path=GOLDEN / "model")
        api.upload_folder(repo_id=name, folder_path=GOLDEN / "tokenizer")
    model, tuner = heads("me/clip"), prompts("me/clip")
    report["urls"] = [model.push_to_hub("me/x"), model.push_to_hub("me/x", commit_message="the same again")]
    api.upload_file(repo_id="me/x", path_in_repo="notes.bin", path_or_fileobj=b"not ours")
    model.push_to_hub("me/regular")
    tuner.push_to_hub("me/prompts")
    tuner.push_to_hub("me/copied")
    other = prompts("me/clip", shift=0.1)
    other.push_to_hub("me/prompts", branch="warm")
    other.push_to_hub("me/prompts", branch="warm")  # the branch is there now
    report["proposal"] = other.push_to_hub("me/prompts", create_pr=True)
    secret = prompts("me/secret-clip")
    secret.push_to_hub("me/secret", private=True)
    lora = LoRA(*own_base("me/clip"), CLASSES)
    with torch.no_grad():
        for parameter in lora.trainable_parameters():
            parameter.fill_(0.02)
    lora.push_to_hub("me/lora")
    found |= {"x": logits(model), "x-new": logits(model, NEW_CLASSES), "prompts": logits(tuner), "warm": logits(other)}
    found |= {"secret": logits(secret), "lora": logits(lora)}
    clip, tokenizer = own_base("me/clip")
    theirs = peft.get_peft_model(clip, peft.LoraConfig(r=3, target_modules=r".*(q_proj|v_proj)"))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.02)
    theirs.push_to_hub("me/peft")  # not by this package
    found["peft"] = logits(LoRA(theirs, tokenizer, CLASSES))

    shutil.copytree(GOLDEN / "model", folder / "clip")
    shutil.copytree(GOLDEN / "tokenizer", folder / "clip", dirs_exist_ok=True)
    local, adapted = prompts(str(folder / "clip")), LoRA(*own_base(str(folder / "clip")), CLASSES)
    local.push_to_hub("me/local")
    shutil.rmtree(folder / "clip")  # a folder that is gone was still one of this machine
    local.push_to_hub("me/gone")
    adapted.push_to_hub("me/local-lora")

    model.push_to_hub("me/truncated")
    whole = model.save_pretrained(folder / "whole") / "fvg_heads.safetensors"
    api.upload_file(repo_id="me/truncated", path_in_repo=whole.name, path_or_fileobj=whole.read_bytes()[:-100])
    api.create_repo("me/notes")
    api.upload_file(repo_id="me/notes", path_in_repo="README.md", path_or_fileobj=b"# nothing of ours")
    api.create_repo("me/orphan")
    record = json.loads((folder / "whole/config.json").read_text())
    record["base_model"] |= {"id": "me/no-clip"}
    (folder / "whole/config.json").write_text(json.dumps(record))
    api.upload_folder(repo_id="me/orphan", folder_path=folder / "whole")

    moved = load_file(GOLDEN / "model/model.safetensors")  # the base model's repository moves on; what tells models
    moved["vision_model.embeddings.position_embedding.weight"].add_(1.0)  # apart is unchanged
    save_file(moved, folder / "moved.safetensors", metadata={"format": "pt"})
    api.upload_file(repo_id="me/clip", path_in_repo="model.safetensors", path_or_fileobj=folder / "moved.safetensors")
    report["misnamed"] = message(lambda: tuner.push_to_hub("me/a/b"))
    report["broken off"] = message(lambda: tuner.push_to_hub("me/cut"))
    return report, found


def collect(folder: Path) -> tuple[Report, dict[str, Tensor]]:
    """A fresh machine, not logged in."""
    from huggingface_hub import HfApi, hf_hub_download

    model = load("me/x")  # the first thing it does
    assert isinstance(model, FVGModel)
    found = {"x": logits(model)}
    clip, tokenizer = model.tuner.clip, model.tuner.tokenizer

    def given(name: str, **options: Any) -> Any:
        return load(name, clip=clip, tokenizer=tokenizer, **options)

    found["given"] = logits(given("me/x"))
    found["x-new"] = logits(given("me/x", classes=NEW_CLASSES))
    found["regular"] = logits(FVGModel.from_pretrained("me/regular", clip, tokenizer))
    found["prompts"] = logits(CoOp.from_pretrained("me/prompts"))
    for revision in ("warm", "refs/pr/1"):
        found[revision] = logits(CoOp.from_pretrained("me/prompts", clip, tokenizer, revision=revision))
    found["lora"] = logits(load("me/lora"))
    plain = load("me/lora").detach()  # the base model of the commit that was tuned; its repository has moved on
    found["peft"] = logits(LoRA(peft.PeftModel.from_pretrained(plain, "me/peft"), tokenizer, CLASSES))
    found["secret"] = logits(load("me/secret", token=TOKEN))
    found["elsewhere"] = logits(load("me/x", cache_dir=folder / "elsewhere"))
    report: Report = {"elsewhere": sorted(path.name for path in (folder / "elsewhere").glob("models--*"))}

    report["errors"] = {
        "unknown repo": message(lambda: given("me/unknown")),
        "unknown revision": message(lambda: given("me/x", revision="nowhere")),
        "private repo": message(lambda: given("me/secret", cache_dir=folder / "none")),
        "private base": message(lambda: prompts_without_a_token(folder)),
        "not ours": message(lambda: given("me/secret-clip", token=TOKEN)),
        "nothing of ours": message(lambda: given("me/notes")),
        "truncated": message(lambda: given("me/truncated")),
        "local base": message(lambda: load("me/local")),
        "no base": message(lambda: load("me/orphan")),
        "other kind": message(lambda: CoOp.from_pretrained("me/x")),
        "push": message(lambda: model.push_to_hub("me/mine")),
    }
    cached = next((Path(os.environ["HF_HOME"]) / "hub/models--me--regular").glob("snapshots/*/fvg_heads.safetensors"))
    cached.resolve().write_bytes(cached.read_bytes()[:-100])
    report["errors"]["truncated in the cache"] = message(lambda: given("me/regular"))
    found["forced"] = logits(given("me/regular", force_download=True))

    given("me/copied")  # then a new commit, of which another program fetches the config alone
    api = HfApi(token=TOKEN)
    config = json.loads(Path(hf_hub_download("me/copied", "config.json")).read_text())
    api.upload_file(
        repo_id="me/copied", path_in_repo="config.json", path_or_fileobj=json.dumps({**config, "note": ""}).encode()
    )
    hf_hub_download("me/copied", "config.json")
    return report, found


def prompts_without_a_token(folder: Path) -> Any:
    """An adapter that is public, of a base model that is not."""
    saved = load("me/secret", token=TOKEN)
    config_folder = saved.save_pretrained(folder / "public")
    return load(config_folder, cache_dir=folder / "none")


def stay_offline(folder: Path) -> tuple[Report, dict[str, Tensor]]:
    """The fresh machine again, without a network."""
    found = {
        "x": logits(load("me/x")),
        "prompts": logits(load("me/prompts")),
        "warm": logits(load("me/prompts", revision="warm")),
        "lora": logits(load("me/lora")),
        "secret": logits(load("me/secret")),  # no token is needed for what is here
    }
    absent = message(lambda: load("me/notes2"))
    half = message(lambda: load("me/copied"))
    return {"absent": absent, "half": half}, found


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `publish` works."""
    return tmp_path_factory.mktemp("publisher")


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with serving(regular=("me/regular", "me/prompts"), mute=("me/cut",)) as server:
        yield server


@pytest.fixture(scope="module")
def published(hub: LoopbackHub, machine: Path) -> tuple[Report, dict[str, Tensor]]:
    return run(publish, hub, machine, HF_HOME=str(machine / "home"), HF_TOKEN=TOKEN)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fresh")


@pytest.fixture(scope="module")
def collected(hub: LoopbackHub, published: Any, fresh: Path) -> tuple[Report, dict[str, Tensor], list[str]]:
    before = len(hub.requests)
    return *run(collect, hub, fresh, HF_HOME=str(fresh / "home")), hub.requests[before:]


def test_ours_are_uploaded_and_nothing_else(hub: LoopbackHub, published: Any) -> None:
    assert set(hub.repos["me/x"].files()) == {*OURS, ".gitattributes", "notes.bin"}
    assert set(hub.repos["me/prompts"].files()) == {*OURS - {"fvg_heads.safetensors"}, ".gitattributes"}
    lora = {"lora/adapter_config.json", "lora/adapter_model.safetensors"}
    assert set(hub.repos["me/lora"].files()) >= lora
    assert hub.repos["me/secret"].private and not hub.repos["me/x"].private


def test_both_ways_of_uploading_store_the_same(hub: LoopbackHub, published: Any) -> None:
    large, regular = hub.repos["me/x"], hub.repos["me/regular"]
    assert large.files()["fvg_heads.safetensors"] in large.lfs and not regular.lfs
    same = OURS - {"README.md"}  # a card names its repository
    assert {k: regular.files()[k] for k in same} == {k: large.files()[k] for k in same}


def test_pushing_gives_the_address_of_the_commit(hub: LoopbackHub, published: Any) -> None:
    first, second = published[0]["urls"]
    assert re.fullmatch(rf"{hub.url}/me/x/commit/[0-9a-f]{{40}}", first)
    assert second == first  # nothing had changed, so there is no second commit
    assert [len(r.commits) for r in (hub.repos["me/x"], hub.repos["me/regular"])] == [3, 2]


def test_branches_and_proposals_leave_main_alone(hub: LoopbackHub, published: Any) -> None:
    repo = hub.repos["me/prompts"]
    assert set(repo.refs) == {"main", "warm", "refs/pr/1"}
    warm, proposed = ({k: v for k, v in repo.files(ref).items() if k != "README.md"} for ref in ("warm", "refs/pr/1"))
    assert warm == proposed != {k: v for k, v in repo.files().items() if k != "README.md"}
    assert b'revision="warm"' in repo.files("warm")["README.md"]
    assert repo.refs["refs/pr/1"] in published[0]["proposal"]


def test_no_path_of_this_machine_is_uploaded(hub: LoopbackHub, published: Any, machine: Path) -> None:
    private = {str(p) for p in (machine, Path.home(), Path(__file__).parent, sys.prefix, machine.parent)} - {"/"}
    for repo in hub.repos.values():
        for name, data in (item for commit in repo.commits.values() for item in commit.items()):
            for path in private:
                assert path.encode() not in data, f"{repo.name}/{name} names {path}"
    for name in ("me/local", "me/gone", "me/local-lora"):
        record = json.loads(hub.repos[name].files()["config.json"])["base_model"]
        assert record["id"] == "local" and "path" not in record and "tokenizer" not in record, name
    adapter = json.loads(hub.repos["me/local-lora"].files()["lora/adapter_config.json"])
    assert adapter["base_model_name_or_path"] is None
    adapter = json.loads(hub.repos["me/lora"].files()["lora/adapter_config.json"])
    assert adapter["base_model_name_or_path"] == "me/clip"


def test_the_base_model_is_recorded_by_id_and_commit(hub: LoopbackHub, published: Any) -> None:
    record = json.loads(hub.repos["me/x"].files()["config.json"])["base_model"]
    *_, first, moved = hub.repos["me/clip"].commits
    assert (record["id"], record["revision"]) == ("me/clip", first)
    assert hub.repos["me/clip"].refs["main"] == moved  # so all that is loaded below comes from an older commit
    assert "tokenizer" not in record


PAIRS = [("x", "x"), ("x-new", "x-new"), ("given", "x"), ("regular", "x"), ("forced", "x"), ("elsewhere", "x")]
PAIRS += [
    ("prompts", "prompts"),
    ("warm", "warm"),
    ("refs/pr/1", "warm"),
    ("lora", "lora"),
    ("secret", "secret"),
    ("peft", "peft"),
]


@pytest.mark.parametrize(("name", "origin"), PAIRS)
def test_a_fresh_machine_gets_bit_equal_logits(name: str, origin: str, published: Any, collected: Any) -> None:
    assert torch.equal(collected[1][name], published[1][origin])


def test_the_logits_tell_models_apart(published: Any) -> None:
    found: Mapping[str, Tensor] = published[1]
    assert not torch.equal(found["prompts"], found["warm"])
    assert not torch.equal(found["prompts"], found["x"])
    assert found["x"].shape == (2, len(CLASSES)) and found["x-new"].shape == (2, len(NEW_CLASSES))


def test_only_our_files_are_fetched(collected: Any) -> None:
    fetched = {line.split("/")[-1] for line in collected[2] if line.startswith("GET /me/x/resolve/")}
    assert fetched == OURS - {"README.md"}


def test_base_model_and_tokenizer_are_fetched_by_commit(hub: LoopbackHub, collected: Any) -> None:
    fetched = {line.split("/")[4] for line in collected[2] if line.startswith("GET /me/clip/resolve/")}
    assert fetched == {list(hub.repos["me/clip"].commits)[-2]}


def test_the_base_model_goes_where_cache_dir_says(collected: Any) -> None:
    assert collected[0]["elsewhere"] == ["models--me--clip", "models--me--x"]


ERRORS = {
    "unknown repo": ["'me/unknown'", "could not be loaded from the Hub", "Repository Not Found"],
    "unknown revision": ["'me/x'", "at revision 'nowhere'", "Revision Not Found"],
    "private repo": ["'me/secret'", "401", "token="],
    "private base": ["base model 'me/secret-clip' could not be loaded", "clip="],
    "not ours": ["config.json is the config of a base model (model_type 'clip')", "not of an adapter", "--plain"],
    "nothing of ours": ["'me/notes'", "has no config.json", "push_to_hub"],
    "truncated": ["fvg_heads.safetensors is no whole safetensors file", "force_download=True"],
    "truncated in the cache": ["fvg_heads.safetensors is no whole safetensors file", "force_download=True"],
    "local base": ["made for a local base model", "clip=", "tokenizer="],
    "no base": ["base model 'me/no-clip' could not be loaded", "clip="],
    "other kind": ["me/x holds a FVGModel, not a CoOp", "fvg_adapter.load"],
    "push": ["'me/mine'", "401", "token="],
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_errors_say(case: str, collected: Any) -> None:
    said = collected[0]["errors"][case]
    for part in ERRORS[case]:
        assert part in said


@pytest.mark.parametrize(("case", "name"), [("misnamed", "me/a/b"), ("broken off", "me/cut")])
def test_what_cannot_be_pushed(case: str, name: str, published: Any) -> None:
    assert published[0][case].startswith(f"{name!r} could not be pushed to the Hub: ")


def test_offline_everything_comes_from_the_cache(hub: LoopbackHub, published: Any, collected: Any, fresh: Path) -> None:
    before = len(hub.requests)
    report, found = run(stay_offline, hub, fresh, HF_HOME=str(fresh / "home"), HF_HUB_OFFLINE="1")
    assert hub.requests[before:] == []
    for name, values in found.items():
        assert torch.equal(values, published[1][name]), name
    assert "'me/notes2'" in report["absent"] and "HF_HUB_OFFLINE" in report["absent"]
    assert "has no tuner.safetensors" in report["half"]  # the client itself gives half a revision without a word


def test_a_folder_that_is_gone_is_no_hub_id(golden_clip: CLIPModel, tokenizer: Any) -> None:
    for path in ("/data/clip", "./clip", "../clip", "~/clip", "runs/clip/step-3", "C:\\clip", "clip\\step-3"):
        golden_clip.name_or_path = path
        tokenizer.name_or_path = path
        record = base_model_record(golden_clip, tokenizer)
        assert record["id"] == "local" and "tokenizer" not in record
        assert Path(record["path"]).resolve() == Path(path).resolve()
    for name in ("openai/clip-vit-base-patch16", "clip", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"):
        golden_clip.name_or_path = name
        assert base_model_record(golden_clip, tokenizer)["id"] == name


if __name__ == "__main__":
    work(publish, collect, stay_offline)
