"""Files of a saved tuner or FVG model: safetensors and a config, written whole or not at all, read without trust.

Below the tuners, so that every tuner can save itself; `hub.load` dispatches on what was saved. `ModelHubMixin` was not
used: its save deletes config.json first, and its load fetches the config on its own, after which an offline cache holds
half a revision (FACTS 5.1, 5.4). Imports base_models, replacing and untrusted;
huggingface_hub and the card lazily.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from fvg_adapter.base_models import check_base_model, hub_errors, load_base_model, load_tokenizer, refuse_path
from fvg_adapter.errors import FVGError, closest, nearest
from fvg_adapter.files import CONFIG_FILE, HEADS_FILE, PEFT_FILES, TUNER_FILE
from fvg_adapter.replacing import read_whole, replacing
from fvg_adapter.untrusted import OTHER_FILE, TensorFile, read_json, sha256_of, shapes_of

_log = logging.getLogger(__name__)

FORMAT = "fvg_adapter"
FORMAT_VERSION = 1
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".tar")
MAX_CLASSES = 32_768
"""Class names in a file; ImageNet-21k has 21,843."""
_PARTS = {"base_model": dict, "sha256": dict, "tuner": dict, "base_classes": list, "classes": list}
_TEXTS = {
    "": ("kind", "foreground"),
    "tuner": ("kind",),
    "base_model": ("id", "revision", "path", "tokenizer", "class"),
}
_PATTERNS = [CONFIG_FILE, TUNER_FILE, HEADS_FILE, *PEFT_FILES]
"""The config gives the hashes of all others; of PEFT's from 0.1 on, files without it are read all the same."""

Self = TypeVar("Self", bound="Pretrained")


