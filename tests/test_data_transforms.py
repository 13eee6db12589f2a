"""Picture and mask share one geometry; draws equal torchvision's, evaluation equals CLIP's own preprocessing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import max_pool2d

from fvg_adapter.data import CLIP_MEAN, CLIP_STD, DataError, PairedTransform, transform_for

PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def pair(width, height, seed=0, boxes=2):
    """A picture that is white exactly where its mask is: random boxes."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for _ in range(boxes):
        top, left = rng.integers(0, height), rng.integers(0, width)
        mask[top : top + 1 + height // 2, left : left + 1 + width // 2] = 255
    return Image.fromarray(mask).convert("RGB"), Image.fromarray(mask)


def agreement(out):
    """Where the picture, thresholded, equals its mask: (1, H, W) bool."""
    assert set(out["foreground_mask"].unique().tolist()) <= {0.0, 1.0}
    return (out["pixel_values"] > 0.5).all(0, keepdim=True) == out["foreground_mask"].bool()


def away_from_edges(mask):
    """Pixels whose neighbours all agree with them: (1, H, W) bool."""
    return max_pool2d(mask[None], 3, 1, 1)[0] == -max_pool2d(-mask[None], 3, 1, 1)[0]


SIDES, SIZES = st.integers(1, 90), st.integers(1, 40)


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, SIZES, SIZES, st.booleans(), st.integers(0, 9999))
def test_picture_and_mask_share_the_geometry_exactly(width, height, rows, columns, train, seed):
    """With one interpolation for both, a picture that encodes its mask still does so in every single pixel."""
    transform = PairedTransform((rows, columns), *PLAIN, train=train, resample=Image.Resampling.NEAREST)
    out = transform(*pair(width, height, seed), generator=torch.Generator().manual_seed(seed))
    assert out["pixel_values"].shape == (3, rows, columns)
    assert out["foreground_mask"].shape == (1, rows, columns)
    assert agreement(out).all()


@settings(max_examples=80, deadline=None)
@given(st.integers(40, 120), st.integers(40, 120), st.integers(16, 40), st.booleans(), st.integers(0, 9999))
def test_bicubic_moves_nothing_but_edges(width, height, side, train, seed):
    transform = PairedTransform(side, *PLAIN, train=train)
    out = transform(*pair(width, height, seed, boxes=1), generator=torch.Generator().manual_seed(seed))
    assert agreement(out)[away_from_edges(out["foreground_mask"])].float().mean() > 0.995


def test_the_geometry_test_can_fail():
    image, mask = pair(60, 60, 3)
    out = PairedTransform(32, *PLAIN, train=False)(image, mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert agreement(out)[away_from_edges(out["foreground_mask"])].float().mean() < 0.9


# torchvision 0.29: RandomResizedCrop.get_params after torch.manual_seed(seed), then torch.rand(1) < 0.5
@pytest.mark.parametrize(
    ("seed", "size", "box", "flip"),
    [
        (0, (64, 48), (9, 1, 53, 39), True),
        (1, (33, 100), (5, 35, 25, 52), False),
        (2, (200, 10), (93, 0, 106, 10), True),
        (3, (1, 50), (0, 24, 1, 25), False),
        (4, (7, 7), (2, 1, 7, 6), True),
    ],
)
def test_draws_equal_torchvision(seed, size, box, flip):
    torch.manual_seed(seed)
    geometry = PairedTransform(24, train=True).geometry(*size)
    assert (geometry.source, geometry.flip) == (box, flip)


def image_processor(**options):
    import transformers

    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    return getattr(transformers, name)(**options)


@pytest.mark.parametrize("size", [(40, 40), (75, 50), (70, 45), (45, 70), (32, 33), (90, 20)])
def test_evaluation_equals_clips_own_processor(size):
    processor = image_processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    expected = torch.as_tensor(np.array(processor(image, return_tensors="np")["pixel_values"][0]))
    got = transform_for(processor, train=False)(image)["pixel_values"]
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 1e-5


def siglip_processor():
    """An image processor without a centre crop, inside a processor."""
    inner = SimpleNamespace(size={"height": 20, "width": 24}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2)
    return SimpleNamespace(image_processor=inner)


def test_transform_for():
    assert transform_for(32, train=True, scale=(0.5, 1)) == PairedTransform(32, train=True, scale=(0.5, 1.0))
    assert transform_for([32, 48], train=False).output_size == (32, 48)
    siglip = transform_for(siglip_processor(), train=False)
    assert (siglip.output_size, siglip.resize, siglip.mean, siglip.resample) == ((20, 24), (20, 24), (0.5,) * 3, 2)
    squeezed = PairedTransform((20, 24), *PLAIN, train=False, resize=(20, 24), resample=0)(*pair(60, 31))
    assert agreement(squeezed).all()
    assert siglip.geometry(60, 31).size == (24, 20)  # width and height, unlike the processor's order
    clip = transform_for(
        image_processor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}), train=False
    )
    assert (clip.output_size, clip.resize, clip.mean) == ((32, 32), 40, CLIP_MEAN)
    assert clip.std == CLIP_STD
    assert transform_for(image_processor(do_normalize=False), train=False).std == (1.0, 1.0, 1.0)


