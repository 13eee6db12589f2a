"""Files of a saved tuner or FVG model: safetensors and a config, written whole or not at all, read without trust.

Below the tuners, so that every tuner can save itself; `hub.load` dispatches on what was saved. `ModelHubMixin` was not
used: its save deletes config.json first, and its load fetches the config on its own, after which an offline cache holds
half a revision (FACTS 5.1, 5.4). Imports towers, safetensors and huggingface_hub (lazily).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fvg_adapter.base_models import check_base_model, hub_errors, load_base_model, load_tokenizer
from fvg_adapter.errors import FVGError, closest, nearest

_log = logging.getLogger(__name__)

FORMAT = "fvg_adapter"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
TUNER_FILE = "tuner.safetensors"
HEADS_FILE = "fvg_heads.safetensors"
_MAX_CONFIG_BYTES = 16 * 2**20
_PATTERNS = [CONFIG_FILE, TUNER_FILE, HEADS_FILE, "lora/*"]

Self = TypeVar("Self", bound="Pretrained")


class Pretrained:
    """save_pretrained, from_pretrained and push_to_hub for tuners and FVG models."""

    def pretrained_config(self) -> dict[str, Any]:
        """What config.json says beside format, versions and hashes."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its config.json holds")

    def pretrained_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by file name."""
        raise NotImplementedError(f"{type(self).__name__} does not say which tensors it saves")

    @classmethod
    def rebuild(
        cls: type[Self],
        config: dict[str, Any],
        tensors: dict[str, dict[str, Tensor]],
        clip: nn.Module,
        tokenizer: Any,
        classes: Any = None,
        folder: Path | None = None,
    ) -> Self:
        """The object again, from a checked config and its tensors, around a base model."""
        raise NotImplementedError(f"{cls.__name__} cannot be loaded")

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, is_main_process: bool = True) -> Path:
        """Writes config.json and the safetensors files into a folder, all of them or none.

        The files are written beside the target first; what was there stays until every new file is complete.

        Args:
            save_directory: the folder. is_main_process: False writes nothing, for all processes but one of a launcher.

        Returns:
            The folder.

        Raises:
            FVGError: the folder cannot be written, or the disk is full; an earlier save in it is still whole.
        """
        target = Path(save_directory)
        if not is_main_process:
            return target
        if target.exists() and not target.is_dir():
            raise FVGError(f"{target} is a file; give a folder to save into.")
        try:
            with _replacing(target) as folder:
                hashes = {}
                for name, tensors in self.pretrained_tensors().items():
                    data = save({k: _portable(v) for k, v in tensors.items()}, metadata={"format": "pt"})
                    (folder / name).write_bytes(data)  # save_file would make it readable by its owner alone
                    hashes[name] = _sha256(folder / name)
                config = {
                    "format": FORMAT,
                    "format_version": FORMAT_VERSION,
                    **self.pretrained_config(),
                    "sha256": hashes,
                    "versions": _versions(),
                }
                (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
                self.save_beside(folder)
        except (OSError, SafetensorError) as error:
            raise FVGError(f"could not save to {target}: {error}. What was there before is unchanged.") from error
        _log.info("saved %s to %s", type(self).__name__, target)
        return target

    def save_beside(self, folder: Path) -> None:
        """Writes further files of one's own into the folder (LoRA's, say)."""

    @classmethod
    def from_pretrained(
        cls: type[Self],
        id_or_dir: str | os.PathLike[str],
        clip: nn.Module | None = None,
        tokenizer: Any = None,
        classes: Any = None,
        *,
        revision: str | None = None,
        **hub: Any,
    ) -> Self:
        """Loads what `save_pretrained` or `push_to_hub` wrote, around `clip` or the base model that the config names.

        Args:
            id_or_dir: a folder, or a Hub id such as "me/pets-fvg".
            clip: the base model; when None it is loaded by the id in the config.
            tokenizer: its tokenizer; when None it is loaded from where the base model came from.
            classes: class names to score instead of the saved ones.
            revision: branch, tag or commit on the Hub.
            **hub: token, cache_dir, local_files_only, force_download, as in `huggingface_hub.snapshot_download`.

        Raises:
            FVGError: not one of our files, a newer format, another base model, a truncated or manipulated file.
        """
        loaded = load_any(id_or_dir, clip, tokenizer, classes, revision=revision, allowed=cls, **hub)
        assert isinstance(loaded, cls)
        return loaded

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        commit_message: str = "Upload with fvg_adapter",
        create_pr: bool = False,
    ) -> str:
        """Saves and uploads to the Hub; returns the commit's address. Paths of this machine are left out.

        Raises:
            FVGError: not logged in, no right to write there, a name that is no Hub id, no connection.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary) / "upload")
            config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
            config["base_model"].pop("path", None)
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
            try:
                repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if branch:
                    api.create_branch(repo, branch=branch, exist_ok=True)
                info = api.upload_folder(
                    repo_id=repo,
                    folder_path=folder,
                    revision=branch,
                    commit_message=commit_message,
                    create_pr=create_pr,
                )
            except hub_errors() as error:
                raise FVGError(
                    f"{repo_id!r} could not be pushed to the Hub: {str(error).rstrip('. ')}. Give an id "
                    "like 'me/pets-fvg', and a token that may write there: token=…, or `hf auth login` once."
                ) from error
        _log.info("pushed %s to %s", type(self).__name__, info.commit_url)
        return str(info.commit_url)


