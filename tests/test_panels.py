"""Before and after: maps and answers against what the parts say alone, the drawing, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel
from typer.testing import CliRunner

from fvg_adapter import FVGModel, record_attention, wrap
from fvg_adapter.cli import app
from fvg_adapter.errors import FVGError
from fvg_adapter.foreground import attention_mask_from_map
from fvg_adapter.panels import SAID, look, panels
from fvg_adapter.tuners import MMRL, CoOp, External, PromptSRC, ZeroShot
from fvg_adapter.visualize import before_after

NAMES = ["cat", "dog", "car"]
OPTIONS: dict[Any, dict[str, Any]] = {
    PromptSRC: {"prompt_depth_text": 2, "prompt_depth_vision": 2},
    MMRL: {"rep_layers": [2], "rep_dim": 8},
}


def made(kind: Any, clip: CLIPModel, tokenizer: Any) -> FVGModel:
    tuner = kind(clip, tokenizer, NAMES, **OPTIONS.get(kind, {}))
    with torch.no_grad():
        for parameter in tuner.trainable_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model = wrap(tuner)
    nn.init.normal_(model.visual_adapter.up.weight, std=0.5)
    return model.eval()


@pytest.fixture
def masks(pixels: Tensor) -> Tensor:
    found = torch.zeros(len(pixels), 1, 32, 32)
    found[:, :, 4:20, 6:22] = 1
    return found


@pytest.mark.parametrize("kind", [CoOp, PromptSRC, MMRL])
@pytest.mark.parametrize("maps", ["relevance", "attention", "rollout"])
def test_views_are_those_of_the_models_alone(
    kind: Any, maps: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor, masks: Tensor
) -> None:
    model = made(kind, small_clip, tokenizer)
    model.train()
    before = [m.training for m in model.modules()]
    found = look(model, pixels, masks, classes=["cat", "dog"], maps=maps)
    assert [m.training for m in model.modules()] == before and model.classes == tuple(NAMES)
    model.eval()
    assert [view.name for view in found[0].views] == ["CLIP", kind.__name__, "FVG-PT"]
    with model.use_classes(["cat", "dog"]), torch.no_grad():
        tuner = model.tuner
        prior = tuner.scores(tuner.prior_image_features(pixels), tuner.prior_text_features())
        answers = [prior, tuner(pixels).logits, model(pixels).logits]
        asked = model(pixels, foreground_mask=masks, branch="new")
    assert asked.foreground_trust is not None and asked.prior_trust is not None
    for i, panel in enumerate(found):
        for view, logits in zip(panel.views, answers, strict=True):
            assert view.answer == ["cat", "dog"][int(logits[i].argmax())]
            assert view.probability == pytest.approx(float(logits[i].softmax(-1).max()), abs=1e-5)
            assert view.map.shape == (4, 4) and view.map.min() >= 0 and view.map.sum() > 0
            assert view.inside is not None and 0 <= view.inside <= 1
        assert panel.foreground_trust == pytest.approx(float(asked.foreground_trust[i]), abs=1e-6)
        assert panel.prior_trust == pytest.approx(float(asked.prior_trust[i]), abs=1e-6)
        assert panel.area == 0.25
    clip, tuned, fvg = (torch.stack([panel.views[k].map for panel in found]) for k in range(3))
    assert torch.equal(tuned, fvg) == (maps != "relevance")  # the heads leave attention as it is
    assert torch.equal(clip, tuned) == (kind is CoOp and maps != "relevance")


@pytest.mark.parametrize("kind", [CoOp, MMRL])
def test_relevance_of_joint_answers_asks_the_branch_of_the_answer(
    kind: Any, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor
) -> None:
    """A log-probability has no gradient where it is all but 0: one class of each group is sure of itself."""
    model = made(kind, small_clip, tokenizer)
    names = ["cat", "fox"]
    found = look(model, pixels, classes=names)
    branches = set()
    for i, panel in enumerate(found):
        view = panel.views[-1]
        branch = "base" if view.answer == "cat" else "new"
        branches.add(branch)
        with model.use_classes(names), record_attention(model, relevance=True) as record:
            logits = model(pixels[i : i + 1].clone().requires_grad_(), branch=branch).logits
            expected = record.relevance(logits[:, names.index(view.answer)])[0]
        torch.testing.assert_close(view.map, expected, atol=1e-4, rtol=1e-3)
        assert expected.max() > 0


def test_plain_clip_is_seen_as_if_nothing_were_attached(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    plain = ZeroShot(small_clip, tokenizer, NAMES)
    expected = look(plain, pixels)
    assert [view.name for view in expected[0].views] == ["CLIP"] and expected[0].prior_trust is None
    with record_attention(plain, relevance=True) as record:
        relevance = record.relevance(plain(pixels.clone().requires_grad_()).logits.max(-1).values)
    plain.detach()
    found = look(made(PromptSRC, small_clip, tokenizer), pixels)
    for i, panel in enumerate(found):
        torch.testing.assert_close(panel.views[0].map, expected[i].views[0].map)
        torch.testing.assert_close(panel.views[0].map, relevance[i])


def test_a_prior_of_ones_own_has_no_column(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    plain = ZeroShot(small_clip, tokenizer, NAMES)

    def image(x: Tensor) -> Tensor:
        return plain.encoder.image_features(x)

    def text(names: Any) -> Tensor:
        return plain.prior_text_features()[[NAMES.index(n) for n in names]]

    tuner = External(image, text, classes=NAMES, clip=small_clip, tokenizer=tokenizer, prior_image_features=image)
    assert [view.name for view in look(tuner, pixels)[0].views] == ["External"]
    tuner = External(image, text, classes=NAMES, clip=small_clip, tokenizer=tokenizer)
    assert [view.name for view in look(tuner, pixels)[0].views] == ["CLIP", "External"]


def test_one_call_draws(small_clip: CLIPModel, tokenizer: Any, tmp_path: Path) -> None:
    model = made(CoOp, small_clip, tokenizer)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8))
    mask = Image.new("L", (50, 40), 0)
    mask.paste(255, (10, 5, 30, 35))
    target = tmp_path / "a" / "b.png"
    drawing = panels(model, [picture, picture], target, masks=[mask, mask], labels=["cat", "dog"], titles=["x", "y"])
    assert Image.open(target).size == drawing.size == (1160, 750)
    assert len(drawing.getcolors(10**7)) > 200
    alone = panels(model, picture, masks="attention", maps="attention")
    assert alone.size == (1160, 400)
    panel = look(model, picture, masks="attention")[0]
    assert panel.mask is not None and panel.foreground_trust is not None
    assert look(model, picture)[0].foreground_trust is None
    assert "relevance" not in SAID["relevance"].split(":")[1] and "tells them apart" in SAID["attention"]


def test_the_models_own_mask_is_that_of_its_training(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    model = made(CoOp, small_clip, tokenizer)
    model.config.attention_layers, model.config.attention_threshold = (0,), 1.4
    with record_attention(model, [0]) as record:
        model(pixels)
    wanted = attention_mask_from_map(record.attention().mean((1, 2)), (32, 32), threshold=1.4)
    for panel, mask in zip(look(model, pixels, "attention", maps="attention"), wanted, strict=True):
        assert panel.mask is not None and torch.equal(panel.mask, mask)


def test_the_users_figures_and_backend_are_left_alone(
    small_clip: CLIPModel, tokenizer: Any, pixels: Tensor, tmp_path: Path
) -> None:
    code = """
