"""Rollout and relevance where a small slip would stay unseen: other grids, added tokens, passes that do not count."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_attention import GRID, Prompted, eager, images, make_clip, oracle
from torch import Tensor, nn

from conftest import checkpoint_activations
from fvg_adapter import record_attention
from fvg_adapter.errors import FVGError
from fvg_adapter.towers import DualEncoder


def rolled_out(matrices: list[Tensor], kept: list[list[int]]) -> Tensor:
    """(B, patches): the product of the layers over the tokens that are followed, the pooling token first."""
    total = torch.eye(len(kept[0])).expand(len(matrices[0]), -1, -1)
    for matrix, tokens in zip(matrices, kept, strict=True):
        among = matrix.mean(1)[:, tokens][:, :, tokens]
        total = 0.5 * (among + torch.eye(len(tokens))) @ total
    return total[:, 0, 1:]


def attentions(clip: nn.Module, pixels: Tensor, **options: Any) -> list[Tensor]:
    """(B, heads, N, N) of every layer, as Hugging Face computes it."""
    return list(eager(clip)(pixel_values=pixels, output_attentions=True, **options).attentions)


class Skipping(nn.Module):
    """A CLIP whose passes count or do not, as those of a tuner beside its plain CLIP."""

    def __init__(self, prompted: Prompted) -> None:
        super().__init__()
        self.clip, self.prompted, self.skips = prompted.clip, prompted, False

    def attention_target(self) -> tuple[nn.Module, Callable[[int], int], Callable[[], bool]]:
        return self.clip, self.prompted.first_patch, lambda: self.skips

    def features(self, pixels: Tensor) -> Tensor:
        return DualEncoder(self.clip).image_features(pixels)


@torch.no_grad()
@pytest.mark.parametrize("size", [(24, 56), (48, 16)])
def test_rollout_over_a_grid_that_is_no_square(size: tuple[int, int]) -> None:
    clip, pixels = make_clip(), images(*size)
    with record_attention(clip, rollout=True) as record:
        clip.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True)
    matrices = attentions(clip, pixels, interpolate_pos_encoding=True)
    height, width = size[0] // 8, size[1] // 8
    expected = rolled_out(matrices, [list(range(1 + height * width))] * len(matrices))
    torch.testing.assert_close(record.rollout(), expected.reshape(3, height, width), atol=1e-6, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("where", ["inside", "behind"])
def test_rollout_follows_patches_among_added_tokens(where: str) -> None:
    model, pixels = Prompted(where), images()
    with record_attention(model, rollout=True) as record:  # type: ignore[arg-type]
        model.clip.get_image_features(pixel_values=pixels)
    matrices = attentions(model.clip, pixels)
    starts = [model.first_patch(layer) for layer in range(len(matrices))]
    kept = [[0, *range(start, start + GRID * GRID)] for start in starts]
    torch.testing.assert_close(record.rollout().flatten(1), rolled_out(matrices, kept), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("parallel", [False, True])
def test_passes_that_do_not_count_are_in_no_map(parallel: bool) -> None:
    """Maps, rollout and relevance are those of the pass that counts, also of a tuner inside DataParallel."""
    model = Skipping(Prompted("inside"))
    given = nn.DataParallel(model) if parallel else model
    maps = []
    for others in (False, True):
        with record_attention(given, "all", rollout=True, relevance=True) as record:
            found = model.features(images().requires_grad_())
            if others:
                model.skips = True
                model.features(2 * images())
                model.skips = False
            maps.append((record.attention(), record.rollout(), record.relevance(found[:, 0])))
    for alone, beside in zip(*maps, strict=True):
        assert torch.equal(alone, beside)
    assert maps[0][2].max() > 0


@torch.no_grad()
def test_rollout_is_of_one_thread() -> None:
    clip = make_clip()
    with record_attention(clip, rollout=True) as record:
        clip.get_image_features(pixel_values=images())
        expected = record.rollout()
        thread = threading.Thread(target=clip.get_image_features, args=(2 * images(batch=2),))
        thread.start()
        thread.join()
        assert torch.equal(record.rollout(), expected)


def test_recomputation_in_backward_is_not_followed() -> None:
    clip, pixels = make_clip(), images().requires_grad_()
    checkpoint_activations(clip, use_reentrant=False)
    clip.train()
    with record_attention(clip, rollout=True) as record:
        clip.vision_model(pixel_values=2 * pixels).pooler_output.sum().backward()
        output = clip.vision_model(pixel_values=pixels).pooler_output
        expected = record.rollout()
        output.sum().backward()
        assert torch.equal(record.rollout(), expected)


@torch.no_grad()
def test_pixels_may_reach_the_embeddings_by_name() -> None:
    clip, pixels = make_clip(), images(24, 56)
    tower = DualEncoder(clip).vision
    with record_attention(clip, rollout=True) as record:
        hidden = tower.embeddings(pixel_values=pixels, interpolate_pos_encoding=True)
        tower.encoder(inputs_embeds=tower.pre_layrnorm(hidden))
    expected = oracle(clip, pixels, interpolate_pos_encoding=True)[:, -1:]
    torch.testing.assert_close(record.attention(), expected, atol=1e-5, rtol=0)
    assert record.rollout().shape == (3, 3, 7)


def test_each_answer_has_to_be_asked_for_at_the_start() -> None:
    clip, pixels = make_clip(), images().requires_grad_()
    with record_attention(clip, relevance=True) as record:
        score = clip.get_image_features(pixel_values=pixels)
        score = getattr(score, "pooler_output", score)[:, 0]
        with pytest.raises(FVGError, match="no rollout was recorded"):
            record.rollout()
    with record_attention(clip, rollout=True) as record:
        clip.get_image_features(pixel_values=pixels)
        with pytest.raises(FVGError, match="nothing was recorded for relevance"):
            record.relevance(score)


def test_a_forward_without_gradients_says_what_to_do() -> None:
    clip = make_clip().requires_grad_(False)
    with record_attention(clip, relevance=True) as record:
        clip.get_image_features(pixel_values=images())
        with pytest.raises(FVGError, match=r"the recorded attention has no gradient; run .*requires_grad_\(\)"):
            record.relevance(torch.ones(1, requires_grad=True))


def test_relevance_in_half_precision() -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_clip().to(dtype)
        with record_attention(model, "all", relevance=True) as record:
            features = DualEncoder(model).image_features(images().to(dtype).requires_grad_())
            found.append(record.relevance(features[:, 0]))
    assert found[1].dtype == torch.float32
    exact, rough = (x.flatten(1) for x in found)
    assert float(torch.corrcoef(torch.cat([exact.flatten()[None], rough.flatten()[None]]))[0, 1]) > 0.9
