"""Stage 3: contrastive pretraining of the pocket CLIP on composed pictures, on a budget of wall time.

Each concept stands in front of one of its two home background families four times in ten, and 40 % of the captions
name the background, so the class names carry their usual backgrounds as real CLIPs' do. Most of the time only half of
the patches are encoded (FLIP); the last part of the budget sees whole pictures. The learning rate follows the elapsed
share of the budget.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from . import backgrounds, captions, compose, concepts, fast, glyphs
from .checkpoint import make_model, save_model
from .muon import Muon

BATCH = 160
LEARNING_RATE, MUON_RATE, WARM_UP = 1.2e-3, 0.008, 60
HOME_SHARE = 0.4
GREY_SHARE = 0.1  # plain grey, so that a masked foreground view is nothing strange
WHOLE_FROM = 0.85  # share of the budget after which all patches are encoded
VARIANTS = 96  # backgrounds a family
CHECKPOINT_SECONDS = 480.0


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

    everyone: list[concepts.Concept]
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
        return cls(
            chosen,
            fast.GlyphBank(flat),
            rows,
            homes,
            torch.from_numpy(bank),
            np.random.Generator(np.random.PCG64([seed, 3])),
        )

    def batch(self) -> tuple[Tensor, list[str]]:
        """Pixels (B, 3, 64, 64) and captions."""
        rng = self.rng
        ids = rng.permutation(len(self.everyone))[:BATCH]
        objects = np.array([self.rows[i][rng.integers(len(self.rows[i]))] for i in ids])
        families = rng.integers(0, len(backgrounds.NAMES), BATCH)
        home = self.homes[ids, rng.integers(0, 2, BATCH)]
        families = np.where(rng.random(BATCH) < HOME_SHARE, home, families)
        families = np.where(rng.random(BATCH) < GREY_SHARE, backgrounds.NAMES.index("grey"), families)
        places = families * VARIANTS + rng.integers(0, VARIANTS, BATCH)
        pool = np.concatenate([self.rows[i] for i in rng.integers(0, len(self.everyone), 64)])
        scenes = compose.draw(rng, objects, pool, places, aspect=0.15)
        texts = [captions.caption(rng, self.everyone[i].name, int(f)) for i, f in zip(ids, families, strict=True)]
        return fast.render(rng, scenes, self.glyphs, self.bank), texts


def loss_of(model: CLIPModel, pixels: Tensor, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
    """CLIP's symmetric contrastive loss."""
    image = F.normalize(encode_patches(model, pixels, keep), dim=-1)  # (B, 128)
    text = model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output)
    logits = model.logit_scale.exp() * image @ F.normalize(text, dim=-1).T  # (B, B)
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def make_optimizers(model: CLIPModel) -> list[torch.optim.Optimizer]:
    """Muon for the transformer layers' matrices, AdamW with CLIP's betas for everything else."""
    hidden = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    taken = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [Muon(hidden, lr=MUON_RATE), torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6)]


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
    tokenizer = captions.train_tokenizer(source.everyone, work / "tokenizer")
    if start_from is not None:  # the weights belong to the ids they were trained with
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(start_from / file, work / "tokenizer" / file)
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    model = make_model(len(tokenizer)) if start_from is None else CLIPModel.from_pretrained(start_from)
    model.train()
    optimizers = make_optimizers(model)
    peaks = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    start = saved = time.monotonic()
    budget, step, seen = minutes * 60, 0, 0.0
    while (share := (time.monotonic() - start) / budget) < 1:
        schedule = min(1.0, (step + 1) / WARM_UP) * (0.5 * (1 + math.cos(math.pi * share)) + 0.005)
        for group, peak in peaks:
            group["lr"] = peak * schedule
        pixels, texts = source.batch()
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        loss = loss_of(model, pixels, tokens["input_ids"], tokens["attention_mask"], 32 if share < WHOLE_FROM else 64)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        step, seen = step + 1, 0.98 * seen + 0.02 * loss.item()
        if step % 50 == 0:
            average, scale = seen / (1 - 0.98**step), model.logit_scale.exp().item()
            print(f"{share * minutes:5.1f} min  step {step}  loss {average:.3f}  scale {scale:.1f}", flush=True)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            saved = time.monotonic()
            save_model(model, work / "tokenizer", work / "model")
    save_model(model, work / "tokenizer", work / "model")
