"""FeatureBank: encode images once, then train heads (and text-only tuners) in seconds.

A bank holds the features that `FVGModel` starts from, for K augmented views of every image; its items go in as
`features`. What is encoded is frozen, so training from a bank is training in the loop with K fixed augmentations.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fvg_adapter.bank_files import (
    ROWS_PER_SHARD,
    Plan,
    joined,
    read_plan,
    read_shards,
    write_bank,
    write_shards,
)
from fvg_adapter.data.randomness import drawn_under, randomness_kept, seed_of
from fvg_adapter.errors import FVGError
from fvg_adapter.foreground import resolve_source, source_name
from fvg_adapter.launched import Processes
from fvg_adapter.model import FVGModel
from fvg_adapter.progress import Progress, counting
from fvg_adapter.replacing import read_whole
from fvg_adapter.tuners.base import Tuner
from fvg_adapter.untrusted import refuse_not_finite

_log = logging.getLogger(__name__)


class FeatureBank(Dataset[dict[str, Any]]):
    """Features of K views of N images; item i is one view, drawn by torch's generator, as `{"features", "labels"}`.

    Made by `encode` or `load`. A bank that was loaded is mapped: rows are read from the disk when they are asked for,
    and training needs no more of them in memory than a batch.

    Args:
        features: "image" (N, K, D); where they exist "foreground" and "prior" (N, K, D), "image_new" (N, K, D) for
            tuners that change the images, "mask_area" (N, K), "usable" (N, K) bool, and "attention_in_mask" (N, K);
            "attended" (N, K, D) (and "attended_new", "attended_prior") where the config has an attended view.
            Or a list of such dictionaries, one a shard.
        labels: list of N class indices. classes: their names.
        fingerprint: of what encoded them. settings: how foreground views were made.
    """

    def __init__(
        self,
        features: dict[str, Tensor] | Sequence[dict[str, Tensor]],
        labels: Sequence[int],
        classes: Sequence[str],
        fingerprint: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._parts = [features] if isinstance(features, dict) else list(features)
        self._starts = [0, *itertools.accumulate(len(part["image"]) for part in self._parts)]
        self.labels: list[int] = [int(label) for label in labels]
        self.classes: list[str] = list(classes)
        self.fingerprint = fingerprint
        self.settings: dict[str, Any] = dict(settings or {})

    @property
    def features(self) -> dict[str, Tensor]:
        """All features by name; those of several shards are put together, in memory, the first time."""
        if len(self._parts) > 1:
            self._parts = [joined(self._parts)]
            self._starts = [0, len(self)]
        return self._parts[0]

    @property
    def views(self) -> int:
        """K, augmented views of each image."""
        return int(self._parts[0]["image"].shape[1])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        view = int(torch.randint(self.views, ())) if self.views > 1 else 0
        shard = bisect.bisect_right(self._starts, index) - 1
        row = index - self._starts[shard]
        features = _finite({k: v[row, view] for k, v in self._parts[shard].items()})
        return {"features": features, "labels": self.labels[index]}

    def batch(self, rows: Sequence[int], views: Sequence[int]) -> dict[str, Any]:
        """Some images, one view each, as `model(**batch)` takes them."""
        labels = torch.tensor([self.labels[i] for i in rows])
        if len(self._parts) == 1:
            at = torch.tensor([rows, views])
            return {"features": _finite({k: v[at[0], at[1]] for k, v in self._parts[0].items()}), "labels": labels}
        found = []
        for row, view in zip(rows, views, strict=True):
            shard = bisect.bisect_right(self._starts, row) - 1
            found.append({k: v[row - self._starts[shard], view] for k, v in self._parts[shard].items()})
        return {"features": _finite({k: torch.stack([f[k] for f in found]) for k in found[0]}), "labels": labels}

    def subset(
        self, indices: Sequence[int], new_labels: Sequence[int] | None = None, classes: Sequence[str] | None = None
    ) -> FeatureBank:
        """A bank of some of the images, with renumbered labels where given."""
        rows = torch.as_tensor(list(indices), dtype=torch.long)
        labels = [self.labels[i] for i in indices] if new_labels is None else new_labels
        features = {k: v[rows] for k, v in self.features.items()}
        return FeatureBank(features, labels, classes or self.classes, self.fingerprint, self.settings)

    def batches(self, batch_size: int = 1024, view: int = 0) -> list[tuple[dict[str, Tensor], Tensor]]:
        """(features, labels) in order, of one view; for evaluation."""
        labels = torch.tensor(self.labels)
        starts = range(0, len(self), batch_size)
        return [
            (_finite({k: v[s : s + batch_size, view] for k, v in self.features.items()}), labels[s : s + batch_size])
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
        output: str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        rows_per_shard: int = ROWS_PER_SHARD,
        progress: Progress = None,
    ) -> FeatureBank:
        """Encodes whole images and foreground views of a data set.

        With `output` features go to that folder, shard by shard: a call that was killed goes on where it was, and under
        `accelerate launch` the processes share the shards. What comes out is the same, byte for byte, since a shard's
        features depend on nothing but the shard.

        Args:
            model: an FVGModel, or a tuner (then masks come from the data set alone).
            dataset: items {"pixel_values" (3, H, W), "labels", optionally "foreground_mask" (1, H, W)}; with `output`
                also `labels`, a list of the N class indices.
            views: K; a data set whose transform augments gives another view each time.
            batch_size: images at once. workers: of the DataLoader.
            seed: view k of image i depends on (seed, k, i) only, not on order, batch size or workers.
            measure: for `evaluate`: the data set's own masks alone, how much attention lies inside them, and every
                feature of the foreground view and of the attended view (`FVGConfig.attended_view`).
            output: folder to write; the bank that comes back is mapped from it. A whole bank that fits is only read.
            dtype: of features on the disk, float32 or float16 (half the size; features of unit length keep 3 digits).
            rows_per_shard: images in a file.
            progress: called with (encoded, in all) after every batch of this process; True for a bar on stderr, False
                for silence; when None, a bar on a terminal only.

        Raises:
            FVGError: an empty data set, views below 1, or a folder that holds another bank.
        """
        if views < 1 or len(dataset) == 0:
            raise FVGError(
                f"a bank needs at least one view of one image, but views is {views} and {len(dataset)} were given."
            )
        if dtype not in (torch.float32, torch.float16) or rows_per_shard < 1:
            raise FVGError(
                f"dtype must be float32 or float16 and rows_per_shard at least 1, but are {dtype} and {rows_per_shard}."
            )
        wrapped = model if isinstance(model, FVGModel) else FVGModel(model, foreground="given")
        _log.info("encoding %d views of %d items", views, len(dataset))
        work = _Work(wrapped, dataset, views, batch_size, seed, workers, measure)
        try:
            with counting(progress, "encoding", views * len(dataset)) as work.tell:
                classes = list(getattr(dataset, "classes", wrapped.classes))
                settings = _settings_of(wrapped, measure, _has_masks(dataset))
                if output is None:
                    features, labels = work(range(len(dataset)))
                    return cls(features, labels, classes, fingerprint(wrapped), settings)
                plan = Plan(
                    fingerprint(wrapped),
                    {**settings, "measure": measure},
                    str(getattr(dataset, "transform", "")),
                    seed,
                    views,
                    classes,
                    _labels_of(dataset),
                    str(dtype).removeprefix("torch."),
                    rows_per_shard,
                )
                shared = Processes.launched()
                write_shards(
                    Path(output),
                    plan,
                    lambda rows: work(rows)[0],
                    rank=shared.rank,
                    world=shared.world,
                    wait=shared.wait,
                )
                shared.wait()
        finally:
            if wrapped is not model:
                wrapped.release()
        return cls.load(output, model)

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> Path:
        """Writes the bank into a folder (see `encode` for banks larger than memory); returns it.

        A bank that is there is replaced once the new one is whole.

        Raises:
            FVGError: the folder cannot be written, or holds something else; it is left as it was.
        """
        kind = str(dtype).removeprefix("torch.")
        plan = Plan(
            self.fingerprint, self.settings, "", 0, self.views, self.classes, self.labels, kind, max(1, len(self))
        )
        return write_bank(Path(path), plan, self.features)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: FVGModel | Tuner | None = None) -> FeatureBank:
        """Reads a bank (mapped from its files); with a model, one that another model encoded is refused.

        Raises:
            FVGError: no bank, an unfinished or truncated one, or features of another model.
        """

        def read(folder: Path) -> FeatureBank:
            plan = read_plan(folder)
            return cls(read_shards(folder, plan), plan.labels, plan.classes, plan.fingerprint, plan.settings)

        bank = read_whole(Path(path), read)
        if model is not None:
            bank.check(model)
        return bank

    def check(self, model: FVGModel | Tuner, *, training: bool = False) -> None:
        """Raises FVGError where these features are not what the model would make of the images.

        That is: another CLIP or another image-side tuning; for an FVGModel also another view outside the mask or
        another mask threshold; in training also masks of another source, unless every image brought its own.
        """
        expected = fingerprint(model)
        if self.fingerprint != expected:
            raise FVGError(
                f"this bank was encoded by {self.fingerprint or 'an unknown model'}, but the model is {expected}; "
                "encode it again with FeatureBank.encode(model, …)."
            )
        if not isinstance(model, FVGModel) or not self.settings or "foreground" not in self._parts[0]:
            return
        wanted = _settings_of(model, "attended" in self._parts[0], self.settings.get("masks") == "given")
        names = [n for n in wanted if n != "masks" or (training and wanted[n] not in ("whole", self.settings.get(n)))]
        other = [n for n in names if n in self.settings and self.settings[n] != wanted[n]]
        if other:
            said = ", ".join(f"{n} {self.settings[n]!r} (the model's: {wanted[n]!r})" for n in other)
            raise FVGError(f"this bank was encoded with {said}; encode it again with FeatureBank.encode(model, …).")


def _finite(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of a bank as they are handed out; a whole bank is not read to be checked.

    Raises:
        FVGError: a value that is NaN or infinite; the tensor is named.
    """
    refuse_not_finite(features, "a feature bank", "Look at the images and the model, and encode it again.")
    return features


