"""Attacks by name, each with what it would have done: code, other people's files, endless work, all of the memory."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import _SNAPSHOT, EVIL, World, header_of, safetensors_file, zip_of
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from conftest import CLASSES, GOLDEN
from fvg_adapter import FeatureBank, FVGConfig, load, untrusted
from fvg_adapter.checkpoints import read_checkpoint
from fvg_adapter.data import DataError, MaskedImageFolder
from fvg_adapter.errors import FVGError, nearest
from fvg_adapter.tuners import LoRA, Tuner


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copied(world: World, tmp_path: Path) -> Any:
    """A copy of whole files by their folder's name."""
    import shutil

    def copy(name: str) -> Path:
        return Path(shutil.copytree(world.root / name, tmp_path / name))

    return copy


@contextlib.contextmanager
def bounded(megabytes: int = 200, seconds: float = 1.0) -> Iterator[None]:
    """Fails where the block takes more memory (the allocation is refused) or more time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, before[1]))
    start = time.thread_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.thread_time() - start < seconds


def edit(file: Path, **values: Any) -> None:
    """Changes a JSON file; names with double underscores lead inwards."""
    document = json.loads(file.read_text())
    for name, value in values.items():
        *outer, last = name.split("__")
        part = document
        for key in outer:
            part = part[key]
        part[last] = value
    file.write_text(json.dumps(document))


def rehash(folder: Path, name: str) -> None:
    """Whoever edits a file can edit its hash too."""
    record = json.loads((folder / "config.json").read_text())
    record["sha256"][name] = untrusted.sha256_of(folder / name)
    (folder / "config.json").write_text(json.dumps(record))


def refused(world: World, folder: Path, message: str, **limits: Any) -> None:
    with bounded(**limits), pytest.raises(FVGError, match=message):
        load(folder, clip=world.clip, tokenizer=world.tokenizer)
    assert world.count_hooks() == world.hooks
    assert all(not p.is_meta for p in world.clip.parameters())


# -- other people's folders and code -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["path", "tokenizer", "id"])
def test_a_config_from_the_hub_names_no_folder(
    name: str, world: World, copied: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = copied("hub")
    (tmp_path / "secret").mkdir()
    given = {"path": {"id": "local", "path": str(GOLDEN / "model")}, "id": {"id": "secret/", "path": None},
             "tokenizer": {"tokenizer": "/etc"}}[name]  # fmt: skip
    edit(cache / _SNAPSHOT / "config.json", **{f"base_model__{k}": v for k, v in given.items()})
    monkeypatch.chdir(tmp_path)
    clip = None if name != "tokenizer" else world.clip
    told = {"path": "may only name a Hub id", "id": "is no Hub id, or is a folder", "tokenizer": "as its tokenizer"}
    with pytest.raises(FVGError, match=told[name]):
        load("me/fvg", clip, cache_dir=cache, local_files_only=True)


def test_a_folder_that_bears_the_name_of_a_hub_id(copied: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied("coop")
    edit(folder / "config.json", base_model__id="me/clip", base_model__path=None)
    (tmp_path / "me" / "clip").mkdir(parents=True)  # transformers would read it in place of the Hub's
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FVGError, match="or is a folder here"):
        load(folder)


def test_code_of_a_base_model_is_not_run(copied: Any, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", copied("coop")
    base.mkdir()
    (base / "evil.py").write_text(f"import pathlib; pathlib.Path({str(EVIL)!r}).touch()\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (base / "config.json").write_text(json.dumps(config))
    edit(folder / "config.json", base_model__id="local", base_model__path=str(base))
    with pytest.raises(FVGError, match="could not be loaded"):
        load(folder)
    (base / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(FVGError, match="is a 'bert', which is no dual encoder"):
        load(folder)
    assert not EVIL.exists()


@pytest.mark.parametrize("kind", ["evil_of_fvg:Evil", "os:system", "External", ["coop"]])
def test_a_kind_in_a_config_is_looked_up_and_never_imported(
    kind: Any, world: World, copied: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_of_fvg.py").write_text(f"import pathlib; pathlib.Path({str(EVIL)!r}).touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("coop", "fvg"):
        folder = copied(name)
        edit(folder / "config.json", tuner__kind=kind)
        refused(world, folder, "not registered here|text is expected")
    assert not EVIL.exists() and "evil_of_fvg" not in sys.modules


LORA = "lora/adapter_config.json"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "evil_of_fvg"}, "sets 'megatron_co"),
        ({"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_of_fvg"}}, "sets 'auto_mapping'"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "sets 'layer_replication'"),
        ({"init_lora_weights": "pissa"}, "sets 'init_lora_weights'"),
        ({"loftq_config": {"loftq_bits": 4}}, "sets 'loftq_config'"),
        ({"target_parameters": ["logit_scale"]}, "sets 'target_parameters'"),
        ({"peft_type": "PROMPT_TUNING", "tokenizer_name_or_path": "/etc"}, "of the method 'PROMPT_TUNING'"),
        ({"peft_type": "XLORA"}, "of the method 'XLORA'"),
        ({"target_modules": "(?:(?:a|.)*)*!"}, "cannot be used|PEFT refused"),
        ({"target_modules": "(?:.|..|...)*[0-9][0-9]"}, "cannot be used: regex timed out"),
        ({"target_modules": "(?:a{1000}){1000}"}, "counts with"),
        ({"target_modules": "("}, "cannot be used"),
        ({"target_modules": "x" * 2000}, "longer than 1000"),
        ({"target_modules": ["(a+)+$"]}, "the name of a module is expected"),
        ({"rank_pattern": {"(a+)+$": 2}}, "the name of a module is expected"),
        ({"rank_pattern": {"q_proj": "2"}}, "a number up to"),
        ({"r": 10**12}, "a number up to"),
        ({"r": 2_000_000}, "a number up to 8192"),
        ({"r": 8192}, "does not fit"),
        ({"r": -3}, "PEFT refused"),
        ({"modules_to_save": ["visual_projection"]}, "does not fit"),
        ({"exclude_modules": ["q_proj"]}, "does not fit"),
    ],
    ids=str,
)
def test_what_an_adapter_config_may_not_say(
    values: dict[str, Any], message: str, world: World, copied: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_of_fvg.py").write_text(f"import pathlib; pathlib.Path({str(EVIL)!r}).touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = {k: v.clone() for k, v in world.clip.state_dict().items()}
    folder = copied("lora")
    edit(folder / LORA, **values)
    rehash(folder, LORA)
    refused(world, folder, message)
    assert not EVIL.exists() and "evil_of_fvg" not in sys.modules
    after = world.clip.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], v) for k, v in before.items())


def test_other_methods_of_peft_come_back_from_files(world: World, tmp_path: Path) -> None:
    import peft

    pixels = torch.randn(2, 3, 32, 32)
    made: list[Any] = [
        peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], modules_to_save=["visual_projection"], use_dora=True),
        peft.LoraConfig(r=2, target_modules=r".*layers\.[01]\..*(q_proj|k_proj)", rank_pattern={"k_proj": 3}),
        peft.LoraConfig(target_modules=r".*proj", exclude_modules=["k_proj", "visual_projection", "text_projection"]),
        peft.IA3Config(target_modules=r".*(k_proj|fc2)", feedforward_modules=r".*fc2"),
        peft.LoHaConfig(r=2, target_modules=["q_proj"]),
        peft.LoKrConfig(r=2, target_modules=["q_proj"]),
        peft.HRAConfig(r=2, target_modules=["q_proj"]),
        peft.LNTuningConfig(target_modules=r".*layer_norm1"),
    ]
    for number, config in enumerate(made):
        tuner = LoRA(world.clip, world.tokenizer, CLASSES, peft_config=config)
        with torch.no_grad():
            for parameter in tuner.trainable_parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            expected = tuner.eval()(pixels).logits
            tuner.save_pretrained(tmp_path / str(number))
            tuner.detach()
            loaded = load(tmp_path / str(number), clip=world.clip, tokenizer=world.tokenizer)
            assert isinstance(loaded, Tuner)
            assert torch.equal(loaded(pixels).logits, expected), config
        loaded.detach()


# -- headers and configs that lie --------------------------------------------------------------------------------------


def test_headers_that_lie(world: World, copied: Any) -> None:
    folder = copied("coop")
    file = folder / "tuner.safetensors"
    header, data = header_of(file.read_bytes())
    about = header["ctx"]

    def lied(message: str, content: bytes) -> None:
        file.write_bytes(content)
        rehash(folder, file.name)
        refused(world, folder, message)

    def with_ctx(**fields: Any) -> bytes:
        return safetensors_file({**header, "ctx": {**about, **fields}}, data)

    huge = [2**20, 2**20]
    lied("does not fill its place", with_ctx(shape=huge))
    lied("do not end where its", with_ctx(shape=huge, data_offsets=[0, 2**42]))
    lied("of type 'I64'", with_ctx(dtype="I64"))
    lied("of type \\['F32'\\]", with_ctx(dtype=["F32"]))
    lied("has the shape \\[-1, 2\\]", with_ctx(shape=[-1, 2]))
    lied("has the shape 'all'", with_ctx(shape="all"))
    lied("its header has 100000000 bytes", safetensors_file(b" " * 100_000_000, b""))
    lied("announces", safetensors_file(header, data, 2**63))
    lied(
        "'ctx' stands twice",
        safetensors_file(f'{{"ctx": {json.dumps(about)}, "ctx": {json.dumps(about)}}}'.encode(), data),
    )
    lied("gaps, overlap", safetensors_file({"ctx": about, "other": about}, data))
    lied("its metadata is no text", safetensors_file({**header, "__metadata__": {"a": 1}}, data))
    lied("do not fit: missing ctx; unexpected context", safetensors_file({"context": about}, data))
    half = {"dtype": "BF16", "shape": [*about["shape"], 2], "data_offsets": about["data_offsets"]}
    lied(r"ctx is \(6, 2, 24, 2\), expected \(6, 2, 24\)", safetensors_file({"ctx": half}, data))
    lied("must be F64 or F32", safetensors_file({"ctx": {**about, "dtype": "BOOL", "shape": [len(data)]}}, data))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("kind", "file"),
    [("coop", "tuner.safetensors"), ("fvg", "fvg_heads.safetensors"), ("lora", "lora/adapter_model.safetensors")],
)
def test_values_that_are_no_numbers(kind: str, file: str, value: float, world: World, copied: Any) -> None:
    folder = copied(kind)
    tensors = load_file(folder / file)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / file, {"format": "pt"})
    rehash(folder, file)
    refused(world, folder, f"{name}' of .* NaN or infinite")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("coop", {"tuner__arguments__n_ctx": 10**9}, "no more than 1024 learned tokens"),
        ("coop", {"tuner__arguments__n_ctx": "4"}, "n_ctx is '4', expected is a whole number"),
        ("coop", {"tuner__arguments__ctx_init": "a " * 10**6}, "characters"),
        ("coop", {"tuner__arguments__model": 1}, "takes no 'model' from a file"),
        ("zero_shot", {"tuner__arguments__projection": "x"}, "takes no 'projection' from a file"),
        ("lora", {"tuner__arguments__peft_config": {}}, "takes no 'peft_config' from a file"),
        ("mmrl", {"tuner__arguments__rep_dim": 10**8}, "r2|rep_tokens .*expected"),
        ("mmrl", {"tuner__arguments__rep_layers": list(range(10**4))}, "expected is a list of whole numbers"),
        ("promptsrc", {"tuner__arguments__n_ctx_vision": 10**8}, "no more than 1024"),
        ("promptsrc", {"tuner__arguments__teacher_templates": ["a {}."] * 4000}, "at most 1000"),
        ("fvg", {"fvg__bottleneck": 10**9}, "visual_adapter.down.weight is .64, 16., expected .1000000000, 16."),
        ("fvg", {"fvg__gate_hidden": 10**9}, "foreground_gate.hidden.weight is"),
        ("fvg", {"fvg__attention_layers": [-1] * 10**6}, "at least one layer"),
        ("fvg", {"fvg__temperature": 10**400 // 10**95}, "must be a finite number"),
        ("fvg", {"fvg__usable_area": ["a", {}]}, "must hold finite numbers"),
        ("fvg", {"fvg__image_mean": ["a", "b", "c"]}, "must hold finite numbers"),
        ("fvg", {"foreground": {"a": 1}}, "text is expected"),
        ("coop", {"base_classes": [f"c{i}" for i in range(40_000)]}, "more than 32768"),
        ("coop", {"base_classes": ["x" * 10**6]}, "has 1000000 characters"),
        ("coop", {"classes": [1, 2]}, "no text"),
        ("coop", {"base_model__fingerprint": {"vision_width": {}}}, "has model_type|vision_width {}"),
        ("coop", {"base_model__fingerprint": [1]}, "has no fingerprint"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_configs_that_lie(kind: str, values: dict[str, Any], message: str, world: World, copied: Any) -> None:
    folder = copied(kind)
    edit(folder / "config.json", **values)
    refused(world, folder, message)


def test_texts_that_are_no_config(world: World, copied: Any) -> None:
    folder = copied("coop")
    config = folder / "config.json"
    whole = config.read_text()
    inner = whole.strip()[:-1]
    for text, message in (
        ("[" * 10**6, "not valid JSON"),
        (f'{inner}, "a": {"[" * 100 + "]" * 100}}}', "nested more than 32 deep"),
        (f'{inner}, "kind": "fvg"}}', "'kind' stands twice"),
        (f'{inner}, "a": NaN}}', "NaN is no number"),
        (f'{inner}, "a": 1e999}}', "too large"),
        (f'{inner}, "a": "\\ud800"}}', "surrogates not allowed"),
        (f'{inner}, "a": {"9" * 5000}}}', "not valid JSON"),
    ):
        config.write_text(text)
        refused(world, folder, message)
    config.write_bytes(whole.encode("utf-16"))
    refused(world, folder, "not valid JSON")
    with config.open("wb") as file:
        file.truncate(100 * 2**20)
    refused(world, folder, "more than 8388608 bytes")


@pytest.mark.skipif(os.name != "posix", reason="devices and pipes")
def test_files_that_never_end(world: World, copied: Any) -> None:
    for name in ("config.json", "tuner.safetensors"):
        folder = copied("coop")
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        refused(world, folder, f"has no {name}")
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(world, folder, f"has no {name}")
        import shutil

        shutil.rmtree(folder)


def test_links_are_followed_as_in_the_hubs_cache(world: World, copied: Any) -> None:
    folder = copied("coop")
    for file in list(folder.iterdir()):
        file.rename(folder.parent / f"blob-{file.name}")
        file.symlink_to(folder.parent / f"blob-{file.name}")
    tuner: Any = load(folder, clip=world.clip, tokenizer=world.tokenizer)
    tuner.detach()


# -- checkpoints -------------------------------------------------------------------------------------------------------


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {EVIL}",)


def test_checkpoints_that_would_run_hang_or_swell(tmp_path: Path) -> None:
    file = tmp_path / "model.pth.tar-1"

    def read(message: str) -> None:
        with bounded(), pytest.raises(FVGError, match=message):
            read_checkpoint(file)
        assert not EVIL.exists()

    file.write_bytes(pickle.dumps(_Code()))
    read("begins neither as a zip file nor as an older one of torch")
    torch.save(_Code(), file)
    read("it refers to .*system")
    torch.save(_Code(), file, _use_new_zipfile_serialization=False)
    read("it refers to .*system")

    torch.save({"ctx": torch.zeros(4, 1).expand(4, 10**11)}, file)
    read("claims the shape .4, 100000000000., more than the file holds")
    torch.save({"ctx": torch.full((4, 24), float("nan"))}, file)
    read("'ctx' of .* NaN or infinite")
    torch.save({"ctx": torch.zeros(4, 24).to_sparse()}, file)
    read("is no plain tensor")

    bomb = (
        b"\x80\x02}"
        + b")"
        + b"q\x00"
        + b"".join(b"h" + bytes([i]) * 1 + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    )
    file.write_bytes(zip_of(bomb + b"K\x01s.", {}))  # a key of 2^60 values in 400 bytes
    read("nested deeper, than that of tensors")
    file.write_bytes(zip_of(b"\x80\x02" + b"N0" * 200_000 + b"N.", {}))
    read("larger, or nested deeper")

    torch.save({"ctx": torch.zeros(4, 24)}, tmp_path / "whole")
    with zipfile.ZipFile(tmp_path / "whole") as archive, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for name in archive.namelist():
            made.writestr(name, b"\0" * 10**8 if "/data/" in name else archive.read(name))
    read("claim more than its .* bytes hold")
    with zipfile.ZipFile(tmp_path / "whole") as archive, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for name in archive.namelist():
            made.writestr(name, os.urandom(200) if "/data/" in name else archive.read(name))
    read("compressed or encrypted")
    tensors, _ = read_checkpoint(tmp_path / "whole")
    assert tensors["ctx"].shape == (4, 24)


# -- banks and lists ---------------------------------------------------------------------------------------------------


def test_banks_that_lie(copied: Any) -> None:
    folder = copied("bank")
    index = json.loads((folder / "index.json").read_text())

    def lied(message: str, **values: Any) -> None:
        (folder / "index.json").write_text(json.dumps({**index, **values}))
        with bounded(), pytest.raises(FVGError, match=message):
            FeatureBank.load(folder)

    lied("has 2 shards, but its index says 100000", labels=[0] * 100_000, rows=1)
    lied("has rows of the wrong type, or out of range", rows=2**40)
    lied("has labels", labels=[0, 1, 2, 3, 99])
    lied("has labels", labels=[0, 1, 2, 3, True])
    lied("has views", views=0)
    lied("has settings", settings=[])
    lied("has dtype", dtype="load")
    (folder / "index.json").write_text(json.dumps(index))
    shard = folder / "00001.safetensors"
    whole = load_file(shard)
    for tensors, message in (
        ({**whole, "evil": whole["image"].clone()}, "holds 'evil'"),
        ({**whole, "usable": torch.zeros(2, 2)}, "holds 'usable' of type F32"),
        ({**whole, "image": torch.zeros(2, 2)}, "3 dimensions are expected"),
        ({**whole, "image": torch.zeros(2, 2, 7)}, "other features than the shards before it"),
        ({"image": whole["image"]}, "other features than the shards before it"),
    ):
        save_file(tensors, shard)
        with pytest.raises(FVGError, match=message):
            FeatureBank.load(folder)
    save_file({**whole, "image": whole["image"] * float("nan")}, shard)
    bank = FeatureBank.load(folder)
    _ = bank[0]
    for ask in (lambda: bank[4], lambda: bank.batch([4], [0]), lambda: bank.batches()):
        with pytest.raises(FVGError, match="'image' of a feature bank holds values that are NaN"):
            ask()


def test_lists_of_class_names_without_end(copied: Any) -> None:
    folder = copied("pictures")
    (folder / "classes.txt").write_text("cat\n" * 200_000)
    with bounded(), pytest.raises(DataError, match="come more than once"):
        MaskedImageFolder(folder, "train", masks="none")
    with (folder / "classes.txt").open("wb") as file:
        file.truncate(10**9)
    with bounded(), pytest.raises(DataError, match="more than 8388608 bytes"):
        MaskedImageFolder(folder, "train", masks="none")


def test_messages_stay_short() -> None:
    with bounded(), pytest.raises(FVGError) as told:
        FVGConfig(trust="x" * 10**7)  # type: ignore[arg-type]
    assert len(str(told.value)) < 2100 and str(told.value).endswith("Valid: 'gate', 'one', 'half'.")
    with bounded():
        assert "Did you mean" not in nearest("y" * 10**7, ["gate"])


def test_a_model_that_cannot_be_read_is_the_callers_mistake(copied: Any) -> None:
    with pytest.raises(TypeError, match="no supported|supported families"):
        load(copied("coop"), clip=torch.nn.Linear(2, 2), tokenizer=lambda texts: texts)


def test_a_base_model_of_wrong_weights_is_refused(world: World, copied: Any) -> None:
    from conftest import small_config

    with pytest.raises(FVGError, match="hash"):
        load(copied("coop"), clip=CLIPModel(small_config()), tokenizer=world.tokenizer)
