"""The Space's page without a browser: what it shows of a picture, and what it says of uploads that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from space_fixtures import CLASSES, PICTURE, POCKET, save_adapter

import looking
from fvg_adapter import FVGModel
from fvg_adapter.errors import FVGError

BASE = str(POCKET / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("space")
    save_adapter(place)
    return place


@pytest.fixture(scope="module")
def model(folder: Path) -> FVGModel:
    return looking.open_adapter(str(folder / "adapter"), BASE)


def test_answers_are_those_of_the_models(model: FVGModel) -> None:
    picture = looking.open_picture(str(PICTURE))
    names = ["banana", "purple turnip", "lemon"]
    seen = looking.look(model, picture, names)
    assert list(seen.answers) == ["CLIP", "coop", "FVG-PT"]
    assert seen.branch == "joint" and model.classes == tuple(CLASSES)
    assert seen.answers["FVG-PT"] == pytest.approx({p.name: p.probability for p in model.predict(picture, names)})
    for answers in seen.answers.values():
        assert sum(answers.values()) == pytest.approx(1, abs=1e-5)
    assert 0 <= seen.trust <= 1 and 0 < seen.prior_trust < 1
    assert len(seen.pictures) == 4


def test_attention_is_of_the_model_that_the_caption_names(model: FVGModel) -> None:
    """CLIP's map does not follow the tuner; all four pictures differ where a tuner changes the tower."""
    from fvg_adapter import wrap
    from fvg_adapter.tuners import PromptSRC

    depths = {"prompt_depth_text": 2, "prompt_depth_vision": 2}
    prompts = PromptSRC(model.tuner.encoder.model, model.tuner.tokenizer, CLASSES, **depths)
    with torch.no_grad():
        prompts.vision_ctx.normal_()
    picture = looking.open_picture(str(PICTURE))
    plain = [np.asarray(image) for image, _ in looking.look(model, picture, CLASSES).pictures]
    other = wrap(prompts).eval()
    changed = [np.asarray(image) for image, _ in looking.look(other, picture, CLASSES).pictures]
    assert (plain[0] == plain[1]).all()  # CoOp leaves the image tower alone
    assert (changed[0] == plain[0]).all() and (changed[1] != plain[1]).any()


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b"not a picture", "no picture"), (PICTURE.read_bytes()[:60], "no picture")],
)
def test_bad_uploads_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    upload = tmp_path / "upload.png"
    upload.write_bytes(content)
    with pytest.raises(FVGError, match=f"upload.png.*{said}"):
        looking.open_picture(str(upload))


def test_huge_uploads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = tmp_path / "wide.png"
    with upload.open("wb") as file:
        file.truncate(looking.MAX_BYTES + 1)
    with pytest.raises(FVGError, match="21 MB|20 MB"):
        looking.open_picture(str(upload))
    Image.new("L", (400, 400)).save(upload)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # a small file that unpacks to more pixels than PIL admits
    with pytest.raises(FVGError, match="no picture"):
        looking.open_picture(str(upload))


def test_missing_input_is_asked_for(folder: Path) -> None:
    with pytest.raises(FVGError, match="Drop a picture"):
        looking.open_picture(None)
    with pytest.raises(FVGError, match="1 given"):
        looking.class_names("cat, cat")
    assert looking.class_names("cat, dog\nred fox,") == ["cat", "dog", "red fox"]
    with pytest.raises(FVGError, match="Name an adapter"):
        looking.open_adapter(" ")
    with pytest.raises(FVGError, match="tuner alone"):
        looking.open_adapter(str(folder / "tuner"), BASE)
