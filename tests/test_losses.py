"""Losses against values worked out by hand, naive loops, and the float64 oracle of golden/fvg.safetensors."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import Golden
from fvg_adapter import losses as L
from fvg_adapter.heads import BottleneckAdapter, ReliabilityGate

TAU = 2.0
HALF, QUARTERS = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()


def naive_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def softmax(z: list[float], tau: float) -> list[float]:
    weights = [math.exp(v / tau) for v in z]
    return [w / sum(weights) for w in weights]


def test_entropy_and_divergence_by_hand() -> None:
    assert L.entropy(HALF).item() == pytest.approx(math.log(2))
    assert L.kl_divergence(HALF, QUARTERS).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert L.kl_divergence(HALF, HALF).item() == 0.0


def test_foreground_cues_by_hand() -> None:
    z_full, z_fg = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, TAU * math.log(3)]])  # p_fg = (1/4, 3/4) at τ = 2
    cues = L.foreground_cues(z_full, z_fg, torch.tensor([0.3]), TAU)
    h_fg = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    cosine = 0.5 / (math.sqrt(0.5) * math.sqrt(0.0625 + 0.5625))
    torch.testing.assert_close(cues, torch.tensor([[math.log(2) - h_fg, cosine, 0.3]]))
    precise = L.foreground_cues(z_full, z_fg, torch.tensor([0.3], dtype=torch.float64), TAU)
    assert torch.equal(precise, cues) and precise.dtype == torch.float32  # as the gate that reads them


def test_reliability_target_is_strict_and_has_a_margin() -> None:
    labels = torch.tensor([0, 0, 0])
    z_full = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    z_fg = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert L.reliability_target(z_fg, z_full, labels).tolist() == [1, 0, 0]
    gain = math.log1p(math.exp(-1)) - math.log1p(math.exp(-2))  # how much lower the foreground's cross entropy is
    assert L.reliability_target(z_fg, z_full, labels, gain - 1e-3).tolist() == [1, 0, 0]
    assert L.reliability_target(z_fg, z_full, labels, gain + 1e-3).tolist() == [0, 0, 0]


def test_gate_loss_by_hand() -> None:
    logits, target = torch.tensor([0.0, math.log(3)]), torch.tensor([1.0, 0.0])  # r = 1/2, 3/4
    usable = torch.tensor([True, False])
    assert L.gate_loss(logits, target, usable).item() == pytest.approx(math.log(2) / 2)
    both = L.gate_loss(logits, target, torch.tensor([True, True])).item()
    assert both == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_distillation_and_calibration_against_loops() -> None:
    torch.manual_seed(0)
    z_fg, z_full, z_fdc, z_prior = torch.randn(4, 5, 3, dtype=torch.float64).unbind()
    trust = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    expected = sum(
        r * naive_kl(softmax(a, TAU), softmax(s, TAU)) + (1 - r) * naive_kl(softmax(b, TAU), softmax(s, TAU))
        for r, a, b, s in zip(trust.tolist(), z_fg.tolist(), z_full.tolist(), z_fdc.tolist(), strict=True)
    )
    assert L.distillation_loss(trust, z_fg, z_full, z_fdc, TAU).item() == pytest.approx(expected / 5, abs=1e-12)
    squared = L.distillation_loss(trust, z_fg, z_full, z_fdc, TAU, squared_temperature=True).item()
    assert squared == pytest.approx(4 * expected / 5, abs=1e-12)
    three = L.distillation_loss(trust, z_fg, z_full, z_fdc, 3.0)  # 2² is 2·2: at 3 a square differs from a double
    assert L.distillation_loss(trust, z_fg, z_full, z_fdc, 3.0, squared_temperature=True) == 9 * three

    z_pc = L.calibrated_logits(z_full, z_prior, trust)
    assert torch.equal(z_pc[0], z_full[0])
    assert torch.equal(z_pc[4], z_prior[4])
    kl = [naive_kl(softmax(p, TAU), softmax(q, TAU)) for p, q in zip(z_prior.tolist(), z_pc.tolist(), strict=True)]
    assert L.prior_divergence(z_prior, z_pc, TAU).item() == pytest.approx(sum(kl) / 5, abs=1e-12)
    three = L.prior_divergence(z_prior, z_pc, 3.0)
    assert L.prior_divergence(z_prior, z_pc, 3.0, squared_temperature=True) == 9 * three


@pytest.mark.parametrize("wanted", [0.05, 0.5, 1.0, 1.6])
def test_temperature_that_brings_an_entropy(wanted: float) -> None:
    logits = 5 * torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = L.temperature_of_entropy(logits, wanted)
    mean = sum(-p * math.log(p) for row in logits.tolist() for p in softmax(row, found) if p > 0) / 7
    assert mean == pytest.approx(wanted, abs=1e-9)
    assert L.temperature_of_entropy(3 * logits, wanted) == pytest.approx(3 * found, rel=1e-9)  # scales with the logits
    coarse = L.temperature_of_entropy(logits, wanted, steps=8)  # fewer halvings, a coarser answer
    assert coarse != pytest.approx(found, rel=1e-6) and coarse == pytest.approx(found, rel=0.1)


def test_heads_have_the_published_widths_and_start() -> None:
    torch.manual_seed(0)
    adapter, gate = BottleneckAdapter(512), ReliabilityGate()
    assert tuple(adapter.down.weight.shape) == (64, 512) and tuple(gate.hidden.weight.shape) == (32, 3)
    assert float(adapter.up.weight.detach().std()) == pytest.approx(1e-3, rel=0.02) and not bool(adapter.up.bias.any())
    assert float(BottleneckAdapter(512, init_std=0.5).up.weight.detach().std()) == pytest.approx(0.5, rel=0.02)
    assert sum(p.numel() for m in (adapter, adapter, gate, gate) for p in m.parameters()) == 132_546


def test_examples() -> None:
    ran = doctest.testmod(L)
    assert ran.attempted >= 4 and ran.failed == 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_joint_rule_against_a_loop(temperature: float) -> None:
    torch.manual_seed(1)
    z_prior, z_base, z_new = torch.randn(3, 2, 5, dtype=torch.float64).unbind()
    is_base = torch.tensor([True, False, True, False, False])
    found = L.joint_log_probs(z_prior, z_base, z_new, is_base, group_temperature=temperature).exp()
    for i in range(2):
        prior = softmax(z_prior[i].tolist(), temperature)
        for group, z in ((True, z_base), (False, z_new)):
            members = [c for c in range(5) if bool(is_base[c]) is group]
            inside = softmax([float(z[i, c]) for c in members], 1.0)
            for c, share in zip(members, inside, strict=True):
                assert found[i, c].item() == pytest.approx(sum(prior[m] for m in members) * share, abs=1e-12)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, dtype=torch.float64))


def test_joint_rule_reduces_to_one_branch() -> None:
    z_prior, z_base, z_new = torch.randn(3, 2, 4).unbind()
    torch.testing.assert_close(L.joint_log_probs(z_prior, z_base, z_new, torch.ones(4).bool()), z_base.log_softmax(-1))
    torch.testing.assert_close(L.joint_log_probs(z_prior, z_base, z_new, torch.zeros(4).bool()), z_new.log_softmax(-1))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.sampled_from([0.0, 1.0, 100.0, 1e4]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 10_000),
)
def test_losses_stay_finite_and_in_range(classes: int, size: float, dtype: torch.dtype, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    z = [(size * torch.randn(3, classes, generator=draw)).to(dtype).requires_grad_() for _ in range(3)]
    log_p, log_q = L.log_probs(z[0], TAU), L.log_probs(z[1], TAU)
    slack = 0.05 if dtype == torch.bfloat16 else 1e-4
    assert bool((L.entropy(log_p) >= -slack).all())
    assert bool((L.entropy(log_p) <= math.log(classes) + slack * (1 + math.log(classes))).all())
    assert bool((L.kl_divergence(log_p, log_q) >= -slack).all())
    loss = L.distillation_loss(torch.full((3,), 0.5, dtype=dtype), *z, TAU) + L.prior_divergence(z[0], z[1], TAU)
    loss.backward()
    assert bool(loss.isfinite())
    assert all(bool(v.grad.isfinite().all()) for v in z if v.grad is not None)


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    z = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    trust = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, a, b, s: L.distillation_loss(r, a, b, s, TAU), (trust, *z))
    assert torch.autograd.gradcheck(lambda a, b: L.prior_divergence(a, b, TAU), (z[0], z[1]))
    assert torch.autograd.gradcheck(lambda a, b: L.foreground_cues(a, b, trust, TAU), (z[0], z[1]))


def heads_of(case: Golden) -> dict[str, torch.nn.Module]:
    heads: dict[str, torch.nn.Module] = {
        "visual_adapter": BottleneckAdapter(32, 8),
        "text_adapter": BottleneckAdapter(32, 8),
        "foreground_gate": ReliabilityGate(8),
        "backbone_gate": ReliabilityGate(8),
    }
    for name, head in heads.items():
        head.double().load_state_dict(
            {k.removeprefix(f"{name}."): v for k, v in case.under("param").items() if k.startswith(name)}
        )
    return heads


def test_every_quantity_of_the_float64_oracle(golden: Callable[[str], Golden]) -> None:
    case = golden("fvg")
    heads, scale = heads_of(case), case.config["logit_scale_exp"]

    def close(found: Tensor, name: str) -> None:
        torch.testing.assert_close(found.detach(), case[name], atol=1e-9, rtol=0)

    z_full, z_fg, z_clip, labels = case["z_full"], case["z_fg"], case["z_clip"], case["labels"]
    cues = L.foreground_cues(z_full, z_fg, case["mask_area"], TAU)
    close(cues, "foreground_cues")
    close(L.reliability_target(z_fg, z_full, labels), "foreground_target")
    trust = torch.sigmoid(heads["foreground_gate"](cues)) * case["usable"]
    close(trust, "foreground_trust")
    image, text = heads["visual_adapter"](case["image_features"]), heads["text_adapter"](case["text_features"])
    close(scale * image @ text.T, "z_fdc")
    close(L.kl_divergence(L.log_probs(z_fg, TAU), L.log_probs(case["z_fdc"], TAU)), "kl_fg")
    close(L.kl_divergence(L.log_probs(z_full, TAU), L.log_probs(case["z_fdc"], TAU)), "kl_full")
    close(L.prior_cues(z_full, z_clip, TAU), "backbone_cues")
    prior_trust = torch.sigmoid(heads["backbone_gate"](case["backbone_cues"]))
    close(prior_trust, "prior_trust")
    close(L.calibrated_logits(z_full, z_clip, prior_trust), "z_pc")
