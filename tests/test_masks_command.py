"""`fvg-adapter masks`: what it writes, what survives a kill, what two processes make, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_segmenters import tiny
from transformers import CLIPModel, CLIPTokenizer
from typer.testing import CliRunner

import fvg_adapter
from conftest import GOLDEN, small_config
from fvg_adapter.cli import app
from fvg_adapter.data import MaskedImageFolder, PairedTransform
from fvg_adapter.errors import FVGError
from fvg_adapter.foreground import attention_mask_from_map
from fvg_adapter.launched import Processes
from fvg_adapter.mask_files import PLAN, write_masks
from fvg_adapter.mask_makers import source_masks
from fvg_adapter.segmenters import Segmenter

HERE = ("--device", "cpu", "--threads", "1")
SOURCE = """
import time
import torch

def bright(pixels):
    return pixels.mean(1) > 0

def slow(pixels):
    time.sleep(0.25)
    return pixels.mean(1) > 0

def by_name(pixels, classes):
    return torch.stack([torch.full(p.shape[1:], name == "cat") for p, name in zip(pixels, classes)])

def stripes(pixels):
    wide = torch.arange(pixels.shape[-1]).expand(len(pixels), pixels.shape[-2], -1)
    return (wide // 4) % 2 == 0
"""


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def command(*arguments: Any) -> tuple[list[str], dict[str, str]]:
    package = str(Path(fvg_adapter.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return ["-m", "fvg_adapter.cli", "masks", *map(str, arguments)], environment


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("base") / "clip"
    torch.manual_seed(0)
    model = CLIPModel(small_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    CLIPTokenizer.from_pretrained(GOLDEN / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DATA/train and DATA/test with cats and dogs of several sizes; the folder with `sources.py` is the working one."""
    (tmp_path / "mask_sources.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mask_sources", None)
    for split, count in (("train", 5), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                draw(tmp_path / "pets" / split / name / f"{i}.png", (30 + 7 * i, 40 - 3 * i), seed=i)
    return tmp_path / "pets"


def draw(path: Path, size: tuple[int, int], seed: int = 0, **options: Any) -> None:
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 80, (size[1], size[0], 3), dtype=np.uint8)
    array[size[1] // 4 : size[1] // 2, size[0] // 4 : size[0] // 2] = 230
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- what it writes ----------------------------------------------------------------------------------------------------


def test_masks_of_attention_are_what_the_map_says_and_the_data_set_finds_them(root: Path, base: Path) -> None:
    result = run("masks", root, "--source", "attention", "--model", base, "--layers", "-2,-1", "--json", *HERE)
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["pictures"], summary["written"], summary["kept"], summary["unreadable"]) == (14, 14, 0, [])
    assert summary["usable"] + summary["empty"] + summary["tiny"] + summary["full"] == 14
    clip = CLIPModel.from_pretrained(base, attn_implementation="eager").eval()
    areas = []
    for split in ("train", "test"):
        data = MaskedImageFolder(root, split)  # masks="require": all of them are there
        for i in range(len(data)):
            raw = data.raw(i)
            picture = raw["image"]
            pixels = PairedTransform(32, train=False, resize=(32, 32))(picture)["pixel_values"][None]
            with torch.no_grad():
                seen = clip.vision_model(pixels, output_attentions=True).attentions
            rows = torch.stack([a[:, :, 0, 1:] for a in seen]).mean((0, 2)).view(1, 4, 4)
            expected = attention_mask_from_map(rows, (picture.height, picture.width))[0, 0] > 0
            got = torch.from_numpy(np.asarray(raw["mask"]) > 0)
            assert (got == expected).float().mean() > 0.99
            areas.append(float(got.float().mean()))
    assert summary["mean_area"] == pytest.approx(np.mean(areas))
    assert summary["usable"] == sum(0.02 <= a <= 0.98 for a in areas)
    with Image.open(summary["sheet"]) as page:
        assert page.size[0] > 1000 and len(page.convert("RGB").getcolors(2**20)) > 100
    assert not (root / "mask").joinpath("contact_sheet.png").exists()


@pytest.mark.parametrize("format", ["png", "jpg"])
def test_what_was_made_is_what_is_read(root: Path, tmp_path: Path, format: str) -> None:
    """PNG bit for bit; JPEG, the authors' way, but for its noise. EXIF turns picture and mask together."""
    place = root / "train" / "cat"
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        draw(place / f"turned{orientation}.jpg", (33, 21), seed=orientation, exif=exif, quality=95)
    draw(place / "square6.jpg", (24, 24), seed=20, exif=exif)
    draw(place / "same.jpg", (20, 30), seed=30)
    draw(place / "same.png", (30, 20), seed=31)
    Image.new("L", (1, 1), 255).save(place / "dot.png")
    Image.new("CMYK", (9, 8), (0, 200, 200, 0)).save(place / "print.jpg")
    data = MaskedImageFolder(root, masks="none")
    made: dict[bytes, torch.Tensor] = {}

    def make(pictures: Any, classes: Any) -> list[torch.Tensor]:
        found = [torch.from_numpy(np.asarray(p.convert("L")) > 100) for p in pictures]
        made.update({p.tobytes(): m for p, m in zip(pictures, found, strict=True)})
        return found

    out = tmp_path / "made"
    summary = write_masks([data], out, make, {"source": "test"}, format=format)
    assert summary.written == len(data) == 23
    back = MaskedImageFolder(root, mask_root=out)
    for i in range(len(back)):
        raw = back.raw(i)
        expected = made[raw["image"].tobytes()].numpy()
        got = np.asarray(raw["mask"]) > 0
        assert got.shape == expected.shape
        assert (got == expected).all() if format == "png" else (got == expected).mean() > 0.98, raw["path"]
    names = {p.name for p in (out / "train" / "cat").iterdir()}
    assert {"same.jpg.png", "same.png.png", "dot.png" if format == "png" else "dot.jpg"} <= names
    assert ("turned6.jpg" in names) == (format == "jpg")
    with Image.open(next((out / "train" / "cat").glob("turned6.*"))) as stored:
        assert stored.getexif()[0x0112] == 6 and stored.size == (33, 21)
        assert stored.mode == ("L" if format == "png" else "RGB")


def test_a_source_of_ones_own_is_asked_with_names(root: Path) -> None:
    result = run("masks", root, "--source", "mask_sources:by_name", "--split", "train", "--json", *HERE)
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["full"], summary["empty"], summary["mean_area"]) == (5, 5, 0.5)
    data = MaskedImageFolder(root)
    assert {data.raw(i)["mask"].getextrema()[0] for i in range(5)} == {255}
    assert {data.raw(i)["mask"].getextrema()[1] for i in range(5, 10)} == {0}


