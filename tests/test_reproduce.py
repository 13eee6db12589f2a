"""reproduce: units resumed and never run twice, one tidy file, tables with the paper's figures, mistakes named."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import signal
import statistics as stdlib
from pathlib import Path
from typing import Any

import pytest
import torch
from paper_layouts import make
from test_cli import assert_mistake
from test_cli import base as base  # the tiny CLIP as a folder
from test_cli import run as command

from fvg_adapter.cli.console import load_base
from fvg_adapter.errors import FVGError
from fvg_adapter.reproduce import (
    Plan,
    Setting,
    Suite,
    paper,
    paper_suite,
    read_suite,
    read_tidy,
    run,
    running,
    statistics,
    tidy,
)
from fvg_adapter.reproduce.suites import chosen
from fvg_adapter.reproduce.tables import SHOWN, tables_of
from fvg_adapter.results import write_json

QUICK = {"epochs": 2}
SETS = ("OxfordPets", "EuroSAT")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four data sets of the paper, small."""
    root = tmp_path_factory.mktemp("DATA")
    for name in (*SETS, "ImageNet", "ImageNetV2"):
        make(root, name)
    return root


@pytest.fixture(scope="module")
def load(base: Path) -> Any:
    return functools.partial(load_base, str(base), "cpu")


def plan(data: Path, output: Path, protocol: str = "base-to-new", **changes: Any) -> Plan:
    """Two epochs, two seeds, one view."""
    quick = {kind: Setting(kind, tune=QUICK, heads=QUICK) for kind in ("coop", "kgcoop")}
    suite = dataclasses.replace(paper_suite(data), settings=quick)
    fields = {"datasets": SETS, "tuners": ["coop"], "model": "tiny", "seeds": (1, 2), "shots": (2,), "views": 1}
    return Plan(protocol, suite, **{**fields, "output": output, **changes})


def values(found: Plan) -> list[tuple[Any, ...]]:
    """All figures but those of time."""
    return sorted(
        tuple(map(str, dataclasses.astuple(f)))
        for f in found.figures()
        if f.split != "cost" or f.metric == "parameters"
    )


