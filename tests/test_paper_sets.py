"""The paper's data sets on small folders that imitate each layout: lists, order, class names, masks, and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Repo, serving
from paper_layouts import MAKERS, NESTED, SYNSETS, classnames, make, mask

from fvg_adapter.data import (
    ELEVEN,
    PAPER_SETS,
    VARIANTS,
    ClassNameWarning,
    DataError,
    DataFileError,
    MaskedImageFolder,
    PairedTransform,
    base_new_split,
    few_shot_indices,
    open_dataset,
    open_paper_set,
    paper_set,
)
from fvg_adapter.protocols import base_to_new_split
from fvg_adapter.tuners.templates import CLIP_TEMPLATES

PLAIN = PairedTransform(32, train=False)


def test_all_sets_are_there_with_their_template_and_an_imitation() -> None:
    assert len(ELEVEN) == 11 and len(VARIANTS) == 4
    assert set(PAPER_SETS) == set(MAKERS) == set(CLIP_TEMPLATES)
    assert set(NESTED) == set(ELEVEN)
    assert PAPER_SETS["OxfordPets"].sizes == {"train": 2944, "val": 736, "test": 3669}


@pytest.mark.parametrize("name", MAKERS)
def test_coops_layout(tmp_path: Path, name: str) -> None:
    root = make(tmp_path, name)
    for split in PAPER_SETS[name].sizes:
        found = open_paper_set(root, name, split, masks="require", transform=PLAIN)
        assert found.has_masks and len(found.classes) >= 2 and set(found.labels) == set(range(len(found.classes)))
        assert found.raw(0)["image"].size == (36, 28)
        item = found[len(found) - 1]
        assert item["pixel_values"].shape == (3, 32, 32) and 0.1 < item["foreground_mask"].mean() < 0.5
        assert not found.check()
        assert found.digest == open_paper_set(tmp_path, name, split).digest  # from the folder of all sets
    assert isinstance(open_dataset(root, "test", masks="require"), type(found))  # by the folder's name


@pytest.mark.parametrize("mirror", ["outer", "inner"])
@pytest.mark.parametrize("name", ELEVEN)
def test_the_releases_layout_with_either_mirror(tmp_path: Path, name: str, mirror: str) -> None:
    top = make(tmp_path / "release", name, mirror, nested=True)
    plain = make(tmp_path / "coop", name)
    for root in (top, tmp_path / "release", top / NESTED[name][1]):
        found = open_paper_set(root, name, "test", masks="require")
        same = open_paper_set(plain, name, "test")
        assert (found.digest, found.classes, found.labels) == (same.digest, same.classes, same.labels)
        assert found.raw(0)["mask"].tobytes() == same.raw(0)["mask"].tobytes()


def test_the_release_spells_suns_folder_small(tmp_path: Path) -> None:
    top = make(tmp_path, "SUN397", "outer", nested=True)
    (top / "sun397/SUN397").rename(top / "sun397/sun397")
    (top / "mask/sun397/SUN397").rename(top / "mask/sun397/sun397")
    assert len(open_paper_set(top, "SUN397", "train", masks="require").classes) == 3


def test_a_list_or_masks_above_the_pictures(tmp_path: Path) -> None:
    top = make(tmp_path, "ImageNet", "inner", nested=True)
    (top / "imagenet/classnames.txt").rename(top / "classnames.txt")  # as the release has it
    assert open_paper_set(top, "imagenet-1k", "val", masks="require").classes == list(SYNSETS.values())


def test_the_draw_is_coops_in_the_order_of_its_list(tmp_path: Path) -> None:
    root = make(tmp_path, "OxfordPets")
    train = open_paper_set(root, "oxford_pets", "train")
    listed = json.loads((root / "split_zhou_OxfordPets.json").read_text())["train"]
    assert [file.rpartition("/")[2] for file, _ in train.entries] == [row[0] for row in listed]
    shown = few_shot_indices(train.labels, 2, seed=1)[0]
    base, new = base_new_split(train.classes)
    kept = train.subset(shown).keep_classes(base)
    assert len(kept) == 4 and kept.classes == ["abyssinian", "american_bulldog"] and len(new) == 2
    import random

    stream, expected = random.Random(1), []  # Dassl's generate_fewshot_dataset, written out
    for label in (3, 0, 1, 2):  # in the order in which they first appear
        rows = [row[0] for row in listed if row[1] == label]
        expected += stream.sample(rows, 2)
    assert [train.entries[i][0].rpartition("/")[2] for i in shown] == expected
    normal = {"size": (32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    split = base_to_new_split(root, shots=2, seed=1, **normal)  # first the draw, then the cut
    drawn = [file.rpartition("/")[2] for file, _ in split.train.entries]
    assert drawn == [file for file in expected if file.lower().startswith(("aby", "american"))]
    assert [part.classes for part in split.tests["test"]] == [kept.classes, ["bengal", "pug"]]


def test_names_are_coops(tmp_path: Path) -> None:
    (
        make(tmp_path, "EuroSAT"),
        make(tmp_path, "FGVCAircraft"),
        make(tmp_path, "StanfordCars"),
        make(tmp_path, "Caltech101"),
    )
    euro = json.loads((tmp_path / "eurosat/split_zhou_EuroSAT.json").read_text())
    for rows in euro.values():
        for row in rows:
            row[2] = row[0].split("/")[0]  # names of the folders, which CoOp replaces
    (tmp_path / "eurosat/split_zhou_EuroSAT.json").write_text(json.dumps(euro))
    assert open_paper_set(tmp_path, "EuroSAT", "test").classes == ["Annual Crop Land", "Forest", "Sea or Lake"]
    assert open_paper_set(tmp_path, "FGVCAircraft", "test").classes[2] == "F/A-18"
    assert "2012 Ram C/V Cargo Van Minivan" in open_paper_set(tmp_path, "StanfordCars", "test").classes
    assert open_paper_set(tmp_path, "Caltech101", "test").classes == ["face", "leopard", "inline_skate"]


def test_a_folder_of_splits_stays_what_it_is(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            mask(tmp_path / "oxford_pets" / split / name / "a.jpg")
    found = open_dataset(tmp_path / "oxford_pets", "train", masks="none", dataset="OxfordPets")
    assert isinstance(found, MaskedImageFolder)


# -- what is wrong -----------------------------------------------------------------------------------------------------


def told(call: object, *texts: str) -> None:
    with pytest.raises((DataError, DataFileError)) as error:
        call()  # type: ignore[operator]
    for text in texts:
        assert text in str(error.value), str(error.value)


def test_a_missing_list_or_folder_is_named(tmp_path: Path) -> None:
    root = make(tmp_path, "OxfordPets")
    (root / "split_zhou_OxfordPets.json").rename(tmp_path / "elsewhere.json")
    for call in (
        lambda: open_paper_set(root, "OxfordPets", "train"),
        lambda: open_dataset(root, "train"),
        lambda: open_dataset(root, "train", dataset="oxford_pets"),
    ):
        told(call, "OxfordPets was not found", "split_zhou_OxfordPets.json", "'images'")
    told(lambda: open_paper_set(tmp_path, "DTD texture", "train"), "no data set of the paper")
    told(lambda: open_paper_set(tmp_path, "UCF101", "train"), "UCF-101-midframes", "elsewhere.json")
    told(lambda: open_paper_set(root, "OxfordPets", "tset"), "no split 'tset'", "'test'")
    (tmp_path / "elsewhere.json").rename(root / "split_zhou_OxfordPets.json")
    (root / "images").rename(root / "Images")
    (root / "images.tar.gz").write_bytes(b"")
    told(lambda: open_paper_set(root, "OxfordPets", "train"), "'Images'", "Unpack 'images.tar.gz' first")


def test_pictures_that_a_list_names_and_nobody_has(tmp_path: Path) -> None:
    root = make(tmp_path, "OxfordPets")
    (root / "images/pug_7.jpg").unlink()
    told(lambda: open_paper_set(root, "OxfordPets", "test"), "8 pictures, of which 1 are not", "pug_7.jpg", "(test)")
    assert len(open_paper_set(root, "OxfordPets", "train")) == 12  # the other splits are whole
    (root / "images/Pug_7.jpg").write_bytes((root / "images/pug_9.jpg").read_bytes())
    told(lambda: open_paper_set(root, "OxfordPets", "test"), "exactly this case")


def test_lists_that_contradict_themselves(tmp_path: Path) -> None:
    root = make(tmp_path, "OxfordPets")
    file = root / "split_zhou_OxfordPets.json"
    good = json.loads(file.read_text())

    def with_row(row: list[object]) -> None:
        file.write_text(json.dumps({**good, "train": [*good["train"], row]}))

    for row, text in (
        (["pug_1.jpg", 0, "pug"], "both 'abyssinian' and 'pug'"),
        (["pug_1.jpg", 7, "pug"], "5 classes but no label '4'"),
        (["../../secret.jpg", 3, "pug"], "does not lie below"),
        (["/etc/passwd", 3, "pug"], "does not lie below"),
        (["pug_1.jpg", 4, ""], "printable"),
        (["pug_1.jpg", 4, "pug\n\x1b[31m"], "printable"),
        (["pug_1.jpg", 4, 12], "printable"),
        (["pug_1.jpg", "x", "pug"], "no split file of CoOp's"),
        (["pug_1.jpg"], "no split file of CoOp's"),
    ):
        with_row(row)
        told(lambda: open_paper_set(root, "OxfordPets", "train"), text)
    for content in (
        "{",
        "[]",
        "[" * 100_000,
        '{"train": []}',
        "\udcff".encode("utf-8", "surrogateescape").decode("latin1"),
    ):
        file.write_text(content, encoding="latin1")
        told(lambda: open_paper_set(root, "OxfordPets", "train"), "split_zhou_OxfordPets.json")


@pytest.mark.parametrize(
    "odd", ["{}", "naïve café", "猫", "a" * 300, "  spaced  ", 'semi;colon, "quoted"', "C/V", "%s"]
)
def test_odd_class_names_are_kept(tmp_path: Path, odd: str) -> None:
    root = make(tmp_path, "OxfordPets")
    file = root / "split_zhou_OxfordPets.json"
    file.write_text(file.read_text().replace('"pug"', json.dumps(odd)), encoding="utf-8")
    assert open_paper_set(root, "OxfordPets", "train").classes[3] == odd.strip()


def test_one_name_for_two_classes_is_told_apart(tmp_path: Path) -> None:
    root = make(tmp_path, "ImageNet")
    classnames(root, {**SYNSETS, "n03126707": "crane"})
    with pytest.warns(ClassNameWarning, match=r"labels 2 and 3 both 'crane'"):
        assert open_paper_set(root, "ImageNet", "val").classes == ["tench", "goldfish", "crane", "crane (3)"]


def test_imagenets_folders_and_names_must_fit(tmp_path: Path) -> None:
    root = make(tmp_path, "ImageNet")
    classnames(root, dict(list(SYNSETS.items())[:3]))
    told(lambda: open_paper_set(root, "ImageNet", "val"), "'n03126707'", "classnames.txt")
    (root / "classnames.txt").write_text("n01440764\n")
    told(lambda: open_paper_set(root, "ImageNet", "val"), "line 1", "n01440764 tench")
    classnames(root)
    shutil.rmtree(root / "images/val/n01440764")
    (root / "images/val/n01440764").mkdir()
    told(lambda: open_paper_set(root, "ImageNet", "val"), "n01440764", "holds no pictures")
    two = make(tmp_path, "ImageNetV2")
    shutil.rmtree(two / "imagenetv2-matched-frequency-format-val/2")
    told(lambda: open_paper_set(two, "ImageNetV2", "test"), "lacks the folders of labels '2'")


def test_masks_that_are_absent(tmp_path: Path) -> None:
    root = make(tmp_path, "Food101")
    gone = sorted((root / "mask/images/waffles").iterdir())[:2]
    for file in gone:
        file.unlink()
    told(
        lambda: open_paper_set(root, "Food101", "train", masks="require"), "2 of 9 pictures have no", "waffles", "mask"
    )
    found = open_paper_set(root, "Food101", "train", masks="optional", transform=PLAIN)
    assert len(found.without_masks()) == 2 and found.has_masks
    without = [i for i in range(len(found)) if found.entries[i][0] in found.without_masks()]
    assert [float(found[i]["foreground_mask"].sum()) for i in without] == [0.0, 0.0]  # no usable mask
    assert float(found[0]["foreground_mask"].sum()) > 0
    bare = make(tmp_path, "EuroSAT", masks=None)
    assert not open_paper_set(bare, "EuroSAT", "train").has_masks
    told(lambda: open_paper_set(bare, "EuroSAT", "train", masks="require"), "9 of 9", "'mask'")
    assert not open_paper_set(root, "Food101", "train", masks="none").has_masks


def test_a_mask_with_another_extension_and_not_another_pictures(tmp_path: Path) -> None:
    root = make(tmp_path, "OxfordPets")
    file = root / "mask/images/pug_7.jpg"
    file.rename(file.with_suffix(".png"))
    assert not open_paper_set(root, "OxfordPets", "test").without_masks()
    shutil.copy(root / "images/pug_9.jpg", root / "images/pug_7.png")  # then that mask is this picture's
    assert open_paper_set(root, "OxfordPets", "test").without_masks() == ["oxford_pets/images/pug_7.jpg"]


def test_names_of_sets() -> None:
    for given, name in (
        ("caltech-101", "Caltech101"),
        ("DTD", "DescribableTextures"),
        ("flowers-102", "OxfordFlowers"),
    ):
        assert paper_set(given) == PAPER_SETS[name]
    assert paper_set("data") is None and paper_set("") is None


# -- from the Hub ------------------------------------------------------------------------------------------------------

ON_THE_HUB = """
import json, sys
from pathlib import Path
from fvg_adapter.data import DataError, HubFiles, PairedTransform, open_dataset, open_paper_set

