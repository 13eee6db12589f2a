"""Dassl-family checkpoints, written here as the trainers write them, through a real warm-up scheduler."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from transformers import CLIPModel

from conftest import Golden
from fvg_adapter import load
from fvg_adapter.convert import convert
from fvg_adapter.errors import FVGError
from fvg_adapter.tuners import MMRL, CoOp, PromptSRC


class ConstantWarmupScheduler(LRScheduler):
    """As Dassl's: a constant rate first, then another scheduler, which is kept as an object."""

    __module__ = "dassl.optim.lr_scheduler"

    def __init__(self, optimizer: Any, successor: Any, warmup_epoch: int, cons_lr: float) -> None:
        self.successor, self.warmup_epoch, self.cons_lr = successor, warmup_epoch, cons_lr
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        warm = self.last_epoch >= self.warmup_epoch
        return self.successor.get_last_lr() if warm else [self.cons_lr for _ in self.base_lrs]

    def step(self, epoch: Any = None) -> None:
        if self.last_epoch >= self.warmup_epoch:
            self.successor.step(epoch)
        else:
            super().step(epoch)


@pytest.fixture(autouse=True)
def dassl(monkeypatch: Any) -> Iterator[None]:
    """Pickles name the scheduler by Dassl's module; nobody who converts has that installed."""
    module = types.ModuleType("dassl.optim.lr_scheduler")
    module.ConstantWarmupScheduler = ConstantWarmupScheduler  # type: ignore[attr-defined]
    for name in ("dassl", "dassl.optim"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "dassl.optim.lr_scheduler", module)
    yield