def test_a_segmenter_from_a_folder(root: Path, tmp_path: Path, tokenizer: Any) -> None:
    where = tmp_path / "clipseg"
    tiny("clipseg").save_pretrained(where)
    tokenizer.save_pretrained(where)
    (where / "preprocessor_config.json").write_text(json.dumps({"size": 64}))
    options = ("--prompt", "a photo of a {}", "--threshold", "0.45", "--largest", "--split", "train", "--batch", "4")
    result = run("masks", root, "--source", where, *options, *HERE)
    assert result.exit_code == 0, result.stderr
    assert (
        result.stdout.startswith(f"10 masks in {root}/mask: 10 written, 0 were there") and "images/s" in result.stdout
    )
    assert "images/s" not in result.stderr  # no bar where nobody looks
    plan = json.loads((root / "mask" / PLAN).read_text())
    assert plan["source"] == str(where) and "a photo of a {}" in plan["identity"] and "largest=True" in plan["identity"]
    segmenter = Segmenter.from_pretrained(
        str(where), prompt="a photo of a {}", threshold=0.45, largest=True, batch_size=4
    )
    data = MaskedImageFolder(root)
    raws = [data.raw(i) for i in range(4)]
    expected = segmenter.masks([raw["image"] for raw in raws], ["cat"] * 4)
    for raw, mask in zip(raws, expected, strict=True):
        assert np.array_equal(np.asarray(raw["mask"]) > 0, mask.numpy())


def test_class_folders_in_the_root(root: Path) -> None:
    for _ in range(2):
        result = run("masks", root / "train", "--source", "mask_sources:bright", "--json", *HERE)
        assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["kept"] == 10
    assert len(MaskedImageFolder(root / "train", None)) == 10  # the tree and its sheet are no class


def test_cleaning_of_any_source(root: Path, base: Path) -> None:
    options = ("--source", "mask_sources:stripes", "--split", "test", "--size", "32", "--json", *HERE)
    plain = json.loads(run("masks", root, *options, "--output", "plain").stdout)
    largest = json.loads(run("masks", root, *options, "--output", "largest", "--largest").stdout)
    assert plain["mean_area"] == pytest.approx(0.5, abs=0.05) and largest["mean_area"] < 0.2


def test_unreadable_pictures_are_named_and_cost_no_others(root: Path) -> None:
    (root / "train" / "cat" / "9.png").touch()
    (root / "train" / "dog" / "9.png").write_bytes(b"nothing")
    result = run("masks", root, "--source", "mask_sources:bright", "--json", *HERE)
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary["unreadable"] == ["train/cat/9.png", "train/dog/9.png"] and summary["written"] == 14
    assert "2 pictures cannot be read" in result.stderr


