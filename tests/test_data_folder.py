"""Image folders: layouts, mirrored masks, class names, damage, subsets."""

import pickle
import warnings

import numpy as np
import pytest
from PIL import Image

from fvg_adapter.data import (
    DataError,
    DataFileError,
    MaskedImageFolder,
    PairedTransform,
    UnreadableImageError,
    UnreadableImageWarning,
    open_dataset,
)


def save(path, value=0, size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * 3).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    """pets/{train,test}/{bear,polar_bear,zebra}/{a,b}.png with masks in pets/mask/."""
    for split in ("train", "test"):
        for number, name in enumerate(("bear", "polar_bear", "zebra")):
            for file in ("b.png", "a.png"):
                save(tmp_path / "pets" / split / name / file, value=10 * number)
                save(tmp_path / "pets" / "mask" / split / name / file, value=255)
    return tmp_path / "pets"


def names(data):
    return [(sample.image.parent.name, sample.image.name) for sample in data.samples]


def test_items(root):
    data = MaskedImageFolder(root, "train")
    assert data.classes == ["bear", "polar_bear", "zebra"]
    assert data.labels == [0, 0, 1, 1, 2, 2]
    assert names(data)[:3] == [("bear", "a.png"), ("bear", "b.png"), ("polar_bear", "a.png")]
    raw = data[2]
    assert (raw["image"].mode, raw["image"].size, raw["label"]) == ("RGB", (6, 4), 1)
    assert (raw["mask"].mode, raw["mask"].size) == ("L", (6, 4))
    assert raw["path"] == str(root / "train" / "polar_bear" / "a.png")
    item = data.with_transform(PairedTransform(8, train=False))[2]
    assert data.transform is None
    assert item["labels"] == 1
    assert item["pixel_values"].shape == (3, 8, 8)
    assert item["foreground_mask"].unique().tolist() == [1.0]
    assert len(list(data)) == 6  # stops at the end


def test_no_file_is_opened_before_it_is_asked_for(root, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    data = MaskedImageFolder(root, "train").keep_classes([1, 2])
    assert data.labels == [0, 0, 1, 1]


@pytest.mark.parametrize("place", ["inside", "outside", "in the split"])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_mask_layouts(root, place, suffix):
    tree = {"inside": root / "mask" / "train", "outside": root.parent / "mask" / root.name / "train"}
    folder = tree.get(place, root / "train" / "mask") / "bear"
    for file in (root / "mask" / "train" / "bear").iterdir():
        file.unlink()
    stored = [save(folder / f"{stem}{suffix}", 255) for stem in "ab"]
    data = MaskedImageFolder(root, "train")
    assert [sample.mask for sample in data.samples[:2]] == stored
    assert data.classes == ["bear", "polar_bear", "zebra"]


def test_without_splits(root):
    data = MaskedImageFolder(root / "train", split=None)  # its masks lie in the outer tree: PARENT/mask/train/…
    assert data.labels == [0, 0, 1, 1, 2, 2]
    assert data.has_masks
    (root / "mask" / "train").rename(root / "train" / "mask")
    assert MaskedImageFolder(root / "train", split=None).classes == ["bear", "polar_bear", "zebra"]


def test_a_class_called_mask(root):
    save(root / "train" / "mask" / "a.png")
    assert "mask" in MaskedImageFolder(root, "train", masks="none").classes


def test_a_mask_by_stem_is_not_taken_from_another_picture(root):
    save(root / "train" / "bear" / "a.jpg")  # beside a.png, whose mask is a.png
    data = MaskedImageFolder(root, "train", masks="optional")
    assert {sample.image.name: sample.mask for sample in data.samples[:3]}["a.jpg"] is None


def test_missing_masks(root):
    for stem in "ab":
        (root / "mask" / "train" / "zebra" / f"{stem}.png").unlink()
    with pytest.raises(DataFileError, match="2 of 6") as error:
        MaskedImageFolder(root, "train")
    for words in (
        "a.png",
        str(root / "mask"),
        str(root.parent / "mask" / "pets"),
        "optional",
        'foreground="attention"',
    ):
        assert words in str(error.value)
    data = MaskedImageFolder(root, "train", masks="optional", transform=PairedTransform(8, train=True))
    assert data[0]["foreground_mask"].sum() > 0
    assert data[5]["foreground_mask"].sum() == 0  # no usable mask, whatever its batch holds
    assert data.subset([5])[0]["foreground_mask"].shape == (1, 8, 8)
    assert data.with_transform(None)[5]["mask"] is None
    none = MaskedImageFolder(root, "train", masks="none", transform=PairedTransform(8, train=True))
    assert "foreground_mask" not in none[0]


def test_unknown_policy(root):
    with pytest.raises(DataError, match="'sometimes'"):
        MaskedImageFolder(root, masks="sometimes")


def test_classes_file_orders_the_labels(root):
    (root / "classes.txt").write_text("\ufeffzebra\n\npolar bear\nbear\n", encoding="utf-8")
    data = MaskedImageFolder(root, "train")
    assert data.classes == ["zebra", "polar bear", "bear"]
    assert names(data)[0] == ("zebra", "a.png")
    assert data.labels == [0, 0, 1, 1, 2, 2]
    assert MaskedImageFolder(root, "train", classes=["bear", "zebra", "polar bear"]).classes[1] == "zebra"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bear\npolar bear\nzebra\nzebro", r"'zebro'.*Did you mean 'zebra'"),
        ("bear\npolar bear", r"1 folders.*'zebra'"),
        ("bear\nbear\nzebra", r"more than once|more than one|come more"),
        ("bear\npolar bear\npolar_bear\nzebra", "both mean the folder"),
        ("", "class names"),
    ],
)
def test_classes_file_that_does_not_fit(root, text, words):
    (root / "classes.txt").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        MaskedImageFolder(root, "train")


