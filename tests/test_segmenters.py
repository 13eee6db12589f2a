"""Segmenters as foreground sources: every family on tiny random models, cleaning, frames, prompts, and the loop."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_segmenters import BUILT, CLIP_TEXT, SIDE, tiny
from torch import nn

from fvg_adapter import FeatureBank, unwrap, wrap
from fvg_adapter.errors import FVGError
from fvg_adapter.foreground import masks_from, source_name
from fvg_adapter.segmenters import STUFF, Segmenter, clean, source_named
from fvg_adapter.segmenters.families import FAMILIES, SEMANTIC, Part, boxed, detect, main_object
from fvg_adapter.segmenters.frames import Frames, Framing
from fvg_adapter.segmenters.labels import foreground_labels

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
WIDE = {"size": {"shortest_edge": 2 * SIDE, "longest_edge": 4 * SIDE}}
PROCESSOR = {"size": {"height": SIDE, "width": SIDE}, "image_mean": MEAN, "image_std": STD}


class Words:
    """A tokenizer with one token a word, the same in every process."""

    def __init__(self, top: int = 99, end: int = 98) -> None:
        self.top, self.end = top, end
        self.seen: list[str] = []

    def __call__(self, texts: list[str], return_tensors: str | None = None, **options: Any) -> dict[str, Any]:
        self.seen += texts
        rows = [[1 + sum(map(ord, w)) % (self.end - 2) for w in text.split()] + [self.end] for text in texts]
        fixed = options.get("padding") == "max_length"
        length = options["max_length"] if fixed else max(map(len, rows))
        ids = [row + [0] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        if return_tensors is None:
            return {"input_ids": ids}
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def words(family: str) -> Words:
    return Words(CLIP_TEXT["vocab_size"], 49407) if family in ("clipseg", "sam3", "oneformer") else Words()


def segmenter(family: str, **options: Any) -> Segmenter:
    if family == "grounding-dino":
        return Segmenter(
            tiny("sam2"),
            PROCESSOR,
            detector=tiny(family),
            detector_processor=WIDE,
            detector_tokenizer=words(family),
            **options,
        )
    return Segmenter(tiny(family), PROCESSOR, words(family), **options)


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
    array[8:20, 10:28] = rng.integers(150, 255, 3)
    return Image.fromarray(array)


# -- every family ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BUILT)
def test_every_family_gives_masks_of_pixels_and_of_pictures(family: str) -> None:
    made = segmenter(family, threshold=0.01, score=0.001, batch_size=2)
    pixels = torch.randn(3, 3, 24, 36)
    masks = made(pixels, classes=["cat", "dog", "tabby cat"])
    assert masks.dtype == torch.bool and masks.shape == (3, 24, 36)
    shown = made.masks([picture(0), picture(1, (30, 50)), picture(2)], ["cat", "dog", "cat"])
    assert [tuple(m.shape) for m in shown] == [(30, 40), (50, 30), (30, 40)]
    assert all(m.dtype == torch.bool for m in shown)
    assert made.prompted == (family in ("clipseg", "sam3", "grounding-dino"))


@pytest.mark.parametrize("family", BUILT)
def test_a_batch_is_its_pictures_one_by_one(family: str) -> None:
    made = segmenter(family, threshold=0.3, score=0.05, fill_holes=False)
    pictures, names = [picture(0), picture(1, (30, 50)), picture(2)], ["cat", "dog", "tabby cat"]
    together = made.masks(pictures, names)
    for one, name, mask in zip(pictures, names, together, strict=True):
        alone = made.masks([one], [name])[0]
        assert (alone == mask).float().mean() > 0.99  # sums of another order may tip a pixel at the threshold


def test_every_family_in_the_table_is_tried_or_shares_a_row_with_one_that_is() -> None:
    tried = {FAMILIES[name.replace("_", "-")] for name in BUILT if name.replace("_", "-") in FAMILIES}
    # kin that differ in their frame alone
    assert {n for n, row in FAMILIES.items() if row not in tried} <= {"sam3_tracker", "eomt_dinov3", "sam3"}


def test_clipseg_is_the_models_own_probability() -> None:
    model, tokens = tiny("clipseg"), words("clipseg")
    pixels = torch.randn(2, 3, SIDE, SIDE)
    made = Segmenter(model, {**PROCESSOR, "image_mean": (0, 0, 0), "image_std": (1, 1, 1)}, tokens, fill_holes=False)
    rgb = pixels * 0.1 + 0.5
    with torch.no_grad():
        logits = model(pixel_values=rgb, **tokens(["a cat", "dog"], return_tensors="pt")).logits
    masks = made((rgb - 0.5) / 0.25, classes=["a_cat", "dog"], image_mean=MEAN, image_std=STD)
    assert (masks == (logits.sigmoid() >= 0.5)).float().mean() > 0.999
    assert tokens.seen[-2:] == ["a cat", "dog"]
    assert 0.02 < masks.float().mean() < 0.98


def test_the_prompt_decides_the_mask() -> None:
    made = segmenter("clipseg", prompt="a photo of a {}")
    with torch.no_grad():
        made._part.model.clip.text_projection.weight.mul_(50)
    pixels = torch.randn(1, 3, SIDE, SIDE)
    assert (made(pixels, classes=["cat"]) != made(pixels, classes=["hot air balloon"])).any()
    assert made._part.tokenizer.seen[-1] == "a photo of a hot air balloon"


class Says(nn.Module):
    """A model that says what it was made with, whatever it is shown."""

    def __init__(self, **output: Any) -> None:
        super().__init__()
        self.output = output
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, **given: Any) -> Any:
        return SimpleNamespace(**self.output, get=self.output.get)


def part_of(family: str, model: nn.Module, **changes: Any) -> Part:
    plain = Framing((4, 4), MEAN, STD)
    return Part(model, FAMILIES[family], plain, words(family), **changes)


def frames(count: int = 1, filled: tuple[int, int] = (4, 4)) -> Frames:
    return Frames(torch.zeros(count, 3, 4, 4), [filled] * count, [(4, 4)] * count)


def test_sam3_takes_the_instances_that_reach_the_score() -> None:
    masks = torch.full((1, 3, 4, 4), -5.0)
    masks[0, 0, :2], masks[0, 1, 2], masks[0, 2, 3] = 5.0, 5.0, 5.0
    model = Says(pred_masks=masks, pred_logits=torch.tensor([[2.0, 1.5, -5.0]]), presence_logits=torch.tensor([[-1.0]]))
    for score, rows in ((0.2, [1, 1, 1, 0]), (0.23, [1, 1, 0, 0]), (0.5, [0, 0, 0, 0])):  # 0.237, 0.220, 0.002
        part = part_of("sam3", model, score=score)
        found = part.family.read(part, frames(), ["cat"])[0] > 0.5
        assert found.int().tolist() == [[row] * 4 for row in rows], score


def test_mask_classification_takes_the_foreground_queries() -> None:
    classes = torch.log(torch.tensor([[[0.1, 0.8, 0.05, 0.05], [0.9, 0.03, 0.03, 0.04], [0.02, 0.02, 0.06, 0.9]]]))
    masks = torch.full((1, 3, 4, 4), -9.0)
    masks[0, 0, 0], masks[0, 1, 1], masks[0, 2, 2] = 9.0, 9.0, 9.0  # a cat, background, nothing
    part = part_of("mask2former", Says(class_queries_logits=classes, masks_queries_logits=masks), foreground=(1, 2))
    found = part.family.read(part, frames(), None)[0]
    assert found[0].tolist() == pytest.approx([0.85] * 4, abs=1e-3) and found[1:].max() < 0.1


def test_semantic_models_add_up_their_foreground_labels() -> None:
    logits = torch.log(torch.tensor([0.4, 0.35, 0.25])).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    part = Part(Says(logits=logits), SEMANTIC, Framing((4, 4), MEAN, STD), foreground=(1, 2))
    assert SEMANTIC.read(part, frames(), None)[0, 0, 0].item() == pytest.approx(0.6)


def test_boxes_of_the_detector_reach_the_sam_in_its_own_pixels() -> None:
    centres = torch.tensor([[[0.5, 0.5, 0.5, 1.0], [0.2, 0.2, 0.2, 0.2], [0.9, 0.9, 0.4, 0.4]]])
    logits = torch.tensor([[[-9.0, 1.0], [-9.0, -3.0], [3.0, -9.0]]])  # scores 0.73, 0.05, 0.95
    part = part_of("grounding-dino", Says(logits=logits, pred_boxes=centres), prompt="{}.", score=0.25)
    boxes, kept = detect(part, frames(), ["Tabby_Cat"], most=2)
    assert part.tokenizer.seen == ["tabby cat."]
    assert kept.tolist() == [[True, True]]  # the surest first
    assert torch.allclose(boxes[0], torch.tensor([[0.7, 0.7, 1.0, 1.0], [0.25, 0.0, 0.75, 1.0]]))

    class Sam(nn.Module):
        def forward(self, pixel_values: Any, input_boxes: Any, multimask_output: bool) -> Any:
            self.boxes = input_boxes
            return SimpleNamespace(
                pred_masks=torch.full((1, 2, 1, 4, 4), 3.0) * torch.tensor([1, -1]).view(1, 2, 1, 1, 1)
            )

    sam = Sam()
    found = boxed(part_of("sam", sam), frames(filled=(2, 4)), boxes, torch.tensor([[False, True]]))
    assert torch.allclose(sam.boxes[0, 1], torch.tensor([1.0, 0.0, 3.0, 2.0]))  # twice as wide as it is high
    assert found.max() < 0.1  # the box that does not count was the one with a mask


def test_the_main_object_is_sure_central_and_not_the_surroundings() -> None:
    n, side = 5, 20
    masks, inside = torch.full((1, n, side, side), -5.0), torch.ones(1, side, side, dtype=torch.bool)
    masks[0, 0] = 5.0  # everything
    masks[0, 1, 6:14, 6:14] = 5.0  # an object in the middle
    masks[0, 2, 0:8, 0:8] = 5.0  # one in the corner
    masks[0, 3] = -masks[0, 1]  # what is around the middle
    masks[0, 4, 10, 10] = 5.0  # one pixel
    scores = torch.tensor([[0.99, 0.7, 0.95, 0.9, 1.0]])
    assert torch.equal(main_object(masks, scores, inside)[0] > 0.5, masks[0, 1] > 0)
    masks[0, 1] = -5.0
    assert torch.equal(main_object(masks, scores, inside)[0] > 0.5, masks[0, 2] > 0)
    assert main_object(masks[:, [0, 4]], scores[:, [0, 4]], inside).max() == 0


def test_points_and_the_main_object_know_where_the_picture_ends() -> None:
    seen = {}

    class Sam(nn.Module):
        def forward(self, pixel_values: Any, input_points: Any, input_labels: Any) -> Any:
            seen["points"] = input_points
            masks = torch.full((1, 4, 3, 4, 4), -5.0)
            masks[0, 2, 1, :, 1:3] = 5.0
            return SimpleNamespace(pred_masks=masks, iou_scores=torch.ones(1, 4, 3))

    part = part_of("sam", Sam(), points=2)
    found = part.family.read(part, frames(filled=(2, 4)), None)[0]
    assert seen["points"][0, :, 0].tolist() == [[1.0, 0.5], [3.0, 0.5], [1.0, 1.5], [3.0, 1.5]]  # x, y
    assert (found > 0.5).int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


# -- frames ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("size", [(30, 60), (60, 30), (33, 33), (1, 1), (500, 3)])
def test_a_map_of_the_frame_comes_back_where_it_was(letterbox: bool, size: tuple[int, int]) -> None:
    h, w = size
    array = np.zeros((h, w, 3), np.uint8)
    array[h // 2 :, w // 2 :] = 255
    framing = Framing((32, 32), (0, 0, 0), (1, 1, 1), letterbox)
    shown = framing.of_pictures([Image.fromarray(array)], "cpu", torch.float32)
    back = shown.back(shown.pixels[:, 0])[0]
    assert back.shape == (h, w)
    truth = torch.from_numpy(array[..., 0]) > 0
    assert ((back > 0.5) == truth).float().mean() > (0.93 if min(size) > 3 else 0.6)
    pixels = torch.from_numpy(array).permute(2, 0, 1).float()[None] / 255
    same = framing.of_pixels(pixels, "cpu", torch.float32)
    assert same.filled == shown.filled and (same.pixels - shown.pixels).abs().max() < 0.02
    if letterbox and h == 30:
        assert shown.filled == [(16, 32)] and shown.inside().sum() == 512 and shown.inside((8, 8)).sum() == 32


def test_preprocessing_is_the_processors() -> None:
    made = Segmenter(tiny("segformer"), {"size": {"height": 24, "width": 40}, "image_mean": MEAN, "image_std": STD})
    assert made._part.framing == Framing((24, 40), MEAN, STD, False)
    made = Segmenter(tiny("mask2former"), {"size": {"shortest_edge": 48, "longest_edge": 90}, "do_normalize": False})
    assert made._part.framing == Framing((48, 48), (0, 0, 0), (1, 1, 1), True)
    assert Segmenter(tiny("segformer"))._part.framing.side == (512, 512)
    assert Segmenter(tiny("segformer"), side=64)._part.framing.side == (64, 64)
    processor = transformers.CLIPImageProcessor(size={"height": 40, "width": 40}, image_mean=MEAN, image_std=STD)
    assert Segmenter(tiny("segformer"), processor)._part.framing == Framing((40, 40), MEAN, STD, False)
    assert Segmenter(tiny("sam"), processor)._part.framing.side == (SIDE, SIDE)  # takes no other


# -- labels and cleaning -----------------------------------------------------------------------------------------------


def test_surroundings_are_no_foreground() -> None:
    coco = {0: "person", 1: "wall-brick", 2: "sky-other-merged", 3: "food-other-merged", 4: "dog", 5: "mirror-stuff"}
    assert foreground_labels(coco, None) == [0, 4]
    assert foreground_labels({0: "LABEL_0", 1: "LABEL_1"}, None) == [1]
    assert foreground_labels(coco, ["Dog", "wall-brick"]) == [4, 1]
    assert "background" in STUFF
    with pytest.raises(FVGError, match=r"no label 'dogg'.*Did you mean 'dog'"):
        foreground_labels(coco, ["dogg"])
    with pytest.raises(FVGError, match=r"all labels.*surroundings"):
        foreground_labels({0: "sky", 1: "wall"}, None)
    with pytest.raises(FVGError, match="leaves no foreground"):
        foreground_labels(coco, [])


def test_cleaning() -> None:
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask[1:6, 1:6] = True
    mask[3, 3] = False  # a hole
    mask[8, 8:] = True  # a speck
    mask[6, 6] = True  # touches by a corner alone: another part
    assert clean(mask) is mask
    big = clean(mask, largest=True)
    assert big.sum() == 24 and not big[3, 3] and not big[8, 8] and not big[6, 6]
    assert clean(mask, fill_holes=True).sum() == 28
    assert clean(mask, largest=True, fill_holes=True).sum() == 25
    assert clean(mask, area=(0.0, 0.2)).sum() == 0 and torch.equal(clean(mask, area=(0.27, 0.27)), mask)
    several = torch.stack([mask, torch.zeros_like(mask), ~torch.zeros_like(mask)])
    assert clean(several, largest=True, fill_holes=True).sum((1, 2)).tolist() == [25, 0, 100]
    assert clean(several[:0], largest=True).shape == (0, 10, 10)
    with pytest.raises(FVGError, match="no range"):
        clean(mask, area=(0.5, 0.1))
    with pytest.raises(FVGError, match="must be bool"):
        clean(mask.float(), largest=True)


def test_cleaning_reaches_the_segmenters_masks() -> None:
    class Blobs(nn.Module):
        def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
            logits = torch.full((len(pixels), 1, 10, 10), -5.0)
            logits[:, :, 1:6, 1:6], logits[:, :, 3, 3], logits[:, :, 8, 8] = 5.0, -5.0, 5.0
            return [torch.zeros(1), logits]

    pixels = torch.zeros(1, 3, 10, 10)
    counts = [
        int(Segmenter(Blobs(), side=10, **options)(pixels).sum())
        for options in ({"fill_holes": False}, {}, {"largest": True}, {"area": (0.5, 1.0)})
    ]
    assert counts == [25, 26, 25, 0]


def test_scipy_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FVGError, match=r"fvg-adapter\[masks\].*fill_holes=False"):
        Segmenter(tiny("segformer"))
    Segmenter(tiny("segformer"), fill_holes=False)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Segmenter("CIDAS/clipseg-rd64-refined"), "from_pretrained"),
        (lambda: Segmenter(lambda pixels: pixels), r"wrap\(…, foreground=function\)"),
        (lambda: Segmenter(tiny("clipseg")), "give its tokenizer"),
        (lambda: Segmenter(tiny("oneformer")), "give its tokenizer"),
        (lambda: Segmenter(tiny("grounding-dino"), None, Words()), "boxes, not masks"),
        (lambda: Segmenter(tiny("segformer"), detector=tiny("grounding-dino")), "need a SAM"),
        (lambda: Segmenter(tiny("sam"), detector=tiny("segformer")), "must be a Grounding DINO"),
        (lambda: Segmenter(tiny("sam"), labels=["cat"]), "no labels to choose"),
        (lambda: Segmenter(tiny("sam"), side=64), "its own size"),
        (lambda: Segmenter(tiny("segformer"), labels=["cta"]), "Did you mean 'cat'"),
        (lambda: Segmenter(tiny("segformer"), prompt="a cat"), "must hold one {}"),
        (lambda: Segmenter(tiny("segformer"), threshold=0.0), r"threshold must lie in \(0, 1\]"),
        (lambda: Segmenter(tiny("sam"), points=0), "at least 1"),
        (lambda: Segmenter(tiny("segformer"), {"image_mean": [0.5]}), "three channels"),
        (lambda: segmenter("clipseg")(torch.zeros(2, 3, 8, 8)), r"one for each of the 2 pictures.*none were given"),
        (lambda: segmenter("clipseg")(torch.zeros(2, 3, 8, 8), classes=["cat"]), "but 1 were given"),
        (lambda: segmenter("clipseg").masks([picture()], "cat"), "'cat' were given"),
        (lambda: segmenter("segformer")(torch.zeros(3, 8, 8)), r"\(B, 3, H, W\)"),
        (lambda: Segmenter(nn.Conv2d(3, 2, 1))(torch.zeros(1, 3, 8, 8)), "Conv2d gave"),
        (lambda: source_named("atention"), "Did you mean 'attention'"),
        (lambda: source_named("nowhere.to:find"), "could not be imported"),
        (lambda: source_named("math:pi"), "a callable from pixels"),
        (lambda: source_named("./no/such/folder"), "could not be loaded"),
    ],
)
def test_mistakes_are_named(make: Any, message: str) -> None:
    with pytest.raises(FVGError, match=message):
        make()


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["clipseg", "segformer", "sam", "mask2former"])
def test_a_saved_folder_gives_the_same_masks(family: str, tmp_path: Any, tokenizer: Any) -> None:

    model = tiny(family)
    model.save_pretrained(tmp_path)
    if family == "clipseg":
        tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    loaded = source_named(str(tmp_path), device="cpu", threshold=0.3)
    assert isinstance(loaded, Segmenter) and type(loaded._part.model) is type(model)
    assert loaded.name == str(tmp_path) and loaded._part.framing.mean == MEAN
    direct = Segmenter(model, PROCESSOR, tokenizer, threshold=0.3)
    pixels = torch.randn(2, 3, 20, 24)
    assert torch.equal(loaded(pixels, classes=["cat", "dog"]), direct(pixels, classes=["cat", "dog"]))


def test_detector_and_sam_from_folders(tmp_path: Any, tokenizer: Any) -> None:
    tiny("sam2").save_pretrained(tmp_path / "sam")
    tiny("grounding-dino").save_pretrained(tmp_path / "dino")
    words_file = tmp_path / "dino" / "vocab.txt"
    words_file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "cat", "dog"]))
    transformers.BertTokenizer(str(words_file)).save_pretrained(tmp_path / "dino")
    (tmp_path / "dino" / "preprocessor_config.json").write_text(json.dumps(WIDE))
    for made in (
        Segmenter.from_pretrained(f"{tmp_path}/dino+{tmp_path}/sam"),
        Segmenter.from_pretrained(str(tmp_path / "sam"), detector=str(tmp_path / "dino")),
    ):
        assert made.prompted and made(torch.randn(2, 3, 16, 16), classes=["cat", "dog"]).shape == (2, 16, 16)
        assert made.name == f"{tmp_path}/dino+{tmp_path}/sam"


def test_a_pipeline_is_taken_apart() -> None:
    processor = transformers.CLIPImageProcessor(size={"height": 40, "width": 40}, image_mean=MEAN, image_std=STD)
    model = tiny("segformer")
    pipe = SimpleNamespace(model=model, preprocess=None, image_processor=processor, tokenizer=None)
    made, pixels = Segmenter(pipe), torch.randn(1, 3, 40, 40)
    assert torch.equal(made(pixels), Segmenter(model, processor)(pixels))


# -- as a foreground source --------------------------------------------------------------------------------------------


def test_sources_are_told_what_they_have_parameters_for() -> None:
    pixels = torch.zeros(2, 3, 4, 4)
    told: list[Any] = []

    class Module(nn.Module):
        def forward(self, pixels: torch.Tensor, *, image_mean: Any = None) -> torch.Tensor:
            told.append(image_mean)
            return pixels[:, 0]

    def named(pixels: torch.Tensor, classes: list[str]) -> torch.Tensor:
        told.append(classes)
        return pixels[:, 0]

    def loose(pixels: torch.Tensor, **more: Any) -> torch.Tensor:
        told.append(more)
        return pixels[:, 0]

    for source in (Module(), named, loose, lambda p: p[:, 0], torch.sum):
        masks_from(source, pixels, classes=["cat", "dog"], image_mean=MEAN)
    assert told == [MEAN, ["cat", "dog"], {}]
    with pytest.raises(FVGError, match=r"named is asked with class names, which come from the labels"):
        masks_from(named, pixels)
    with pytest.raises(FVGError, match="asked with class names"):
        masks_from(segmenter("clipseg"), pixels)
    assert masks_from(segmenter("segformer"), pixels).shape == (2, 4, 4)
    assert source_name(named).endswith("named") and "prompt='{}'" in source_name(segmenter("clipseg"))


def test_training_asks_with_the_class_name_of_each_picture(
    small_clip: Any, tokenizer: Any, pixels: torch.Tensor
) -> None:
    seen: list[Any] = []

    def source(pixel_values: torch.Tensor, classes: Any = None, image_std: Any = None) -> torch.Tensor:
        seen.append((list(classes), image_std))
        return torch.stack([torch.arange(32).expand(32, 32) < (8 if name == "dog" else 24) for name in classes])

    model = wrap(small_clip, tokenizer, ["cat", "dog", "hot_air balloon"], foreground=source).train()
    labels = torch.tensor([2, 1, 0, 1])
    with_source = model(pixels, labels)
    assert seen == [(["hot_air balloon", "dog", "cat", "dog"], model.config.image_std)]
    masks = torch.stack([torch.arange(32).expand(32, 32) < (8 if label == 1 else 24) for label in labels])
    assert torch.equal(model(pixels, labels, masks).loss, with_source.loss)
    model.eval()(pixels)
    assert len(seen) == 1  # no mask is needed to answer
    items = [{"pixel_values": p, "labels": int(label)} for p, label in zip(pixels, labels, strict=True)]
    bank = FeatureBank.encode(model, items)
    assert seen[-1][0] == ["hot_air balloon", "dog", "cat", "dog"]
    assert bank.features["mask_area"][:, 0].tolist() == [0.75, 0.25, 0.75, 0.25]


def test_a_segmenter_in_the_loop(small_clip: Any, tokenizer: Any, pixels: torch.Tensor) -> None:
    before = {k: v.clone() for k, v in small_clip.state_dict().items()}
    made = segmenter("clipseg")
    model = wrap(small_clip, tokenizer, ["cat", "dog"], foreground=made).train()
    weights = [p.clone() for p in made._part.model.parameters()]
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    for _ in range(2):
        model(pixels, torch.tensor([0, 1, 1, 0])).loss.backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, made._part.model.parameters(), strict=True))
    assert made._part.tokenizer.seen[:4] == ["cat", "dog", "dog", "cat"]
    unwrap(model)
    assert all(torch.equal(v, before[k]) for k, v in small_clip.state_dict().items())


def test_a_module_as_source_is_no_part_of_the_model(small_clip: Any, tokenizer: Any) -> None:
    class Source(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 1, 1)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.conv(pixels).sigmoid()

    model = wrap(small_clip, tokenizer, ["cat", "dog"], foreground=Source())
    assert not any("conv" in name for name, _ in model.named_parameters())
    assert not any("conv" in name for name in model.state_dict())
    assert isinstance(model.foreground, Source)


def test_a_bank_of_another_source_is_refused(small_clip: Any, tokenizer: Any, pixels: torch.Tensor) -> None:
    items = [{"pixel_values": p, "labels": 0} for p in pixels]
    model = wrap(small_clip, tokenizer, ["cat", "dog"], foreground=segmenter("segformer"))
    bank = FeatureBank.encode(model, items)
    bank.check(model, training=True)
    unwrap(model)
    other = wrap(small_clip, tokenizer, ["cat", "dog"], foreground=segmenter("segformer", threshold=0.9))
    with pytest.raises(FVGError, match="encoded with masks"):
        bank.check(other, training=True)


def test_half_precision_models_give_masks() -> None:
    made = segmenter("segformer")
    made._part.model.to(torch.bfloat16)
    full = segmenter("segformer")
    pixels = torch.randn(2, 3, 24, 24)
    assert (made(pixels) == full(pixels)).float().mean() > 0.9
