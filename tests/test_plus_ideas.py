"""The further ideas beside plus: losses and gate by hand, a cell against the library's own training and scores."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from examples.pocket import plus, plus_cells, plus_gate, plus_ideas  # noqa: E402
from examples.pocket.plus_variants import Losses, distill_term, prior_term  # noqa: E402
from fvg_adapter import evaluate, wrap  # noqa: E402
from fvg_adapter import losses as L  # noqa: E402
from fvg_adapter.train import fit  # noqa: E402


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_losses_against_sums_by_hand() -> None:
    torch.manual_seed(0)
    r, (fg, full, fdc, prior) = torch.rand(3), torch.randn(4, 3, 5).unbind()
    p = {n: F.softmax(z / 2, -1).tolist() for n, z in (("fg", fg), ("full", full), ("fdc", fdc), ("prior", prior))}
    by_hand = {"paper": 0.0, "trusted": 0.0, "scaled": 0.0, "turned": 0.0}
    for i, trust in enumerate(r.tolist()):
        view, whole = kl(p["fg"][i], p["fdc"][i]), kl(p["full"][i], p["fdc"][i])
        mixed = trust * view + (1 - trust) * whole
        by_hand["paper"] += mixed / 3
        by_hand["trusted"] += trust * view / 3
        by_hand["scaled"] += 2 * trust * mixed / 3
        by_hand["turned"] += (trust * kl(p["fdc"][i], p["fg"][i]) + (1 - trust) * kl(p["fdc"][i], p["full"][i])) / 3
    for kind, wanted in by_hand.items():
        assert float(distill_term(r, fg, full, fdc, 2.0, kind)) == pytest.approx(wanted, abs=1e-5)
    there = sum(kl(a, b) for a, b in zip(p["prior"], p["fdc"], strict=True)) / 3
    back = sum(kl(b, a) for a, b in zip(p["prior"], p["fdc"], strict=True)) / 3
    for kind, wanted in {"paper": there, "turned": back, "both": (there + back) / 2}.items():
        assert float(prior_term(prior, fdc, 2.0, kind)) == pytest.approx(wanted, abs=1e-5)


def test_cues_against_a_loop() -> None:
    torch.manual_seed(0)
    z, r = torch.randn(3, 4, 5).unbind(), torch.rand(4)
    is_base = [True, True, False, True, False]
    found = plus_gate.cues(z, torch.tensor(is_base), r)
    for i in range(4):
        for k, scores in enumerate(z):
            weights = [math.exp(float(s) / 2) for s in scores[i]]
            inside = sum(w for w, b in zip(weights, is_base, strict=True) if b)
            assert float(found[i, k]) == pytest.approx(math.log(inside / (sum(weights) - inside)), abs=1e-5)
        for column, scores, group in ((3, z[1], True), (4, z[2], False)):
            members = [c for c in range(5) if is_base[c] == group]
            p = F.softmax(scores[i, members], -1).tolist()
            wanted = -sum(a * math.log(a) for a in p) / math.log(len(members))
            assert float(found[i, column]) == pytest.approx(wanted, abs=1e-5)
        assert found[i, 5] == r[i]


def test_the_gate_is_at_the_minimum_and_counts_both_groups_the_same() -> None:
    torch.manual_seed(0)
    groups = torch.rand(400) < 0.2
    seen = torch.randn(400, 6) * 3 + 1
    seen[:, 0] += 2.0 * groups
    gate = plus_gate.JointGate(seen, groups, (0, 2))
    x = torch.cat(
        [F.normalize(seen[:, [0, 2]] - seen[:, [0, 2]].mean(0), dim=0) * math.sqrt(399), torch.ones(400, 1)], 1
    )
    p, y = torch.sigmoid(gate(seen)), groups.float()
    weight = torch.where(groups, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    slope = (x * (weight * (p - y)).unsqueeze(1)).mean(0)
    slope[:-1] += 2 * plus_gate.PENALTY * gate.parameters[:-1].detach().float()
    assert float(slope.abs().max()) < 1e-4
    assert gate.parameters[0] > 5 * gate.parameters[1].abs() > 0
    assert float(p[groups].mean()) > 0.5 > float(p[~groups].mean())


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The task that lies in the repository, with few shots and epochs."""
    with pytest.MonkeyPatch.context() as patch:
        short = {k: replace(v, epochs=2) for k, v in plus.stages("coop").items()}
        for module in (plus_cells, plus_ideas):
            patch.setattr(module, "stages", lambda kind: short)
        for module in (plus_cells, plus_gate):
            patch.setattr(module, "SHOTS", 3)
        patch.setattr(plus_gate, "HELD_SHOTS", 1)
        patch.setattr(plus_cells, "folder_of", lambda task: ROOT / "examples" / "pocket" / "data")
        clip, tokenizer = plus.pocket_clip()
        yield plus_cells.Cell(clip, tokenizer, "fruit_vegetables", 1, tmp_path_factory.mktemp("banks"))