def test_classes_file_in_another_encoding(root):
    (root / "classes.txt").write_bytes(b"b\xe4r\n")
    with pytest.raises(DataError, match="UTF-8"):
        MaskedImageFolder(root, "train")


def test_a_class_that_only_another_split_has(root):
    """Few-shot training folders hold base classes only: labels must not depend on the split."""
    for file in (root / "train" / "bear").iterdir():
        file.unlink()
    (root / "train" / "bear").rmdir()
    train, test = MaskedImageFolder(root, "train"), MaskedImageFolder(root, "test")
    assert train.classes == test.classes
    assert train.labels == [1, 1, 2, 2]
    (root / "classes.txt").write_text("bear\npolar bear\nzebra", encoding="utf-8")
    assert MaskedImageFolder(root, "train").labels == [1, 1, 2, 2]


def test_wrong_places(root, tmp_path):
    with pytest.raises(DataError, match=r"Did you mean 'train'\? There is: 'test', 'train'"):
        MaskedImageFolder(root, "tain")
    with pytest.raises(DataError, match="does not exist"):
        MaskedImageFolder(root / "nowhere")
    with pytest.raises(DataError, match="is a file"):
        MaskedImageFolder(root / "train" / "bear" / "a.png")
    with pytest.raises(DataError, match="2 pictures lie in it directly"):
        MaskedImageFolder(root / "train", "bear")
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="hold no pictures"):
        MaskedImageFolder(tmp_path / "empty")


def test_hidden_files_nested_folders_and_links(root):
    bear = root / "train" / "bear"
    (bear / "._a.png").write_bytes(b"x")
    (bear / "notes.txt").write_text("no picture")
    save(bear / "more" / "c.PNG")
    save(root / "mask" / "train" / "bear" / "more" / "c.PNG", 255)
    (bear / "more" / "loop").symlink_to(bear)
    (root / "mask" / "train" / "cub").symlink_to(root / "mask" / "train" / "bear")
    (root / "train" / "cub").symlink_to(bear)
    data = MaskedImageFolder(root, "train")
    assert [name for name in names(data) if name[0] in ("bear", "more")][:3] == [
        ("bear", "a.png"),
        ("bear", "b.png"),
        ("more", "c.PNG"),
    ]
    assert data.classes == ["bear", "cub", "polar_bear", "zebra"]
    assert data.labels.count(1) == 3
    assert data[5]["mask"] is not None