class Pretrained:
    """save_pretrained, from_pretrained and push_to_hub for tuners and FVG models."""

    about: dict[str, Any] | None = None
    """What the files that this was loaded from say for their card: figures, data, licence."""
    saved_in: Path | None = None
    """The folder that this was loaded from."""

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
        tensors: dict[str, Mapping[str, Tensor]],
        clip: nn.Module,
        tokenizer: Any,
        classes: Any = None,
        folder: Path | None = None,
    ) -> Self:
        """The object again, from a checked config and its tensors, around a base model."""
        raise NotImplementedError(f"{cls.__name__} cannot be loaded")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        results: Any = None,
        picture: str | os.PathLike[str] | None = None,
        dataset: str | None = None,
        license: str | None = None,
        is_main_process: bool = True,
    ) -> Path:
        """Writes config.json, the safetensors files and a model card into a folder, all of them or none.

        The new files are made apart first, and count together from the moment when all of them are on the disk:
        whenever this process is killed, a load finds the old save or the new one. Other files in the folder stay, and
        so does a README.md that a person wrote or edited.

        Args:
            save_directory: the folder.
            results: figures for the card: what `evaluate` returned, a `protocols.Results` or the path of a
                results.json. They stay with the files until the weights change.
            picture: an image file for the card, such as `visualize.before_after` draws.
            dataset: the name or the Hub id of the data. license: the Hub's word for one, such as "apache-2.0".
            is_main_process: False writes nothing, for all processes but one of a launcher.

        Returns:
            The folder.

        Raises:
            FVGError: the folder cannot be written, or the disk is full; an earlier save in it is still whole. Results
                without this model's row, or a picture that is none.
        """
        from fvg_adapter.card.saving import add_card

        target = Path(save_directory)
        if not is_main_process:
            return target
        if target.exists() and not target.is_dir():
            raise FVGError(f"{target} is a file; give a folder to save into.")
        try:
            with replacing(target) as folder:
                hashes = {}
                for name, tensors in self.pretrained_tensors().items():
                    metadata = {"format": "pt"} if tensors else None  # safetensors 0.4.3 writes no JSON for it alone
                    data = save({k: _portable(v) for k, v in tensors.items()}, metadata=metadata)
                    (folder / name).write_bytes(data)  # save_file would make it readable by its owner alone
                    hashes[name] = sha256_of(folder / name)
                self.save_beside(folder)
                beside = (path for path in sorted(folder.rglob("*")) if path.is_file())
                hashes |= {n: sha256_of(p) for p in beside if (n := p.relative_to(folder).as_posix()) in PEFT_FILES}
                config = {
                    "format": FORMAT,
                    "format_version": FORMAT_VERSION,
                    **self.pretrained_config(),
                    "sha256": hashes,
                    "versions": _versions(),
                }
                given = {"results": results, "picture": picture, "dataset": dataset, "license": license}
                add_card(folder, config, target, before=self.about, kept=self.saved_in, **given)
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
        parent_commit: str | None = None,
        results: Any = None,
        picture: str | os.PathLike[str] | None = None,
        dataset: str | None = None,
        license: str | None = None,
        card: str | os.PathLike[str] | None = None,
    ) -> str:
        """Saves and uploads to the Hub in one commit; paths of this machine are left out.

        A card that was edited on the Hub is kept. When another push comes in between, this one goes on top of it, as if
        it had been started after it: both are whole commits of the history.

        Args:
            repo_id: such as "me/pets-fvg"; made if it does not exist.
            private: for a repository that is made now.
            token: with the right to write; the one of `hf auth login` when None.
            branch: made from the main one if it does not exist. commit_message: its first line.
            create_pr: propose the change as a pull request instead.
            parent_commit: the commit that this one has to follow; a push in between is then an error.
            results, picture, dataset, license: for the card, as in `save_pretrained`.
            card: a Markdown file to upload as README.md instead of what is there or would be generated.

        Returns:
            The address of the commit.

        Raises:
            FVGError: not logged in, no right to write there, a name that is no Hub id, no connection, a card with a
                broken header. Nothing on this machine changes.
        """
        from fvg_adapter.publishing import publish

        with tempfile.TemporaryDirectory() as temporary:
            given = {"results": results, "picture": picture, "dataset": dataset, "license": license}
            folder = self.save_pretrained(Path(temporary) / "upload", **given)
            url = publish(
                folder,
                repo_id,
                private=private,
                token=token,
                branch=branch,
                commit_message=commit_message,
                create_pr=create_pr,
                parent_commit=parent_commit,
                card=card,
            )
        _log.info("pushed %s to %s", type(self).__name__, url)
        return url


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
    fetched = fetch(id_or_dir, revision=revision, **hub)
    folder, config, tensors = read_whole(fetched, lambda f: read(f, lambda: _on_hub(id_or_dir, revision, hub)))
    find = _KINDS.get(str(config.get("kind")))
    if find is None:
        kind = config.get("kind")
        raise FVGError(f"{folder / CONFIG_FILE} has an unknown kind {kind!r}. {nearest(kind, _KINDS)}")
    cls = find(config)
    if not issubclass(cls, allowed):
        raise FVGError(
            f"{id_or_dir} holds a {cls.__name__}, not a {allowed.__name__}; use fvg_adapter.load for either."
        )
    if not Path(id_or_dir).is_dir():
        refuse_path(config["base_model"], str(id_or_dir))
    if clip is None:
        clip = load_base_model(config["base_model"], **hub)
    check_base_model(clip, config["base_model"])
    needs_tokenizer = "class_features" not in tensors.get(TUNER_FILE, {})
    if tokenizer is None and needs_tokenizer:
        tokenizer = load_tokenizer(clip, config["base_model"], **hub)
    _log.info("loading a %s from %s", cls.__name__, folder)
    loaded = cls.rebuild(config, tensors, clip, tokenizer, classes, folder)
    loaded.about, loaded.saved_in = config.get("about"), folder
    return loaded


def read(
    folder: Path, files: Callable[[], Iterable[str]] | None = None
) -> tuple[Path, dict[str, Any], dict[str, Mapping[str, Tensor]]]:
    """The folder, its config, and its tensors by file; with `read_whole`, also while another process saves there."""
    config = read_config(folder)
    return folder, config, read_tensors(folder, config, files)


