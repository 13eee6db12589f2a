"""Masks, foreground views and their sources, against naive loops and by hand."""

from __future__ import annotations

import doctest
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from fvg_adapter import foreground, masks
from fvg_adapter.config import CLIP_MEAN, CLIP_STD
from fvg_adapter.errors import FVGError
from fvg_adapter.foreground import (
    ForegroundError,
    ForegroundSource,
    attention_mask_from_map,
    foreground_view,
    mask_area,
    mirrored_mask_path,
    prepare_mask,
    read_mask,
    resolve_source,
    usable_mask,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pixels(batch: int, height: int = 8, width: int = 12) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def truth(batch: int, height: int = 8, width: int = 12) -> Tensor:
    """(B, 1, H, W) float of 0 and 1."""
    return (torch.rand(batch, 1, height, width, generator=torch.Generator().manual_seed(1)) > 0.6).float()


# -- prepare_mask ------------------------------------------------------------------------------------------------------

FORMS: dict[str, Any] = {
    "bool": lambda m: m.bool(),
    "float32": lambda m: m,
    "float64": lambda m: m.double(),
    "float16": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "soft": lambda m: m * 0.5 + 0.2,  # 0.2 and 0.7
    "uint8 0/1": lambda m: m.byte(),
    "uint8 0..255": lambda m: (m * 255).byte(),
    "jpeg noise": lambda m: (m * 240 + 7).byte(),
    "int64 0/1": lambda m: m.long(),
    "int32 0..255": lambda m: (m * 255).int(),
    "uint16 0..255": lambda m: (m * 255).to(torch.uint16),
    "needs a gradient": lambda m: m.clone().requires_grad_(),
    "numpy bool": lambda m: m.numpy().astype(bool),
    "numpy uint8": lambda m: (m * 255).byte().numpy(),
    "numpy uint16": lambda m: (m * 255).numpy().astype(np.uint16),
    "numpy float64": lambda m: m.numpy().astype(np.float64),
    "numpy big-endian": lambda m: (m * 255).numpy().astype(">i4"),
    "numpy read-only": lambda m: np.frombuffer(m.numpy().tobytes(), np.float32).reshape(m.shape),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_form_means_the_same(form: str, batch: int) -> None:
    mask = truth(batch)
    given_mask = FORMS[form](mask)
    shapes = [given_mask, given_mask[:, 0]] + ([given_mask[0, 0]] if batch == 1 else [])
    for shaped in shapes:
        result = prepare_mask(shaped, pixels(batch))
        assert result.dtype == torch.float32 and not result.requires_grad
        assert torch.equal(result, mask)


def test_threshold_is_included() -> None:
    mask = torch.tensor([[0.0, 0.4999, 0.5, 1.0]])
    images = torch.zeros(1, 3, 1, 4)
    assert prepare_mask(mask, images).flatten().tolist() == [0, 0, 1, 1]
    assert prepare_mask(mask, images, threshold=0.25).flatten().tolist() == [0, 1, 1, 1]
    assert prepare_mask((mask * 255).byte(), images, threshold=1.0).flatten().tolist() == [0, 0, 0, 1]
    assert prepare_mask(torch.tensor([[0, 127, 128, 255]]), images).flatten().tolist() == [0, 0, 1, 1]


def test_an_image_of_ones_is_foreground_whatever_stands_beside_it() -> None:
    """Each image is read by its own range, so that a batch split in two gives the same masks."""
    mask = torch.stack([torch.ones(8, 12), 255 * truth(1)[0, 0], torch.zeros(8, 12)]).byte()
    together = prepare_mask(mask, pixels(3))
    apart = torch.cat([prepare_mask(m[None], pixels(1)) for m in mask])
    assert torch.equal(together, apart)
    assert mask_area(together)[[0, 2]].tolist() == [1, 0]


def area_oracle(mask: Tensor, height: int, width: int) -> Tensor:
    """Mean of the cells that each pixel touches, by loops."""
    rows, columns = mask.shape
    result = torch.zeros(height, width)
    for i in range(height):
        for j in range(width):
            top, bottom = i * rows // height, -(-(i + 1) * rows // height)
            left, right = j * columns // width, -(-(j + 1) * columns // width)
            result[i, j] = mask[top:bottom, left:right].mean()
    return result


@settings(max_examples=40, deadline=None)
@given(*[st.integers(1, 9)] * 4, st.integers(0, 99))
def test_another_resolution(rows: int, columns: int, height: int, width: int, seed: int) -> None:
    mask = (torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.5).float()
    images = torch.zeros(2, 3, height, width)
    result = prepare_mask(mask, images)
    for i in range(2):
        shares = area_oracle(mask[i], height, width)
        clear = (shares - 0.5).abs() > 1e-5  # a tie may fall either way in float32
        assert torch.equal(result[i, 0][clear], (shares >= 0.5).float()[clear])
        mirrored = prepare_mask(mask.flip(-1), images)[i, 0].flip(-1)
        assert torch.equal(mirrored[clear], result[i, 0][clear])
    if (rows, columns) == (height, width):
        assert torch.equal(result[:, 0], mask)


def test_whole_multiples_keep_the_mask() -> None:
    mask = truth(2)
    large = mask.repeat_interleave(4, 2).repeat_interleave(3, 3)
    assert torch.equal(prepare_mask(mask, torch.zeros(2, 3, 32, 36)), large)
    assert torch.equal(prepare_mask(large, pixels(2)), mask)


BAD: list[tuple[Any, int, str]] = [
    (torch.zeros(2, 8, 12), 4, "holds 2 masks for 4 images"),
    (torch.zeros(2, 1, 8, 12), 4, "holds 2 masks for 4 images"),
    (torch.zeros(8, 12), 4, r"\(B, H, W\) or \(B, 1, H, W\) with B = 4, but is \(8, 12\)"),
    (torch.zeros(12), 1, r"but is \(12,\)"),
    (torch.zeros(1, 2, 1, 8, 12), 2, r"but is \(1, 2, 1, 8, 12\)"),
    (torch.zeros(4, 3, 8, 12), 4, r"one channel.*\(4, 3, 8, 12\).*mask.float\(\).mean\(1\)"),
    (torch.zeros(4, 8, 12, 3), 4, r"one channel.*mask.float\(\).mean\(-1\)"),
    (torch.zeros(4, 2, 8, 12), 4, r"one channel, \(B, 1, H, W\), but is \(4, 2, 8, 12\)\.$"),
    (torch.zeros(3, 8, 12), 1, "holds 3 masks for 1 images.*Average the channels"),
    (torch.zeros(8, 12, 3), 1, "holds 8 masks for 1 images.*Average the channels"),
    (torch.zeros(2, 0, 0), 2, "has no pixels"),
    (torch.full((2, 8, 12), float("nan")), 2, "contains NaN"),
    (torch.full((2, 8, 12), 255.0), 2, r"values from 255 to 255.*\[0, 1\]: divide by 255"),
    (torch.full((2, 8, 12), -0.5), 2, "values from -0.5"),
    (torch.full((2, 8, 12), float("inf")), 2, "to inf"),
    (torch.full((2, 8, 12), 256), 2, "values from 256 to 256; integer masks must be 0/1 or 0..255"),
    (torch.full((2, 8, 12), -1), 2, "values from -1"),
    (torch.zeros(2, 8, 12, dtype=torch.complex64), 2, "complex64"),
    ([[0, 1]], 1, "tensor or a numeric array, but is list"),
    (None, 1, "but is NoneType"),
    (np.array([["a"]]), 1, "array of <U1"),
]


@pytest.mark.parametrize(("mask", "batch", "message"), BAD)
def test_masks_that_do_not_fit(mask: Any, batch: int, message: str) -> None:
    with pytest.raises(ForegroundError, match=message) as error:
        prepare_mask(mask, pixels(batch))
    assert isinstance(error.value, ValueError) and isinstance(error.value, FVGError)


def test_one_nan_among_good_values() -> None:
    mask = truth(2)
    mask[1, 0, 3, 3] = float("nan")
    with pytest.raises(ForegroundError, match="NaN"):
        prepare_mask(mask, pixels(2))


def test_other_mistakes_of_prepare_mask() -> None:
    with pytest.raises(ForegroundError, match=r"pixel_values must be \(B, 3, H, W\), but have shape \(3, 8, 12\)"):
        prepare_mask(truth(1), torch.zeros(3, 8, 12))
    for threshold in (0.0, 1.5, float("nan")):
        with pytest.raises(ForegroundError, match=r"threshold must lie in \(0, 1\]"):
            prepare_mask(truth(1), pixels(1), threshold=threshold)
    assert prepare_mask(torch.zeros(0, 8, 12), pixels(0)).shape == (0, 1, 8, 12)


# -- foreground_view, area, usable -------------------------------------------------------------------------------------


def test_view_is_the_image_inside_and_the_fill_outside() -> None:
    images, mask = pixels(2), truth(2)
    mean, black = foreground_view(images, mask), foreground_view(images, mask, outside="black")
    for b in range(2):
        for c in range(3):
            for i in range(8):
                for j in range(12):
                    inside = bool(mask[b, 0, i, j])
                    assert float(mean[b, c, i, j]) == (float(images[b, c, i, j]) if inside else 0)
                    undone = float(black[b, c, i, j]) * CLIP_STD[c] + CLIP_MEAN[c]  # back to pixels in [0, 1]
                    expected = float(images[b, c, i, j]) * CLIP_STD[c] + CLIP_MEAN[c] if inside else 0.0
                    assert undone == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("outside", ["mean", "black"])
def test_view_keeps_the_type_and_the_gradient(outside: str) -> None:
    images = pixels(2).bfloat16().requires_grad_()
    view = foreground_view(images, truth(2), outside=outside)
    assert view.dtype == torch.bfloat16
    view.sum().backward()
    assert images.grad is not None and torch.equal(images.grad[:, :1].float(), truth(2))
    assert torch.equal(foreground_view(images, truth(2).bool(), outside=outside), view)
    whole = foreground_view(pixels(2), torch.ones(2, 1, 8, 12), outside=outside)
    assert torch.equal(whole, pixels(2))


def test_black_takes_the_models_own_normalisation() -> None:
    view = foreground_view(
        torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), outside="black", image_mean=[0.5], image_std=[0.25]
    )
    assert view.item() == -2
    with pytest.raises(ForegroundError, match="1 channels, but image_mean has 3 and image_std 3"):
        foreground_view(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), outside="black")
    with pytest.raises(ForegroundError, match="outside is 'blac'. Did you mean 'black'"):
        foreground_view(pixels(1), truth(1), outside="blac")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_area_counts_pixels(batch: int, height: int, width: int, seed: int) -> None:
    mask = (torch.rand(batch, 1, height, width, generator=torch.Generator().manual_seed(seed)) > 0.3).float()
    expected = [int(m.sum()) / (height * width) for m in mask]
    assert mask_area(mask).tolist() == pytest.approx(expected, abs=1e-7)
    assert torch.equal(mask_area(mask.bool()), mask_area(mask[:, 0]))


