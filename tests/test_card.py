"""The model card: what stands in it, that the Hub's own tools read it, and that a person's card is kept."""

from __future__ import annotations

import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import card_problems
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image
from transformers import CLIPModel

from conftest import CLASSES, GOLDEN, NEW_CLASSES
from fvg_adapter import FVGModel, load, wrap
from fvg_adapter.card import is_edited, make_card
from fvg_adapter.card.figures import shown
from fvg_adapter.errors import FVGError
from fvg_adapter.hub import push_folder, update_card
from fvg_adapter.protocols import Results
from fvg_adapter.publishing import _operations, config_to_push
from fvg_adapter.replacing import WHOLE
from fvg_adapter.tuners import TUNERS, CoOp, External, ZeroShot

ROWS = {
    "clip": {"base": [70.0, 70.0, 70.0], "new": [60.0, 60.0, 60.0], "hm": [64.6, 64.6, 64.6]},
    "coop": {"base": [80.0, 82.0, 84.0], "new": [60.0, 61.0, 62.0], "hm": [68.6, 69.9, 71.3]},
    "coop+fvg": {
        "base": [81.0, 84.0, 84.0],
        "new": [62.0, 62.0, 62.0],
        "hm": [70.2, 71.3, 71.3],
        "joint_base": [55.0, 56.0, 57.0],
        "joint_new": [45.0, 46.0, 47.0],
        "joint_hm": [49.5, 50.5, 51.5],
        "d_fg": [0.2, 0.3, 0.4],
        "ece": [5.0, float("nan"), 6.0],
    },
    "coop+fvg [x_fg=x]": {"base": [81.5, 84.5, 85.0], "new": [62.0, 62.0, 62.0], "hm": [70.4, 71.5, 71.7]},
    "coop+fvg [lambda_d=0]": {"base": [80.0, 83.0, 83.5], "new": [62.0, 62.0, 62.0], "hm": [69.9, 71.0, 71.2]},
    "coop+fvg [shuffled masks]": {"base": [80.0, 83.0, 83.0], "new": [62.0, 62.0, 62.0], "hm": [69.9, 71.0, 71.0]},
}
SETTINGS = {
    "data": "/home/somebody/secret/pets",
    "from_hub": False,
    "shots": 16,
    "seeds": [1, 2, 3],
    "test_split": "test",
    "foreground": "given",
    "views": 4,
    "tune": {"optimizer": "sgd", "lr": 0.0035, "crop_scale": (0.5, 1.0), "source": "somewhere"},
    "heads": {"optimizer": "sgd", "lr": 0.0035},
    "config": {},
}
RESULTS = Results(rows=ROWS, settings=SETTINGS, adapter="/home/somebody/adapter", picture="/home/somebody/p.png")


@pytest.fixture
def model(small_clip: CLIPModel, tokenizer: Any) -> FVGModel:
    torch.manual_seed(0)
    return wrap(CoOp(small_clip, tokenizer, CLASSES, ctx_init=""), foreground="given").eval()


def named(model: FVGModel, name: str) -> FVGModel:
    """The model as if its CLIP had come from the Hub."""
    model.tuner.clip.name_or_path = name
    model.tuner.clip.config._commit_hash = "a" * 40
    return model


def card_in(folder: Path) -> ModelCard:
    """The card, once huggingface_hub and the Hub's checks have taken it."""
    text = (folder / "README.md").read_text("utf-8")
    assert card_problems(text) == []
    return ModelCard.load(folder / "README.md")


def rows_of(card: ModelCard, heading: str) -> dict[str, list[str]]:
    """The rows of the table whose first column has this heading."""
    table = card.text.partition(f"| {heading} |")[2].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]
    return {line[0]: line[1:] for line in lines}


def snippet_of(card: ModelCard) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return str(found)


# -- what stands in it -------------------------------------------------------------------------------------------------


def test_the_header_is_what_the_hub_reads(model: FVGModel, tmp_path: Path) -> None:
    named(model, "openai/clip-vit-base-patch16").save_pretrained(
        tmp_path / "a", results=RESULTS, license="mit", dataset="me/pets"
    )
    data = card_in(tmp_path / "a").data
    assert (data.base_model, data.base_model_relation) == ("openai/clip-vit-base-patch16", "adapter")
    assert (data.library_name, data.pipeline_tag) == ("fvg-adapter", "zero-shot-image-classification")
    assert (data.license, data.datasets, data.metrics) == ("mit", ["me/pets"], ["accuracy"])
    assert {"fvg-pt", "coop", "clip", "arxiv:2603.08708"} <= set(data.tags)
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values["base accuracy, percent"] == 83.0 and values["joint HM accuracy, percent"] == 50.5
    assert len(values) == 6
    first = data.eval_results[0]
    assert first.metric_args == {"seeds": [1, 2, 3], "standard_deviation": 1.73}
    assert (first.dataset_type, first.dataset_name, first.dataset_split) == ("me/pets", "me/pets", "test")
    index = eval_results_to_model_index(data.model_name, data.eval_results)
    assert model_index_to_eval_results(index) == (data.model_name, data.eval_results)


