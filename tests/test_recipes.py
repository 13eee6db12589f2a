"""Recipes and templates: complete, sourced, and the learning rates of the authors' scheduler."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from conftest import Golden
from fvg_adapter.errors import FVGError
from fvg_adapter.tuners import TUNERS
from fvg_adapter.tuners.recipes import RECIPES, dassl_learning_rate, recipe_for, recipe_on
from fvg_adapter.tuners.templates import CLIP_TEMPLATES, KGCOOP_TEMPLATES, PROMPTSRC_TEMPLATES, template_for


@pytest.mark.parametrize("case", ["coop_init_end", "coop_random_end"])
def test_learning_rates_are_the_authors(case: str, golden: Callable[[str], Golden]) -> None:
    expected = golden(case)["lr_schedule"].tolist()
    actual = [dassl_learning_rate(epoch, 0.0035, len(expected)) for epoch in range(len(expected))]
    assert actual == pytest.approx(expected, rel=1e-9)


def test_learning_rates_of_promptsrc(golden: Callable[[str], Golden]) -> None:
    case = golden("promptsrc_gpa")
    actual = [dassl_learning_rate(epoch, case.config["optimizer"]["lr"], 4) for epoch in range(4)]
    assert actual == pytest.approx(case["lr_per_epoch"].tolist(), rel=1e-9)


def test_without_warm_up_the_cosine_starts_at_once() -> None:
    assert dassl_learning_rate(0, 0.1, 10, warmup_epochs=0) == 0.1
    assert dassl_learning_rate(5, 0.1, 10, warmup_epochs=0) == pytest.approx(0.05)


def test_every_tuner_has_a_sourced_recipe() -> None:
    assert set(TUNERS) <= set(RECIPES)
    for recipe in RECIPES.values():
        for stage in (recipe.tune, recipe.fvg):
            assert stage is None or stage.source
        assert set(recipe.templates) == set(CLIP_TEMPLATES)


def test_values_of_method_section_7() -> None:
    for kind in ("coop", "kgcoop"):
        stage = RECIPES[kind].fvg
        assert (stage.optimizer, stage.lr, stage.batch_size, stage.epochs) == ("sgd", 0.0035, 4, 10)
        assert (stage.momentum, stage.weight_decay, stage.crop_scale) == (0.9, 5e-4, (0.08, 1.0))
    stage = RECIPES["promptsrc"].fvg
    assert (stage.optimizer, stage.lr, stage.batch_size) == ("sgd", 0.0025, 32)
    stage = RECIPES["mmrl"].fvg
    assert (stage.optimizer, stage.lr, stage.batch_size, stage.crop_scale) == ("adamw", 1e-3, 4, (0.5, 1.0))


def test_optimizers_are_made_from_a_stage() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    sgd = RECIPES["coop"].fvg.make_optimizer([parameter])
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["momentum"] == 0.9
    assert sgd.defaults["weight_decay"] == 5e-4
    assert not sgd.defaults["nesterov"] and sgd.defaults["dampening"] == 0
    adamw = RECIPES["mmrl"].fvg.make_optimizer([parameter])
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["weight_decay"] == 5e-4
    assert RECIPES["coop"].fvg.learning_rate(0) == 1e-5
    assert RECIPES["coop"].fvg.learning_rate(1, epochs=20) == 0.0035


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(FVGError, match=r"'cop'.*Did you mean 'coop'"):
        recipe_for("cop")
    assert recipe_for("coop") is RECIPES["coop"]


@pytest.mark.parametrize("name", ["OxfordPets", "oxford_pets", "oxford-pets", "pets"])
def test_templates_by_any_name(name: str) -> None:
    assert template_for(name) == "a photo of a {}, a type of pet."


def test_kgcoop_has_another_prompt_for_textures() -> None:
    assert template_for("dtd") == "{} texture."
    assert template_for("dtd", KGCOOP_TEMPLATES) == "a photo of a {}, a type of texture."
    assert {k for k in CLIP_TEMPLATES if CLIP_TEMPLATES[k] != KGCOOP_TEMPLATES[k]} == {"DescribableTextures"}


def test_an_unknown_data_set() -> None:
    with pytest.raises(FVGError, match=r"'flowrs102'.*give one, such as"):
        template_for("flowrs102")
    assert template_for("mine", default="a {}.") == "a {}."


def test_templates_have_one_place_for_the_name() -> None:
    assert len(PROMPTSRC_TEMPLATES) == len(set(PROMPTSRC_TEMPLATES)) == 60
    assert PROMPTSRC_TEMPLATES[0] == "a photo of a {}."
    for template in (*PROMPTSRC_TEMPLATES, *CLIP_TEMPLATES.values(), *KGCOOP_TEMPLATES.values()):
        assert template.count("{}") == 1
        assert template.endswith(".")


def test_recipes_on_the_data_sets_of_the_paper() -> None:
    assert recipe_on("coop", "oxford_pets").arguments["template"] == "a photo of a {}, a type of pet."
    assert recipe_on("kgcoop", "dtd").arguments["teacher_template"] == "a photo of a {}, a type of texture."
    assert recipe_on("mmrl", "dtd").arguments["template"] == "{} texture."
    assert recipe_on("coop", "birds in my garden").arguments["template"] == "a photo of a {}."
    eurosat = recipe_on("promptsrc", "eurosat")
    assert eurosat.tune is not None
    assert (eurosat.tune.epochs, eurosat.fvg.epochs) == (20, 20)
    assert recipe_on("promptsrc", "dtd").fvg.epochs == 10 and RECIPES["promptsrc"].fvg.epochs == 10