def fetch(id_or_dir: str | os.PathLike[str], *, revision: str | None = None, **hub: Any) -> Path:
    """The folder with our files: local, or downloaded in one go so that the cache never holds half a revision."""
    if Path(id_or_dir).is_dir():
        return Path(id_or_dir)
    name = str(id_or_dir)
    if Path(name).exists():
        raise FVGError(f"{name} is a file; give the folder written by save_pretrained, or a Hub id like 'me/pets-fvg'.")
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
            f"{f' at revision {revision!r}' if revision else ''}: {' '.join(str(error).split()).rstrip('. ')}. "
            "Check the name and the connection; for a private repository log in (`hf auth login`) or give token=…."
        ) from error
    if not (folder / CONFIG_FILE).is_file():
        said = _instead(_on_hub(name, revision, hub))
        raise FVGError(f"the Hub repository {name!r} has no {CONFIG_FILE}; nothing was put there by push_to_hub.{said}")
    return folder


def _folders_beside(name: str) -> list[str]:
    """The folders that lie where this one should."""
    parent = Path(name).expanduser().parent
    return [str(parent / inner.name) for inner in parent.iterdir() if inner.is_dir()] if parent.is_dir() else []


def _on_hub(id_or_dir: str | os.PathLike[str], revision: str | None, hub: Mapping[str, Any]) -> list[str]:
    """Names of the files of a folder or a Hub repository; none where they cannot be had. For messages alone."""
    if Path(id_or_dir).is_dir():
        return [path.name for path in Path(id_or_dir).iterdir()]
    from huggingface_hub import HfApi

    if hub.get("local_files_only"):
        return []
    try:
        return list(HfApi(token=hub.get("token")).list_repo_files(str(id_or_dir), revision=revision))
    except hub_errors():
        return []


def _instead(names: Iterable[str]) -> str:
    """What a folder without our files holds instead, as a sentence after a blank; "" where that helps nobody."""
    names = sorted(names)
    pickles = [name for name in names if Path(name).suffix in _PICKLES]
    if pickles:
        return (
            f" It holds pickle files ({', '.join(pickles[:3])}), which can run code when they are read and are never "
            "opened here: save the model again with save_pretrained, or take over a checkpoint of the Dassl "
            "family with `fvg-adapter convert`."
        )
    if "adapter_config.json" in names:
        return " It holds a PEFT adapter: give PeftModel.from_pretrained(clip, …) to fvg_adapter.tuners.LoRA."
    return ""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a saved folder, with its format checked.

    Raises:
        FVGError: missing, unreadable, not ours, or of a newer format version (both versions are named).
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FVGError(f"{folder} has no {CONFIG_FILE}; it was not written by fvg_adapter's save_pretrained.")
    config = read_json(path, "a config")
    if config.get("format") != FORMAT:
        if isinstance(config.get("model_type"), str):
            raise FVGError(
                f"{path} is the config of a base model (model_type {config['model_type']!r:.80}), not of an adapter: "
                f"train one for it (`fvg-adapter train DATA --model {folder} --output out`, or wrap in Python). To ask "
                "the base model as it is: `fvg-adapter show` or `audit` with --plain, or a ZeroShot tuner in Python."
            )
        raise FVGError(
            f"{path} is no fvg_adapter config (its 'format' is not {FORMAT!r}); is this another library's folder? "
            "`fvg-adapter info` names what a file or folder holds."
        )
    version = config.get("format_version")
    if type(version) is not int or version < 1:
        raise FVGError(f"{path} has format_version {version!r}; expected a whole number from 1 to {FORMAT_VERSION}.")
    if version > FORMAT_VERSION:
        raise FVGError(
            f"{path} has format version {version}, but this fvg_adapter reads up to {FORMAT_VERSION}; "
            "upgrade with pip install -U fvg-adapter."
        )
    for key, kind in _PARTS.items():
        if not isinstance(config.get(key), kind):
            raise FVGError(f"{path} lacks {key!r} (a {kind.__name__}); the file was edited or is incomplete.")
    for within, keys in _TEXTS.items():
        part = config[within] if within else config
        for key in keys:
            if not isinstance(part.get(key), (str, type(None))):
                raise FVGError(f"{path} has {key!r} {part[key]!r:.80}; text is expected. The file was edited.")
    for key in ("base_classes", "classes"):
        check_saved_classes(config[key], f"{path}: {key!r}")
    if not isinstance(config["tuner"].get("arguments", {}), dict) or not isinstance(config.get("fvg", {}), dict):
        raise FVGError(f"{path} has 'arguments' or 'fvg' that are no JSON objects; the file was edited.")
    return config


