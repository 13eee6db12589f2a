"""Hugging Face data sets: columns, labels without decoding, EXIF, bad input."""

import io

import numpy as np
import pytest
from PIL import Image

from fvg_adapter.data import (
    DataError,
    DataFileError,
    MaskedHubDataset,
    PairedTransform,
    UnreadableImageWarning,
    open_dataset,
)

datasets = pytest.importorskip("datasets")


def table(kind=None, masks=True, **columns):
    pictures = [Image.new("RGB", (8, 6), (40 * i, 0, 0)) for i in range(4)]
    data = {"image": pictures, "label": [0, 1, 2, 1], **columns}
    features = {"image": datasets.Image(), "label": kind or datasets.ClassLabel(names=["cat", "dog", "eel"])}
    if masks:
        data["mask"] = [Image.new("L", (8, 6), 255), None, Image.new("L", (4, 3), 0), Image.new("RGB", (8, 6), "white")]
        features["mask"] = datasets.Image()
    return datasets.Dataset.from_dict(data, features=datasets.Features(features))


def test_items():
    data = MaskedHubDataset(table(), masks="optional", transform=PairedTransform(8, train=False))
    assert (data.classes, data.labels, len(data)) == (["cat", "dog", "eel"], [0, 1, 2, 1], 4)
    assert [data[i]["foreground_mask"].mean().item() for i in range(4)] == [1, 0, 0, 1]
    assert data[3]["labels"] == 1
    raw = data.raw(2)
    assert (raw["image"].mode, raw["mask"].size, raw["label"], raw["path"]) == ("RGB", (8, 6), 2, "row 2")
    part = data.keep_classes([1, 2])
    assert (part.labels, part.classes) == ([0, 1, 0], ["dog", "eel"])
    assert part.raw(2)["image"].getpixel((0, 0)) == (120, 0, 0)
    assert part.subset([2]).raw(0)["path"] == "row 3"
    assert len(list(part)) == 3


def test_a_required_mask_that_a_row_lacks():
    data = MaskedHubDataset(table())
    assert data[0]["mask"] is not None
    with pytest.raises(DataFileError, match="row 1 has no mask"):
        data[1]
    with pytest.warns(UnreadableImageWarning, match="1 of 4"):
        assert data.drop_unreadable().labels == [0, 2, 1]


def test_without_masks():
    data = MaskedHubDataset(table(masks=False), mask=None, transform=PairedTransform(8, train=True))
    assert "foreground_mask" not in data[0]
    assert not MaskedHubDataset(table(masks=False), masks="optional").has_masks
    assert not MaskedHubDataset(table(), masks="none").has_masks
    with pytest.raises(DataError, match="mask=None"):
        MaskedHubDataset(table(masks=False))


def test_labels_are_read_without_decoding(monkeypatch):
    source = table()
    monkeypatch.setattr(Image, "open", None)
    assert MaskedHubDataset(source).labels == [0, 1, 2, 1]


def test_rows_that_were_selected_and_formatted():
    source = table().select([3, 0]).with_transform(lambda rows: {"nothing": [0] * len(next(iter(rows.values())))})
    data = MaskedHubDataset(source, transform=PairedTransform(8, train=False))
    assert data.labels == [1, 0]
    assert data.raw(0)["image"].getpixel((0, 0)) == (120, 0, 0)


def test_labels_as_words_and_as_bare_numbers():
    words = table(datasets.Value("string"), label=["dog", "cat", "dog", "eel"])
    data = MaskedHubDataset(words)
    assert (data.classes, data.labels) == (["cat", "dog", "eel"], [1, 0, 1, 2])
    assert MaskedHubDataset(words, classes=["eel", "dog", "cat"]).labels == [1, 2, 1, 0]
    with pytest.raises(DataError, match=r"'cat', 'dog'"):
        MaskedHubDataset(words, classes=["eel"])
    numbers = table(datasets.Value("int64"))
    with pytest.raises(DataError, match="classes="):
        MaskedHubDataset(numbers)
    assert MaskedHubDataset(numbers, classes=["a", "b", "c"]).classes == ["a", "b", "c"]
    with pytest.raises(DataError, match="'2' have no class name"):
        MaskedHubDataset(numbers, classes=["a", "b"])


@pytest.mark.parametrize("label", [[0, -1, 1, 1], [0, None, 1, 1]])
def test_rows_without_a_label(label):
    with pytest.raises(DataError, match=r"filtered out|no label"):
        MaskedHubDataset(table(datasets.Value("int64"), label=label), classes=["a", "b"])


def test_picture_and_mask_turn_alike():
    mask = np.zeros((6, 8), np.uint8)
    mask[:2, :5] = 255
    exif, stored, plain = Image.Exif(), io.BytesIO(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(mask).convert("RGB").save(stored, "PNG", exif=exif)
    Image.fromarray(mask).save(plain, "PNG")  # made from the stored pixels, without the tag
    row = {"image": [{"bytes": stored.getvalue(), "path": None}], "mask": [{"bytes": plain.getvalue(), "path": None}]}
    features = datasets.Features(
        {"image": datasets.Image(), "mask": datasets.Image(), "label": datasets.ClassLabel(names=["a"])}
    )
    raw = MaskedHubDataset(datasets.Dataset.from_dict({**row, "label": [0]}, features=features))[0]
    assert raw["image"].size == (6, 8)
    assert np.array_equal(np.asarray(raw["image"])[..., 0], np.asarray(raw["mask"]))


def test_what_is_no_data_set():
    with pytest.raises(DataError, match="Did you mean 'image'"):
        MaskedHubDataset(table(), image="imag")
    with pytest.raises(DataError, match="choose one"):
        MaskedHubDataset(datasets.DatasetDict(train=table()))
    with pytest.raises(DataError, match="without streaming"):
        MaskedHubDataset(table().to_iterable_dataset())
    with pytest.raises(DataError, match="no rows"):
        MaskedHubDataset(table().select([]))


def test_open_dataset_loads_what_is_no_folder(monkeypatch):
    asked = []

    def load(id, split, **options):
        asked.append((id, split, options))
        if split == "tain":
            raise ValueError('Unknown split "tain".')
        return table()

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = open_dataset("user/pets", "train", masks="optional", revision="abc")
    assert isinstance(data, MaskedHubDataset)
    assert asked == [("user/pets", "train", {"revision": "abc"})]
    with pytest.raises(DataError, match=r"user/pets.*Unknown split.*no folder"):
        open_dataset("user/pets", "tain")