def damaged(root):
    bear = root / "train" / "bear"
    (bear / "a.png").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(bear / "cut.jpg")
    (bear / "cut.jpg").write_bytes((bear / "cut.jpg").read_bytes()[:-900])
    (bear / "gone.png").symlink_to(bear / "nowhere.png")
    (root / "mask" / "train" / "zebra" / "b.png").write_bytes(b"no mask")
    return MaskedImageFolder(root, "train", masks="optional")


def test_unreadable_pictures(root):
    data = damaged(root)
    with pytest.raises(UnreadableImageError, match=r"a\.png"):
        data[0]
    problems = data.check()
    assert [(p.index, p.path.rsplit("/", 1)[1]) for p in problems] == [
        (0, "a.png"),
        (2, "cut.jpg"),
        (3, "gone.png"),
        (7, "b.png"),
    ]
    assert "mask" in problems[-1].reason
    with pytest.warns(UnreadableImageWarning, match=r"4 of 8 pictures.*cut\.jpg") as caught:
        rest = data.drop_unreadable()
    assert len(caught) == 1
    assert rest.labels == [0, 1, 1, 2]
    assert rest.unreadable == tuple(problems)
    assert rest.check() == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rest.drop_unreadable() is rest
    with pytest.raises(DataFileError, match="None of the 1 pictures"):
        data.subset([0]).drop_unreadable()


def test_subsets(root):
    data = MaskedImageFolder(root, "train", transform=PairedTransform(8, train=False))
    part = data.subset([4, 0], [1, 0], ["bear", "zebra"])
    assert isinstance(part, MaskedImageFolder)
    assert (part.labels, part.classes, len(part)) == ([1, 0], ["bear", "zebra"], 2)
    assert [sample.label for sample in part.samples] == part.labels
    assert part[0]["labels"] == 1
    assert data.labels == [0, 0, 1, 1, 2, 2]
    kept = data.keep_classes([2, 0])
    assert (kept.labels, kept.classes) == ([1, 1, 0, 0], ["zebra", "bear"])
    assert names(kept)[0] == ("bear", "a.png")
    assert pickle.loads(pickle.dumps(kept)).labels == kept.labels  # data loader workers that are spawned


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([6],), "'6' lie outside a data set of 6"),
        (([-1],), "outside"),
        (([0], [0]), "give classes="),
        (([0], [0, 1], ["a", "b"]), "1 indices came with 2"),
        (([0], [2], ["a", "b"]), "'2' have no class name"),
        (([4], None, ["a", "b"]), "'2' have no class name"),
        (([0], [0], ["a", "a"]), "must differ"),
    ],
)
def test_bad_subsets(root, arguments, words):
    with pytest.raises(DataError, match=words):
        MaskedImageFolder(root).subset(*arguments)


def test_classes_that_do_not_exist_cannot_be_kept(root):
    with pytest.raises(DataError, match="'7' do not exist"):
        MaskedImageFolder(root).keep_classes([0, 7])


def test_views_of_a_data_set(root):
    data = MaskedImageFolder(root, transform=PairedTransform(4, train=True, seed=1))
    assert np.array_equal(data.view(3, 5)["pixel_values"], data.view(3, 5)["pixel_values"])
    assert data.view(3, 5)["labels"] == 1
    with pytest.raises(DataError, match="PairedTransform"):
        data.with_transform(None).view(0, 0)


def test_relative_root_and_open_dataset(root, monkeypatch):
    monkeypatch.chdir(root)
    assert MaskedImageFolder(".").root == root
    monkeypatch.chdir(root.parent)
    assert open_dataset("pets", "test", masks="none").labels == [0, 0, 1, 1, 2, 2]
    with pytest.raises(DataError, match="does not exist"):
        open_dataset("./pats", "train")
    with pytest.raises(DataError, match="name of a split"):
        open_dataset("user/pats", None)
