"""FeatureBank: encode images once, then train heads (and text-only tuners) in seconds.

A bank holds the features that `FVGModel` starts from, for K augmented views of every image; its items go in as
`features`. What is encoded is frozen, so training from a bank is training in the loop with K fixed augmentations.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fvg_adapter.errors import FVGError
from fvg_adapter.model import FVGModel
from fvg_adapter.tuners.base import Tuner

_SUFFIX = ".safetensors"


class FeatureBank(Dataset[dict[str, Any]]):
    """Features of K views of N images; item i is one view, drawn by torch's generator, as `{"features", "labels"}`.

    Attributes:
        features: "image" (N, K, D); where they exist "foreground" and "prior" (N, K, D), "image_new" (N, K, D) for
            tuners that change the images, "mask_area" (N, K), "usable" (N, K) bool, and "attention_in_mask" (N, K).
        labels: list of N class indices. classes: their names.
        fingerprint: of what encoded them.
    """

    def __init__(
        self, features: dict[str, Tensor], labels: Sequence[int], classes: Sequence[str], fingerprint: str = ""
    ) -> None:
        self.features = features
        self.labels = [int(label) for label in labels]
        self.classes = list(classes)
        self.fingerprint = fingerprint

    @property
    def views(self) -> int:
        """K, augmented views of each image."""
        return int(self.features["image"].shape[1])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        view = int(torch.randint(self.views, ())) if self.views > 1 else 0
        return {"features": {k: v[index, view] for k, v in self.features.items()}, "labels": self.labels[index]}

    def subset(
        self, indices: Sequence[int], new_labels: Sequence[int] | None = None, classes: Sequence[str] | None = None
    ) -> FeatureBank:
        """A bank of some of the images, with renumbered labels where given."""
        rows = torch.as_tensor(list(indices), dtype=torch.long)
        labels = [self.labels[i] for i in indices] if new_labels is None else new_labels
        return FeatureBank(
            {k: v[rows] for k, v in self.features.items()}, labels, classes or self.classes, self.fingerprint
        )

    def batches(self, batch_size: int = 1024, view: int = 0) -> list[tuple[dict[str, Tensor], Tensor]]:
        """(features, labels) in order, of one view; for evaluation."""
        labels = torch.tensor(self.labels)
        starts = range(0, len(self), batch_size)
        return [
            ({k: v[s : s + batch_size, view] for k, v in self.features.items()}, labels[s : s + batch_size])
            for s in starts
        ]

    @classmethod
    @torch.no_grad()
    def encode(
        cls,
        model: FVGModel | Tuner,
        dataset: Any,
        *,
        views: int = 1,
        batch_size: int = 64,
        seed: int = 0,
        workers: int = 0,
        measure: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> FeatureBank:
        """Encodes whole images and foreground views of a data set.

        Args:
            model: an FVGModel, or a tuner (then masks come from the data set alone).
            dataset: items {"pixel_values" (3, H, W), "labels", optionally "foreground_mask" (1, H, W)}.
            views: K; a data set whose transform augments gives another view each time.
            batch_size: images at once. workers: of the DataLoader.
            seed: view k of image i depends on (seed, k, i) only, not on order, batch size or workers.
            measure: for `evaluate`: the data set's own masks alone, how much attention lies inside them, and every
                feature of the foreground view.
            progress: called with (encoded, total) after every batch.

        Raises:
            FVGError: an empty data set, or views below 1.
        """
        if views < 1 or len(dataset) == 0:
            raise FVGError(
                f"a bank needs at least one view of one image, but views is {views} and {len(dataset)} were given."
            )
        wrapped = model if isinstance(model, FVGModel) else FVGModel(model, foreground="given")
        try:
            device = wrapped.tuner.encoder.device
            kept: list[list[dict[str, Tensor]]] = []
            done, total = 0, views * len(dataset)
            labels: list[int] = []
            for k in range(views):
                source = _View(dataset, seed, k)
                parts = []
                for batch in DataLoader(source, batch_size, num_workers=workers, collate_fn=_collate):
                    parts.append({n: t.cpu() for n, t in _encode(wrapped, batch, device, measure).items()})
                    if k == 0:
                        labels += batch["labels"].tolist()
                    done += len(batch["labels"])
                    if progress is not None:
                        progress(done, total)
                kept.append(parts)
        finally:
            if wrapped is not model:
                wrapped.release()
        by_view = [{n: torch.cat([p[n] for p in parts]) for n in parts[0]} for parts in kept]
        names = set.intersection(*(set(v) for v in by_view))
        features = {n: torch.stack([v[n] for v in by_view], dim=1) for n in sorted(names)}
        classes = list(getattr(dataset, "classes", wrapped.classes))
        return cls(features, labels, classes, fingerprint(wrapped))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one safetensors file, whole or not at all; returns its path."""
        target = Path(path)
        target = target if target.suffix == _SUFFIX else target.with_name(target.name + _SUFFIX)
        target.parent.mkdir(parents=True, exist_ok=True)
        meta = {
            "format": "fvg_bank",
            "version": "1",
            "fingerprint": self.fingerprint,
            "classes": json.dumps(self.classes),
        }
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        tensors = {**self.features, "labels": torch.tensor(self.labels)}
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=meta)
            temporary.replace(target)
        except (OSError, SafetensorError) as error:
            raise FVGError(
                f"could not save the bank to {target}: {error}. What was there before is unchanged."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: FVGModel | Tuner | None = None) -> FeatureBank:
        """Reads a bank (memory-mapped); with a model, one that another model encoded is refused.

        Raises:
            FVGError: no bank, a truncated file, or features of another model.
        """
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (safe_open has no iterator)
        except (OSError, SafetensorError) as error:
            raise FVGError(f"{path} is no whole safetensors file: {error}; encode it again.") from error
        if meta.get("format") != "fvg_bank" or "image" not in tensors or "labels" not in tensors:
            raise FVGError(f"{path} is no bank written by FeatureBank.save.")
        bank = cls(
            {k: v for k, v in tensors.items() if k != "labels"},
            tensors["labels"].tolist(),
            json.loads(meta["classes"]),
            meta.get("fingerprint", ""),
        )
        if model is not None:
            bank.check(model)
        return bank

    def check(self, model: FVGModel | Tuner) -> None:
        """Raises FVGError where another CLIP, or another image-side tuning, encoded these features."""
        expected = fingerprint(model)
        if self.fingerprint != expected:
            raise FVGError(
                f"this bank was encoded by {self.fingerprint or 'an unknown model'}, but the model is {expected}; "
                "encode it again "
                "with FeatureBank.encode(model, …)."
            )