files = HubFiles("me/foreground")
report = {"revision": files.revision}
cached = lambda: sorted(p.name for p in Path(sys.argv[1]).rglob("*.jpg") if p.is_symlink() or p.is_file())
pets = open_paper_set(files, "OxfordPets", "test", masks="require", transform=PairedTransform(32, train=False))
report["listed"] = [pets.digest, len(pets), cached()]
item = pets[0]
report["item"] = [float(item["foreground_mask"].mean()), cached()]
report["dtd"] = open_dataset(files, "train", dataset="dtd").classes
for repo, call in (("me/none", lambda: HubFiles("me/none")), ("here", lambda: open_paper_set(files, "UCF101", "test"))):
    try:
        call()
    except DataError as error:
        report[repo] = str(error)
print(json.dumps(report))
"""


def test_the_release_on_the_hub_is_fetched_picture_by_picture(tmp_path: Path) -> None:
    data = tmp_path / "release"
    make(data, "OxfordPets", "outer", nested=True)
    make(data, "DescribableTextures", "inner", nested=True)
    with serving() as hub:
        repo = Repo("me/foreground", private=False)
        repo.commit("main", {p.relative_to(data).as_posix(): p.read_bytes() for p in data.rglob("*") if p.is_file()})
        hub.repos["me/foreground"] = repo
        here = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        environment = {**os.environ, **here, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", ON_THE_HUB, str(tmp_path / "hf")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    local = open_paper_set(data, "OxfordPets", "test")
    assert report["listed"] == [local.digest, 8, []]  # nothing but the list has come
    assert 0.1 < report["item"][0] < 0.5 and report["item"][1] == ["pug_9.jpg"] * 2  # a picture and its mask
    assert report["dtd"] == ["banded", "polka-dotted", "zigzagged"]
    assert "me/none" in report["me/none"] and "UCF-101-midframes" in report["here"]
