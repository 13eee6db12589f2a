"""The equations of FVG-PT as pure functions of tensors (METHOD.md sections 3 to 5 and 11).

z are logits (B, C), y labels (B,), r and b trusts (B,), τ the temperature. Everything is computed in the inputs' own
floating-point type; entropies and divergences are in nats. Imports torch only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(z / τ) (B, C).

    >>> log_probs(torch.tensor([[0.0, 0.0]])).exp()
    tensor([[0.5000, 0.5000]])
    """
    return F.log_softmax(logits / temperature, dim=-1)


def entropy(log_p: Tensor) -> Tensor:
    """Shannon entropy H(p) (B,) of log-probabilities (B, C), in [0, log C].

    >>> entropy(torch.tensor([[0.5, 0.5]]).log())
    tensor([0.6931])
    """
    return -(log_p.exp() * log_p).sum(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) (B,), summed over classes, of log-probabilities (B, C).

    >>> kl_divergence(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    tensor([0.1438])
    """
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def foreground_cues(z_full: Tensor, z_fg: Tensor, mask_area: Tensor, temperature: float) -> Tensor:
    """u = [H(p_full) − H(p_fg), cos(p_full, p_fg), A(m)] (B, 3), what the foreground gate sees (section 3)."""
    full, view = log_probs(z_full, temperature), log_probs(z_fg, temperature)
    cosine = F.cosine_similarity(full.exp(), view.exp(), dim=-1)
    return torch.stack([entropy(full) - entropy(view), cosine, mask_area.to(cosine)], dim=-1)


def prior_cues(z_full: Tensor, z_prior: Tensor, temperature: float) -> Tensor:
    """v = [H(p_full), H(p_CLIP), cos(p_full, p_CLIP)] (B, 3), what the backbone gate sees (section 5)."""
    full, prior = log_probs(z_full, temperature), log_probs(z_prior, temperature)
    return torch.stack([entropy(full), entropy(prior), F.cosine_similarity(full.exp(), prior.exp(), dim=-1)], dim=-1)


def reliability_target(z_fg: Tensor, z_full: Tensor, labels: Tensor, margin: float = 0.0) -> Tensor:
    """r* (B,): 1 where CE(z_fg, y) + δ < CE(z_full, y), else 0; without gradient (section 3)."""
    with torch.no_grad():
        view = F.cross_entropy(z_fg, labels, reduction="none")
        full = F.cross_entropy(z_full, labels, reduction="none")
        return (view + margin < full).to(z_full.dtype)


def gate_loss(gate_logits: Tensor, target: Tensor, usable: Tensor) -> Tensor:
    """L_FRG = (1/B) Σ u_i · BCE(r_i, r*_i) over gate logits (B,), targets (B,) and usable flags (B,) (section 3).

    Always in the graph, also where no mask is usable; divided by B, so that halves of a batch average to the whole.
    """
    each = F.binary_cross_entropy_with_logits(gate_logits, target, reduction="none")
    return (usable.to(each) * each).mean()


def distillation_loss(
    trust: Tensor, z_fg: Tensor, z_full: Tensor, z_fdc: Tensor, temperature: float, *, squared_temperature: bool = False
) -> Tensor:
    """L_dist = (1/B) Σ [ r_i KL(p_fg ‖ p_FDC) + (1 − r_i) KL(p_full ‖ p_FDC) ] (section 4)."""
    student = log_probs(z_fdc, temperature)
    view = kl_divergence(log_probs(z_fg, temperature), student)
    full = kl_divergence(log_probs(z_full, temperature), student)
    factor = temperature**2 if squared_temperature else 1.0
    return factor * (trust * view + (1 - trust) * full).mean()


def calibrated_logits(z_full: Tensor, z_prior: Tensor, prior_trust: Tensor) -> Tensor:
    """z_PC = (1 − b) · z_full + b · z_CLIP (B, C) (section 5)."""
    b = prior_trust.unsqueeze(-1)  # (B, 1)
    return (1 - b) * z_full + b * z_prior


def prior_divergence(z_prior: Tensor, z_pc: Tensor, temperature: float, *, squared_temperature: bool = False) -> Tensor:
    """KL(p_CLIP ‖ softmax(z_PC / τ)), averaged over the batch (section 5)."""
    factor = temperature**2 if squared_temperature else 1.0
    return factor * kl_divergence(log_probs(z_prior, temperature), log_probs(z_pc, temperature)).mean()


def temperature_of_entropy(logits: Tensor, wanted: float, steps: int = 60) -> float:
    """The temperature T at which the mean entropy of softmax(z / T) is `wanted` nats, by bisection.

    D_fg of two models can be compared at the entropy of one of them: a flatter softmax lowers it for nothing.

    Args:
        logits: (N, C) z. wanted: mean entropy in nats, between 0 and log C (both excluded). steps: halvings.

    >>> round(temperature_of_entropy(torch.tensor([[2.0, 0.0]]), 0.6), 2)
    2.21
    """
    low, high = 1e-4, 1e4
    for _ in range(steps):
        middle = (low * high) ** 0.5
        if float(entropy(log_probs(logits, middle)).mean()) < wanted:
            low = middle
        else:
            high = middle
    return float((low * high) ** 0.5)


def joint_log_probs(
    z_prior: Tensor, z_base: Tensor, z_new: Tensor, is_base: Tensor, *, group_temperature: float = 1.0
) -> Tensor:
    """log p(c | x) (B, C) over base and new classes together, by the hierarchical rule of section 11.

    Which group is asked of the untouched prior, which class in it of the branch made for it. With one group alone it is
    that branch's log softmax.

    Args:
        z_prior, z_base, z_new: (B, C) logits of plain CLIP, of the base and of the new branch, over all classes.
        is_base: (C,) True for the classes tuned on.
        group_temperature: T of P_CLIP(group) = Σ softmax(z_CLIP / T) over the group's classes; 1 is METHOD's rule. A
            flatter prior leaves more of the question to the branches (measured in docs/plus.md).
    """
    prior = log_probs(z_prior, group_temperature)
    result = torch.empty_like(z_base)
    for members, logits in ((is_base, z_base), (~is_base, z_new)):
        if bool(members.any()):
            group = prior[:, members].logsumexp(-1, keepdim=True)  # (B, 1)
            result[:, members] = group + log_probs(logits[:, members])
    return result
