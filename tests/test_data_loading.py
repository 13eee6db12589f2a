"""Batches: partial masks, bad items, workers."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fvg_adapter.data import DataError, MaskedImageFolder, PairedTransform, collate


def item(label=0, mask=None, size=4):
    made = {"pixel_values": torch.full((3, size, size), float(label)), "labels": label}
    return made if mask is None else {**made, "foreground_mask": torch.full((1, size, size), float(mask))}


def test_collate():
    batch = collate([item(2, mask=1), item(0), item(1, mask=1)])
    assert batch["pixel_values"].shape == (3, 3, 4, 4)
    assert (batch["labels"].dtype, batch["labels"].tolist()) == (torch.int64, [2, 0, 1])
    assert batch["foreground_mask"].shape == (3, 1, 4, 4)
    assert batch["foreground_mask"].mean((1, 2, 3)).tolist() == [1, 0, 1]


def test_collate_without_masks_or_labels():
    assert set(collate([item(), item(1)])) == {"pixel_values", "labels"}
    assert set(collate([{"pixel_values": torch.zeros(3, 2, 2)}])) == {"pixel_values"}


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], "at least one"),
        ([{"image": 0, "label": 1}], "PairedTransform"),
        ([item(), item(size=5)], "one size"),
    ],
)
def test_items_that_make_no_batch(items, words):
    with pytest.raises(DataError, match=words):
        collate(items)


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(8):
        for tree in ("train", "mask/train"):
            file = tmp_path / tree / f"class {number % 2}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(file)
    return MaskedImageFolder(tmp_path, transform=PairedTransform(16, train=True, seed=3))


class Views(torch.utils.data.Dataset):
    def __init__(self, data, key):
        self.data, self.key = data, key

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data.view(index, self.key + index)


def loaded(data, workers, seed):
    torch.manual_seed(seed)  # DataLoader seeds its workers from here
    batches = list(DataLoader(data, batch_size=4, num_workers=workers, collate_fn=collate))
    return torch.cat([torch.cat([b["pixel_values"], b["foreground_mask"]], dim=1) for b in batches])  # (8, 4, 16, 16)


def test_workers_are_reproducible_and_differ(data):
    first, again, other = (loaded(data, 2, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:4].mean((1, 2, 3)), first[4:].mean((1, 2, 3)))


def test_views_do_not_depend_on_workers(data):
    assert torch.equal(loaded(Views(data, 10), 0, 0), loaded(Views(data, 10), 2, 7))


def test_an_unreadable_picture_in_a_worker_keeps_its_error(data):
    data.samples[5].image.write_bytes(b"")
    with pytest.raises(DataError, match=data.samples[5].image.name):
        loaded(data, 1, 0)
