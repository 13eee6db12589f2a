"""The `fvg-adapter` command. Imports torch only inside a command, so that `--help` is quick."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fvg_adapter import __version__
from fvg_adapter.cli.auditing import audit_model
from fvg_adapter.cli.converting import convert_checkpoint
from fvg_adapter.cli.evaluating import evaluate_adapter
from fvg_adapter.cli.informing import describe_adapter
from fvg_adapter.cli.masking import write_mask_files
from fvg_adapter.cli.predicting import predict_images
from fvg_adapter.cli.pushing import push_adapter
from fvg_adapter.cli.reproducing import reproduce_tables
from fvg_adapter.cli.showing import show_pictures
from fvg_adapter.cli.training import train_and_compare

__all__ = ["app", "main"]


class WithPanels(TyperCommand):
    """A command whose own help groups its options in panels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "rich_markup_mode": "rich"})


app: typer.Typer = typer.Typer(
    name="fvg-adapter",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,  # rich takes twice as long to import as everything else that this help needs
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command, _short in (
    ("train", train_and_compare, "Tune prompts, add FVG-PT, score everything."),
    ("eval", evaluate_adapter, "Score a saved adapter on a data set."),
    ("predict", predict_images, "Name what is in pictures, among any classes."),
    ("info", describe_adapter, "Explain a saved adapter, or any other file."),
    ("push", push_adapter, "Share a saved adapter on the Hub."),
    ("convert", convert_checkpoint, "Turn a checkpoint of Dassl's into an adapter."),
    ("masks", write_mask_files, "Write foreground masks for a data set."),
    ("show", show_pictures, "See what decides an answer, before and after."),
    ("audit", audit_model, "Find out whether a model takes shortcuts."),
    ("reproduce", reproduce_tables, "Make the paper's tables, resumable."),
):
    app.command(_name, cls=WithPanels, short_help=_short)(_command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fvg-adapter {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """FVG-PT for any Hugging Face CLIP: adapters behind a frozen, tuned model, guided by the foreground.

    Tune prompts and adapters on a few pictures a class, measure what they
    gain on tuned and on unseen classes, and use the small result anywhere:

    \b
    fvg-adapter train pets --model openai/clip-vit-base-patch16 --output out
    fvg-adapter info out/adapter
    fvg-adapter eval out/adapter pets --split test
    fvg-adapter predict out/adapter photo.jpg --classes "tabby cat,beagle"
    fvg-adapter push out/adapter me/pets-fvg --license mit
    fvg-adapter show out/adapter photo.jpg --output before_after.png
    fvg-adapter audit out/adapter pets --output report
    fvg-adapter masks pets --source CIDAS/clipseg-rd64-refined
    fvg-adapter convert old/prompt_learner --classes @pets.txt --output new \\
        --model openai/clip-vit-base-patch16
    fvg-adapter reproduce base-to-new --data DATA --output tables \\
        --model openai/clip-vit-base-patch16

    Results go to stdout (with --json: one JSON document and nothing else),
    progress and messages to stderr. Exit codes: 0 done, 1 an unexpected
    error, 2 a mistake in what was given.
    """


def main() -> None:
    """Entry point of the `fvg-adapter` script."""
    app(prog_name="fvg-adapter")
