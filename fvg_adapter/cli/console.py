"""What all commands share: where text goes, how mistakes are told, and how models are loaded."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from fvg_adapter.errors import FVGError

P = ParamSpec("P")
T = TypeVar("T")

FAILED, MISTAKEN, INTERRUPTED = 1, 2, 130

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, and nothing else.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or mps.", show_default="a GPU if there is one", metavar="NAME")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, the log and the libraries' messages.")]
Base = Annotated[
    str | None,
    typer.Option("--model", metavar="ID_OR_DIR", help="The base model.", show_default="the one that the adapter names"),
]


def say(text: str) -> None:
    """A line on stderr."""
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True, soft_wrap=True, highlight=False).print(escape(printable(text)))


def say_progress() -> Callable[[str], None] | None:
    """`say` on a terminal; None elsewhere, where a command keeps quiet until it is done."""
    return say if sys.stderr.isatty() else None


def show(what: Any) -> None:
    """Plain text or something rich on stdout."""
    from rich.console import Console
    from rich.markup import escape

    Console(highlight=False, soft_wrap=isinstance(what, str)).print(
        escape(printable(what)) if isinstance(what, str) else what
    )


def show_json(document: Any) -> None:
    """One JSON document on stdout; NaN, which JSON does not have, becomes null."""
    typer.echo(json.dumps(_valid(document), indent=2, ensure_ascii=False, allow_nan=False))


def _valid(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _valid(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_valid(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text: str) -> str:
    """Text from a file without control characters, which could rewrite a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def mistakes_told(command: Callable[P, T]) -> Callable[P, T]:
    """Ends a command with one message and an exit code where it fails: 2 for a user's mistake, 1 for anything else."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        debug = bool(kwargs.get("debug"))
        try:
            with _quiet(debug):
                return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of our output has gone; typer ends quietly
            if debug:
                traceback.print_exc(file=sys.stderr)
            mistake = isinstance(error, (FVGError, OSError))
            say(f"error: {_message(error)}" if mistake else f"unexpected {type(error).__name__}: {_message(error)}")
            if not mistake and not debug:
                say("Run it again with --debug for the traceback.")
            raise typer.Exit(MISTAKEN if mistake else FAILED) from None

    return run


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Warnings as single lines; libraries' bars only on a terminal, their messages only for debugging."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info" if debug else "error")
    with warnings.catch_warnings(), _log_shown() if debug else contextlib.nullcontext():
        if not debug:
            warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = lambda message, *unused, **unused_too: say(f"warning: {message}")
        yield


@contextlib.contextmanager
def _log_shown() -> Iterator[None]:
    """What our modules log, on stderr."""
    import logging

    log = logging.getLogger("fvg_adapter")
    handler, level = logging.StreamHandler(), log.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


# -- models ------------------------------------------------------------------------------------------------------------


def prepare(device: str | None, threads: int | None) -> str:
    """Sets the threads and returns the device to use.

    Raises:
        FVGError: no such device here.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise FVGError(f"the device {wanted!r} cannot be used: {str(error).splitlines()[0]}") from error
    return wanted


def load_base(name: str, device: str) -> tuple[Any, Any]:
    """A dual encoder and its tokenizer, from a Hub id or a folder.

    Raises:
        FVGError: it cannot be loaded, or is no dual encoder that we know.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from fvg_adapter.towers import DualEncoder

    if not sys.stderr.isatty():
        disable_progress_bar()
    path_like = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).is_file()
    if (saved := _adapter_of(Path(name).expanduser() / "config.json")) is not None:
        raise FVGError(
            f"{name!r} is a saved adapter, not a base model: give the one that it was made for, {saved}, or another."
        )
    if path_like and not Path(name).expanduser().is_dir():
        what = "is a file, not a folder" if Path(name).is_file() else "is no folder here"
        raise FVGError(
            f"the model {name!r} could not be loaded: it {what}. Give a Hub id such as "
            "openai/clip-vit-base-patch16, or a folder with config, weights and tokenizer."
        )
    try:
        clip = AutoModel.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise FVGError(
            f"the model {name!r} could not be loaded: {first_line(error)} Give a Hub id such as "
            "openai/clip-vit-base-patch16, or a folder with config, weights and tokenizer."
        ) from error
    try:
        DualEncoder(clip)
    except TypeError as error:
        raise FVGError(f"{name!r} cannot be wrapped: {error}") from error
    return clip.eval().to(device), tokenizer


def _adapter_of(config: Path) -> str | None:
    """The base model that a saved adapter's config names; None where it is no such config."""
    from fvg_adapter.storage import FORMAT
    from fvg_adapter.untrusted import read_json

    with contextlib.suppress(FVGError):
        record = read_json(config, "a config") if config.is_file() else {}
        if record.get("format") == FORMAT:
            base = record.get("base_model")
            base = base if isinstance(base, dict) else {}
            return printable(str(base.get("path") or base.get("id") or "which it does not name"))
    return None