def test_a_cell_trains_and_scores_as_the_library(cell: Any) -> None:
    torch.manual_seed(1)
    model = wrap(cell.tuner, config=replace(plus.PLUS), foreground="given")
    fit(model, cell.train.bank, recipe=plus_cells.stages("coop")["heads"], seed=1)
    own = cell.plus
    for name, tensor in model._head_tensors().items():
        assert torch.equal(tensor, own._head_tensors()[name])
    sets = [pictures.bank for pictures in cell.tests]
    for found, wanted in (
        (plus_cells.figures(cell, own), evaluate(model, *sets)),
        (plus_cells.figures(cell, own, branches=(0, 0)), evaluate(model, *sets, branches=("prior", "prior"))),
        (plus_cells.tuner_figures(cell), evaluate(cell.tuner, *sets)),
    ):
        assert found == pytest.approx({m: wanted[m] for m in found}, abs=1e-3)
    constant = plus_cells.figures(cell, own, weigh=lambda p, _: torch.full((len(p.bank),), plus.PLUS.attended_view))
    assert constant == plus_cells.figures(cell, own)
    assert plus_cells.figures(cell, own, weigh=lambda p, _: torch.zeros(len(p.bank))) != constant
    r = plus_cells.trust(own, cell.tests[0], cell.base)
    assert ((r >= 0) & (r <= 1)).all() and own.config == plus.PLUS
    changed = cell.heads(cell.tuner, plus.PLUS, Losses(new_kl="turned"))
    assert not torch.equal(changed.backbone_gate.out.weight, own.backbone_gate.out.weight)
    assert torch.equal(changed.visual_adapter.up.weight, own.visual_adapter.up.weight)
    changed.release()


def test_one_stage_moves_the_prompts_at_their_own_rate(cell: Any) -> None:
    frozen = cell.tuner.ctx.clone()
    start = cell.fresh(cell.base)
    model = plus_ideas.in_one_stage(cell, cell.train.bank)
    assert not torch.equal(model.tuner.ctx, start.ctx) and torch.equal(cell.tuner.ctx, frozen)
    slow = cell.heads(cell.fresh(cell.base), replace(plus.PLUS, freeze_tuner=False), Losses(prompt_rate=1e-6), epochs=2)
    moved, hardly = ((m.tuner.ctx - start.ctx).abs().max() for m in (model, slow))
    assert moved > 20 * hardly
    for m in (model, slow):
        m.release().detach()
    start.detach()


def test_the_gate_is_fitted_without_new_classes(cell: Any) -> None:
    asked: list[list[str]] = []

    def learn(cell: Any, bank: Any) -> Any:
        asked.append(bank.classes)
        assert len(bank) == 2 * len(bank.classes)  # one shot of three is held out
        return plus_ideas.in_two_stages(cell, bank)

    seen, groups = plus_gate.pseudo(cell, learn)
    assert asked == [cell.base[: len(cell.base) // 2], cell.base[len(cell.base) // 2 :]]
    assert len(seen) == 2 * plus_cells.VIEWS * len(cell.base) and groups.float().mean() == 0.5
    both = [*cell.base, *cell.new]
    is_base = torch.arange(len(both)) < len(cell.base)
    z = plus_cells.logits(cell.plus, cell.tests[0].bank, both)

    class AsThePrior:
        """Plain CLIP's own log-odds at plus's temperature: METHOD's rule again."""

        def __call__(self, seen: Any) -> Any:
            return seen[:, 0]

    assert plus_gate.gated(cell, AsThePrior(), cell.plus) == plus_cells.figures(cell, cell.plus)  # type: ignore[arg-type]
    torch.testing.assert_close(
        torch.sigmoid(plus_gate.cues(z, is_base, torch.zeros(len(z[0])))[:, 0]),
        L.log_probs(z[0], plus.PLUS.group_temperature)[:, is_base].exp().sum(-1),
    )


def test_what_is_recorded_is_whole_and_beside_what_the_search_found() -> None:
    record = json.loads((plus.MEASURED / "ideas.json").read_text("utf-8"))
    assert [part["group"] for part in record] == list(plus_ideas.GROUPS)
    for part in record:
        for metrics in part["ideas"].values():
            assert tuple(metrics) == plus_cells.METRICS
            assert all(tuple(v) == plus.VALIDATION and all(len(s) == 3 for s in v.values()) for v in metrics.values())
    known = json.loads((plus.MEASURED / "search.json").read_text("utf-8"))[0]["ideas"]["plain CLIP"]
    found = record[0]["ideas"][plus.CLIP]["joint_hm"]
    assert sum(sum(v) for v in found.values()) / 9 == pytest.approx(list(known.values())[-1], abs=0.1)