_KINDS: dict[str, Any] = {}


def loads_kind(kind: str, find: Any) -> None:
    """Says which class rebuilds configs of a kind: `find(config) -> class`."""
    _KINDS[kind] = find


def load_any(
    id_or_dir: str | os.PathLike[str],
    clip: nn.Module | None = None,
    tokenizer: Any = None,
    classes: Any = None,
    *,
    revision: str | None = None,
    allowed: type[Any] = object,
    **hub: Any,
) -> Any:
    """Loads whatever was saved: a tuner or an FVG model; `from_pretrained` explains the arguments."""
    folder = fetch(id_or_dir, revision=revision, **hub)
    config = read_config(folder)
    find = _KINDS.get(str(config.get("kind")))
    if find is None:
        kind = config.get("kind")
        raise FVGError(f"{folder / CONFIG_FILE} has an unknown kind {kind!r}. {nearest(kind, _KINDS)}")
    cls = find(config)
    if not issubclass(cls, allowed):
        raise FVGError(
            f"{id_or_dir} holds a {cls.__name__}, not a {allowed.__name__}; use fvg_adapter.load for either."
        )
    tensors = read_tensors(folder, config)
    if clip is None:
        clip = load_base_model(config["base_model"], **hub)
    check_base_model(clip, config["base_model"])
    needs_tokenizer = "class_features" not in tensors.get(TUNER_FILE, {})
    if tokenizer is None and needs_tokenizer:
        tokenizer = load_tokenizer(clip, config["base_model"], **hub)
    _log.info("loading a %s from %s", cls.__name__, folder)
    return cls.rebuild(config, tensors, clip, tokenizer, classes, folder)


def fetch(id_or_dir: str | os.PathLike[str], *, revision: str | None = None, **hub: Any) -> Path:
    """The folder with our files: local, or downloaded in one go so that the cache never holds half a revision."""
    if Path(id_or_dir).is_dir():
        return Path(id_or_dir)
    name = str(id_or_dir)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FVGError(
            f"there is no folder {name}. {closest(name, _folders_beside(name))}Give a folder written by "
            "save_pretrained, or a Hub id like 'me/pets-fvg'."
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS, **hub))
    except hub_errors() as error:
        raise FVGError(
            f"{name!r} is no folder here, and it could not be loaded from the Hub"
            f"{f' at revision {revision!r}' if revision else ''}: {str(error).rstrip('. ')}. "
            "Check the name and the connection; for a private repository log in (`hf auth login`) or give token=…."
        ) from error
    if not (folder / CONFIG_FILE).is_file():
        raise FVGError(f"the Hub repository {name!r} has no {CONFIG_FILE}; nothing was put there by push_to_hub.")
    return folder