def check_saved_classes(names: list[Any], where: str) -> None:
    """Refuses class lists that no model of ours can have been saved with.

    Raises:
        FVGError: more than `MAX_CLASSES` names, or one that is no text.
    """
    if len(names) > MAX_CLASSES:
        raise FVGError(f"{where} holds {len(names)} class names; more than {MAX_CLASSES} are not read from a file.")
    if not all(isinstance(name, str) for name in names):
        raise FVGError(f"{where} holds class names that are no text; the file was edited.")


def read_tensors(
    folder: Path, config: Mapping[str, Any], files: Callable[[], Iterable[str]] | None = None
) -> dict[str, Mapping[str, Tensor]]:
    """The safetensors files that the config lists, each checked against its hash; tensors are read when asked for.

    Args:
        folder, config: what was saved. files: names the files there are, for the message when one is missing.

    Raises:
        FVGError: a file is missing, truncated or not the one that was saved with this config; its header claims what
            the file has no room for, or tensors that are no floating point numbers.
    """
    tensors: dict[str, Mapping[str, Tensor]] = {}
    for name, digest in config["sha256"].items():
        if name not in (TUNER_FILE, HEADS_FILE, *PEFT_FILES):
            raise FVGError(
                f"{folder / CONFIG_FILE} lists a file {name!r}; only {TUNER_FILE}, {HEADS_FILE} and PEFT's in lora/ "
                "belong to it."
            )
        path = folder / name
        if not path.is_file():
            said = _instead(files() if files is not None else _on_hub(folder, None, {}))
            raise FVGError(
                f"{folder} has no {name}, which its {CONFIG_FILE} lists; copy or download the whole folder.{said}"
            )
        if path.suffix == ".safetensors":
            _refuse_pickle(path)
            tensors[name] = TensorFile(path, str(digest))
        elif sha256_of(path) != digest:
            raise FVGError(OTHER_FILE.format(path))
    return tensors


def _refuse_pickle(path: Path) -> None:
    """Raises FVGError for a file that begins as torch.save's (a zip) or as a bare pickle of protocol 2 to 5."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        raise FVGError(
            f"{path} is no whole safetensors file but a pickle, which can run code when it is read; it was not "
            "opened. Save the model again with save_pretrained."
        )


def load_own(
    module: nn.Module, tensors: Mapping[str, Tensor], what: str, own: Mapping[str, Tensor] | None = None
) -> None:
    """Loads tensors into a module's own parameters; every name must fit, and so must every shape, before any is read.

    Args:
        module: what to load into. tensors: from the file `what`.
        own: the tensors expected, when only a part of `module.state_dict()` lies in this file.

    Raises:
        FVGError: missing, unexpected or misshapen tensors, all of them named; values that are NaN or infinite.
    """
    whole = module.state_dict()
    own = whole if own is None else own
    shapes = shapes_of(tensors)
    problems = [f"missing {k}" for k in own if k not in shapes]
    problems += [f"unexpected {k[:80]}" for k in shapes if k not in own]
    problems += [
        f"{k} is {shapes[k]}, expected {tuple(v.shape)}"
        for k, v in own.items()
        if k in shapes and shapes[k] != tuple(v.shape)
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


def _portable(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _versions() -> dict[str, str]:
    names = ("fvg-adapter", "torch", "transformers", "peft", "safetensors", "huggingface_hub")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