def test_masks_that_look_inverted_are_named(root: Path) -> None:
    Path("turned.py").write_text(
        "def source(p):\n    m = p[:, 0] > -99\n    m[:, 50:180, 50:180] = False\n    return m\n"
    )
    result = run("masks", root, "--source", "turned:source", *HERE)
    assert result.exit_code == 0
    assert "14 of all 14 foreground masks cover the border" in result.stderr


def test_training_takes_a_source_by_name(root: Path, base: Path) -> None:
    """Without mask files; the same as training on masks that the command wrote from that source would see."""
    options = ("--model", base, "--shots", "2", "--seeds", "1", "--views", "2", "--tune-epochs", "1", "--epochs", "1")
    result = run("train", root, *options, "--no-controls", "--json", *HERE, "--foreground", "mask_sources:by_name")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["settings"]["foreground"] == "by_name"
    wrong = run("train", root, *options, "--foreground", "mask_sources:nothing")
    assert wrong.exit_code == 2 and "could not be imported" in wrong.stderr


# -- kills, processes --------------------------------------------------------------------------------------------------


def test_after_a_sigkill_it_goes_on_and_ends_as_an_unbroken_run(root: Path, tmp_path: Path) -> None:
    arguments = (root, "--source", "mask_sources:slow", "--batch", "2", "--size", "32", *HERE)
    tail, environment = command(*arguments, "--output", tmp_path / "killed")
    started = subprocess.Popen(
        [sys.executable, *tail], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").rglob("*.png"))) < 3:
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    there = files(tmp_path / "killed")
    finished = {name for name in there if name.endswith(".png") and "/." not in name}
    assert 3 <= len(finished) < 14
    for name in finished:
        with Image.open(tmp_path / "killed" / name) as mask:
            mask.load()  # whole
    times = {name: (tmp_path / "killed" / name).stat().st_mtime_ns for name in finished}
    missing = min(finished)
    (tmp_path / "killed" / missing).unlink()  # a gap in a block that was done
    torn = (tmp_path / "killed" / missing).with_name(f".{Path(missing).name}.part")
    torn.write_bytes(b"torn")
    result = run("masks", *arguments, "--output", tmp_path / "killed", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["kept"], summary["written"]) == (len(finished) - 1, 14 - len(finished) + 1)
    for name in finished - {missing}:
        assert (tmp_path / "killed" / name).stat().st_mtime_ns == times[name]
    assert run("masks", *arguments, "--output", tmp_path / "whole").exit_code == 0
    assert not torn.exists()
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_kill_before_the_first_mask_is_gone_on_from(root: Path, tmp_path: Path) -> None:
    """What such a run leaves: a folder of its own that no process holds any more."""
    arguments = (root, "--source", "mask_sources:bright", "--output", tmp_path / "out", *HERE)
    for _ in ("before its plan is there", "right behind"):
        (tmp_path / "out/.fvg-new-left").mkdir(parents=True)
        assert run("masks", *arguments).exit_code == 0
        assert not (tmp_path / "out/.fvg-new-left").exists()
    (tmp_path / "out/masks.json").write_text("[" * 100_000)
    assert "masks.json cannot be read" in mistaken(*arguments)


def test_two_processes_write_the_files_of_one(root: Path, tmp_path: Path, base: Path) -> None:
    arguments = (root, "--source", "attention", "--model", base, "--batch", "3", *HERE)
    tail, environment = command(*arguments, "--output", tmp_path / "two", "--json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(
        [sys.executable, *launcher, *tail], env=environment, capture_output=True, text=True, timeout=500, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-4000:]
    two = json.loads(done.stdout)  # one document: the second process says nothing
    one = run("masks", *arguments, "--output", tmp_path / "one", "--json")
    assert files(tmp_path / "two") == files(tmp_path / "one")
    own = ("seconds", "images_per_second", "output", "sheet")
    assert {k: v for k, v in two.items() if k not in own} == {
        k: v for k, v in json.loads(one.stdout).items() if k not in own
    }
    assert Path(two["sheet"]).read_bytes() == Path(f"{tmp_path}/one_contact_sheet.png").read_bytes()


def test_each_process_does_its_blocks_and_no_others(root: Path, tmp_path: Path) -> None:
    data = [MaskedImageFolder(root, masks="none")]
    asked: list[int] = []

    def make(pictures: Any, classes: Any) -> list[torch.Tensor]:
        asked.append(len(pictures))
        return [torch.ones(p.height, p.width, dtype=torch.bool) for p in pictures]

    def nothing() -> None:
        pass

    for rank in (0, 1):
        alone = Processes(rank, 2, nothing, list, nothing)
        done = write_masks(data, tmp_path / "out", make, {}, batch_size=4, processes=alone)
        assert done.written == (6 if rank == 0 else 4)
    assert asked == [4, 2, 4]


def test_a_block_is_made_again_as_a_whole(root: Path, tmp_path: Path) -> None:
    """Pictures that go through a model together may round differently from the same pictures alone."""
    data = [MaskedImageFolder(root, masks="none")]

    def make(pictures: Any, classes: Any) -> list[torch.Tensor]:
        return [torch.full((p.height, p.width), len(pictures) > 2) for p in pictures]

    write_masks(data, tmp_path / "out", make, {}, batch_size=5)
    whole = files(tmp_path / "out")
    (tmp_path / "out" / "train" / "cat" / "3.png").unlink()
    (tmp_path / "out" / "train" / "cat" / "4.png").write_bytes(b"")  # what a full disk may leave
    again = write_masks(data, tmp_path / "out", make, {}, batch_size=5)
    assert (again.written, again.kept) == (2, 8)
    assert files(tmp_path / "out") == whole


def test_an_interrupted_write_leaves_no_mask(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [MaskedImageFolder(root, masks="none")]
    save = Image.Image.save

    def interrupted(self: Image.Image, target: Any, *rest: Any, **options: Any) -> None:
        save(self, target, *rest, **options)
        Path(target).write_bytes(Path(target).read_bytes()[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_masks(data, tmp_path / "out", source_masks(lambda pixels: pixels[:, 0] > 0, 8), {})
    assert not list((tmp_path / "out").rglob("[!.]*.png"))


# -- mistakes ----------------------------------------------------------------------------------------------------------


def mistaken(*arguments: Any) -> str:
    result = run("masks", *arguments, *HERE)
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr, result.stderr
    return " ".join(result.stderr.split())


def test_masks_of_somebody_else_stay(root: Path) -> None:
    theirs = root / "mask" / "train" / "cat" / "0.png"
    theirs.parent.mkdir(parents=True)
    Image.new("L", (30, 40), 255).save(theirs)
    before = files(root)
    assert "somebody else's" in mistaken(root, "--source", "mask_sources:bright")
    assert files(root) == before


def test_another_source_does_not_mix_with_the_first(root: Path) -> None:
    assert run("masks", root, "--source", "mask_sources:bright", *HERE).exit_code == 0
    before = files(root / "mask")
    said = mistaken(root, "--source", "mask_sources:stripes")
    assert "'mask_sources:bright' (now: 'mask_sources:stripes')" in said
    assert "size 224 (now: 32)" in mistaken(root, "--source", "mask_sources:bright", "--size", "32")
    assert files(root / "mask") == before
    (root / "mask" / PLAN).write_text("{")
    assert "cannot be read" in mistaken(root, "--source", "mask_sources:bright")


def test_no_mask_is_written_through_a_link_that_leaves(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    assert run("masks", root, "--source", "mask_sources:bright", "--split", "test", *HERE).exit_code == 0
    (root / "mask" / "train").symlink_to(tmp_path / "elsewhere")
    assert "link that leaves" in mistaken(root, "--source", "mask_sources:bright")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--source", "attention"), "needs --model"),
        (("--source", "whole"), "makes no masks"),
        (("--source", "atention"), "Did you mean 'attention'"),
        (("--source", "attenton", "--model", "x"), "Did you mean 'attention'"),
        (("--source", "BASE"), "gives no masks"),
        (("--source", "mask_sources:bright", "--model", "x"), "leave it out"),
        (("--source", "mask_sources:bright", "--format", "gif"), "format 'gif' is unknown"),
        (("--source", "mask_sources:bright", "--split", "trian"), "Did you mean 'train'"),
        (("--source", "mask_sources:bright", "--split", ","), "names no split"),
        (("--source", "mask_sources:none"), "could not be imported"),
        (("--source", "attention", "--model", "BASE", "--layers", "last"), "no list of whole numbers"),
        (("--source", "attention", "--model", "nowhere/at/all"), "could not be loaded"),
    ],
)
def test_mistakes(root: Path, base: Path, options: tuple[str, ...], words: str) -> None:
    given = [str(base) if option == "BASE" else option for option in options]
    assert words in mistaken(root, *given)
    assert not (root / "mask").exists()


def test_a_refused_layer_does_not_stand_in_the_way_of_the_next_run(root: Path, base: Path) -> None:
    assert "layer 99 does not exist" in mistaken(root, "--source", "attention", "--model", base, "--layers", "99")
    assert not (root / "mask").exists()
    assert run("masks", root, "--source", "attention", "--model", base, *HERE).exit_code == 0


def test_a_folder_that_is_none(root: Path, tmp_path: Path) -> None:
    assert "does not exist" in mistaken(tmp_path / "nowhere", "--source", "mask_sources:bright")
    with pytest.raises(FVGError, match="at least one split"):
        write_masks([], tmp_path / "out", source_masks(lambda pixels: pixels[:, 0], 8), {})
