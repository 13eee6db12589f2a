"""One model in many threads, processes and copies: what it answers there is what it answers alone."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_features import Pictures
from test_tuner_life import MAKERS, made
from test_tuner_life import NAMES as TUNED
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import CLIPModel

from conftest import CLASSES, NEW_CLASSES
from fvg_adapter import FeatureBank, FVGModel, record_attention, unwrap, wrap
from fvg_adapter.data import PairedTransform, collate, open_dataset
from fvg_adapter.tuners import CoOp
from fvg_adapter.tuners.cache import ENTRIES, remembered

THREADS = 6
Job = Callable[[], Any]


def wrapped(kind: str, clip: CLIPModel, tokenizer: Any, seed: int = 0) -> FVGModel:
    """FVG-PT behind a tuner, every learned tensor away from where it starts."""
    model = wrap(made(kind, clip, tokenizer, seed), foreground="given").eval()
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def model(small_clip: CLIPModel, tokenizer: Any) -> FVGModel:
    torch.manual_seed(0)
    return wrap(CoOp(small_clip, tokenizer, CLASSES, ctx_init=""), foreground="given").eval()


def at_once(jobs: Sequence[Job]) -> list[Any]:
    """Results of jobs that start together, in THREADS threads."""
    start = threading.Barrier(THREADS)

    def share(number: int) -> list[tuple[int, Any]]:
        start.wait()
        with torch.no_grad():
            return [(i, jobs[i]()) for i in range(number, len(jobs), THREADS)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(pair for part in pool.map(share, range(THREADS)) for pair in part)
    return [found[i] for i in range(len(jobs))]


def same(found: Any, expected: Any) -> bool:
    return torch.equal(found, expected) if isinstance(expected, Tensor) else bool(found == expected)


def assert_same_at_once(jobs: Sequence[Job], fresh: Callable[[], None] = lambda: None) -> None:
    """The jobs in threads give, bit for bit, what they give one after the other; `fresh` empties caches before."""
    with torch.no_grad():
        expected = [job() for job in jobs]
    fresh()
    for number, (one, other) in enumerate(zip(at_once(jobs), expected, strict=True)):
        assert same(one, other), f"job {number} gives something else in a thread"


def branch_jobs(model: FVGModel, pixels: Tensor) -> list[Job]:
    """Everything that a thread may ask of one model: branches, plain CLIP's passes, names, maps."""
    clip = model.tuner.clip

    def logits(image: int, branch: str, classes: list[str]) -> Tensor:
        model.tuner.invalidate()  # so that text is encoded in the middle of other threads' passes
        with model.use_classes(classes):
            return model(pixels[image : image + 1], branch=branch).logits

    def attention(image: int) -> Tensor:
        with record_attention(model, layers="all") as record:
            model(pixels[image : image + 1])
        return record.attention()

    def direct(image: int) -> Tensor:
        output = clip.get_image_features(pixel_values=pixels[image : image + 1])
        return output if isinstance(output, Tensor) else output.pooler_output

    jobs: list[Job] = []
    for image in range(4):
        one = pixels[image : image + 1]
        jobs += [
            lambda i=image: logits(i, "base", TUNED),
            lambda i=image: logits(i, "new", NEW_CLASSES),
            lambda i=image: logits(i, "joint", [*TUNED, *NEW_CLASSES]),
            lambda: model.tuner.prior_text_features(),
            lambda x=one: model.tuner.prior_image_features(x),
            lambda x=one: [p.name for p in model.predict(x[0], top_k=2)],
            lambda i=image: attention(i),
            lambda i=image: direct(i),
        ]
    return jobs


@pytest.mark.parametrize("kind", MAKERS)
def test_threads_give_the_single_threaded_answers(
    kind: str, small_clip: CLIPModel, tokenizer: Any, pixels: Tensor
) -> None:
    model = wrapped(kind, small_clip, tokenizer)
    assert_same_at_once(branch_jobs(model, pixels), model.tuner.invalidate)


