"""Numbers at their limits: any logits, class count and precision, and every gradient against finite differences.

FVG_EXAMPLES=3000 python -m pytest tests/test_numbers.py      # more cases than the 120 of the default run
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tuner_life import MAKERS, made
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call
from transformers import CLIPModel

from fvg_adapter import FVGConfig, wrap
from fvg_adapter import losses as L
from fvg_adapter.heads import BottleneckAdapter, ReliabilityGate

TAU = 2.0
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CLASSES = [1, 2, 3, 10, 1000, 10_000]
LARGE = 1e4

KINDS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "random": lambda b, c, g: torch.randn(b, c, generator=g),
    "scaled by 100": lambda b, c, g: 100 * torch.randn(b, c, generator=g),
    "identical": lambda b, c, g: torch.full((b, c), 7.0),
    "all large": lambda b, c, g: torch.full((b, c), LARGE),
    "all small": lambda b, c, g: torch.full((b, c), -LARGE),
    "one large": lambda b, c, g: -LARGE + 2 * LARGE * (torch.arange(c) == int(torch.randint(c, (), generator=g))),
    "large of both signs": lambda b, c, g: LARGE * torch.randn(b, c, generator=g).sign(),
}


@st.composite
def logits(draw: st.DrawFn, count: int) -> tuple[list[Tensor], torch.Generator]:
    """`count` tensors of logits (B, C) of one type, each of some kind, that ask for gradients."""
    batch, classes, dtype = draw(st.integers(1, 4)), draw(st.sampled_from(CLASSES)), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    kinds = [draw(st.sampled_from(sorted(KINDS))) for _ in range(count)]
    made = [KINDS[kind](batch, classes, generator).expand(batch, classes).to(dtype).clone() for kind in kinds]
    return [z.requires_grad_() for z in made], generator


def slack(*log_p: Tensor) -> float:
    """What rounding may do to a sum of p · (log p − log q): p is off by eps · |log p|, and Σ p |log p| ≤ log C."""
    largest = max(float(t.detach().float().abs().max()) for t in log_p)
    return 8 * torch.finfo(log_p[0].dtype).eps * (1 + largest) * (1 + math.log(log_p[0].shape[-1]))


def finite(*tensors: Tensor | None) -> bool:
    return all(t is None or bool(t.isfinite().all()) for t in tensors)


PROPERTY = settings(max_examples=int(os.environ.get("FVG_EXAMPLES", "120")), deadline=None)


@PROPERTY
@given(logits(2))
def test_entropy_lies_between_0_and_log_c_and_divergence_is_not_negative(made: tuple[list[Tensor], Any]) -> None:
    (z, other), _ = made
    log_p, log_q = L.log_probs(z, TAU), L.log_probs(other, TAU)
    entropy, divergence = L.entropy(log_p), L.kl_divergence(log_p, log_q)
    assert finite(log_p, log_q, entropy, divergence)
    assert bool((entropy >= 0).all())
    assert bool((entropy.double() <= math.log(z.shape[1]) + slack(log_p)).all())
    assert bool((divergence.double() >= -slack(log_p, log_q)).all())
    assert not bool(L.kl_divergence(log_p, log_p).any())
    if z.shape[1] == 1:
        assert not bool(entropy.any()) and not bool(divergence.any())
    if z.dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(log_p.exp().sum(-1), torch.ones_like(entropy), atol=1e-4, rtol=0)


@PROPERTY
@given(logits(4), st.floats(0, 1), st.booleans())
def test_losses_and_their_gradients_are_finite(made: tuple[list[Tensor], Any], trust: float, squared: bool) -> None:
    (z_full, z_fg, z_fdc, z_prior), generator = made
    batch, classes = z_full.shape
    squared = squared and z_full.dtype != torch.float16  # its τ² times 2e4 lies beyond the largest number of float16
    labels = torch.randint(classes, (batch,), generator=generator)
    r = torch.full((batch,), trust, dtype=z_full.dtype).requires_grad_()
    target = L.reliability_target(z_fg, z_full, labels)
    assert set(target.unique().tolist()) <= {0.0, 1.0} and target.dtype == z_full.dtype
    terms = [
        L.distillation_loss(r, z_fg, z_full, z_fdc, TAU, squared_temperature=squared),
        L.prior_divergence(z_prior, L.calibrated_logits(z_full, z_prior, r), TAU, squared_temperature=squared),
        L.gate_loss(z_full[:, 0], target, torch.rand(batch, generator=generator) > 0.5),
        L.foreground_cues(z_full, z_fg, torch.full((batch,), trust), TAU).sum(),
        L.prior_cues(z_full, z_prior, TAU).sum(),
    ]
    assert finite(*terms)
    lowest = -slack(*(L.log_probs(z, TAU) for z in (z_full, z_fg, z_fdc, z_prior))) * (TAU**2 if squared else 1)
    assert all(float(term.detach()) >= lowest for term in terms[:3])
    torch.stack([term.float() for term in terms]).sum().backward()
    assert finite(r.grad, *(z.grad for z in (z_full, z_fg, z_fdc, z_prior)))


@PROPERTY
@given(logits(2), st.floats(-1e4, 1e4), st.floats(0, 1))
def test_trusts_lie_between_0_and_1(made: tuple[list[Tensor], Any], size: float, area: float) -> None:
    (z, other), _ = made
    gate = ReliabilityGate()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.mul_(size)
        for cues in (
            L.foreground_cues(z, other, torch.full((len(z),), area), TAU),
            L.prior_cues(z, other, TAU),
        ):
            assert finite(cues) and float(cues[:, -1].float().abs().max()) <= 1.0001 + 8 * torch.finfo(z.dtype).eps
            trust = torch.sigmoid(gate(cues.float()))
            assert finite(trust) and bool((trust >= 0).all()) and bool((trust <= 1).all())
            mixed = L.calibrated_logits(z.float(), other.float(), trust)
            low, high = torch.minimum(z, other).float(), torch.maximum(z, other).float()
            room = 1e-6 * (low.abs() + high.abs())
            assert bool(((mixed >= low - room) & (mixed <= high + room)).all())


@PROPERTY
@given(logits(3), st.integers(0, 4))
def test_joint_probabilities_sum_to_1(made: tuple[list[Tensor], Any], cut: int) -> None:
    (z_prior, z_base, z_new), generator = made
    classes = z_prior.shape[1]
    is_base = torch.rand(classes, generator=generator) < cut / 4  # none, some or all
    found = L.joint_log_probs(z_prior, z_base, z_new, is_base)
    assert finite(found) and bool((found.float() <= slack(found)).all())
    if found.dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(found.exp().sum(-1), torch.ones_like(found[:, 0]), atol=2e-3, rtol=0)
    found.float().exp().sum().backward()
    assert finite(z_prior.grad, z_base.grad, z_new.grad)


# -- gradients by finite differences, float64 --------------------------------------------------------------------------


def doubles(*shape: int, seed: int = 0, count: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("squared", [False, True])
def test_gradients_of_every_equation(classes: int, squared: bool) -> None:
    z = doubles(3, classes, count=4)
    r, gate, area = torch.rand(3, 3, dtype=torch.float64).unbind()
    r.requires_grad_(), gate.requires_grad_(), area.requires_grad_()
    usable, target = torch.tensor([True, False, True]), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    is_base = torch.arange(classes) % 2 == 0
    options: dict[str, Any] = {"temperature": TAU, "squared_temperature": squared}
    equations: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "entropy": (lambda a: L.entropy(L.log_probs(a, TAU)), (z[0],)),
        "kl": (lambda a, b: L.kl_divergence(L.log_probs(a, TAU), L.log_probs(b, TAU)), (z[0], z[1])),
        "foreground cues": (lambda a, b, m: L.foreground_cues(a, b, m, TAU), (z[0], z[1], area)),
        "prior cues": (lambda a, b: L.prior_cues(a, b, TAU), (z[0], z[1])),
        "gate": (lambda g: L.gate_loss(g, target, usable), (gate,)),
        "distillation": (lambda t, a, b, s: L.distillation_loss(t, a, b, s, **options), (r, z[0], z[1], z[2])),
        "calibration": (L.calibrated_logits, (z[0], z[3], r)),
        "prior divergence": (lambda a, b: L.prior_divergence(a, b, **options), (z[3], z[0])),
        "joint": (lambda a, b, c: L.joint_log_probs(a, b, c, is_base), (z[0], z[1], z[2])),
    }
    for name, (equation, inputs) in equations.items():
        assert gradcheck(equation, inputs), name


def test_gradients_of_the_heads() -> None:
    adapter, gate = BottleneckAdapter(6, 4, init_std=0.5).double(), ReliabilityGate(5).double()
    (features,), (cues,) = doubles(3, 6), doubles(3, 3, seed=1)
    for module, inputs in ((adapter, features), (gate, cues)):
        names = [name for name, _ in module.named_parameters()]
        values = tuple(p.detach().clone().requires_grad_() for p in module.parameters())

        def run(x: Tensor, *parameters: Tensor, module: Any = module, names: Any = names) -> Tensor:
            return functional_call(module, dict(zip(names, parameters, strict=True)), (x,))  # type: ignore[no-any-return]

        assert gradcheck(run, (inputs, *values))


@pytest.fixture
def double_by_default() -> Iterator[None]:
    """transformers 4.57 makes the text mask in torch's default dtype, where float64's smallest number overflows."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_by_default")
