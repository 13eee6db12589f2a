"""Hook attention against `output_attentions=True` of an eager copy: the oracle that somebody else wrote."""

from __future__ import annotations

import copy
import doctest
import io
import logging
import math
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from conftest import checkpoint_activations
from fvg_adapter import attention, attention_kernels
from fvg_adapter.attention import AttentionProbe, pooling_attention, record_attention
from fvg_adapter.attention_kernels import folded_attention
from fvg_adapter.errors import FVGError
from fvg_adapter.towers import DualEncoder, linear_weight, pooled

LAYERS, HEADS, GRID = 3, 4, 4
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def sharpened(model: nn.Module, gain: float = 1.5) -> Any:
    """Random weights give nearly uniform attention; these do not (largest weight 0.98; with gain 0.5, 0.24)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]) * gain if parameter.dim() > 1 else 1 + 0.2 * noise)
    return model.eval()


def make_clip(implementation: str = "sdpa") -> CLIPModel:
    text = {**VISION, "vocab_size": 50, "max_position_embeddings": 8, "num_hidden_layers": 1}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return sharpened(CLIPModel._from_config(config, attn_implementation=implementation))


def images(height: int = 32, width: int = 32, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def eager(model: nn.Module) -> Any:
    """A copy of a model's vision transformer that computes attention eagerly."""
    tower = copy.deepcopy(DualEncoder(model).vision)
    tower.config._attn_implementation = "eager"
    return tower