@dataclass
class _Work:
    """Encodes some rows of a data set."""

    model: FVGModel
    dataset: Any
    views: int
    batch_size: int
    seed: int
    workers: int
    measure: bool
    tell: Callable[[int], None] = lambda done: None
    done: int = 0

    def __call__(self, rows: range) -> tuple[dict[str, Tensor], list[int]]:
        """Features (n, K, …) by name, and labels, of these rows."""
        device = self.model.tuner.encoder.device
        classes = list(getattr(self.dataset, "classes", self.model.classes))
        kept: list[list[dict[str, Tensor]]] = []
        labels: list[int] = []
        for k in range(self.views):
            parts = []
            source = _View(self.dataset, self.seed, k, rows)
            for batch in DataLoader(source, self.batch_size, num_workers=self.workers, collate_fn=_collate):
                found = _encode(self.model, batch, device, self.measure, classes)
                parts.append({name: tensor.cpu() for name, tensor in found.items()})
                if k == 0:
                    labels += batch["labels"].tolist()
                self.done += len(batch["labels"])
                self.tell(self.done)
            kept.append(parts)
        by_view = [{name: torch.cat([p[name] for p in parts]) for name in parts[0]} for parts in kept]
        names = set.intersection(*(set(v) for v in by_view))
        return {name: torch.stack([v[name] for v in by_view], dim=1) for name in sorted(names)}, labels


