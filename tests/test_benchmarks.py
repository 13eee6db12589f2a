"""The benchmarks run from end to end on a tiny model; what they measure there means nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import GROUPS, main
from benchmarks.harness import in_turns, row


@pytest.fixture(autouse=True)
def threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_group_runs(tmp_path: Path) -> None:
    results, page = tmp_path / "results.json", tmp_path / "docs" / "benchmarks.md"
    options = ["--size", "tiny", "--pairs", "1", "--threads", "1", "--results", str(results), "--page", str(page)]
    assert main(options) == 0
    groups = json.loads(results.read_text("utf-8"))["groups"]
    assert list(groups) == list(GROUPS)
    rows = [row for group in groups.values() for row in group["rows"]]
    assert all(row["ratio"] > 0 and row["second"] > 0 for row in rows) and len(rows) >= 20
    text = page.read_text("utf-8")
    assert all(row["figure"] in text for row in rows)
    assert (page.parent / groups["heads_by_classes"]["picture"]).stat().st_size > 1000
    assert "estimate" in text
    groups_before = dict(groups)
    assert main([*options, "--only", "heads_file"]) == 0  # the others stay
    assert set(json.loads(results.read_text("utf-8"))["groups"]) == set(groups_before)


def test_a_group_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(setting: object, folder: Path) -> None:
        raise ValueError("no such thing")

    monkeypatch.setitem(GROUPS, "inference", ("Inference", broken))
    options = ["--size", "tiny", "--pairs", "1", "--threads", "1", "--results", str(tmp_path / "r.json")]
    assert main([*options, "--page", str(tmp_path / "p.md"), "--only", "inference", "heads_file"]) == 1
    assert list(json.loads((tmp_path / "r.json").read_text("utf-8"))["groups"]) == ["heads_file"]
    assert "--only inference" in capsys.readouterr().out


def test_rows() -> None:
    found = row("a ÷ b", [2.0, 3.0, 9.0], [1.0, 1.0, 3.0], "≤ 3")
    assert (found.ratio, found.low, found.high, found.first, found.second, found.pairs) == (3.0, 2.0, 3.0, 3.0, 1.0, 3)
    assert found.holds and not row("a ÷ b", [2.0], [1.0], "≥ 3").holds and row("a ÷ b", [2.0], [1.0]).holds is None
    order: list[str] = []
    in_turns([lambda: order.append("a"), lambda: order.append("b")], 2)
    assert "".join(order) == "ab" + "ab" + "ba"