def test_two_models_around_one_clip_in_threads(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    models = [wrapped(kind, small_clip, tokenizer, seed) for seed, kind in enumerate(("promptsrc", "mmrl", "coop"))]
    asked = [(m, i, branch) for i in range(4) for m in models for branch in ("base", "new")]
    jobs = [lambda m=m, i=i, b=b: m(pixels[i : i + 1], branch=b).logits for m, i, b in asked]
    assert_same_at_once(jobs)
    answers = [m(pixels).logits for m in models]
    assert not torch.equal(answers[0], answers[1]) and not torch.equal(answers[1], answers[2])
    unwrap(models[1]).detach()
    assert torch.equal(models[0](pixels).logits, answers[0]) and torch.equal(models[2](pixels).logits, answers[2])


# -- class lists -------------------------------------------------------------------------------------------------------


def test_a_block_of_use_classes_belongs_to_its_thread(model: FVGModel, pixels: Tensor) -> None:
    expected = model(pixels).logits
    inside, seen = threading.Event(), threading.Event()

    def other() -> tuple[tuple[str, ...], tuple[str, ...], Tensor]:
        with model.use_classes(NEW_CLASSES):
            with torch.no_grad():
                logits = model(pixels).logits
            inside.set()
            seen.wait(60)
            within = model.classes
        return within, model.classes, logits

    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        future = pool.submit(other)
        inside.wait(60)
        assert model.classes == tuple(CLASSES)
        assert torch.equal(model(pixels).logits, expected)
        model.set_classes(CLASSES[:2])  # for every thread that is in no block
        seen.set()
        within, behind, logits = future.result()
    assert (within, behind) == (tuple(NEW_CLASSES), tuple(CLASSES[:2]))
    assert logits.shape[1] == len(NEW_CLASSES)


def test_blocks_nest_and_set_classes_inside_ends_with_its_block(model: FVGModel) -> None:
    with model.use_classes(NEW_CLASSES):
        with model.use_classes(CLASSES[:2]):
            model.set_classes(CLASSES[:3])
            assert model.classes == tuple(CLASSES[:3])
            twin = pickle.loads(pickle.dumps(model.tuner))
        assert model.classes == tuple(NEW_CLASSES)
    assert model.classes == tuple(CLASSES)
    assert twin.classes == tuple(CLASSES[:3])  # a copy is made as its thread sees the model


def test_every_answer_is_of_one_class_list(model: FVGModel, pixels: Tensor) -> None:
    """Threads predict while others set the class list again and again: each answer is that of one of the lists."""
    lists = [CLASSES, NEW_CLASSES, [*CLASSES, *NEW_CLASSES], CLASSES[:2]]
    expected = {}
    for names in lists:
        with model.use_classes(names), torch.no_grad():
            expected[len(names)] = model(pixels).logits

    def change(i: int) -> None:
        model.tuner.invalidate()
        model.set_classes(lists[i % len(lists)])

    def answer() -> Tensor:
        return model(pixels).logits

    jobs: list[Job] = [job for i in range(40) for job in (answer, lambda i=i: change(i), model.tuner.text_features)]
    for logits in at_once(jobs)[::3]:
        assert torch.equal(logits, expected[logits.shape[1]])
    for names in lists:  # and nothing wrong was kept
        model.set_classes(names)
        with torch.no_grad():
            assert torch.equal(model(pixels).logits, expected[len(names)])


def test_text_that_is_kept_is_of_the_list_that_it_is_kept_under(
    model: FVGModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread sets the class list between the look into the cache and the encoding."""
    expected = model.tuner.text_features()
    model.tuner.invalidate()
    encode, tuner = CoOp._text, model.tuner

    def late(self: CoOp, classes: Sequence[str]) -> Tensor:
        other = threading.Thread(target=tuner.set_classes, args=(NEW_CLASSES,))
        other.start()
        other.join()
        return encode(self, self.classes)

    monkeypatch.setattr(CoOp, "_text", late)
    assert torch.equal(tuner.text_features(), expected)
    monkeypatch.undo()
    assert tuner.classes == tuple(NEW_CLASSES)
    tuner.set_classes(CLASSES)
    assert torch.equal(tuner.text_features(), expected)


def test_more_class_lists_than_are_kept(model: FVGModel, pixels: Tensor) -> None:
    names = [*CLASSES, *NEW_CLASSES]

    def answer(i: int) -> Tensor:
        with model.use_classes([names[i % 11], names[(i + 1 + i // 11 % 10) % 11]]):
            return model(pixels).logits

    assert_same_at_once([lambda i=i: answer(i) for i in range(2 * 11 * THREADS)])
    assert len(model.tuner._text_cache._entries) <= ENTRIES


def test_entries_of_many_threads_never_trip_over_each_other() -> None:
    entries: dict[Any, int] = {}

    def add(number: int) -> bool:
        return all(remembered(entries, (number, i), lambda i=i: i + 1) == i + 1 for i in range(2000))

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(add, range(THREADS)))
    assert len(entries) <= ENTRIES


def test_predict_leaves_a_training_model_training_and_an_evaluated_one_untouched(
    model: FVGModel, pixels: Tensor
) -> None:
    model.train().predict(pixels)
    assert model.training
    model.eval()
    calls: list[bool] = []
    model.train = lambda mode=True: calls.append(mode)  # type: ignore[method-assign]
    model.predict(pixels)
    assert not calls  # other threads may be in the middle of a forward


def test_data_parallel_replicas_score_the_classes_of_the_block(model: FVGModel) -> None:
    with model.use_classes(NEW_CLASSES):
        replica = model.tuner._replicate_for_data_parallel()
    seen = at_once([lambda: replica.classes] * THREADS)
    assert set(seen) == {tuple(NEW_CLASSES)}


# -- recorders ---------------------------------------------------------------------------------------------------------


def test_a_recorder_inside_a_recorder(model: FVGModel, pixels: Tensor) -> None:
    def alone(layers: Any, image: Tensor) -> Tensor:
        with record_attention(model, layers=layers) as record:
            model(image)
        return record.attention()

    def nested() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with record_attention(model, layers="all") as outer:
            first = model(pixels[:1], return_attention=True).foreground_attention
            with record_attention(model, layers=[0]) as inner:
                model(pixels[:2])
            with pytest.raises(ZeroDivisionError), record_attention(model):
                raise ZeroDivisionError
            model(pixels[2:])
        return first, inner.attention(), outer.attention(), alone([-1], pixels[:1])

    with torch.no_grad():
        wanted = alone([0], pixels[:2]), alone("all", pixels[2:])
        hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
        for first, inner, outer, last in [nested(), *at_once([nested] * 12)]:
            assert torch.equal(inner, wanted[0]) and torch.equal(outer, wanted[1])  # the last forward in each block
            assert torch.equal(first, last.mean((1, 2)))
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", MAKERS)
def test_copies_of_a_wrapped_model_live_on_their_own(
    kind: str, duplicate: Callable[[FVGModel], FVGModel], small_clip: CLIPModel, tokenizer: Any, pixels: Tensor
) -> None:
    flags = [p.requires_grad for p in small_clip.parameters()]
    bare = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in small_clip.modules())
    model = wrapped(kind, small_clip, tokenizer)
    names = [n for n, _ in model.named_parameters()]
    with torch.no_grad():
        expected = model(pixels).logits
        first, second = duplicate(model), duplicate(model)
        assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in first.parameters())
        assert [n for n, _ in first.named_parameters()] == names
        for p in first.trainable_parameters():
            p.add_(0.5)
        assert not torch.equal(first(pixels).logits, expected)
        assert torch.equal(model(pixels).logits, expected) and torch.equal(second(pixels).logits, expected)
        clip = unwrap(first).detach()
        assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in clip.modules()) == bare
        assert [p.requires_grad for p in clip.parameters()] == flags
        assert torch.equal(model(pixels).logits, expected) and torch.equal(second(pixels).logits, expected)
        unwrap(model).detach()
        assert torch.equal(second(pixels).logits, expected)  # also when the first of them is gone
        with record_attention(second) as record:
            second(pixels)
        assert record.attention().shape[0] == 4
        with second.use_classes(NEW_CLASSES):
            assert second(pixels).logits.shape == (4, len(NEW_CLASSES))


# -- processes ---------------------------------------------------------------------------------------------------------


def asked(model: FVGModel, pixels: Tensor, folder: Path) -> list[Any]:
    """What a process says of a model, a data set and a bank that were handed to it."""
    torch.set_num_threads(1)
    data = open_dataset(folder / "data", "train", masks="none", transform=PairedTransform((32, 32), train=False))
    bank = FeatureBank.load(folder / "bank", model)
    with torch.no_grad(), model.use_classes([*CLASSES, *NEW_CLASSES]):
        logits = model(pixels).logits
    return [logits.numpy(), [item["pixel_values"].numpy() for item in data], bank.features["image"].numpy()]


@pytest.fixture
def folder(model: FVGModel, tmp_path: Path) -> Path:
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    for name in CLASSES:
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        pixels = torch.randint(0, 255, (40, 40, 3), generator=draw, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "data" / "train" / name / "0.png")
    FeatureBank.encode(model, Pictures(CLASSES, 6), output=tmp_path / "bank", rows_per_shard=4)
    return tmp_path


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_give_the_same_answers(method: str, model: FVGModel, pixels: Tensor, folder: Path) -> None:
    expected = asked(model, pixels, folder)
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(asked, model, pixels, folder).result(300)
    assert (found[0] == expected[0]).all() and (found[2] == expected[2]).all()
    assert all((one == other).all() for one, other in zip(found[1], expected[1], strict=True))
    data = open_dataset(folder / "data", "train", masks="none", transform=PairedTransform((32, 32), train=False))
    bank = FeatureBank.load(folder / "bank", model)
    for source, join, name in ((data, collate, "pixel_values"), (bank, None, "labels")):
        loader = DataLoader(source, 3, num_workers=1, collate_fn=join, multiprocessing_context=context)
        alone = DataLoader(source, 3, collate_fn=join)
        for batch, wanted in zip(loader, alone, strict=True):
            assert torch.equal(batch[name], wanted[name])
            if "features" in batch:
                with torch.no_grad():
                    assert torch.equal(model(**batch).logits, model(**wanted).logits)


def test_torch_compile_gives_the_same_logits(small_clip: CLIPModel, tokenizer: Any, pixels: Tensor) -> None:
    model = wrap(CoOp(small_clip, tokenizer, CLASSES)).eval()
    with torch.no_grad(), model.use_classes([*CLASSES, *NEW_CLASSES]):
        expected = model(pixels).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(pixels).logits, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), model.use_classes(NEW_CLASSES):
        torch.testing.assert_close(compiled(pixels).logits, model(pixels).logits, atol=1e-5, rtol=1e-5)