def _settings_of(model: FVGModel, measure: bool, masks_given: bool) -> dict[str, Any]:
    """What decides the foreground views, beside the model."""
    config = model.config
    source = "given" if masks_given or measure else resolve_source(model.foreground)
    if source == "callable":
        source = f"callable {source_name(model.foreground)}"
    settings: dict[str, Any] = {
        "masks": source,
        "outside_mask": config.outside_mask,
        "mask_threshold": config.mask_threshold,
    }
    if config.outside_mask == "black":
        settings |= {"image_mean": list(config.image_mean), "image_std": list(config.image_std)}
    attended = measure and config.attended_view > 0
    if attended:
        settings |= {"usable_area": list(config.usable_area), "attended_margin": config.attended_margin}
    if source == "attention" or attended:
        settings |= {
            "attention_layers": list(config.attention_layers),
            "attention_threshold": config.attention_threshold,
        }
    return settings


def _has_masks(dataset: Any) -> bool:
    with randomness_kept(cuda=False):  # looking at a picture may draw an augmentation
        return "foreground_mask" in dataset[0]


def _labels_of(dataset: Any) -> list[int]:
    labels = getattr(dataset, "labels", None)
    if labels is None or len(labels) != len(dataset):
        raise FVGError(
            "a bank in files needs the labels before it looks at the images; give the data set an attribute `labels`, "
            "a list of one class index an image."
        )
    return [int(label) for label in labels]


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
    """View k of some rows of a data set: item i depends on (seed, k, i) only."""

    def __init__(self, dataset: Any, seed: int, view: int, rows: range) -> None:
        self.dataset, self.seed, self.view, self.rows = dataset, seed, view, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.rows[position]
        with drawn_under(seed_of(self.seed, self.view, index)):
            item: dict[str, Any] = self.dataset[index]
            return item


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    masks = [item.get("foreground_mask") for item in items]
    batch = default_collate([{k: item[k] for k in ("pixel_values", "labels")} for item in items])
    if any(mask is not None for mask in masks):
        blank = torch.zeros(1, *batch["pixel_values"].shape[-2:])
        batch["foreground_mask"] = torch.stack([blank if mask is None else mask for mask in masks])
    return dict(batch)