@pytest.mark.parametrize("kind", MAKERS)
def test_the_gradient_of_l_in_every_head(kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    """L as a whole behind every tuner; r learns from the distillation too, else its gradient is cut on purpose."""
    config = FVGConfig(gate_learns_from_distillation=True, init_std=0.3)
    model = wrap(made(kind, small_clip, tokenizer).double(), config=config, foreground="given").double()
    mask = torch.zeros(4, 32, 32)
    mask[:3, 8:24, 8:24] = 1  # the last one is unusable
    views = model.views(pixels.double(), mask)
    bank = {"image": views.base, "image_new": views.new, "foreground": views.foreground, "prior": views.prior}
    batch = {k: v for k, v in {**bank, "mask_area": views.area, "usable": views.usable}.items() if v is not None}
    labels = torch.tensor([0, 1, 2, 0])
    model.train()
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    values = tuple(p.detach().clone().requires_grad_() for p in own.values())
    assert all(value.dtype == torch.float64 for value in values) and len(values) == 16

    def loss(*parameters: Tensor) -> Tensor:
        output = functional_call(
            model, dict(zip(own, parameters, strict=True)), (), {"features": batch, "labels": labels}
        )
        return output.loss  # type: ignore[no-any-return]

    assert gradcheck(loss, values, fast_mode=True, eps=1e-7, atol=1e-5)
    for name, parameter in zip(own, torch.autograd.grad(loss(*values), values), strict=True):
        assert finite(parameter) and float(parameter.abs().max()) > 0, name