def _folders_beside(name: str) -> list[str]:
    """The folders that lie where this one should."""
    parent = Path(name).expanduser().parent
    return [str(parent / inner.name) for inner in parent.iterdir() if inner.is_dir()] if parent.is_dir() else []


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a saved folder, with its format checked.

    Raises:
        FVGError: missing, unreadable, not ours, or of a newer format version (both versions are named).
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FVGError(f"{folder} has no {CONFIG_FILE}; it was not written by fvg_adapter's save_pretrained.")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise FVGError(f"{path} has {path.stat().st_size} bytes; no config of ours is larger than {_MAX_CONFIG_BYTES}.")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FVGError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise FVGError(
            f"{path} is no fvg_adapter config (its 'format' is not {FORMAT!r}); is this another library's folder?"
        )
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise FVGError(f"{path} has format_version {version!r}; expected a whole number from 1 to {FORMAT_VERSION}.")
    if version > FORMAT_VERSION:
        raise FVGError(
            f"{path} has format version {version}, but this fvg_adapter reads up to {FORMAT_VERSION}; "
            "upgrade with pip install -U fvg-adapter."
        )
    for key, kind in (
        ("base_model", dict),
        ("sha256", dict),
        ("tuner", dict),
        ("base_classes", list),
        ("classes", list),
    ):
        if not isinstance(config.get(key), kind):
            raise FVGError(f"{path} lacks {key!r} (a {kind.__name__}); the file was edited or is incomplete.")
    return config


def read_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Tensors of the safetensors files that the config lists, each checked against its hash.

    Raises:
        FVGError: a file is missing, truncated or not the one that was saved with this config.
    """
    tensors = {}
    for name, digest in config["sha256"].items():
        if name not in (TUNER_FILE, HEADS_FILE):
            raise FVGError(
                f"{folder / CONFIG_FILE} lists a file {name!r}; only {TUNER_FILE} and {HEADS_FILE} belong to it."
            )
        path = folder / name
        if not path.is_file():
            raise FVGError(f"{folder} has no {name}, which its {CONFIG_FILE} lists; copy or download the whole folder.")
        try:
            tensors[name] = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise FVGError(
                f"{path} is no whole safetensors file: {error}; copy it again, or download it again "
                "with force_download=True."
            ) from error
        if _sha256(path) != digest:
            raise FVGError(
                f"{path} is not the file that was saved with this {CONFIG_FILE} (its sha256 differs): an interrupted "
                "save or a mixed copy. Save again, or take both files from the same revision."
            )
    return tensors


def load_own(
    module: nn.Module, tensors: Mapping[str, Tensor], what: str, own: Mapping[str, Tensor] | None = None
) -> None:
    """Loads tensors into a module's own parameters; every name must fit, and so must every shape.

    Args:
        module: what to load into. tensors: from the file `what`.
        own: the tensors expected, when only a part of `module.state_dict()` lies in this file.

    Raises:
        FVGError: missing, unexpected or misshapen tensors, all of them named.
    """
    whole = module.state_dict()
    own = whole if own is None else own
    problems = [f"missing {k}" for k in own if k not in tensors]
    problems += [f"unexpected {k}" for k in tensors if k not in own]
    problems += [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(v.shape)}"
        for k, v in own.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    if problems:
        raise FVGError(f"the tensors of {what} do not fit: {'; '.join(problems[:8])}.")
    module.load_state_dict({**whole, **tensors}, strict=True)


def own_tensors_only(module: nn.Module, *names: str) -> None:
    """Leaves child modules out of `state_dict()` and does not miss them on loading (DESIGN decision 8)."""
    module.__dict__["_left_out"] = names
    module.register_state_dict_post_hook(_drop_left_out)
    module.register_load_state_dict_post_hook(_forgive_left_out)


def _drop_left_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    starts = tuple(f"{prefix}{name}." for name in module.__dict__["_left_out"])
    for key in [k for k in state if k.startswith(starts)]:
        del state[key]


def _forgive_left_out(module: nn.Module, incompatible: Any) -> None:
    starts = tuple(f".{name}." for name in module.__dict__["_left_out"])
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not any(s in f".{k}" for s in starts)]


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new folder beside the target; on success its files move into the target, on failure it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield folder
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        if not target.exists():
            folder.chmod(0o755)
            folder.rename(target)
            return
        files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.name == CONFIG_FILE)
        aside: list[tuple[Path, Path | None]] = []
        try:
            for number, path in enumerate(files):  # the config last: until then its hashes tell of a killed save
                to = target / path.relative_to(folder)
                to.parent.mkdir(parents=True, exist_ok=True)
                kept = folder / f".old-{number}" if to.exists() else None
                if kept is not None:
                    os.link(to, kept) if hasattr(os, "link") else shutil.copy2(to, kept)
                path.replace(to)
                aside.append((to, kept))
        except BaseException:
            for to, kept in aside:
                kept.replace(to) if kept is not None else to.unlink()
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _portable(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _versions() -> dict[str, str]:
    names = ("fvg-adapter", "torch", "transformers", "peft", "safetensors", "huggingface_hub")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
