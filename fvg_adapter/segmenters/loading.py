"""Segmenters from the Hub or a folder: the model class, its tokenizer and its preprocessing, without image processors.

Only the JSON of a preprocessor is read: the processors of SAM 2 and SAM 3 need torchvision, and they take no batches on
the GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from fvg_adapter.errors import FVGError
from fvg_adapter.layouts import layout_of
from fvg_adapter.untrusted import read_json

LOADED_AS = {"sam2_video": "Sam2Model", "sam3_video": "Sam3Model", "sam3_tracker_video": "Sam3TrackerModel"}
"""Checkpoints that are published for video; their image model reads the same weights."""


def load_model(name: str, *, trust_remote_code: bool = False, revision: str | None = None, **options: Any) -> nn.Module:
    """The model of a Hub id or folder, of the class that its config names, in evaluation mode.

    Raises:
        FVGError: it cannot be loaded, or its config names no class that this version of transformers has.
    """
    import transformers

    where: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **where)
        architecture = LOADED_AS.get(config.model_type) or (getattr(config, "architectures", None) or [""])[0]
        if layout_of(config) is not None and "ForImageSegmentation" not in architecture:
            raise FVGError(
                f"{name!r} is a {architecture or config.model_type!r}, a base model that gives no masks; its attention "
                "does: give the source attention (fvg-adapter masks: --source attention --model), or a segmenter such "
                "as CIDAS/clipseg-rd64-refined."
            )
        kind = getattr(transformers, architecture, None)
        if kind is None:
            if not getattr(config, "auto_map", None):
                raise FVGError(
                    f"the segmenter {name!r} is a {architecture or config.model_type!r}, which transformers "
                    f"{transformers.__version__} does not have; upgrade transformers, or load the model yourself and "
                    "give it to Segmenter(model, …)."
                )
            kind = transformers.AutoModelForImageSegmentation
            where["trust_remote_code"] = trust_remote_code
        model: nn.Module = kind.from_pretrained(name, **where, **options).eval()
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, FVGError):
            raise
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise FVGError(
            f"the segmenter {name!r} could not be loaded: {reason}. Give a Hub id such as CIDAS/clipseg-rd64-refined, "
            "or a folder with config and weights; a model that brings its own code needs trust_remote_code=True."
        ) from error
    return model


def load_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """The tokenizer that lies beside a model.

    Raises:
        FVGError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **({} if revision is None else {"revision": revision}))
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise FVGError(f"{name!r} is asked with words, but its tokenizer could not be loaded: {error}") from error


def preprocessing(name: str, *, revision: str | None = None) -> dict[str, Any] | None:
    """The JSON of a model's preprocessor, or None.

    Raises:
        FVGError: there is one, and it is no JSON object.
    """
    from transformers.utils import cached_file

    for file in ("preprocessor_config.json", "processor_config.json"):
        try:
            found = cached_file(name, file, **({} if revision is None else {"revision": revision}))
        except (OSError, ValueError):
            continue
        if found is not None:
            return read_json(Path(found), "the JSON of a preprocessor")
    return None