def test_usable_bounds_are_included() -> None:
    for covered, usable in [(0, False), (1, False), (2, True), (50, True), (98, True), (99, False), (100, False)]:
        mask = (torch.arange(100) < covered).float().view(1, 1, 10, 10)
        assert usable_mask(mask_area(mask)).tolist() == [usable]
    assert usable_mask(torch.tensor([0.0, 1.0]), (0.0, 1.0)).all()
    assert usable_mask(torch.tensor([float("nan")])).tolist() == [False]


# -- masks from attention ----------------------------------------------------------------------------------------------


def bilinear_oracle(patches: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation between patch centres, the border patches held constant outside theirs."""
    rows, columns = patches.shape
    result = torch.zeros(height, width)
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * rows / height - 0.5, 0), rows - 1)
            x = min(max((j + 0.5) * columns / width - 0.5, 0), columns - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
            upper = patches[y0, x0] * (1 - (x - x0)) + patches[y0, x1] * (x - x0)
            lower = patches[y1, x0] * (1 - (x - x0)) + patches[y1, x1] * (x - x0)
            result[i, j] = upper * (1 - (y - y0)) + lower * (y - y0)
    return result


@pytest.mark.parametrize("threshold", [0.7, 1.0, 1.5])
def test_attention_mask_by_loops(threshold: float) -> None:
    maps = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(4)) ** 2
    result = attention_mask_from_map(maps, (8, 20), threshold=threshold)
    assert result.shape == (3, 1, 8, 20) and result.dtype == torch.float32
    for b in range(3):
        enlarged = bilinear_oracle(maps[b], 8, 20)
        limit = threshold * float(maps[b].mean())
        clear = (enlarged - limit).abs() > 1e-6
        assert torch.equal(result[b, 0][clear], (enlarged >= limit).float()[clear])
    assert 0 < result.mean() < 1


def test_attention_mask_does_not_know_scale_batch_or_direction() -> None:
    maps = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(5))
    mask = attention_mask_from_map(maps, (32, 32))
    assert torch.equal(attention_mask_from_map(maps * 0.25, (32, 32)), mask)
    assert torch.equal(torch.cat([attention_mask_from_map(m[None], (32, 32)) for m in maps]), mask)
    assert torch.equal(attention_mask_from_map(maps.flip(-1), (32, 32)), mask.flip(-1))
    assert not attention_mask_from_map(maps.requires_grad_(), (32, 32)).requires_grad


def test_attention_mask_lies_over_the_patch() -> None:
    maps = torch.full((1, 4, 4), 0.01)
    maps[0, 1, 2] = 1.0
    mask = attention_mask_from_map(maps, (32, 32), threshold=8.0)[0, 0]  # 0.57 of the peak
    where = mask.nonzero().float()
    assert where.mean(0).tolist() == [11.5, 19.5]  # the centre of rows 8..15 and columns 16..23
    assert mask[12, 20] == 1


def test_attention_mask_of_nothing() -> None:
    maps = torch.stack([torch.zeros(2, 2), torch.full((2, 2), float("nan")), torch.tensor([[1.0, 0], [0, 0]])])
    assert mask_area(attention_mask_from_map(maps, (4, 4)))[:2].tolist() == [0, 0]
    with pytest.raises(
        ForegroundError, match=r"must be \(B, h, w\), but has shape \(1, 2, 3, 4, 4\).*mean\(\(1, 2\)\)"
    ):
        attention_mask_from_map(torch.zeros(1, 2, 3, 4, 4), (8, 8))
    with pytest.raises(ForegroundError, match="threshold must be above 0"):
        attention_mask_from_map(torch.zeros(1, 4, 4), (8, 8), threshold=0.0)


# -- mask files --------------------------------------------------------------------------------------------------------


def block(height: int = 32, width: int = 48) -> np.ndarray[Any, Any]:
    mask = np.zeros((height, width), bool)
    mask[8:24, 16:40] = True
    return mask


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA"])
def test_read_mask_in_any_mode(tmp_path: Path, mode: str) -> None:
    Image.fromarray(block().astype(np.uint8) * 255).convert(mode).save(tmp_path / "m.png")
    result = read_mask(tmp_path / "m.png")
    assert result.shape == (1, 32, 48) and result.dtype == torch.float32
    assert torch.equal(result[0].bool(), torch.from_numpy(block()))
    result += 1  # its own memory


def test_read_mask_in_the_authors_layout(tmp_path: Path) -> None:
    """An RGB JPEG, noise included; another size by nearest."""
    rng = np.random.default_rng(0)
    noisy = block()[..., None] * 235 + rng.integers(0, 20, (32, 48, 3))
    Image.fromarray(noisy.astype(np.uint8)).save(tmp_path / "m.jpg", quality=60)
    assert torch.equal(read_mask(str(tmp_path / "m.jpg"))[0].bool(), torch.from_numpy(block()))
    double = read_mask(tmp_path / "m.jpg", (64, 96))[0].bool()
    assert torch.equal(double, torch.from_numpy(block().repeat(2, 0).repeat(2, 1)))
    assert read_mask(tmp_path / "m.jpg", (64, 32)).shape == (1, 64, 32)


def test_read_mask_averages_the_channels(tmp_path: Path) -> None:
    colours = [
        (255, 255, 255),
        (255, 128, 0),
        (255, 127, 0),
        (0, 0, 255),
        (0, 0, 0),
    ]  # means 255, 127.67, 127.33, 85, 0
    Image.fromarray(np.array([colours], np.uint8)).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").flatten().tolist() == [1, 1, 0, 0, 0]


def test_mask_files_of_no_use(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(file.getvalue()[:700])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut.jpg", "text.png", "absent.png"):
        with pytest.raises(ForegroundError, match=f"could not read the mask.*{name}"):
            read_mask(tmp_path / name)


def test_mirrored_paths(tmp_path: Path) -> None:
    root = tmp_path / "caltech-101"
    image = root / "101_ObjectCategories" / "ant" / "image_0001.jpg"
    assert mirrored_mask_path(image, root) is None
    layouts = [
        root / "101_ObjectCategories" / "mask" / "ant" / "image_0001.jpg",  # the inner root, last choice
        tmp_path / "mask" / "caltech-101" / "101_ObjectCategories" / "ant" / "image_0001.jpg",  # the outer root
        root / "mask" / "101_ObjectCategories" / "ant" / "image_0001.jpg",  # the root itself, first choice
    ]
    for path in layouts:
        path.parent.mkdir(parents=True)
        path.touch()
        assert mirrored_mask_path(str(image), str(root)) == path
    assert mirrored_mask_path(image.with_name("image_0002.jpg"), root) is None
    with pytest.raises(ForegroundError, match="does not lie below the root"):
        mirrored_mask_path(tmp_path / "elsewhere.jpg", root)


# -- sources -----------------------------------------------------------------------------------------------------------


class Segmenter(torch.nn.Module):
    def forward(self, pixel_values: Tensor, /) -> Tensor:
        return pixel_values.mean(1) > 0


def test_sources() -> None:
    source: ForegroundSource = Segmenter()
    for kind in ("attention", "given", "whole"):
        assert resolve_source(kind) == kind
    assert resolve_source(source) == resolve_source(lambda pixel_values: pixel_values[:, 0]) == "callable"
    assert prepare_mask(source(pixels(2)), pixels(2)).shape == (2, 1, 8, 12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("atention", "Did you mean 'attention'"),
        ("callable", "Valid: 'attention', 'given', 'whole'"),
        (None, "is None"),
        (3, "is 3"),
    ],
)
def test_sources_that_are_none(wrong: Any, message: str) -> None:
    with pytest.raises(ForegroundError, match=message) as error:
        resolve_source(wrong)
    assert "callable from normalised pixels" in str(error.value)


@pytest.mark.parametrize("module", [foreground, masks])
def test_examples(module: Any) -> None:
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0 and result.attempted > 0
