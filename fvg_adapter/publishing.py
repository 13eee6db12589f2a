"""A saved folder goes to the Hub: in one commit, on top of what is there, never over a card that a person edited."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from fvg_adapter.base_models import hub_errors
from fvg_adapter.card import header_problem, is_edited, make_card, read_card, sound_about
from fvg_adapter.card.saving import tell_kept
from fvg_adapter.errors import FVGError
from fvg_adapter.files import CARD_FILE, CONFIG_FILE, HEADS_FILE, PEFT_FILES, PICTURE_FILE, TUNER_FILE
from fvg_adapter.untrusted import read_json, sha256_of

ATTEMPTS = 5
"""How often a push starts over because another one came in between."""
_FAILURES: tuple[type[Exception], ...] = (
    *hub_errors(),
    RuntimeError,
)  # the client raises a RuntimeError where the upload of a file fails
_OVERTAKEN = (409, 412)  # the Hub's answers to a commit whose parent is not the branch's last one any more


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    commit_message: str = "Upload with fvg_adapter",
    create_pr: bool = False,
    parent_commit: str | None = None,
    card: str | os.PathLike[str] | None = None,
) -> str:
    """Uploads our files of a folder; `Pretrained.push_to_hub` explains the arguments, what it returns and raises."""
    config = config_to_push(folder)
    given = None if card is None else _given(Path(card))
    mine = read_card(folder / CARD_FILE)
    try:
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if branch:
            api.create_branch(repo, branch=branch, exist_ok=True)
        for attempt in range(ATTEMPTS):
            info = api.repo_info(repo, revision=branch)
            text = given or _card(api, repo, info, mine, make_card(config, repo, branch))
            try:
                done = api.create_commit(
                    repo,
                    _operations(folder, config, text),
                    commit_message=commit_message,
                    revision=branch,
                    create_pr=create_pr,
                    parent_commit=parent_commit or info.sha,
                )
            except HfHubHTTPError as error:
                if getattr(error.response, "status_code", None) not in _OVERTAKEN:
                    raise
                if parent_commit is not None or attempt == ATTEMPTS - 1:
                    raise FVGError(_overtaken(repo, parent_commit)) from error
                continue
            return str(done.commit_url)
    except FVGError:
        raise
    except _FAILURES as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        said = " ".join(f"{error} {cause or ''}".split()).rstrip(". ")
        raise FVGError(f"{repo_id!r} could not be pushed to the Hub: {said}. {_way_out(said)}") from error
    raise AssertionError("every attempt returns or raises")


def config_to_push(folder: Path) -> dict[str, Any]:
    """config.json of a saved folder without what belongs to this machine, or to nobody."""
    config = read_json(folder / CONFIG_FILE, "a config")
    config["base_model"].pop("path", None)  # of this machine
    about, picture = sound_about(config.get("about")), folder / PICTURE_FILE
    if not picture.is_file() or sha256_of(picture) != about.get("picture"):  # taken away, or not the card's
        about.pop("picture", None)
    config["about"] = about
    return config


def _operations(folder: Path, config: Mapping[str, Any], card: str | None) -> list[Any]:
    """What the commit adds: our files alone, whatever else lies in the folder. The client drops what is unchanged."""
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    added = {CONFIG_FILE: text.encode()} | ({} if card is None else {CARD_FILE: card.encode()})
    pictures = [PICTURE_FILE] if (config.get("about") or {}).get("picture") else []
    files = [folder / name for name in (TUNER_FILE, HEADS_FILE, *PEFT_FILES, *pictures)]
    operations = [CommitOperationAdd(p.relative_to(folder).as_posix(), p) for p in files if p.is_file()]
    return operations + [CommitOperationAdd(name, content) for name, content in added.items()]


def _card(api: HfApi, repo: str, info: Any, mine: str | None, made: str) -> str | None:
    """The card to upload; None where the one on the Hub is a person's."""
    theirs = _on_hub(api, repo, info)
    wanted = mine if mine is not None and is_edited(mine) else made
    if theirs is None or not is_edited(theirs):
        if wanted is mine and (problem := header_problem(wanted)) is not None:
            warnings.warn(_broken("the folder's README.md", problem) + " A generated card is pushed.", stacklevel=4)
            return made
        return wanted
    if theirs.strip() != wanted.strip():
        tell_kept(theirs, f"the card of {repo} on the Hub")
        if wanted is mine:
            warnings.warn(
                f"both the folder's README.md and the card of {repo} on the Hub were edited; the Hub's was kept. "
                "card=… (or --card) uploads a file of yours instead.",
                stacklevel=4,
            )
    return None


def _on_hub(api: HfApi, repo: str, info: Any) -> str | None:
    """The card at a commit, read without a trace in the cache."""
    if CARD_FILE not in {file.rfilename for file in info.siblings or []}:
        return None
    with tempfile.TemporaryDirectory() as temporary:
        try:
            path = api.hf_hub_download(repo, CARD_FILE, revision=info.sha, cache_dir=temporary)
        except EntryNotFoundError:
            return None
        return read_card(Path(path))


def _given(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise FVGError(f"the card {path} cannot be read: {error}; give a Markdown file in UTF-8.") from error
    problem = header_problem(text)
    if problem is not None:
        raise FVGError(_broken(f"the card {path}", problem) + " Nothing was pushed.")
    return text


def _broken(what: str, problem: str) -> str:
    return f"{what} has a broken YAML header ({problem}); mend what stands between the two lines of ---."


def _overtaken(repo: str, parent: str | None) -> str:
    if parent is None:
        return f"{repo!r} could not be pushed: others came in between {ATTEMPTS} times; wait for them and push again."
    return (
        f"{repo!r} could not be pushed: another push came in between, so that parent_commit {parent!r} is not the last "
        "commit of the branch any more. Look at it, then give its commit, or no parent_commit to go on top of it."
    )


def _way_out(said: str) -> str:
    if "xet" in said.lower():
        return "The upload goes by Xet, which this Hub does not speak: set HF_HUB_DISABLE_XET=1 and push again."
    if "metadata" in said.lower() or "yaml" in said.lower():
        return "The Hub refuses the card's header: change what it names (license=…, dataset=…, or the file of card=…)."
    if "connect" in said.lower() or "offline" in said.lower():
        return "Check the connection and push again. Nothing on this machine was changed."
    return (
        "Give an id like 'me/pets-fvg', and a token that may write there: token=…, or `hf auth login` once. "
        "Nothing on this machine was changed."
    )
