"""`fvg-adapter reproduce`: the paper's experiments over data sets, tuners and seeds."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Annotated

import typer

from fvg_adapter.cli.console import (
    AsJson,
    Debug,
    Device,
    Threads,
    check_folder,
    load_base,
    mistakes_told,
    prepare,
    say,
    show,
    show_json,
)
from fvg_adapter.cli.training import fvg_config, seed_numbers
from fvg_adapter.errors import FVGError, nearest

_WHAT, _RUN = "What is run", "Running"


@mistakes_told
def reproduce_tables(
    protocol: Annotated[str, typer.Argument(help="base-to-new, cross-dataset, few-shot or ablation.")],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for results.csv, tables.md and what is needed to go on.")
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="ID_OR_DIR", help="The base CLIP: a Hub id or a folder.", show_default="the suite's"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The folder that holds the paper's data sets, or hub: the authors' release."),
    ] = None,
    suite: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Another suite of data sets, as a JSON file, in place of --data."),
    ] = None,
    datasets: Annotated[
        str | None,
        typer.Option(help="Data sets, separated by commas.", rich_help_panel=_WHAT, show_default="all of the suite"),
    ] = None,
    tuners: Annotated[str, typer.Option(help="Tuners, separated by commas.", rich_help_panel=_WHAT)] = "coop",
    seeds: Annotated[str, typer.Option(help="Separated by commas.", rich_help_panel=_WHAT)] = "1,2,3",
    shots: Annotated[
        str | None,
        typer.Option(
            help="Pictures a class, separated by commas.",
            rich_help_panel=_WHAT,
            show_default="16; few-shot: 1,2,4,8,16",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="cross-dataset: what is tuned on.", rich_help_panel=_WHAT, show_default="ImageNet"),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="cross-dataset: what is scored.", rich_help_panel=_WHAT, show_default="all others"),
    ] = None,
    controls: Annotated[
        bool, typer.Option(help="Also x_fg = x, no distillation, and shuffled masks.", rich_help_panel=_WHAT)
    ] = True,
    foreground: Annotated[
        str,
        typer.Option(help="Masks of pictures without a mask file: given (none) or attention.", rich_help_panel=_WHAT),
    ] = "given",
    preset: Annotated[
        str | None,
        typer.Option(
            help="paper, or plus: other values of FVGConfig (docs/plus.md), into a folder of their own.",
            rich_help_panel=_WHAT,
            show_default="paper",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="FVGConfig fields as JSON.", rich_help_panel=_WHAT)
    ] = None,
    views: Annotated[
        int, typer.Option(min=0, help="Augmented views that are encoded once; 0: in the loop.", rich_help_panel=_RUN)
    ] = 4,
    banks: Annotated[bool, typer.Option(help="Keep encoded features in DIR/banks.", rich_help_panel=_RUN)] = True,
    processes: Annotated[
        int, typer.Option(min=1, help="Data sets at once, a process of one thread each.", rich_help_panel=_RUN)
    ] = 1,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16 autocast.", rich_help_panel=_RUN)] = "no",
    device: Device = None,
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run the paper's experiments over data sets, tuners and seeds, and write their tables.

    Every combination of data set, tuner, shots and seed is a unit with a file
    of its own: a run that was stopped goes on where it was, and what is there
    is not run again. DIR/results.csv has one row a figure; DIR/tables.md has
    the paper's tables with the paper's figures beside ours, paired exact tests
    over data sets, and every control.

    Examples:

    \b
    # table 1 of the paper: eleven data sets below DATA
    fvg-adapter reproduce base-to-new --data DATA --output out \\
        --tuners coop,kgcoop,promptsrc,mmrl --model openai/clip-vit-base-patch16
    # table 2: tuned on ImageNet, scored on ten others
    fvg-adapter reproduce cross-dataset --data DATA --output out \\
        --model openai/clip-vit-base-patch16
    # two data sets, pictures fetched from the authors' release as needed
    fvg-adapter reproduce ablation --data hub --datasets dtd,eurosat \\
        --output out --model openai/clip-vit-base-patch16
    """
    place = prepare(device, threads)
    sys.path.insert(0, str(Path.cwd()))  # where a suite's or a tuner's module lies
    from fvg_adapter.reproduce import PROTOCOLS, Plan, paper_suite, read_suite, run
    from fvg_adapter.reproduce.suites import chosen
    from fvg_adapter.train import PRECISIONS
    from fvg_adapter.tuners.registry import tuner_to_train

    if protocol not in PROTOCOLS:
        raise FVGError(f"the protocol {protocol!r} is unknown. {nearest(protocol, PROTOCOLS)}")
    if precision not in PRECISIONS:
        raise FVGError(f"--precision {precision!r} is unknown. {nearest(precision, PRECISIONS)}")
    if (data is None) == (suite is None):
        raise FVGError("give either --data, the folder that holds the paper's data sets, or --suite FILE.")
    check_folder(output)
    found = read_suite(suite) if suite is not None else paper_suite(data or "")
    base = model or found.model
    if base is None:
        raise FVGError("--model is needed: a Hub id such as openai/clip-vit-base-patch16, or a folder.")
    across = protocol == "cross-dataset"
    if across:
        names = chosen(found, [source or "ImageNet"])
        others = [
            name for name in chosen(found, None if targets is None else split_names(targets)) if name not in names
        ]
    else:
        if source is not None or targets is not None:
            raise FVGError(f"--source and --targets belong to cross-dataset, not to {protocol}.")
        names, others = chosen(found, None if datasets is None else split_names(datasets)), []
    several = "1,2,4,8,16" if protocol == "few-shot" else "16"
    plan = Plan(
        protocol=protocol,
        suite=found,
        datasets=names,
        tuners=[tuner_to_train(name).kind for name in split_names(tuners)],
        model=found.name if base == found.model else base,
        output=output,
        seeds=seed_numbers(seeds),
        shots=seed_numbers(shots or several, "--shots", 1),
        targets=others,
        views=views,
        controls=controls,
        config=fvg_config(config, {}, base, preset),
        precision=precision,
        foreground=foreground,
        banks=banks,
        imports=[name for name in split_names(tuners) if ":" in name],
    )
    outcome = run(plan, functools.partial(load_base, base, place), processes=processes, progress=say)
    files = {"results": str(output / "results.csv"), "tables": str(output / "tables.md")}
    if as_json:
        show_json({**files, "done": outcome.done, "there": outcome.there, "failed": outcome.failed})
    else:
        show((output / "tables.md").read_text(encoding="utf-8"))
    if outcome.failed:
        say(f"error: {len(outcome.failed)} units failed; run the command again to try them once more.")
        raise typer.Exit(1)


def split_names(text: str) -> list[str]:
    """Names separated by commas.

    Raises:
        FVGError: none.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise FVGError(f"{text!r} holds no names; give them like oxford_pets,dtd.")
    return names