def written(
    folder: Path, state: dict[str, Tensor], *, adamw: bool = False, epoch: int = 10, whole_scheduler: bool = False
) -> Path:
    """A checkpoint with everything that the trainer's save_model puts into it."""
    weight = nn.Parameter(torch.zeros(4, 8))
    optimizer = torch.optim.AdamW([weight], lr=1e-3) if adamw else torch.optim.SGD([weight], lr=0.0035, momentum=0.9)
    scheduler = ConstantWarmupScheduler(optimizer, CosineAnnealingLR(optimizer, 10.0), 1, 1e-5)
    for _ in range(3):
        weight.sum().backward()
        optimizer.step()
        scheduler.step()
    content = {
        "state_dict": state,
        "epoch": epoch,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler if whole_scheduler else scheduler.state_dict(),
        "val_result": 81.5,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"model.pth.tar-{epoch}"
    torch.save(content, path)
    for name in ("dassl", "dassl.optim", "dassl.optim.lr_scheduler"):
        sys.modules.pop(name, None)
    return path


def openai(clip: CLIPModel, prefix: str) -> dict[str, Tensor]:
    """A few of the frozen CLIP's own tensors, by OpenAI's names."""
    if prefix == "text_encoder.":
        return {
            "text_encoder.positional_embedding": clip.text_model.embeddings.position_embedding.weight.detach(),
            "text_encoder.text_projection": clip.text_projection.weight.detach().T.contiguous(),
            "text_encoder.transformer.resblocks.0.ln_1.weight": torch.ones(48),
        }
    return {
        f"{prefix}class_embedding": clip.vision_model.embeddings.class_embedding.detach(),
        f"{prefix}proj": clip.visual_projection.weight.detach().T.contiguous(),
        f"{prefix}transformer.resblocks.0.attn.in_proj_weight": torch.ones(192, 64),
    }


def embedding(clip: CLIPModel, ids: Tensor) -> Tensor:
    return clip.text_model.embeddings.token_embedding.weight.detach()[ids]


def state_of(name: str, case: Golden, clip: CLIPModel) -> dict[str, Tensor]:
    """The state dict that the trainer would have saved with the golden parameters."""
    p = case.under("param")
    words = embedding(clip, case["input_ids"])
    if name.startswith("coop"):
        return {"ctx": p["ctx"], "token_prefix": case["token_prefix"], "token_suffix": case["token_suffix"]}
    if name.startswith("kgcoop"):
        unused = {"bias_vectors": torch.ones(1, 512), "meta_net.linear1.weight": torch.ones(512, 512)}
        unused["meta_net.linear1.bias"] = torch.ones(512)
        return {"ctx": p["ctx"], **unused, "token_prefix": words[:, :1], "token_suffix": words[:, 5:]}
    if name == "promptsrc":
        state = {"prompt_learner.ctx": p["text_ctx"]}
        state |= {"prompt_learner.token_prefix": words[:, :1], "prompt_learner.token_suffix": words[:, 5:]}
        state |= openai(clip, "prompt_learner.ZS_image_encoder.") | openai(clip, "image_encoder.")
        state |= openai(clip, "text_encoder.") | {
            "image_encoder.VPT": p["vision_ctx"],
            "logit_scale": torch.tensor(3.4),
        }
        for i in range(1, 9):
            state[f"text_encoder.transformer.resblocks.{i}.VPT_shallow"] = p["text_deep"][i - 1]
            state[f"image_encoder.transformer.resblocks.{i}.VPT_shallow"] = p["vision_deep"][i - 1]
        return state
    state = openai(clip, "image_encoder.") | openai(clip, "text_encoder.") | {"prompt_embeddings": words}
    state |= {"representation_learner.compound_rep_tokens": p["rep_tokens"], "image_encoder.proj_rep": p["proj_rep"]}
    for i in range(7):
        for short, long in (("r2t", "r2tproj"), ("r2v", "r2vproj")):
            for part in ("weight", "bias"):
                state[f"representation_learner.compound_rep_tokens_{long}.{i}.{part}"] = p[f"{short}_{part}"][i]
    return state


CASES: dict[str, dict[str, Any]] = {
    "coop_init_end": {},
    "coop_random_end": {},
    "coop_csc_end": {},
    "coop_csc_front": {"class_token_position": "front"},
    "kgcoop_w2": {"weight": 2.0, "teacher_template": "a photo of a {}, a type of pet."},
    "promptsrc": {},
    "mmrl": {},
}
KINDS = {"coop": "coop", "kgcoop": "kgcoop", "promptsrc": "promptsrc", "mmrl": "mmrl"}
EXPECTED = {"promptsrc": "eval/logits", "mmrl": "eval_base/prediction_scores"}


@pytest.mark.parametrize("variant", ["plain", "fp16", "module", "scheduler"])
@pytest.mark.parametrize("name", CASES)
def test_converted_logits_are_the_golden_ones(
    name: str, variant: str, golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any, tmp_path: Path
) -> None:
    case = golden(name)
    state = state_of(name, case, golden_clip)
    if variant == "fp16":  # exact: golden parameters are fp16 numbers
        state = {k: v.half() for k, v in state.items()}
    if variant == "module":
        state = {f"module.{k}": v for k, v in state.items()}
    path = written(tmp_path, state, adamw=name == "mmrl", whole_scheduler=variant == "scheduler")
    result = convert(path, golden_clip, tokenizer, case.config["classnames"], **CASES[name])
    assert result.kind == KINDS[name.split("_")[0]]
    assert (result.epoch, result.notes) == (10, ())
    tuner = result.tuner
    assert not tuner.training
    with torch.no_grad():
        torch.testing.assert_close(tuner(case["images"]).logits, case[EXPECTED.get(name, "logits")], atol=1e-4, rtol=0)
        if case.config.get("new_classnames"):
            with tuner.use_classes(case.config["new_classnames"]):
                key = "eval_new/prediction_scores" if name == "mmrl" else "new/logits"
                actual = (
                    tuner.logits(case["images"], branch="new")
                    if isinstance(tuner, MMRL)
                    else tuner(case["images"]).logits
                )
                torch.testing.assert_close(actual, case[key], atol=1e-4, rtol=0)
    everything = set(result.dropped) | {n for names in result.kept.values() for n in names}
    assert everything == {k.removeprefix("module.") for k in state}
    assert set(result.kept) == set(case.under("param"))


def test_our_files_of_it(
    golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any, tmp_path: Path
) -> None:
    case = golden("promptsrc")
    path = written(tmp_path / "VLPromptLearner", state_of("promptsrc", case, golden_clip))
    tuner = convert(path, golden_clip, tokenizer, case.config["classnames"]).tuner
    folder = tuner.save_pretrained(tmp_path / "ours")
    again = load(folder, clip=tuner.detach(), tokenizer=tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(again(case["images"]).logits, case["eval/logits"], atol=1e-4, rtol=0)


def test_what_is_dropped_is_listed(
    golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any, tmp_path: Path
) -> None:
    case = golden("kgcoop_w2")
    path = written(tmp_path, state_of("kgcoop_w2", case, golden_clip))
    dropped = convert(path, golden_clip, tokenizer, case.config["classnames"]).dropped
    assert dropped["token_suffix"] == "depends on the class names, made anew"
    assert dropped["bias_vectors"] == dropped["meta_net.linear1.weight"] == "never used by its trainer"


def test_the_last_epoch_of_a_folder(small_clip: CLIPModel, tokenizer: Any, tmp_path: Path) -> None:
    for epoch in (2, 10, 9):
        torch.save(
            {"state_dict": {"ctx": torch.full((2, 24), float(epoch))}, "epoch": epoch},
            tmp_path / f"model.pth.tar-{epoch}",
        )
    result = convert(tmp_path, small_clip, tokenizer, ["cat"])
    assert result.epoch == 10
    assert float(result.tuner.ctx.detach()[0, 0]) == 10
    other = tmp_path / "best"
    other.mkdir()
    with pytest.raises(FVGError, match="holds no model.pth.tar-N"):
        convert(other, small_clip, tokenizer, ["cat"])
    torch.save({"state_dict": {"ctx": torch.zeros(2, 24)}}, other / "model-best.pth.tar")
    assert convert(other, small_clip, tokenizer, ["cat"]).epoch is None
    with pytest.raises(FVGError, match="there is no checkpoint"):
        convert(tmp_path / "nowhere", small_clip, tokenizer, ["cat"])


def test_words_that_stay_are_found_in_the_buffer(small_clip: CLIPModel, tokenizer: Any, tmp_path: Path) -> None:
    """PromptSRC with fewer tokens than init words: which words stood there, only the buffer tells."""
    options = {"n_ctx_text": 2, "prompt_depth_text": 1, "prompt_depth_vision": 0}
    for words in ("a photo of a", ""):
        tuner = PromptSRC(small_clip, tokenizer, ["cat", "dog"], ctx_init=words, **options)
        prompts = tuner.prompts(tuner.classes)
        suffix = embedding(small_clip, prompts.input_ids)[:, 3:]
        expected = tuner.text_features().detach()
        state = {"prompt_learner.ctx": tuner.text_ctx.detach(), "prompt_learner.token_suffix": suffix}
        state["image_encoder.class_embedding"] = torch.zeros(32)
        tuner.detach()
        path = written(tmp_path / (words or "none"), state)
        again = convert(path, small_clip, tokenizer, ["cat", "dog"]).tuner
        torch.testing.assert_close(again.text_features(), expected)
        again.detach()


def test_other_class_names_are_noticed(
    golden: Callable[[str], Golden], golden_clip: CLIPModel, tokenizer: Any, tmp_path: Path
) -> None:
    case = golden("coop_random_end")
    path = written(tmp_path, state_of("coop_random_end", case, golden_clip))
    with pytest.warns(UserWarning, match="does not belong to the 6 class names given"):
        convert(path, golden_clip, tokenizer, case.config["classnames"][::-1])


# -- refused ---------------------------------------------------------------------------------------------------------


class Evil:
    """A pickle that would run a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("place", ["scheduler", "state_dict", "beside"])
def test_code_is_refused_and_never_run(place: str, small_clip: CLIPModel, tokenizer: Any, tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    content: dict[str, Any] = {"state_dict": {"ctx": torch.zeros(4, 24)}, "epoch": 1, "scheduler": {}}
    if place == "state_dict":
        content["state_dict"]["token_prefix"] = Evil(mark)
    else:
        content[place] = Evil(mark)
    path = tmp_path / "model.pth.tar-1"
    torch.save(content, path)
    with pytest.raises(FVGError, match=r"is refused: it refers to \S*system.*Nothing in it was run"):
        convert(path, small_clip, tokenizer, ["cat"])
    torch.save(content, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FVGError, match="refused"):
        convert(path, small_clip, tokenizer, ["cat"])
    assert not mark.exists()


def test_a_foreign_class_is_refused(small_clip: CLIPModel, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pth.tar-1"
    torch.save({"state_dict": {"ctx": torch.zeros(4, 24)}, "scheduler": types.SimpleNamespace(a=1)}, path)
    with pytest.raises(FVGError, match="types.SimpleNamespace"):
        convert(path, small_clip, tokenizer, ["cat"])


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 broken"])
def test_damaged_files(content: bytes, small_clip: CLIPModel, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pth.tar-1"
    path.write_bytes(content)
    with pytest.raises(FVGError, match=r"no whole checkpoint|refused"):
        convert(path, small_clip, tokenizer, ["cat"])


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"state_dict": {"ctx": 3}}, {"epoch": 3}])
def test_no_state_dict(content: Any, small_clip: CLIPModel, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pth.tar-1"
    torch.save(content, path)
    with pytest.raises(FVGError, match="holds no state dict of tensors"):
        convert(path, small_clip, tokenizer, ["cat"])


SMALL = {"prompt_learner.ctx": torch.zeros(4, 24), "image_encoder.VPT": torch.zeros(4, 32)}
REP = {
    "representation_learner.compound_rep_tokens": torch.zeros(5, 8),
    "image_encoder.proj_rep": torch.zeros(32, 16),
    **{
        f"representation_learner.compound_rep_tokens_{m}.{i}.{p}": torch.zeros(w, 8)
        if p == "weight"
        else torch.zeros(w)
        for m, w in (("r2tproj", 24), ("r2vproj", 32))
        for i in range(2)
        for p in ("weight", "bias")
    },
}


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        ({"ctx": torch.zeros(4, 512)}, {}, "ctx in .* has width 512, but this CLIP's text tower has width 24"),
        (
            {**SMALL, "image_encoder.VPT": torch.zeros(4, 768)},
            {},
            "width 768, but this CLIP's vision tower has width 32",
        ),
        ({"ctx": torch.zeros(4, 24)}, {"kind": "promptsrc"}, "checkpoint of 'coop', but kind 'promptsrc' was asked"),
        (REP, {"kind": "coop"}, "checkpoint of 'mmrl', but kind 'coop' was asked"),
        ({"ctx": torch.zeros(4, 24)}, {"kind": "maple"}, "kind 'maple' is unknown"),
        ({"ctx": torch.zeros(3, 4, 24)}, {}, "class-specific contexts of 3 classes, but 1 class"),
        ({"ctx": torch.zeros(4, 24), "meta_net.linear2.weight": torch.zeros(1)}, {}, "no checkpoint of coop, kgcoop"),
        ({"layer.weight": torch.zeros(1)}, {}, r"holds \['layer.weight'\]"),
        (
            {"ctx": torch.zeros(4, 24), "extra": torch.zeros(1)},
            {},
            r"tensors that these tuners do not have: \['extra'\]",
        ),
        (
            {**SMALL, "image_encoder.transformer.resblocks.3.VPT_shallow": torch.zeros(4, 32)},
            {},
            r"deep prompts in blocks \[3\]",
        ),
        (
            {
                **SMALL,
                **{f"image_encoder.transformer.resblocks.{i}.VPT_shallow": torch.zeros(4, 32) for i in range(1, 9)},
            },
            {},
            "prompt_depth_vision is 9, but the vision tower has 2 layers",
        ),
        (
            {**SMALL, "image_encoder.proj": torch.ones(32, 16)},
            {},
            "tuned on another CLIP: its image_encoder.proj differs",
        ),
        ({**SMALL, "image_encoder.proj": torch.ones(768, 512)}, {}, r"is \(768, 512\), but this CLIP's is \(32, 16\)"),
        ({k: v for k, v in REP.items() if "proj_rep" not in k}, {}, "lacks image_encoder.proj_rep"),
        ({k: v for k, v in REP.items() if "r2vproj" not in k}, {}, "lacks MMRL's linear maps"),
        (REP, {"rep_layers": [2]}, r"has r2t_weight of shape \(2, 24, 8\), but the tuner's is \(1, 24, 8\)"),
        ({"ctx": torch.zeros(4, 24)}, {"alpha": 1.0}, "arguments do not fit CoOp"),
        ({"ctx": torch.zeros(75, 24)}, {}, "tokens, but the text tower holds 77"),
    ],
)
def test_what_does_not_fit(
    state: dict[str, Tensor],
    options: dict[str, Any],
    message: str,
    small_clip: CLIPModel,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    path = written(tmp_path, state)
    with pytest.raises(FVGError, match=message):
        convert(path, small_clip, tokenizer, ["cat"], **options)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in small_clip.modules()) == 0
    assert all(p.requires_grad for p in small_clip.parameters())


def test_coop_and_kgcoop_share_their_file(small_clip: CLIPModel, tokenizer: Any, tmp_path: Path) -> None:
    path = written(tmp_path, {"ctx": torch.zeros(4, 24)})
    assert convert(path, small_clip, tokenizer, ["cat"], kind="kgcoop", weight=2.0).kind == "kgcoop"
    plain = convert(path, small_clip, tokenizer, ["cat"]).tuner
    assert type(plain) is CoOp


def test_mmrl_layers_are_the_last_ones(small_clip: CLIPModel, tokenizer: Any, tmp_path: Path) -> None:
    tuner = convert(written(tmp_path, REP), small_clip, tokenizer, ["cat"], alpha=0.5).tuner
    assert tuner.arguments()["rep_layers"] == [1, 2]
    assert tuner.arguments()["alpha"] == 0.5