import sys, matplotlib
matplotlib.use("svg")
import fvg_adapter.panels, fvg_adapter.visualize, fvg_adapter.reports
assert matplotlib.get_backend() == "svg" and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    model = made(CoOp, small_clip, tokenizer).train()
    model.foreground_gate.eval()
    items = [{"pixel_values": picture, "labels": i % 3} for i, picture in enumerate(pixels)]
    before_after(model, Listed(items), tmp_path / "a.png", pictures=2)
    assert panels(model, pixels[:1]).size[0] > 300
    assert model.visual_adapter.training and not model.foreground_gate.training


class Listed(list[Any]):
    classes = NAMES


def test_mistakes(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    model = made(CoOp, small_clip, tokenizer)
    picture = Image.new("RGB", (40, 40))
    with pytest.raises(FVGError, match="maps is 'heat'. Valid: 'relevance'"):
        look(model, pixels, maps="heat")
    with pytest.raises(FVGError, match="2 pictures and 1 masks were given"):
        look(model, [picture, picture], [Image.new("L", (40, 40))])
    with pytest.raises(FVGError, match="0 pictures"):
        look(model, [])
    with pytest.raises(FVGError, match="masks is 'attenton'; give a mask for each picture"):
        look(model, picture, "attenton")
    with pytest.raises(FVGError, match="1 labels were given for 3 pictures|1 labels were given for"):
        panels(model, pixels, labels=["cat"])
    with pytest.raises(FVGError, match="label 'x' is not among the"):
        panels(model, picture, labels=["x"])
    assert not any(m._forward_hooks for m in small_clip.vision_model.encoder.layers[0].self_attn.modules())


def test_the_command(small_clip: CLIPModel, tokenizer: Any, tmp_path: Path) -> None:
    run = CliRunner().invoke
    data = Path("examples/pocket/data")
    picture, mask = data / "test/avocado/00.webp", data / "mask/test/avocado/00.webp"
    common = ["show", "examples/pocket/model", str(picture), "--plain"]
    target = tmp_path / "out.png"
    asked = [*common, "--classes", "avocado,banana", "--mask", str(mask), "--output", str(target)]
    result = run(app, [*asked, "--label", "avocado", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["picture"] == str(target) and Image.open(target).size[0] > 500
    assert told["images"][0]["views"][0]["answer"] == "avocado" and told["images"][0]["r"] is None
    assert 0 < told["images"][0]["views"][0]["inside_mask"] <= 1
    result = run(app, [*asked, "--map", "rollout", "--layers", "all"])
    assert result.exit_code == 0 and "CLIP: avocado" in " ".join(result.stdout.split())
    for extra, message in (
        ([], "has no classes of its own"),
        (["--classes", "a,b", "--map", "heat"], "maps is 'heat'"),
        (["--classes", "a,b", "--layers", "x"], "--layers is 'x'"),
        (["--classes", "red apple,b", "--label", "red_apple"], "Did you mean 'red apple'? Give classes that hold it"),
        (["--classes", "a,b", "--label", "a", "--label", "b"], "2 --label were given for 1 pictures"),
        (["--classes", "a,b", "--output", str(tmp_path / "x.xyz")], "ends in .png"),
    ):
        result = run(app, [*common, *extra])
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
