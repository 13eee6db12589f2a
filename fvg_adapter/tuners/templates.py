"""Hand-written prompts as data: one for each data set of the paper, and the 60 that PromptSRC's teacher averages.

Names of data sets are Dassl's class names; `template_for` also takes the folder names of CoOp's DATASETS.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from fvg_adapter.data.paper_sets import PAPER_SETS
from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.tuners.prompts import DEFAULT_TEMPLATE

CLIP_TEMPLATES: Mapping[str, str] = {
    "Caltech101": "a photo of a {}.",
    "DescribableTextures": "{} texture.",
    "EuroSAT": "a centered satellite photo of {}.",
    "FGVCAircraft": "a photo of a {}, a type of aircraft.",
    "Food101": "a photo of {}, a type of food.",
    "ImageNet": "a photo of a {}.",
    "ImageNetA": "a photo of a {}.",
    "ImageNetR": "a photo of a {}.",
    "ImageNetSketch": "a photo of a {}.",
    "ImageNetV2": "a photo of a {}.",
    "OxfordFlowers": "a photo of a {}, a type of flower.",
    "OxfordPets": "a photo of a {}, a type of pet.",
    "StanfordCars": "a photo of a {}.",
    "SUN397": "a photo of a {}.",
    "UCF101": "a photo of a person doing {}.",
}
"""Prompts of plain CLIP, of MMRL and of the prior (CUSTOM_TEMPLATES in zsclip.py of CoOp and in mmrl.py)."""

KGCOOP_TEMPLATES: Mapping[str, str] = {**CLIP_TEMPLATES, "DescribableTextures": "a photo of a {}, a type of texture."}
"""Prompts of KgCoOp's teacher; DTD's is another one there (trainers/kgcoop.py: CUSTOM_TEMPLATES)."""

PROMPTSRC_TEMPLATES: tuple[str, ...] = (
    "a photo of a {}.",
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
)
"""The first 60 of OpenAI's public list of 80 prompts for ImageNet, "a photo of a {}." first (PromptSRC's teacher)."""

_FOLDERS = {folder: found.name for found in PAPER_SETS.values() for folder in found.folders}


def template_for(dataset: str, templates: Mapping[str, str] = CLIP_TEMPLATES, *, default: str | None = None) -> str:
    """The hand-written prompt of a data set.

    Args:
        dataset: its name in Dassl ("OxfordPets") or its folder ("oxford_pets", "dtd"); case, "_" and "-" do not matter.
        templates: `CLIP_TEMPLATES`, `KGCOOP_TEMPLATES` or another table.
        default: what an unknown data set gets, `prompts.DEFAULT_TEMPLATE` say; an error when None.

    Raises:
        FVGError: the data set is unknown and no default is given.

    >>> template_for("oxford_pets")
    'a photo of a {}, a type of pet.'
    """
    found = templates.get(dataset_name(dataset), default)
    if found is None:
        raise FVGError(
            f"no hand-written prompt is known for the data set {dataset!r}; give one, such as {DEFAULT_TEMPLATE!r}. "
            f"{nearest(dataset, templates)}"
        )
    return found


def dataset_name(given: str) -> str:
    """Dassl's name of a data set, from that or from its folder's; what is not known stays as it is.

    >>> dataset_name("oxford_pets"), dataset_name("my_birds")
    ('OxfordPets', 'my_birds')
    """
    known = {_key(name): name for name in CLIP_TEMPLATES} | {_key(folder): name for folder, name in _FOLDERS.items()}
    return known.get(_key(given), given)


def _key(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