@pytest.fixture(scope="module")
def whole(data: Path, load: Any, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """One unbroken run that the other tests look at."""
    done = plan(data, tmp_path_factory.mktemp("whole"))
    outcome = run(done, load)
    assert not outcome.failed and len(outcome.done) == 4 and not outcome.there
    return done


# -- base-to-new -------------------------------------------------------------------------------------------------------


def test_one_tidy_row_a_figure(whole: Plan) -> None:
    figures = read_tidy(whole.output / "results.csv")
    assert [str(f) for f in figures] == [str(f) for f in whole.figures()]
    assert {(f.dataset, f.seed) for f in figures} == set(itertools.product(SETS, (1, 2)))
    assert {f.row for f in figures} == set(SHOWN)
    main = {f.metric for f in figures if f.split == "test"}
    assert {"base", "new", "hm", "joint_hm", "ece", "joint_ece", "worst_class", "joint_worst_class", "d_fg"} <= main
    costs = {(f.row, f.metric): f.value for f in figures if f.split == "cost"}
    assert costs["alone", "parameters"] == 4 * 24  # four context vectors of the tiny text tower
    assert costs["fvg", "parameters"] == 2 * (16 * 64 + 64 + 64 * 16 + 16) + 2 * 161
    assert min(costs.values()) > 0 and ("clip", "inference_images_per_second") in costs
    header = (whole.output / "results.csv").read_text("utf-8").splitlines()[0]
    assert header == "format,protocol,dataset,split,source,tuner,row,shots,seed,metric,value,preset"


def test_tables_say_what_the_figures_say_beside_the_papers(whole: Plan) -> None:
    text = (whole.output / "tables.md").read_text("utf-8")

    def mean(row: str, metric: str) -> float:
        return stdlib.fmean(f.value for f in whole.figures() if (f.row, f.metric, f.split) == (row, metric, "test"))

    base, new = mean("fvg", "base"), mean("fvg", "new")
    (line,) = [row for row in text.splitlines() if row.startswith("| **coop + FVG-PT** |") and "77.76" in row]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    hm = 2 * base * new / (base + new) if base + new else 0
    assert cells[1].startswith(f"{base:.2f} ±") and cells[3:] == [f"{hm:.2f}", "77.76", "other data"]
    for row in SHOWN.values():
        assert f"| {row.format('coop')} |" in text
    assert "sign-flip p" in text and "trainable parameters" in text and "have not been run" not in text


def test_the_difference_from_the_paper_is_given_for_its_eleven_data_sets(tmp_path: Path) -> None:
    suite = Suite("paper", dict.fromkeys(chosen(paper_suite(tmp_path), None), "nowhere"))
    everything = Plan("base-to-new", suite, list(suite.data), ["coop"], model="m", output=tmp_path, seeds=(1,))
    figures = [
        tidy.Figure(1, "base-to-new", name, "test", "", "coop", row, 16, 1, metric, value)
        for name in suite.data
        for row, shift in (("clip", 0.0), ("alone", 1.0), ("fvg", 4.0))
        for metric, value in (("base", 80.0 + shift), ("new", 70.0 + shift), ("hm", 75.0 + shift), ("joint_hm", 60.0))
    ]
    text = tables_of(everything, figures)
    ours = 2 * 84 * 74 / (84 + 74)
    assert f"| {ours:.2f} | 77.76 | {ours - 77.76:+.2f} |" in text
    assert "+3.00 ± 0.00 (11/11, p 0.001)" in text  # FVG-PT − tuner, 2 / 2^11
    part = dataclasses.replace(everything, datasets=list(suite.data)[:10])
    assert "| 77.76 | other data |" in tables_of(part, figures)


def test_what_is_there_is_not_run_again_and_what_is_missing_is(whole: Plan, load: Any) -> None:
    before, files = values(whole), {unit: whole.file(unit).stat().st_mtime_ns for unit in whole.units()}
    gone = whole.units()[1]
    whole.file(gone).unlink()
    outcome = run(whole, load)
    assert outcome.done == [gone.name] and len(outcome.there) == 3 and not outcome.failed
    assert values(whole) == before
    changed = [unit for unit, time in files.items() if whole.file(unit).stat().st_mtime_ns != time]
    assert changed == [gone]


def test_a_run_that_was_killed_goes_on_with_whole_units(data: Path, load: Any, whole: Plan, tmp_path: Path) -> None:
    killed = plan(data, tmp_path / "killed")

    def dies_writing_its_second_unit() -> None:
        write, count = running.write_json, itertools.count()

        def write_or_die(target: Path, record: Any) -> None:
            if next(count) == 1:
                target.with_name(f".{target.name}").write_text(json.dumps(record)[:100])  # as far as it came
                os.kill(os.getpid(), signal.SIGKILL)
            write(target, record)

        running.write_json = write_or_die
        run(killed, load)

    process = multiprocessing.get_context("fork").Process(target=dies_writing_its_second_unit)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    there = [unit for unit in killed.units() if killed.file(unit).exists()]
    assert len(there) == 1
    outcome = run(killed, load)
    assert outcome.there == [there[0].name] and len(outcome.done) == 3
    assert values(killed) == values(whole)


@pytest.mark.slow
def test_two_processes_make_the_same_figures(data: Path, load: Any, whole: Plan, tmp_path: Path) -> None:
    two = plan(data, tmp_path / "two")
    outcome = run(two, load, processes=2)
    assert not outcome.failed and values(two) == values(whole)


# -- the other protocols -----------------------------------------------------------------------------------------------


def test_cross_dataset(data: Path, load: Any, tmp_path: Path) -> None:
    across = plan(
        data,
        tmp_path,
        "cross-dataset",
        datasets=["ImageNet"],
        targets=["ImageNetV2", "EuroSAT"],
        seeds=(1,),
        banks=False,
    )
    assert not run(across, load).failed
    figures = across.figures()
    scored = {(f.dataset, f.source) for f in figures if f.split == "test"}
    assert scored == {("ImageNet", "ImageNet"), ("ImageNetV2", "ImageNet"), ("EuroSAT", "ImageNet")}
    assert {f.row for f in figures} == set(SHOWN)
    text = (tmp_path / "tables.md").read_text("utf-8")
    assert "| ImageNet | ImageNetV2 | EuroSAT | average of targets | in the paper |" in text
    assert "65.72" in text and "other data" in text


def test_targets_are_scored_by_the_new_branch_even_where_they_share_the_classes(data: Path, load: Any) -> None:
    from fvg_adapter.protocols import cross_dataset
    from fvg_adapter.tuners.recipes import Stage

    stage = Stage("sgd", 0.5, 4, "a test", epochs=3)
    found = cross_dataset(
        *load(),
        data / "oxford_pets",
        {"OxfordPets": data / "oxford_pets", "asked otherwise": data / "oxford_pets"},
        templates={"asked otherwise": "{} texture."},
        shots=2,
        seeds=(1,),
        tune=stage,
        heads=stage,
        controls=False,
        views=1,
    )
    source, same, other = found.rows, found.also["OxfordPets"], found.also["asked otherwise"]
    for row in ("clip", "coop"):
        assert same[row]["entropy"] == source[row]["entropy"]
    assert same["coop+fvg"]["entropy"] != source["coop+fvg"]["entropy"]  # z_PC, not z_FDC
    assert other["clip"]["entropy"] != source["clip"]["entropy"] and other["coop"] == same["coop"]


def test_few_shot(data: Path, load: Any, tmp_path: Path) -> None:
    few = plan(data, tmp_path, "few-shot", datasets=["OxfordPets"], shots=(1, 2), seeds=(1,))
    assert not run(few, load).failed
    found = {(f.shots, f.row) for f in few.figures() if f.metric == "accuracy"}
    assert found == set(itertools.product((1, 2), SHOWN))
    clip = {f.value for f in few.figures() if (f.row, f.metric) == ("clip", "accuracy")}
    assert len(clip) == 1  # all eight test pictures of all four classes, however many were tuned on
    assert "| 1 shots | 2 shots |" in (tmp_path / "tables.md").read_text("utf-8")


def test_ablation(data: Path, load: Any, tmp_path: Path) -> None:
    steps = plan(data, tmp_path, "ablation", datasets=["OxfordPets"], seeds=(1,))
    assert not run(steps, load).failed
    rows = {f.row: f.value for f in steps.figures() if f.metric == "base"}
    assert set(rows) == {*SHOWN, *paper.ABLATION, *paper.SWEEPS}
    assert rows["fvg [PC only]"] == rows["alone"]
    text = (tmp_path / "tables.md").read_text("utf-8")
    assert "82.40 / 73.62" in text and "81.04 / 63.14" in text and "77.53" in text
    sizes = {f.metric: f.value for f in steps.figures() if (f.split, f.row) == ("cost", "fvg")}
    assert sizes["train_images_per_second"] > 0


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_a_data_set_that_fails_is_named_and_does_not_stop_the_others(data: Path, load: Any, tmp_path: Path) -> None:
    some = plan(data, tmp_path, datasets=["UCF101", "EuroSAT"], seeds=(1,), controls=False)
    outcome = run(some, load)
    assert outcome.done == ["base-to-new/EuroSAT/coop-2shots-seed1"]
    assert "UCF-101-midframes" in outcome.failed["base-to-new/UCF101/coop-2shots-seed1"]
    text = (tmp_path / "tables.md").read_text("utf-8")
    assert "**1 of 2 units have not been run:** base-to-new/UCF101/coop-2shots-seed1." in text


def test_results_of_another_version_and_of_another_run_are_refused(
    whole: Plan, data: Path, load: Any, tmp_path: Path
) -> None:
    old = plan(data, tmp_path, seeds=(1,))
    lines = (whole.output / "results.csv").read_text("utf-8").splitlines()
    (tmp_path / "results.csv").write_text("\n".join([lines[0], "0" + lines[1][1:]]) + "\n")
    with pytest.raises(FVGError, match=r"results\.csv is of format '0'.*reads format 1"):
        run(old, load)
    (tmp_path / "results.csv").write_text("\n".join([lines[0], lines[1].rsplit(",", 2)[0] + ",much,paper"]) + "\n")
    with pytest.raises(FVGError, match="line 2, is no line of results"):
        run(old, load)
    (tmp_path / "results.csv").unlink()
    unit = old.units()[0]
    record = json.loads(whole.file(unit).read_text())
    old.file(unit).parent.mkdir(parents=True)
    for content, text in (
        (json.dumps({**record, "format": 2}), "is of format 2"),
        (json.dumps(record)[:80], "delete it to run that unit again"),
        (json.dumps({"format": 1}), "it lacks"),
        ("[]", "is no unit of results"),
        ("[" * 100_000, "is no unit of results"),
    ):
        old.file(unit).write_text(content)
        with pytest.raises(FVGError, match=text):
            run(old, load)
    old.file(unit).write_text(json.dumps(record))
    other = dataclasses.replace(old, config=dataclasses.replace(old.config, lambda_distill=5.0), model="another")
    with pytest.raises(
        FVGError, match=r"was run with model 'tiny', but 'another' is wanted \(config.lambda_distill differ too\)"
    ):
        run(other, load)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["units"]  # nothing was run or written


def test_a_unit_is_replaced_whole_or_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "unit.json", {"format": 1})

    def fails(path: Path, target: Path) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fails)
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(FVGError, match="disk is full"):
        write_json(tmp_path / "unit.json", {"format": 2})
    assert json.loads((tmp_path / "unit.json").read_text()) == {"format": 1}