def fingerprint(model: FVGModel | Tuner) -> str:
    """Names what decides features: the CLIP, and the tuner's own tensors where it changes the images."""
    tuner = model.tuner if isinstance(model, FVGModel) else model
    record = json.dumps(tuner.encoder.fingerprint(), sort_keys=True)
    digest = hashlib.sha256(record.encode())
    if tuner.changes_images:
        for name, tensor in sorted(tuner.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    kind = tuner.kind if tuner.changes_images else "clip"
    return f"{kind}:{digest.hexdigest()[:16]}"


class _View(Dataset[dict[str, Any]]):
    """View k of a data set: item i depends on (seed, k, i) only."""

    def __init__(self, dataset: Any, seed: int, view: int) -> None:
        self.dataset, self.seed, self.view = dataset, seed, view

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        key = hashlib.sha256(f"{self.seed}/{self.view}/{index}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(key[:7], "big"))
            item: dict[str, Any] = self.dataset[index]
            return item


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    masks = [item.get("foreground_mask") for item in items]
    batch = default_collate([{k: item[k] for k in ("pixel_values", "labels")} for item in items])
    if any(mask is not None for mask in masks):
        blank = torch.zeros(1, *batch["pixel_values"].shape[-2:])
        batch["foreground_mask"] = torch.stack([blank if mask is None else mask for mask in masks])
    return dict(batch)


def _encode(model: FVGModel, batch: dict[str, Any], device: torch.device, measure: bool) -> dict[str, Tensor]:
    pixels = batch["pixel_values"].to(device)
    mask = batch.get("foreground_mask")
    mask = None if mask is None else mask.to(device)
    views = model.views(pixels, mask, masks="given" if measure else "training", measure=measure)
    found = {"image": views.base, "foreground": views.foreground, "mask_area": views.area, "usable": views.usable}
    if model.tuner.changes_images:
        found |= {"prior": views.prior, "foreground_prior": views.foreground_prior}
        found |= {"image_new": views.new, "foreground_new": views.foreground_new if measure else None}
    if measure and views.attention is not None:
        blank = torch.zeros(len(pixels), 1, *pixels.shape[-2:], device=device)
        found["attention_in_mask"] = attention_in_mask(views.attention, blank if mask is None else mask)
    return {k: v for k, v in found.items() if v is not None}


def attention_in_mask(attention: Tensor, mask: Tensor) -> Tensor:
    """Share (B,) of the patches' attention (B, h, w) that lies inside the mask (B, 1, H, W), in [0, 1]."""
    inside = F.adaptive_avg_pool2d(mask.float(), (attention.shape[-2], attention.shape[-1])).squeeze(1)  # (B, h, w)
    return (attention * inside).sum((1, 2)) / attention.sum((1, 2)).clamp_min(1e-12)