def test_transform_for_bad_input():
    with pytest.raises(DataError, match="image processor"):
        transform_for(object(), train=True)
    with pytest.raises(DataError, match="without a centre crop"):
        transform_for(image_processor(do_center_crop=False), train=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "size=0"),
        ({"size": (1, 2, 3)}, "size="),
        ({"mean": (0.5,)}, "three values"),
        ({"std": (1, 0, 1)}, "above 0"),
        ({"scale": (0, 1)}, "scale"),
        ({"ratio": (2, 1)}, "ratio"),
        ({"flip": 1.5}, "flip=1.5"),
        ({"resize": 16}, "resize=16"),
    ],
)
def test_values_that_make_no_picture(options, words):
    with pytest.raises(DataError, match=words):
        PairedTransform(**{"size": 32, "train": True, **options})


def test_not_a_pil_image():
    with pytest.raises(DataError, match="Tensor"):
        PairedTransform(8, train=True)(torch.zeros(3, 8, 8))


def test_mask_of_another_size_or_mode():
    image, mask = pair(60, 40)
    transform = PairedTransform(32, *PLAIN, train=False)
    expected = transform(image, mask)["foreground_mask"]
    assert torch.equal(transform(image, mask.convert("RGB"))["foreground_mask"], expected)
    assert torch.equal(transform(image, mask.convert("1"))["foreground_mask"], expected)
    double = mask.resize((120, 80), Image.Resampling.NEAREST)
    assert torch.equal(transform(image, double)["foreground_mask"], expected)
    assert "foreground_mask" not in transform(image)


def test_evaluation_does_not_draw():
    state = torch.get_rng_state()
    transform = PairedTransform(16, train=False)
    assert torch.equal(transform(*pair(30, 20))["pixel_values"], transform(*pair(30, 20))["pixel_values"])
    assert torch.equal(torch.get_rng_state(), state)


def test_flip_probability():
    image, mask = pair(30, 20)
    flips = [PairedTransform(8, train=True, flip=flip).geometry(30, 20).flip for flip in (0, 1) for _ in range(20)]
    assert flips == [False] * 20 + [True] * 20
    never = PairedTransform(20, *PLAIN, train=True, flip=0, scale=(1, 1), ratio=(1.5, 1.5))
    always = PairedTransform(20, *PLAIN, train=True, flip=1, scale=(1, 1), ratio=(1.5, 1.5))
    for key in ("pixel_values", "foreground_mask"):
        assert torch.equal(never(image, mask)[key].flip(-1), always(image, mask)[key])


def test_views_depend_on_seed_and_key_only():
    transform = PairedTransform(16, train=True, seed=1)
    image, mask = pair(50, 40)
    torch.manual_seed(0)
    first = [transform.view(image, mask, key)["pixel_values"] for key in range(4)]
    torch.manual_seed(9)
    again = [transform.view(image, mask, key)["pixel_values"] for key in (3, 2, 1, 0)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    other = PairedTransform(16, train=True, seed=2).view(image, mask, 0)["pixel_values"]
    assert not torch.equal(first[0], other)


def test_view_is_the_same_on_every_machine():
    image, mask = pair(50, 40)
    view = PairedTransform(16, *PLAIN, train=True, seed=1).view(image, mask, 7)
    assert view["foreground_mask"].sum().item() == 190


@pytest.mark.parametrize("size", [(1, 1), (1, 30_000), (30_000, 2)])
@pytest.mark.parametrize("train", [True, False])
def test_extreme_pictures_stay_small_in_memory(size, train, monkeypatch):
    made, resize = [], Image.Image.resize

    def counted(self, size, *rest, **options):
        made.append(size[0] * size[1])
        return resize(self, size, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", counted)
    out = PairedTransform(224, train=train)(Image.new("RGB", size, (255, 0, 0)), Image.new("L", size, 255))
    assert out["pixel_values"].shape == (3, 224, 224) and bool((out["foreground_mask"] == 1).all())
    assert 0 < max(made) <= 2**24


def test_a_very_long_picture_shows_its_middle(monkeypatch):
    from fvg_adapter.data import transforms

    rng = np.random.default_rng(0)
    array = rng.integers(0, 255, (40, 4000, 3), dtype=np.uint8)
    picture, mask = Image.fromarray(array), Image.fromarray(array[..., 0] // 128 * np.uint8(255))
    transform = PairedTransform(32, train=False)
    whole = transform(picture, mask)
    monkeypatch.setattr(transforms, "_MOST_PIXELS", 10)
    part = transform(picture, mask)
    assert (whole["pixel_values"] - part["pixel_values"]).abs().max() < 0.03  # one step of 8 bits
    assert (whole["foreground_mask"] == part["foreground_mask"]).float().mean() > 0.99
