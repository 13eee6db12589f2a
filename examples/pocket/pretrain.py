"""Stage 3: contrastive pretraining of the pocket CLIP on composed pictures, on a budget of wall time.

Each concept stands in front of one of its two home background families four times in ten, and 40 % of the captions name the
background, so the class names carry their usual backgrounds as real CLIPs' do. Most of the time only half of the patches are
encoded (FLIP); the last part of the budget sees whole pictures. The learning rate follows the elapsed share of the budget.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from . import backgrounds, captions, compose, concepts, fast, glyphs

BATCH = 256
LEARNING_RATE = 1.3e-3
HOME_SHARE = 0.4
GREY_SHARE = 0.1  # plain grey, so that a masked foreground view is nothing strange
WHOLE_FROM = 0.85  # share of the budget after which all patches are encoded
VARIANTS = 96  # backgrounds a family
CHECKPOINT_SECONDS = 480.0


def make_model(vocabulary: int) -> CLIPModel:
    """A randomly initialised pocket CLIP: 2.3 M parameters."""
    size = {"num_attention_heads": 4, "intermediate_size": 512, "hidden_size": 128, "hidden_act": "quick_gelu", "projection_dim": 128}
    special = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    config = CLIPConfig(
        text_config={**size, **special, "num_hidden_layers": 4, "vocab_size": vocabulary, "max_position_embeddings": captions.CONTEXT},
        vision_config={**size, "num_hidden_layers": 6, "image_size": 64, "patch_size": 8},
        projection_dim=128,
    )
    return CLIPModel(config)


def save_model(model: CLIPModel, tokenizer_folder: Path, folder: Path) -> None:
    """Write a complete Hugging Face folder (fp16 weights, `dtype: float32`), replacing `folder` in one step."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(tokenizer_folder, fresh)
    half = CLIPModel(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(fresh)
    config = json.loads((fresh / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 64}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 64, "width": 64}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": fast.CLIP_MEAN, "image_std": fast.CLIP_STD, "do_convert_rgb": True,
    }  # fmt: skip
    (fresh / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def encode_patches(model: CLIPModel, pixels: Tensor, keep: int) -> Tensor:
    """Image features (B, 128) from `keep` random patches of each picture (all 64: the model's own forward)."""
    vision = model.vision_model
    hidden = vision.embeddings(pixels)  # (B, 65, 128)
    if keep < hidden.shape[1] - 1:
        order = torch.rand(hidden.shape[0], hidden.shape[1] - 1).argsort(1)[:, :keep] + 1
        order = torch.cat([torch.zeros(len(order), 1, dtype=order.dtype), order], 1)  # the class token stays
        hidden = hidden.gather(1, order[:, :, None].expand(-1, -1, hidden.shape[2]))  # (B, 1 + keep, 128)
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden)).last_hidden_state
    return model.visual_projection(vision.post_layernorm(hidden[:, 0]))


@dataclass
class Source:
    """Endless batches of distinct concepts: pixels and captions."""

    concepts: list[concepts.Concept]
    glyphs: fast.GlyphBank
    rows: list[np.ndarray]  # per concept: its rows of the glyph bank, pretraining styles only
    homes: np.ndarray  # (concepts, 2) family numbers
    bank: Tensor  # (families × VARIANTS, 96, 96, 3) uint8
    rng: np.random.Generator

    @classmethod
    def load(cls, work: Path, seed: int = concepts.SEED) -> Source:
        data = np.load(work / "glyphs.npz")
        styles = [i for i, s in enumerate(data["styles"]) if s != glyphs.TASK_STYLE]
        pictures = data["glyphs"][:, styles]  # (concepts, styles, 64, 64, 4)
        there = pictures[..., 3].any((2, 3))
        numbers = np.arange(there.size).reshape(there.shape)
        chosen = concepts.load()
        homes = np.array([[backgrounds.NAMES.index(h) for h in c.homes] for c in chosen])
        bank = backgrounds.bank(0, VARIANTS).reshape(-1, backgrounds.SIZE, backgrounds.SIZE, 3)
        flat = pictures.reshape(-1, *pictures.shape[2:])
        rows = [numbers[i][there[i]] for i in range(len(chosen))]
        return cls(chosen, fast.GlyphBank(flat), rows, homes, torch.from_numpy(bank), np.random.Generator(np.random.PCG64([seed, 3])))

    def batch(self) -> tuple[Tensor, list[str]]:
        """Pixels (256, 3, 64, 64) and captions."""
        rng = self.rng
        ids = rng.permutation(len(self.concepts))[:BATCH]
        objects = np.array([self.rows[i][rng.integers(len(self.rows[i]))] for i in ids])
        families = rng.integers(0, len(backgrounds.NAMES), BATCH)
        home = self.homes[ids, rng.integers(0, 2, BATCH)]
        families = np.where(rng.random(BATCH) < HOME_SHARE, home, families)
        families = np.where(rng.random(BATCH) < GREY_SHARE, backgrounds.NAMES.index("grey"), families)
        places = families * VARIANTS + rng.integers(0, VARIANTS, BATCH)
        pool = np.concatenate([self.rows[i] for i in rng.integers(0, len(self.concepts), 64)])
        scenes = compose.draw(rng, objects, pool, places, aspect=0.2)
        texts = [captions.caption(rng, self.concepts[i].name, int(f)) for i, f in zip(ids, families, strict=True)]
        return fast.render(rng, scenes, self.glyphs, self.bank), texts


def loss_of(model: CLIPModel, pixels: Tensor, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
    """CLIP's symmetric contrastive loss."""
    image = F.normalize(encode_patches(model, pixels, keep), dim=-1)  # (B, 128)
    text = model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output)
    logits = model.logit_scale.exp() * image @ F.normalize(text, dim=-1).T  # (B, B)
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def make_optimizer(model: CLIPModel) -> torch.optim.AdamW:
    """AdamW with CLIP's betas; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6)


def run(work: Path, minutes: float = 60.0, threads: int = 2, start_from: Path | None = None) -> None:
    """Train for `minutes` of wall time, writing `work/model` every eight minutes and at the end.

    Args:
        work: the folder with `glyphs.npz`.
        minutes: wall time; the learning rate reaches zero at its end.
        threads: of torch.
        start_from: a folder with an earlier checkpoint to start from instead of random weights.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(concepts.SEED)
    source = Source.load(work, seed=concepts.SEED + (start_from is not None))
    tokenizer = captions.train_tokenizer(source.concepts, work / "tokenizer")
    model = make_model(len(tokenizer)) if start_from is None else CLIPModel.from_pretrained(start_from)
    model.train()
    optimizer = make_optimizer(model)
    start = saved = time.monotonic()
    budget, step, seen = minutes * 60, 0, 0.0
    while (share := (time.monotonic() - start) / budget) < 1:
        rate = LEARNING_RATE * min(1.0, (step + 1) / 150) * (0.5 * (1 + math.cos(math.pi * share)) + 0.005)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels, texts = source.batch()
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        loss = loss_of(model, pixels, tokens["input_ids"], tokens["attention_mask"], 32 if share < WHOLE_FROM else 64)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        step, seen = step + 1, 0.98 * seen + 0.02 * loss.item()
        if step % 50 == 0 or step <= 3:
            print(f"{time.monotonic() - start:6.0f} s  step {step}  loss {seen / (1 - 0.98**step):.3f}  scale {model.logit_scale.exp():.1f}", flush=True)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            saved = time.monotonic()
            save_model(model, work / "tokenizer", work / "model")
    save_model(model, work / "tokenizer", work / "model")