def test_plans_and_suites_that_make_no_sense(data: Path, tmp_path: Path) -> None:
    for changes, text in (
        ({"protocol": "base-to-old"}, "Did you mean 'base-to-new'"),
        ({"foreground": "atention"}, "Did you mean 'attention'"),
        ({"seeds": ()}, "seeds must be at least one"),
        ({"tuners": ["coop", "coop"]}, "each once"),
        ({"protocol": "cross-dataset"}, "at least one target"),
    ):
        with pytest.raises(FVGError, match=text):
            plan(data, tmp_path, **changes)
    with pytest.raises(FVGError, match="no data set 'pots'"):
        chosen(paper_suite(data), ["pots"])
    assert chosen(paper_suite(data), ["dtd", "DTD", "flowers-102"]) == ["DescribableTextures", "OxfordFlowers"]
    with pytest.raises(FVGError, match="is no folder"):
        paper_suite(tmp_path / "none")
    file = tmp_path / "suite.json"
    for content, text in (
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"name": "x", "data": {}}', "no data sets"),
        ('{"x": 1}', "read"),
    ):
        file.write_text(content)
        with pytest.raises(FVGError, match=text):
            read_suite(file)
    file.write_text('{"name": "x", "data": {"a": "a"}, "prepare": "nowhere:f"}')
    with pytest.raises(FVGError, match=r"'nowhere:f', could not be imported"):
        read_suite(file).folder("a")