def oracle(model: nn.Module, pixels: Tensor, **options: Any) -> Tensor:
    """(B, layers, heads, h, w) as Hugging Face computes it."""
    grid = (pixels.shape[-2] // 8, pixels.shape[-1] // 8)
    rows = eager(model)(pixel_values=pixels, output_attentions=True, **options).attentions
    return torch.stack(rows, 1)[..., 0, 1:].unflatten(-1, grid)


def hooks_and_attributes(model: nn.Module) -> dict[str, Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {
        name: (sorted(module.__dict__), {kind: list(getattr(module, kind)) for kind in kinds})
        for name, module in model.named_modules()
    }


# -- equal to eager ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("size", [(32, 32), (24, 56), (48, 16)])
def test_equals_eager_output_attentions(implementation: str, size: tuple[int, int]) -> None:
    clip, pixels = make_clip(implementation), images(*size)
    options = {} if size == (32, 32) else {"interpolate_pos_encoding": True}
    with torch.no_grad(), record_attention(clip, "all") as record:
        clip.get_image_features(pixel_values=pixels, **options)
        inside = record.attention()
    expected = oracle(clip, pixels, **options)
    assert inside.shape == (3, LAYERS, HEADS, size[0] // 8, size[1] // 8)
    assert expected.std() > 0.01  # not the uniform map that anything would match
    torch.testing.assert_close(record.attention(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(inside, record.attention(), atol=0, rtol=0)
    assert record.attention().dtype == torch.float32
    assert not record.attention().requires_grad


def test_layers_are_those_asked_for_in_that_order() -> None:
    clip, pixels = make_clip(), images()
    expected = oracle(clip, pixels)
    for layers, index in [
        ([-1], [2]),
        (0, [0]),
        ([2, 0], [2, 0]),
        ((-3, 1), [0, 1]),
        (range(2), [0, 1]),
        ([1, 1], [1, 1]),
    ]:
        with record_attention(clip, layers) as record:
            clip.get_image_features(pixel_values=pixels)
        torch.testing.assert_close(record.attention(), expected[:, index], atol=1e-5, rtol=0)
        assert record.layers == tuple(index)


def test_rows_sum_to_less_than_one_by_the_share_of_the_pooling_token() -> None:
    clip, pixels = make_clip(), images()
    with record_attention(clip) as record:
        clip.get_image_features(pixel_values=pixels)
    own = eager(clip)(pixel_values=pixels, output_attentions=True).attentions[-1][:, :, 0, 0]
    torch.testing.assert_close(record.attention().sum((1, 3, 4)) + own, torch.ones(3, HEADS))


def vision_model(kind: str) -> tuple[nn.Module, nn.Module]:
    """The model handed to record_attention, and the module to run."""
    if kind == "inner":
        clip = make_clip()
        return clip.vision_model, clip.vision_model
    plain = {"vision": CLIPVisionModel, "projected": CLIPVisionModelWithProjection}.get(kind.removeprefix("peft "))
    model = make_clip() if plain is None else sharpened(plain(CLIPVisionConfig(**VISION)))
    if kind.startswith("peft"):
        model = with_lora(model)
    return model, model


def with_lora(model: nn.Module, wrap: bool = True) -> Any:
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return (get_peft_model(model, config) if wrap else inject_adapter_in_model(config, model)).eval()


@pytest.mark.parametrize("kind", ["clip", "vision", "projected", "inner", "peft clip", "peft vision", "peft projected"])
def test_every_kind_of_model(kind: str) -> None:
    model, run = vision_model(kind)
    pixels = images()
    with torch.no_grad(), record_attention(model, "all") as record:
        if hasattr(run, "get_image_features"):
            run.get_image_features(pixel_values=pixels)
        else:
            run(pixel_values=pixels)
    torch.testing.assert_close(record.attention(), oracle(model, pixels), atol=1e-5, rtol=0)


def test_data_parallel_without_gpus_and_the_like() -> None:
    clip, pixels = make_clip(), images()
    with record_attention(nn.DataParallel(clip)) as record:  # type: ignore[arg-type]
        clip.get_image_features(pixel_values=pixels)
    torch.testing.assert_close(record.attention(), oracle(clip, pixels)[:, -1:], atol=1e-5, rtol=0)


def test_the_model_inside_an_optimised_one_is_recorded() -> None:
    clip, pixels = make_clip(), images()
    once = torch.compile(clip, backend="eager")
    for wrapped in (once, nn.DataParallel(once), torch.compile(nn.DataParallel(clip), backend="eager")):
        with torch.no_grad(), record_attention(wrapped) as record:  # type: ignore[arg-type]
            clip.get_image_features(pixel_values=pixels)
        torch.testing.assert_close(record.attention(), oracle(clip, pixels)[:, -1:], atol=1e-5, rtol=0)


def test_the_model_computes_what_it_computed() -> None:
    clip, pixels = make_clip(), images()
    plain = clip.vision_model(pixel_values=pixels)
    with record_attention(clip, "all"):
        recorded = clip.vision_model(pixel_values=pixels)
    assert torch.equal(plain.last_hidden_state, recorded.last_hidden_state)
    assert clip.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    clip, pixels = sharpened(make_clip(), gain=0.5), images()
    expected = oracle(clip, pixels)
    with torch.no_grad(), record_attention(clip, "all") as record, torch.autocast("cpu", dtype=dtype):
        clip.get_image_features(pixel_values=pixels)
    model = copy.deepcopy(clip).to(dtype)
    with torch.no_grad(), record_attention(model, "all") as half:
        model.get_image_features(pixel_values=pixels.to(dtype))
    for maps, tolerance in ((record.attention(), 2e-3), (half.attention(), 5e-3)):
        assert maps.dtype == torch.float32
        torch.testing.assert_close(maps, expected, atol=tolerance, rtol=0)


def test_softmax_is_full_precision_under_autocast() -> None:
    """Only the projections are bfloat16: layer 0 is closer to float32 than eager attention under autocast is."""
    clip, pixels = make_clip(), images()
    truth = oracle(clip, pixels)[:, 0]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with record_attention(clip, [0]) as record:
            clip.get_image_features(pixel_values=pixels)
        theirs = oracle(clip, pixels).float()[:, 0]
    assert (record.attention()[:, 0] - truth).abs().mean() < (theirs - truth).abs().mean()
    query, keys = torch.randn(2, 32), torch.randn(2, 9, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pooling_attention(query, keys, 4, 0.5)
    assert torch.equal(inside, pooling_attention(query, keys, 4, 0.5))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_pooling_attention_by_hand(batch: int, tokens: int, heads: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads * width, generator=generator)
    keys = torch.randn(batch, tokens, heads * width, generator=generator)
    result = pooling_attention(query, keys, heads, 0.7)
    assert result.shape == (batch, heads, tokens)
    for b in range(batch):
        for h in range(heads):
            part = range(h * width, (h + 1) * width)
            weights = [math.exp(0.7 * sum(float(query[b, i] * keys[b, n, i]) for i in part)) for n in range(tokens)]
            for n in range(tokens):
                assert float(result[b, h, n]) == pytest.approx(weights[n] / sum(weights), abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99)
)
def test_keys_need_not_be_formed(batch: int, tokens: int, heads: int, width: int, inputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = nn.Linear(inputs, heads * width)
    query = torch.randn(batch, heads * width, generator=generator)
    hidden = torch.randn(batch, tokens, inputs, generator=generator)
    mask = torch.randn(batch, heads, tokens, generator=generator)
    expected = pooling_attention(query, keys(hidden), heads, 0.7, mask)
    torch.testing.assert_close(folded_attention(query, keys.weight, hidden, heads, 0.7, mask), expected)


def test_projections_that_are_no_plain_linear_map_are_asked() -> None:
    clip, pixels = make_clip(), images()
    layer = DualEncoder(clip).vision_layers[-1].self_attn
    assert linear_weight(layer, "k_proj") is layer.k_proj.weight

    def doubled(*_: Any) -> Any:
        return 2 * _[-1]

    handle = layer.k_proj.register_forward_hook(doubled)
    assert linear_weight(layer, "k_proj") is None
    with torch.no_grad(), record_attention(clip) as record:
        clip.get_image_features(pixel_values=pixels)
    torch.testing.assert_close(record.attention(), oracle(clip, pixels)[:, -1:], atol=1e-5, rtol=0)
    handle.remove()
    layer.k_proj.forward = lambda x: 2 * nn.Linear.forward(layer.k_proj, x)  # as accelerate's offloading does
    assert linear_weight(layer, "k_proj") is None
    del layer.k_proj.forward
    layer.k_proj.to("meta")
    assert linear_weight(layer, "k_proj") is None
    layer.k_proj = torch.ao.nn.quantized.dynamic.Linear(32, 32)
    assert linear_weight(layer, "k_proj") is None
    assert linear_weight(with_lora(make_clip()).vision_model.encoder.layers[0].self_attn, "k_proj") is None


# -- LoRA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("differentiable", [False, True])
def test_lora_injected_after_attaching_is_seen(differentiable: bool) -> None:
    clip, pixels = make_clip(), images()
    probe = AttentionProbe(clip, "all")
    with probe.recording(differentiable) as before:
        clip.get_image_features(pixel_values=pixels)
    with_lora(clip, wrap=False)
    with probe.recording(differentiable) as after:
        clip.get_image_features(pixel_values=pixels)
    torch.testing.assert_close(after.attention(), oracle(clip, pixels), atol=1e-5, rtol=0)
    assert (after.attention() - before.attention()).abs().max() > 0.05


@pytest.mark.parametrize("differentiable", [False, True])
def test_lora_switched_off_during_the_forward_stays_off_in_the_record(differentiable: bool) -> None:
    clip, pixels = make_clip(), images()
    expected = oracle(clip, pixels)
    model = with_lora(clip)
    with record_attention(model, "all", differentiable=differentiable) as record, model.disable_adapter():
        model.get_image_features(pixel_values=pixels)
    torch.testing.assert_close(record.attention(), expected, atol=1e-5, rtol=0)


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradients(model: CLIPModel, maps: Tensor, pixels: Tensor) -> list[Tensor]:
    """Of a weighted sum of all maps, for the pixels and every parameter of the vision tower's layers 0 and 2."""
    weights = torch.randn(maps.shape, generator=torch.Generator().manual_seed(3))
    layers = DualEncoder(model).vision_layers
    wanted = [p for i in (0, 2) for n, p in layers[i].named_parameters() if "layer_norm1" in n or "q_proj" in n]
    found = torch.autograd.grad((maps * weights).sum(), [pixels, *wanted])
    assert all(g.abs().max() > 0 for g in found[:2])
    return list(found)


def expected_gradients(clip: CLIPModel, pixels: Tensor) -> list[Tensor]:
    clip = copy.deepcopy(clip)
    clip.vision_model.config._attn_implementation = "eager"
    rows = clip.vision_model(pixel_values=pixels, output_attentions=True).attentions
    return gradients(clip, torch.stack(rows, 1)[..., 0, 1:].unflatten(-1, (GRID, GRID)), pixels)


def test_differentiable_equals_eager_autograd() -> None:
    clip, pixels = make_clip(), images().requires_grad_()
    with record_attention(clip, "all", differentiable=True) as record:
        clip.get_image_features(pixel_values=pixels)
    torch.testing.assert_close(
        gradients(clip, record.attention(), pixels), expected_gradients(clip, pixels), atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("inside", [True, False])
def test_gradient_checkpointing_is_exact(inside: bool) -> None:
    clip, pixels = make_clip(), images().requires_grad_()
    expected = expected_gradients(clip, pixels)
    checkpoint_activations(clip, use_reentrant=False)
    clip.train()
    with record_attention(clip, "all", differentiable=True) as record:
        clip.vision_model(pixel_values=pixels)
        if inside:
            found = gradients(clip, record.attention(), pixels)
    if not inside:
        found = gradients(clip, record.attention(), pixels)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_reentrant_checkpointing_is_refused_and_can_be_switched_off_for_the_layers() -> None:
    clip, pixels = make_clip(), images().requires_grad_()
    expected = expected_gradients(clip, pixels)
    checkpoint_activations(clip, use_reentrant=True)
    clip.train()
    with record_attention(clip, "all", differentiable=True) as record:
        clip.vision_model(pixel_values=pixels)
    with pytest.raises(FVGError, match="reentrant gradient checkpointing.*use_reentrant"):
        record.attention()
    DualEncoder(clip).vision_layers[2].gradient_checkpointing = False  # one layer that keeps its graph is not enough
    with record_attention(clip, [0, 2], differentiable=True) as record:
        clip.vision_model(pixel_values=pixels)
    with pytest.raises(FVGError, match="reentrant gradient checkpointing.*use_reentrant"):
        record.attention()
    with record_attention(clip, "all") as plain:
        clip.vision_model(pixel_values=pixels)
    torch.testing.assert_close(plain.attention(), oracle(clip.eval(), pixels), atol=1e-5, rtol=0)
    clip.train()
    for layer in DualEncoder(clip).vision_layers:
        layer.gradient_checkpointing = False
    with record_attention(clip, "all", differentiable=True) as record:
        clip.vision_model(pixel_values=pixels)
    torch.testing.assert_close(gradients(clip, record.attention(), pixels), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("differentiable", [True, False])
def test_recomputation_does_not_overwrite_the_last_forward(reentrant: bool, differentiable: bool) -> None:
    clip, first, second = make_clip(), images().requires_grad_(), images(batch=2).requires_grad_()
    expected = oracle(clip, second)
    checkpoint_activations(clip, use_reentrant=reentrant)
    clip.train()
    with record_attention(clip, "all", differentiable=differentiable) as record:
        outputs = [clip.vision_model(pixel_values=x).pooler_output for x in (first, second)]
        for output in reversed(outputs):
            output.sum().backward()
    if differentiable and reentrant:
        return  # refused: see above
    torch.testing.assert_close(record.attention(), expected, atol=1e-5, rtol=0)


def test_a_tower_checkpointed_as_a_whole() -> None:
    clip, first, second = make_clip(), images().requires_grad_(), images(batch=2).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return clip.vision_model(pixel_values=x).pooler_output

    with record_attention(clip, "all") as record:
        outputs = [torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) for x in (first, second)]
        for output in reversed(outputs):
            output.sum().backward()
    torch.testing.assert_close(record.attention(), oracle(clip, second), atol=1e-5, rtol=0)


def test_without_gradients_nothing_asks_for_them() -> None:
    clip, pixels = make_clip(), images()
    with torch.no_grad(), record_attention(clip, differentiable=True) as record:
        clip.get_image_features(pixel_values=pixels)
    assert not record.attention().requires_grad


# -- nothing left behind -----------------------------------------------------------------------------------------------


class _Broken(Exception):
    pass


def _raise(*_: Any) -> None:
    raise _Broken


@pytest.mark.parametrize("differentiable", [False, True])
def test_nothing_is_left_behind_after_an_exception(differentiable: bool) -> None:
    clip, pixels = make_clip(), images()
    before = hooks_and_attributes(clip)
    handle = DualEncoder(clip).vision_layers[1].register_forward_pre_hook(_raise)
    with pytest.raises(_Broken), record_attention(clip, "all", differentiable=differentiable) as record:
        clip.get_image_features(pixel_values=pixels)
    handle.remove()
    assert hooks_and_attributes(clip) == before
    assert attention._THREAD.recordings == []
    assert record._pending == {}  # no module, no hidden states
    with pytest.raises(FVGError, match="did not reach layers|no forward"):
        record.attention()


def test_a_permanent_probe_is_silent_and_comes_off_clean() -> None:
    clip, pixels = make_clip(), images()
    before = hooks_and_attributes(clip)
    probe = AttentionProbe(clip, [0, -1])
    assert probe.hook_count == 4
    attached = hooks_and_attributes(clip)
    clip.get_image_features(pixel_values=pixels)
    with probe.recording() as record:
        clip.get_image_features(pixel_values=pixels)
    assert hooks_and_attributes(clip) == attached  # nothing was stored on the model
    kept = record.attention()
    clip.get_image_features(pixel_values=2 * pixels)  # outside the block
    assert torch.equal(record.attention(), kept)
    probe.detach()
    probe.detach()
    assert probe.hook_count == 0
    assert hooks_and_attributes(clip) == before
    assert "fvg" not in " ".join(clip.state_dict())


def test_the_last_of_several_forwards_counts() -> None:
    clip = make_clip()
    with record_attention(clip, "all") as record:
        for size in ((32, 32), (24, 40)):
            DualEncoder(clip).image_features(images(*size))
    expected = oracle(clip, images(24, 40), interpolate_pos_encoding=True)
    torch.testing.assert_close(record.attention(), expected, atol=1e-5, rtol=0)


def test_nested_recorders_and_probes() -> None:
    clip, first, second = make_clip(), images(), images() * 2
    probe = AttentionProbe(clip)
    with probe.recording() as outer, record_attention(clip, [0]) as other:
        with pytest.raises(_Broken), probe.recording() as broken:
            clip.get_image_features(pixel_values=first)
            raise _Broken
        with probe.recording() as inner:
            clip.get_image_features(pixel_values=first)
        clip.get_image_features(pixel_values=second)
    expected = [oracle(clip, first), oracle(clip, second)]
    torch.testing.assert_close(broken.attention(), expected[0][:, -1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(inner.attention(), expected[0][:, -1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(outer.attention(), expected[1][:, -1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(other.attention(), expected[1][:, :1], atol=1e-5, rtol=0)


def test_threads_record_their_own_forwards() -> None:
    clip = make_clip()
    probe = AttentionProbe(clip, "all")
    batches = [images() * (i + 1) for i in range(2)]
    expected = [oracle(clip, x) for x in batches]
    right: list[int] = []  # an exception in a thread is none here: what came out well is counted
    start = threading.Barrier(3)

    def work(index: int) -> None:
        start.wait()
        for _ in range(10):
            with torch.no_grad(), probe.recording() as record:
                clip.get_image_features(pixel_values=batches[index])
            if (record.attention() - expected[index]).abs().max() <= 1e-5:
                right.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    with probe.recording() as idle:  # open in the main thread, which runs nothing
        start.wait()
        for thread in threads:
            thread.join()
    assert sorted(right) == [0] * 10 + [1] * 10
    with pytest.raises(FVGError, match="no forward was recorded"):
        idle.attention()


# -- copies and compilers ----------------------------------------------------------------------------------------------


class Owner(nn.Module):
    """A model with a probe inside, as FVGModel is."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = make_clip()
        self.probe = AttentionProbe(self.clip, "all", self.first_patch)

    def first_patch(self, layer: int) -> int:
        return 1

    def maps(self, pixels: Tensor) -> Tensor:
        with torch.no_grad(), self.probe.recording() as record:
            self.clip.get_image_features(pixel_values=pixels)
        return record.attention()


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def _torch_saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _torch_saved])
def test_copies_work_and_are_independent(copied: Callable[[Any], Any]) -> None:
    owner, pixels = Owner(), images()
    expected = owner.maps(pixels)
    clean = hooks_and_attributes(make_clip())
    twin = copied(owner)
    assert torch.equal(twin.maps(pixels), expected)
    with owner.probe.recording() as record:
        twin.clip.get_image_features(pixel_values=pixels)
    with pytest.raises(FVGError, match="no forward"):
        record.attention()
    twin.probe.detach()
    assert hooks_and_attributes(twin.clip) == clean
    assert torch.equal(owner.maps(pixels), expected)


def test_a_copy_of_the_bare_model_runs() -> None:
    owner, pixels = Owner(), images()
    twin = copy.deepcopy(owner.clip)
    with owner.probe.recording() as record:
        twin.get_image_features(pixel_values=pixels)
    with pytest.raises(FVGError, match="no forward"):
        record.attention()


@pytest.fixture
def dynamo() -> Iterator[None]:
    trace = logging.getLogger("torch.__trace")  # pytest's log capture would turn minutes of structured tracing on
    level = trace.level
    trace.setLevel(logging.WARNING)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    trace.setLevel(level)


def test_compiled_towers_record(dynamo: None) -> None:
    clip, pixels = make_clip(), images()
    probe = AttentionProbe(clip, "all")
    compiled = torch.compile(clip.vision_model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(pixel_values=pixels)  # first without a recording
        for factor in (1.0, 2.0):
            with probe.recording() as record:
                compiled(pixel_values=factor * pixels)
            torch.testing.assert_close(record.attention(), oracle(clip, factor * pixels), atol=1e-5, rtol=0)
        kept = record.attention()
        compiled(pixel_values=pixels)
        assert torch.equal(record.attention(), kept)


def test_compiled_towers_are_differentiable(dynamo: None) -> None:
    clip, pixels = make_clip(), images().requires_grad_()
    probe = AttentionProbe(clip, "all")
    compiled = torch.compile(clip.vision_model, backend="aot_eager", fullgraph=True)
    with probe.recording(differentiable=True) as record:
        compiled(pixel_values=pixels)
    torch.testing.assert_close(
        gradients(clip, record.attention(), pixels), expected_gradients(clip, pixels), atol=1e-6, rtol=1e-4
    )


def test_recording_inside_a_compiled_function(dynamo: None) -> None:
    owner, pixels = Owner(), images()
    expected = owner.maps(pixels)
    maps = torch.compile(owner.maps, backend="eager", fullgraph=True)
    torch.testing.assert_close(maps(pixels), expected)
    torch.testing.assert_close(maps(pixels), expected)


def test_a_model_compiled_before_attaching_says_so(dynamo: None) -> None:
    clip, pixels = make_clip(), images()
    compiled = torch.compile(clip.vision_model, backend="eager")
    with torch.no_grad():
        compiled(pixel_values=pixels)
        with record_attention(compiled) as record:  # type: ignore[arg-type]
            compiled(pixel_values=pixels)
        with pytest.raises(FVGError, match="compiled before the hooks were attached"):
            record.attention()
        torch._dynamo.reset()
        with record_attention(compiled) as record:  # type: ignore[arg-type]
            compiled(pixel_values=pixels)
    torch.testing.assert_close(record.attention(), oracle(clip, pixels)[:, -1:], atol=1e-5, rtol=0)


# -- tokens that tuners add --------------------------------------------------------------------------------------------


class Prompted:
    """Adds tokens from layer 1 on: behind the pooling token (as MMRL) or behind the patches (as PromptSRC)."""

    def __init__(self, where: str) -> None:
        self.clip, self.where = make_clip(), where
        self.tokens = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
        layer = DualEncoder(self.clip).vision_layers[1]
        layer.register_forward_pre_hook(self._insert, with_kwargs=True)

    def _insert(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        new = self.tokens.expand(len(hidden), -1, -1)
        parts = [hidden[:, :1], new, hidden[:, 1:]] if self.where == "inside" else [hidden, new]
        both = torch.cat(parts, 1)
        return ((both, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": both})

    def first_patch(self, layer: int) -> int:
        return 6 if self.where == "inside" and layer >= 1 else 1

    def attention_target(self) -> tuple[nn.Module, Callable[[int], int]]:
        return self.clip, self.first_patch


@pytest.mark.parametrize("where", ["inside", "behind"])
def test_patches_are_found_among_added_tokens(where: str) -> None:
    model, pixels = Prompted(where), images()
    with torch.no_grad(), record_attention(model, "all") as record, record_attention(model, [2]) as last:  # type: ignore
        model.clip.get_image_features(pixel_values=pixels)
    assert torch.equal(last.attention(), record.attention()[:, 2:])
    rows = eager(model.clip)(pixel_values=pixels, output_attentions=True).attentions
    expected = [row[:, :, 0, model.first_patch(i) :][:, :, : GRID * GRID] for i, row in enumerate(rows)]
    assert [row.shape[-1] for row in rows] == [17, 22, 22]
    torch.testing.assert_close(record.attention().flatten(3), torch.stack(expected, 1), atol=1e-5, rtol=0)


def test_first_patch_that_does_not_fit() -> None:
    clip, pixels = make_clip(), images()
    probe = AttentionProbe(clip, first_patch=lambda layer: 4)
    with probe.recording() as record:
        clip.get_image_features(pixel_values=pixels)
    with pytest.raises(FVGError, match="layer 2 has 17 tokens, which do not hold 4x4 patches from token 4 on"):
        record.attention()
    with probe.recording() as record:
        clip.get_image_features(pixel_values=images(24, 56), interpolate_pos_encoding=True)
    with pytest.raises(FVGError, match="layer 2 has 22 tokens, which do not hold 3x7 patches from token 4 on"):
        record.attention()


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[3], [-4], ["last"], "last", [True], [0.0], 7])
def test_layers_that_do_not_exist(layers: Any) -> None:
    clip = make_clip()
    before = hooks_and_attributes(clip)
    with pytest.raises(FVGError, match=r"does not exist: the vision tower has 3 layers, numbered 0 to 2, or -3 to -1"):
        AttentionProbe(clip, layers)
    assert hooks_and_attributes(clip) == before


def test_no_layers_no_forward_no_encoder() -> None:
    clip = make_clip()
    with pytest.raises(FVGError, match="layers is empty"):
        AttentionProbe(clip, [])
    with record_attention(clip) as record:
        for _ in range(2):
            with pytest.raises(FVGError, match="no forward was recorded"):
                record.attention()
    with pytest.raises(TypeError, match="Linear is not a dual encoder"), record_attention(nn.Linear(2, 2)):
        pass
    with pytest.raises(TypeError, match="not a dual encoder"):
        AttentionProbe(clip.text_model)


@pytest.mark.parametrize("module", [attention, attention_kernels])
def test_examples(module: Any) -> None:
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0 and result.attempted > 0


def test_a_hook_that_another_thread_is_just_attaching_does_no_harm(small_clip: CLIPModel) -> None:
    """torch attaches a hook in two steps; between them a running forward calls it without keyword arguments."""
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = small_clip.get_image_features(pixel_values=pixels)
    probe = AttentionProbe(small_clip, layers="all")
    for module in small_clip.modules():
        module._forward_pre_hooks_with_kwargs.clear()
    with torch.no_grad():
        again = small_clip.get_image_features(pixel_values=pixels)
    assert torch.equal(pooled(plain), pooled(again))
    probe.detach()