def load_adapter(adapter: str, model: str | None, device: str) -> Any:
    """An FVGModel or a tuner as it was saved, around the base model that it names or another copy of it.

    Raises:
        FVGError: see `fvg_adapter.load`.
    """
    from fvg_adapter.hub import load

    if model is None:
        return load(adapter).to(device).eval()
    clip, tokenizer = load_base(model, device)
    return load(adapter, clip=clip, tokenizer=tokenizer).to(device).eval()


def normalisation(model: str) -> dict[str, Any]:
    """Mean and deviation of the model's preprocessor; nothing (CLIP's) where it has none."""
    from fvg_adapter.segmenters.loading import preprocessing

    content = preprocessing(model) or {}
    inner = content.get("image_processor", content)
    content = inner if isinstance(inner, dict) else content
    return {key: content[key] for key in ("image_mean", "image_std") if content.get(key)}


def normal_of(loaded: Any) -> tuple[Any, Any]:
    """Mean and deviation that a loaded model's pictures need: its FVGConfig's, else its base model's, else CLIP's."""
    from fvg_adapter.config import CLIP_MEAN, CLIP_STD

    config = getattr(loaded, "config", None)
    if config is not None:
        return config.image_mean, config.image_std
    name = getattr(loaded.encoder.model, "name_or_path", "")
    found = normalisation(str(name)) if name else {}
    return found.get("image_mean", CLIP_MEAN), found.get("image_std", CLIP_STD)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FVGError: unreadable, or no object.
    """
    from fvg_adapter import untrusted  # brings torch

    try:
        return untrusted.read_json(path, "a JSON file")
    except FVGError as error:
        raise FVGError(
            f'{what} {path} cannot be read: {first_line(error)} One JSON object such as {{"lambda_distill": 5}} is '
            "expected."
        ) from error


def class_names(given: str) -> list[str]:
    """Class names from an option: separated by commas, or @FILE with one a line.

    Raises:
        FVGError: an unreadable file, or no names at all.
    """
    if given.startswith("@"):
        from fvg_adapter import untrusted

        try:
            content = untrusted.read_bytes(Path(given[1:]), untrusted.MAX_JSON_BYTES, "a list of class names")
            parts = content.decode("utf-8").splitlines()
        except ValueError as error:
            raise FVGError(f"the class names in {given[1:]!r} cannot be read: {error}") from error
    else:
        parts = given.split(",")
    names = [part.strip() for part in parts if part.strip()]
    if not names:
        raise FVGError(f"--classes {given!r} holds no names; give them like cat,dog or as @FILE, one a line.")
    return names


def picture_files(given: Sequence[Path]) -> list[Path]:
    """Files as given, and for a folder every picture below it, by name.

    Raises:
        FVGError: a folder without any picture.
    """
    from fvg_adapter.data.images import EXTENSIONS, is_image_name

    found: list[Path] = []
    for path in given:
        inside = [path]
        if path.is_dir():
            below = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
            inside = sorted(p for p in below if is_image_name(p.name) and p.is_file())
        if not inside:
            raise FVGError(
                f"the folder {path} holds no pictures; files that end in {', '.join(EXTENSIONS)} are expected."
            )
        found += inside
    return found


def refuse_folders(given: Sequence[Path]) -> None:
    """Raises FVGError where a folder is given in place of a file."""
    for path in given:
        if path.is_dir():
            raise FVGError(f"{path} is a folder; give picture files, such as {path}/*.jpg.")


def check_folder(folder: Path | None, option: str = "--output") -> None:
    """Tells before hours of work that a folder (None: not given) cannot be made or written; makes nothing.

    Raises:
        FVGError: it or a folder above it is a file, or nobody may write there.
    """
    if folder is None:
        return
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        where = f"{option} {folder}" if there == folder else f"{option} {folder} cannot be made: {there}"
        raise FVGError(f"{where} is a file; give a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise FVGError(f"{option} {folder} cannot be written: you may not write into {there}; give another folder.")


def split_given(given: str) -> str | None:
    """The split that an option names; None for ".", where the class folders lie in the data set's folder itself."""
    return None if given == "." else given


def json_object(text: str | None) -> dict[str, Any]:
    """The arguments in --tuner-options; none where it was not given.

    Raises:
        FVGError: no JSON object.
    """
    if text is None:
        return {}
    from fvg_adapter import untrusted

    try:
        return untrusted.parse_json(text.encode("utf-8", "replace"), "it")
    except FVGError as error:
        raise FVGError(
            f"--tuner-options must be a JSON object such as '{{\"n_ctx\": 8}}', but is {text!r:.200}: "
            f"{first_line(error)}"
        ) from None


def first_line(error: Exception) -> str:
    """The first line of what an exception says, ended with a full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."