# -- statistics --------------------------------------------------------------------------------------------------------


def test_sign_flip_counts_all_patterns() -> None:
    draw = torch.Generator().manual_seed(0)
    for n in (1, 2, 5, 9):
        values = torch.randn(n, generator=draw, dtype=torch.float64).tolist()
        flips = [abs(sum(s * v for s, v in zip(f, values, strict=True))) for f in itertools.product((1, -1), repeat=n)]
        assert statistics.sign_flip(values) == sum(f >= abs(sum(values)) - 1e-12 for f in flips) / 2**n
    with pytest.raises(FVGError, match="at most 20"):
        statistics.sign_flip([1.0] * 21)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_on_the_papers_layout_and_on_a_suite_file(data: Path, base: Path, tmp_path: Path) -> None:
    quick = {kind: {"name": "CoOp", "tune": QUICK, "heads": QUICK} for kind in ("coop",)}
    folders = {"oxford_pets": str(data / "oxford_pets")}
    (tmp_path / "mine.json").write_text(json.dumps({"name": "mine", "data": folders, "settings": quick}))
    out = tmp_path / "out"
    options = ("--suite", tmp_path / "mine.json", "--model", base, "--seeds", "1", "--shots", "2", "--views", "1")
    done = command("reproduce", "base-to-new", *options, "--output", out, "--no-controls", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    assert "# base-to-new, suite mine" in done.stdout and "| **CoOp + FVG-PT** |" in done.stdout
    assert "base-to-new/oxford_pets/coop-2shots-seed1: done" in done.stderr
    again = command("reproduce", "base-to-new", *options, "--output", out, "--no-controls", "--device", "cpu", "--json")
    assert json.loads(again.stdout) == {
        "results": str(out / "results.csv"),
        "tables": str(out / "tables.md"),
        "done": [],
        "there": ["base-to-new/oxford_pets/coop-2shots-seed1"],
        "failed": {},
    }


def test_presets_are_run_named_and_never_mixed(data: Path, base: Path, tmp_path: Path) -> None:
    quick = {kind: {"name": "CoOp", "tune": QUICK, "heads": QUICK} for kind in ("coop",)}
    folders = {"oxford_pets": str(data / "oxford_pets"), "eurosat": str(data / "eurosat")}
    (tmp_path / "mine.json").write_text(json.dumps({"name": "mine", "data": folders, "settings": quick}))
    options = ("--suite", tmp_path / "mine.json", "--model", base, "--seeds", "1", "--shots", "2", "--views", "1")
    start = ("reproduce", "base-to-new", *options, "--no-controls", "--device", "cpu")
    pets, out = ("--datasets", "oxford_pets"), tmp_path / "plus"
    assert_mistake(command(*start, *pets, "--output", out, "--preset", "pluss"), "Did you mean 'plus'?")
    assert not out.exists()
    done = command(*start, *pets, "--output", out, "--preset", "plus")
    assert done.exit_code == 0, done.stderr
    assert "preset plus" in done.stdout and "| **CoOp + FVG-PT (plus)** |" in done.stdout
    figures = read_tidy(out / "results.csv")
    assert {f.preset for f in figures} == {"plus"} and len(figures) > 10
    (unit,) = (out / "units").rglob("*.json")
    config = json.loads(unit.read_text())["identity"]["config"]
    assert (config["preset"], config["lambda_distill"], config["attended_view"]) == ("plus", 1.0, 0.4)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for datasets in (pets, ("--datasets", "eurosat")):
        other = command(*start, *datasets, "--output", out)
        assert_mistake(other, "has figures of the preset 'plus', but 'paper' is wanted", "Give another --output")
    few = command("reproduce", "few-shot", *start[2:], *pets, "--output", out, "--preset", "plus")
    assert_mistake(few, "has figures of the protocol 'base-to-new', but 'few-shot' is wanted", "Give another --output")
    (out / "results.csv").rename(tmp_path / "aside.csv")
    other = command(*start, *pets, "--output", out, "--preset", "paper")
    assert_mistake(other, "was run with config.preset 'plus', but 'paper' is wanted", "Give another --output")
    (tmp_path / "aside.csv").rename(out / "results.csv")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    again = command(*start, *pets, "--output", out, "--preset", "plus", "--json")
    assert json.loads(again.stdout)["done"] == []


def test_results_from_before_presets_are_the_papers(whole: Plan, load: Any, tmp_path: Path) -> None:
    assert {f.preset for f in whole.figures()} == {"paper"}
    lines = (whole.output / "results.csv").read_text("utf-8").splitlines()
    (tmp_path / "old.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines) + "\n")
    assert [str(f) for f in read_tidy(tmp_path / "old.csv")] == [str(f) for f in whole.figures()]
    assert "preset" not in (whole.output / "tables.md").read_text("utf-8")


def test_mistakes_of_the_command(data: Path, base: Path, tmp_path: Path) -> None:
    here = ("--output", tmp_path / "out", "--model", base, "--device", "cpu")
    for arguments, text in (
        (("base-to-old", "--data", data), "Did you mean 'base-to-new'"),
        (("base-to-new",), "give either --data"),
        (("base-to-new", "--data", data, "--source", "dtd"), "belong to cross-dataset"),
        (("base-to-new", "--data", data, "--datasets", "pots"), "no data set 'pots'"),
        (("base-to-new", "--data", data, "--shots", "0"), "every shot must be 1 or more"),
        (("base-to-new", "--data", data, "--tuners", "copo"), "Did you mean 'coop'"),
        (("base-to-new", "--data", tmp_path / "none"), "is no folder"),
    ):
        assert_mistake(command("reproduce", *arguments, *here), text)
    own = tmp_path / "own"
    (own / "train" / "cat").mkdir(parents=True)
    assert_mistake(command("reproduce", "base-to-new", "--data", own, *here), "is one data set")
    (tmp_path / "file").write_text("")
    assert_mistake(command("reproduce", "few-shot", "--data", data, "--output", tmp_path / "file"), "is a file")
    missing = ("--datasets", "ucf101", "--seeds", "1")
    failed = command("reproduce", "base-to-new", "--data", data, *missing, *here)
    assert failed.exit_code == 1 and "UCF-101-midframes" in failed.stderr and "1 units failed" in failed.stderr


def test_train_reads_a_data_set_of_the_paper(data: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").symlink_to(data / "oxford_pets")
    quick = ("--shots", "2", "--views", "1", "--tune-epochs", "1", "--epochs", "1", "--seeds", "1", "--no-controls")
    options = ("--model", base, "--dataset", "oxford_pets", "--device", "cpu", "--json", *quick)
    done = command("train", tmp_path / "mine", *options)
    assert done.exit_code == 0, done.stderr
    settings = json.loads(done.stdout)["settings"]
    assert settings["tuner_options"]["template"] == "a photo of a {}, a type of pet."
    assert len(settings["pictures"]["1"]) == 64  # what was drawn, by its digest
    assert_mistake(command("train", tmp_path, *options), "oxford_pets", "split_zhou_OxfordPets.json")
