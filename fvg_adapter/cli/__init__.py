"""The `fvg-adapter` command. Imports torch only inside a command, so that `--help` is quick."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from fvg_adapter import __version__

__all__ = ["app", "main"]

COMMANDS = {
    "train": ("training", "train_and_compare", "Tune prompts, add FVG-PT, score everything."),
    "eval": ("evaluating", "evaluate_adapter", "Score a saved adapter on a data set."),
    "predict": ("predicting", "predict_images", "Name what is in pictures, among any classes."),
    "info": ("informing", "describe_adapter", "Explain a saved adapter, or any other file."),
    "push": ("pushing", "push_adapter", "Share a saved adapter on the Hub."),
    "convert": ("converting", "convert_checkpoint", "Turn a checkpoint of Dassl's into an adapter."),
    "masks": ("masking", "write_mask_files", "Write foreground masks for a data set."),
    "show": ("showing", "show_pictures", "See what decides an answer, before and after."),
    "audit": ("auditing", "audit_model", "Find out whether a model takes shortcuts."),
    "reproduce": ("reproducing", "reproduce_tables", "Make the paper's tables, resumable."),
}
"""{name: (module of this package, function, what the help says)}"""


class WithPanels(TyperCommand):
    """A command whose own help groups its options in panels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "rich_markup_mode": "rich"})


class WhenAsked(TyperGroup):
    """Imports a command when it is asked for: to read the signatures of all takes longer than the rest of the help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands: dict[str, Any] = dict.fromkeys(COMMANDS)  # the names suffice to suggest the nearest one

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name, imported now; None when there is none."""
        if cmd_name in COMMANDS and self.commands[cmd_name] is None:
            module, function, short = COMMANDS[cmd_name]
            alone = _bare(add_completion=False)
            run = getattr(importlib.import_module(f"fvg_adapter.cli.{module}"), function)
            alone.command(cmd_name, cls=WithPanels, short_help=short)(run)
            self.commands[cmd_name] = typer.main.get_command(alone)
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """One line each, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, _, short) in COMMANDS.items()])


def _bare(**settings: Any) -> typer.Typer:
    return typer.Typer(
        rich_markup_mode=None,  # rich takes twice as long to import as everything else that the help needs
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **settings,
    )


app: typer.Typer = _bare(name="fvg-adapter", cls=WhenAsked, no_args_is_help=True)


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