def test_figures_with_seeds_spread_and_controls(model: FVGModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a", results=RESULTS)
    card = card_in(tmp_path / "a")
    rows = rows_of(card, "model")
    assert rows["**coop+fvg**"] == ["83.0 ± 1.7", "62.0 ± 0.0", "70.9 ± 0.6", "56.0 ± 1.0", "46.0 ± 1.0", "50.5 ± 1.0"]
    assert rows["clip"] == ["70.0 ± 0.0", "60.0 ± 0.0", "64.6 ± 0.0", "–", "–", "–"]
    worth = rows_of(card, "difference, points")
    assert worth["this adapter − CoOp alone"][0] == "+1.0 ± 1.0"  # paired: +1, +2, +0
    assert worth["this adapter − the whole picture as foreground (x_fg = x)"][0] == "-0.7 ± 0.3"  # whatever the sign
    assert set(worth) == {
        "this adapter − CoOp alone",
        "this adapter − the whole picture as foreground (x_fg = x)",
        "this adapter − no distillation (λ_d = 0)",
        "this adapter − masks of other pictures",
    }
    assert "**Here: HM -0.3 ± 0.1 points.**" in card.text
    assert "seeds 1, 2, 3" in card.text and "The files here are of seed 1." in card.text
    assert "D_fg, nats 0.300 ± 0.100" in card.text and "ECE" not in card.text  # one seed has no ECE
    assert "| stage one: lr | `0.0035` |" in card.text and "| FVG-PT: lambda_distill | `10.0` |" in card.text
    assert f"torch {torch.__version__}" in card.text
    assert "arXiv:2603.08708" in card.text and "Learning to Prompt for Vision-Language Models" in card.text


def test_row_names_are_harmless(model: FVGModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a", results={"<img src=x>|y": ROWS["clip"], "coop+fvg": ROWS["coop+fvg"]})
    text = card_in(tmp_path / "a").text
    assert "<img" not in text and "&lt;img src=x&gt;\\|y" in text


def test_what_evaluate_returns_is_one_row(model: FVGModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a", results={"base": 80.0, "new": 60.0, "hm": 68.57, "d_fg": float("nan")})
    card = card_in(tmp_path / "a")
    assert rows_of(card, "model") == {"**this adapter**": ["80.0", "60.0", "68.6", "–", "–", "–"]}
    assert "No controls came with these figures" in card.text and "Here:" not in card.text
    assert card.data.eval_results[0].dataset_name == "unnamed data"


def test_without_figures_the_card_says_so(model: FVGModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a")
    card = card_in(tmp_path / "a")
    assert "No figures came with this adapter." in card.text and "Not chosen yet" in card.text
    assert card.data.license == "unknown"
    assert "base_model" not in card.data.to_dict() and "model-index" not in card.data.to_dict()


@pytest.mark.parametrize("kind", ["zero_shot", "coop", "kgcoop"])
def test_a_tuner_alone(kind: str, small_clip: CLIPModel, tokenizer: Any, tmp_path: Path) -> None:
    TUNERS[kind](small_clip, tokenizer, CLASSES).save_pretrained(tmp_path / "a", dataset="pets")
    card = card_in(tmp_path / "a")
    assert "fvg-pt" not in card.data.tags and kind in card.data.tags
    assert "2603.08708" not in card.text and "@" in card.text.partition("## Citation")[2]


def test_an_external_tuner_has_a_card_too(tmp_path: Path) -> None:
    text = torch.randn(2, 8)
    images, names = (lambda pixels: pixels), (lambda classes: text)
    prior = {"prior_image_features": images, "prior_text_features": names}
    tuner = External(images, names, classes=["a", "b"], feature_dim=8, logit_scale=100.0, **prior)
    wrap(tuner, foreground="given").save_pretrained(tmp_path / "a")
    assert "functions that no file holds" in card_in(tmp_path / "a").text


def test_many_classes_are_folded_and_odd_names_harmless(small_clip: CLIPModel, tokenizer: Any, tmp_path: Path) -> None:
    names = ["<script>x</script>", "a|b", 'the "best" one', "*", *(f"class {i}" for i in range(40))]
    ZeroShot(small_clip, tokenizer, names).save_pretrained(tmp_path / "few")
    card = card_in(tmp_path / "few")
    assert "<details><summary>The 44 classes</summary>" in card.text
    listed = card.text.partition("## Classes")[2].partition("## Data")[0]
    assert "<script>" not in listed and "a\\|b" in listed and "class 39" in listed
    compile(snippet_of(card), "card", "exec")
    wrap(small_clip, tokenizer, names[:4]).save_pretrained(tmp_path / "odd")
    compile(snippet_of(card_in(tmp_path / "odd")), "card", "exec")


def test_no_path_and_nobody_s_name(model: FVGModel, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS.to_json()))
    named(model, str(tmp_path / "clip")).save_pretrained(tmp_path / "a", results=tmp_path / "results.json")
    card = (tmp_path / "a/README.md").read_text("utf-8")
    about = json.dumps(json.loads((tmp_path / "a/config.json").read_text("utf-8"))["about"])
    for text in (card, about):
        for private in (str(tmp_path), "/home", "somebody", "secret", str(Path.home())):
            assert private == "/" or private not in text
    assert "`pets`" in card


def test_the_snippet_runs_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from transformers import AutoTokenizer

    clip = CLIPModel.from_pretrained(GOLDEN / "model")
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    for part in (clip, tokenizer):
        part.save_pretrained(tmp_path / "clip")
    tuner = CoOp(CLIPModel.from_pretrained(tmp_path / "clip"), tokenizer, CLASSES)
    tuner.save_pretrained(tmp_path / "prompts")
    wrap(tuner).save_pretrained(tmp_path / "fvg")
    for folder in ("prompts", "fvg"):
        monkeypatch.chdir(tmp_path / folder)
        exec(compile(snippet_of(card_in(tmp_path / folder)), folder, "exec"), {})
        said = capsys.readouterr().out
        assert any(name in said for name in CLASSES), said
    assert "something else" in said


# -- the picture -------------------------------------------------------------------------------------------------------


def test_the_picture_goes_with_the_weights(
    model: FVGModel, small_clip: CLIPModel, tokenizer: Any, tmp_path: Path
) -> None:
    camera = Image.Exif()
    camera[0x010F] = "somebody's camera"
    Image.new("RGB", (8, 6), "red").save(tmp_path / "drawn.jpg", exif=camera)
    model.save_pretrained(tmp_path / "a", picture=tmp_path / "drawn.jpg", results=RESULTS, license="mit")
    with Image.open(tmp_path / "a/attention.png") as picture:
        assert picture.size == (8, 6) and picture.format == "PNG" and not picture.getexif()
    assert "](attention.png)" in card_in(tmp_path / "a").text
    model.tuner.detach()
    again = load(tmp_path / "a", clip=small_clip, tokenizer=tokenizer)
    again.save_pretrained(tmp_path / "b")  # the same weights: figures and picture are still theirs
    assert (tmp_path / "b/attention.png").read_bytes() == (tmp_path / "a/attention.png").read_bytes()
    assert (tmp_path / "b/README.md").read_bytes() == (tmp_path / "a/README.md").read_bytes()
    with torch.no_grad():
        again.visual_adapter.up.weight.add_(0.1)
    again.save_pretrained(tmp_path / "c")  # other weights: what was measured is not true of them
    card = card_in(tmp_path / "c")
    assert "No figures came" in card.text and "attention.png" not in card.text and card.data.license == "mit"


# -- whose it is -------------------------------------------------------------------------------------------------------


def test_a_generated_card_is_refreshed(model: FVGModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a/README.md"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # as git may do
    assert not is_edited(path.read_bytes().decode())
    model.save_pretrained(tmp_path / "a", results=RESULTS)
    assert "83.0 ± 1.7" in card_in(tmp_path / "a").text
    update_card(tmp_path / "a", license="mit")
    card = card_in(tmp_path / "a")
    assert card.data.license == "mit" and "83.0 ± 1.7" in card.text


def _append(text: str) -> str:
    return text + "\nMy own words.\n"


def _change(text: str) -> str:
    return text.replace("Tuned on", "Tuned with care on")


def _licence(text: str) -> str:
    return text.replace("license: unknown", "license: mit")


def _replace(text: str) -> str:
    return "# Mine"


@pytest.mark.parametrize("edit", [_append, _change, _licence, _replace])
def test_an_edited_card_is_kept(model: FVGModel, tmp_path: Path, edit: Any, caplog: Any) -> None:
    model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a/README.md"
    mine = edit(path.read_text("utf-8"))
    path.write_text(mine, "utf-8")
    with caplog.at_level(logging.INFO, "fvg_adapter"), warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "a", results=RESULTS)
        update_card(tmp_path / "a", license="apache-2.0")
    assert path.read_text("utf-8") == mine
    assert "was edited and is kept" in caplog.text
    path.unlink()  # the way back: the figures were not lost
    update_card(tmp_path / "a")
    card = card_in(tmp_path / "a")
    assert card.data.license == "apache-2.0" and "83.0 ± 1.7" in card.text


@pytest.mark.parametrize("header", ["---\ntags: [a\n---\n# x", "---\n- a\n- b\n---\n# x", "---\ntags: a\n# x"])
def test_a_broken_header_is_kept_with_a_warning(model: FVGModel, tmp_path: Path, header: str) -> None:
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a/README.md").write_text(header)
    with pytest.warns(UserWarning, match=r"README.md was kept as it is, but its YAML header is broken"):
        model.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a/README.md").read_text() == header
    (tmp_path / "a/README.md").write_bytes(b"\xff\xfe mine")  # no UTF-8 at all
    model.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a/README.md").read_bytes() == b"\xff\xfe mine"


@pytest.mark.parametrize("what", ["update_card", "push_folder"])
def test_what_a_killed_save_left_counts(
    what: str, model: FVGModel, small_clip: CLIPModel, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new version was whole, none of its files in its place yet."""
    folder = model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        model.visual_adapter.down.weight.add_(1.0)
    new = model.save_pretrained(tmp_path / "b").rename(folder / WHOLE)
    wanted = (new / "fvg_heads.safetensors").read_bytes()
    pushed: list[bytes] = []
    monkeypatch.setattr(
        "fvg_adapter.publishing.publish", lambda f, *_: pushed.append((f / "fvg_heads.safetensors").read_bytes())
    )
    if what == "update_card":
        update_card(folder, license="mit")
        assert card_in(folder).data.license == "mit"
    else:
        push_folder(folder, "me/x")
        assert pushed == [wanted]
    assert (folder / "fvg_heads.safetensors").read_bytes() == wanted and not (folder / WHOLE).exists()
    model.tuner.detach()
    loaded = load(folder, clip=small_clip, tokenizer=tokenizer)
    assert isinstance(loaded, FVGModel)
    assert torch.equal(loaded.visual_adapter.down.weight, model.visual_adapter.down.weight)


def test_nothing_else_of_a_folder_goes_to_the_hub(model: FVGModel, tmp_path: Path) -> None:
    """Links in a folder from elsewhere would publish what they lead to."""
    Image.new("RGB", (4, 4)).save(tmp_path / "drawn.png")
    folder = model.save_pretrained(tmp_path / "a", picture=tmp_path / "drawn.png")
    secret = tmp_path / "secret"
    secret.write_text("a token")
    (folder / "lora").mkdir()
    for link in (folder / "lora/notes.txt", folder / "attention.png"):
        link.unlink(missing_ok=True)
        link.symlink_to(secret)
    config = config_to_push(folder)
    assert "picture" not in config["about"]
    files = {operation.path_in_repo for operation in _operations(folder, config, None)}
    assert files == {"config.json", "tuner.safetensors", "fvg_heads.safetensors"}


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_figures_that_do_not_fit_are_refused(model: FVGModel, tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{")
    for results, said in (
        ([1, 2], "results is a list"),
        ({"accuracy": 3.0}, "'base' and 'new' are expected"),
        ({"mmrl+fvg": {"base": [1.0], "new": [1.0]}}, "no row 'coop[+]fvg'.*'mmrl[+]fvg'"),
        ({"coop+fvg": {"base": ["many"], "new": [1.0]}}, "the value 'many'"),
        (tmp_path / "no.json", "cannot be read as JSON"),
        (tmp_path / "absent.json", "cannot be read as JSON"),
    ):
        with pytest.raises(FVGError, match=said):
            model.save_pretrained(tmp_path / "a", results=results)
    for options, said in (
        ({"picture": tmp_path / "no.json"}, "picture .* cannot be read"),
        ({"license": ""}, "license is ''"),
        ({"dataset": "/data/pets"}, "is a path here"),
        ({"dataset": "../pets"}, "is a path here"),
    ):
        with pytest.raises(FVGError, match=said):
            model.save_pretrained(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()
    with pytest.raises(FVGError, match=r"has no config.json"):
        update_card(tmp_path)


def test_a_config_from_elsewhere_may_tell_anything(
    model: FVGModel, small_clip: CLIPModel, tokenizer: Any, tmp_path: Path
) -> None:
    folder = model.save_pretrained(tmp_path / "a", results=RESULTS, license="mit")
    model.tuner.detach()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    weights, results = config["about"]["weights"], config["about"]["results"]
    odd: list[Any] = [[], "text", {"results": 3}, {"results": {**results, "ours": "nobody"}}]
    odd += [{"results": {**results, "rows": {"coop+fvg": {"base": "many"}}}}, {"results": {**results, "seeds": 3}}]
    link = "<img src=x> [here](https://example.org)"
    odd += [{"results": {**results, **told}} for told in ({"ours": []}, {"seeds": [link]}, {"shots": link})]
    odd += [{"results": {**results, "rows": {**results["rows"], "more": {"base": [10**400]}}}}]
    odd += [{"results": {**results, "rows": {**results["rows"], **{str(i): {} for i in range(1000)}}}}]
    odd += [{"license": "mit\nevil: yes", "dataset": "a/b/c", "picture": "../../etc"}, {"dataset": ["x"]}]
    for about in odd:
        told = {**about, "weights": weights} if isinstance(about, dict) else about
        (folder / "config.json").write_text(json.dumps({**config, "about": told}))
        loaded = load(folder, clip=small_clip, tokenizer=tokenizer)
        loaded.save_pretrained(tmp_path / "b")
        loaded.tuner.detach()
        card = card_in(tmp_path / "b")
        assert "No figures came" in card.text and card.data.license == "unknown" and "evil" not in str(card)


def test_names_make_no_links(model: FVGModel) -> None:
    config: dict[str, Any] = {**model.pretrained_config(), "versions": {"torch": "[x](https://example.org)"}}
    config["classes"] = ["![pixel](https://example.org/a.png)", "a\n\n# b"]
    config["base_model"] = {"id": "me/x", "revision": "`[y](https://example.org)", "class": "CLIPModel"}
    rows = {"coop+fvg": {"base": [1.0], "new": [1.0]}, "[z](https://example.org)": {"base": [1.0], "new": [1.0]}}
    config["about"] = {"results": {"rows": rows, "ours": "coop+fvg"}}
    text = make_card(config).partition("## Citation")[0]
    outside = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    assert "](https://example.org" not in outside and "\n# b" not in text


def test_figures_of_one_list_of_classes(model: FVGModel, tmp_path: Path) -> None:
    """What few-shot and cross-dataset runs have: accuracy alone."""
    rows = {"clip": {"accuracy": [40.0]}, "coop": {"accuracy": [50.0]}, "coop+fvg": {"accuracy": [52.5]}}
    rows["coop+fvg [x_fg=x]"] = {"accuracy": [52.0]}
    results = Results(rows=rows, settings=SETTINGS, cost={"coop+fvg": {"parameters": [3.0]}})
    card = card_in(model.save_pretrained(tmp_path / "a", results=results))
    assert "| model | accuracy |\n" in card.text and "| **coop+fvg** | 52.5 |" in card.text
    assert "**Here: accuracy +0.5 points.**" in card.text and "harmonic" not in card.text
    assert "first half" not in card.text
    assert [r.metric_name for r in card.data.eval_results] == ["accuracy, percent"]


def test_a_pickle_in_place_of_safetensors(
    model: FVGModel, small_clip: CLIPModel, tokenizer: Any, tmp_path: Path
) -> None:
    heads = model.save_pretrained(tmp_path / "a") / "fvg_heads.safetensors"
    heads.unlink()
    torch.save({"x": torch.zeros(1)}, heads.with_suffix(".bin"))
    with pytest.raises(FVGError, match=r"has no fvg_heads.safetensors.*pickle files \(fvg_heads.bin\).*never"):
        load(tmp_path / "a", clip=small_clip, tokenizer=tokenizer)
    heads.with_suffix(".bin").rename(heads)
    with pytest.raises(FVGError, match=r"but a pickle, which can run code"):
        load(tmp_path / "a", clip=small_clip, tokenizer=tokenizer)


def test_numbers_as_people_read_them() -> None:
    assert shown([80.0, 84.0]) == "82.0 ± 2.8" and shown([1.0]) == "1.0" and shown([]) == shown(None) == "–"
    assert shown([1.0, None]) == "–" and shown([-0.25, -0.75], 2, "+") == "-0.50 ± 0.35"


def test_a_card_is_the_same_each_time(model: FVGModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a", results=RESULTS)
    config = json.loads((tmp_path / "a/config.json").read_text("utf-8"))
    assert make_card(config) == (tmp_path / "a/README.md").read_text("utf-8")
    assert 'revision="warm"' in make_card(config, "me/x", "warm")
    assert set(NEW_CLASSES).isdisjoint(config["classes"])