def _encode(
    model: FVGModel, batch: dict[str, Any], device: torch.device, measure: bool, classes: Sequence[str]
) -> dict[str, Tensor]:
    pixels = batch["pixel_values"].to(device)
    mask = batch.get("foreground_mask")
    mask = None if mask is None else mask.to(device)
    names = [classes[label] for label in batch["labels"].tolist()] if callable(model.foreground) else None
    views = model.views(pixels, mask, masks="given" if measure else "training", measure=measure, classes=names)
    found = {"image": views.base, "foreground": views.foreground, "mask_area": views.area, "usable": views.usable}
    if model.tuner.changes_images:
        found |= {"prior": views.prior, "foreground_prior": views.foreground_prior}
        found |= {"image_new": views.new, "foreground_new": views.foreground_new if measure else None}
        found |= {"attended_new": views.attended_new, "attended_prior": views.attended_prior}
    found["attended"] = views.attended
    if measure and views.attention is not None:
        blank = torch.zeros(len(pixels), 1, *pixels.shape[-2:], device=device)
        found["attention_in_mask"] = attention_in_mask(views.attention, blank if mask is None else mask)
    return {k: v for k, v in found.items() if v is not None}


def attention_in_mask(attention: Tensor, mask: Tensor) -> Tensor:
    """Share (B,) of the patches' attention (B, h, w) that lies inside the mask (B, 1, H, W), in [0, 1]."""
    inside = F.adaptive_avg_pool2d(mask.float(), (attention.shape[-2], attention.shape[-1])).squeeze(1)  # (B, h, w)
    return (attention * inside).sum((1, 2)) / attention.sum((1, 2)).clamp_min(1e-12)
