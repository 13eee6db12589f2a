"""Recording under what users do to models: threads, checkpoints, compilers, kernels, processes, long runs."""

from __future__ import annotations

import gc
import logging
import os
import socket
import subprocess
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AttentionInterface

from conftest import checkpoint_activations
from fvg_adapter import FVGModel, record_attention, wrap
from fvg_adapter import losses as L
from fvg_adapter.attention import AttentionProbe
from fvg_adapter.errors import FVGError
from fvg_adapter.towers import DualEncoder
from fvg_adapter.tuners import MMRL, CoOp, PromptSRC

NAMES = ["cat", "dog", "car"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def images(factor: float = 1.0) -> Tensor:
    return factor * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def features(model: nn.Module, pixels: Tensor) -> Tensor:
    return DualEncoder(model).image_features(pixels)


def looks(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention, rollout, and the relevance of two scores, one after the other."""
    with record_attention(model, "all", rollout=True, relevance=True) as record:
        found = features(model, pixels.clone().requires_grad_())
        relevance = [record.relevance(found[:, i]) for i in range(2)]
    return record.attention(), record.rollout(), relevance[0], relevance[1]


# -- threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_recorders_come_and_go_in_several_threads(family: str) -> None:
    """Each thread attaches and removes hooks of its own on one model, while the others run it."""
    model = families.tiny(family).requires_grad_(False)
    expected = [looks(model, images(i + 1)) for i in range(3)]
    wrong: list[str] = []

    def work(index: int) -> None:
        try:
            for _ in range(15):
                for a, b in zip(looks(model, images(index + 1)), expected[index], strict=True):
                    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong, wrong[0]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_hook_that_is_half_attached_does_no_harm() -> None:
    """torch attaches a hook in two steps; between them another thread calls it without keyword arguments."""
    model = families.tiny("clip")
    with record_attention(model, "all", rollout=True, relevance=True):
        for module in model.modules():
            module._forward_pre_hooks_with_kwargs.clear()
            module._forward_hooks_with_kwargs.clear()
        thread = threading.Thread(target=lambda: done.append(features(model, images())))
        done: list[Tensor] = []
        thread.start()
        thread.join()
    assert len(done) == 1


def test_recorders_inside_recorders() -> None:
    model = families.tiny("clip")
    expected = looks(model, images())
    with record_attention(model, "all", rollout=True, relevance=True) as outer:
        inner = looks(model, images())
        other = features(model, images(2.0).requires_grad_())
        relevance = outer.relevance(other[:, 0])
    assert all(torch.equal(a, b) for a, b in zip(inner, expected, strict=True))
    assert torch.equal(outer.rollout(), looks(model, images(2.0))[1])
    assert torch.equal(relevance, looks(model, images(2.0))[2])
    assert torch.equal(relevance, outer.relevance(other[:, 0]))  # behind the block too, as long as the graph is there


# -- checkpoints, compilers, kernels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["clip", "altclip", "siglip"])
def test_relevance_with_gradient_checkpointing(family: str) -> None:
    model = families.tiny(family)
    expected = looks(model, images())
    checkpoint_activations(model, use_reentrant=False)
    for a, b in zip(looks(model.train(), images()), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_relevance_with_reentrant_checkpointing_says_what_to_do() -> None:
    model = families.tiny("clip")
    rollout = looks(model, images())[1]
    checkpoint_activations(model, use_reentrant=True)
    model.train()
    with record_attention(model, rollout=True, relevance=True) as record:
        found = features(model, images().requires_grad_())
        with pytest.raises(FVGError, match="Reentrant gradient checkpointing cuts the graph: use.*use_reentrant"):
            record.relevance(found[:, 0])
    torch.testing.assert_close(record.rollout(), rollout)


@pytest.fixture
def dynamo() -> Iterator[None]:
    trace = logging.getLogger("torch.__trace")  # pytest's log capture would turn minutes of structured tracing on
    level = trace.level
    trace.setLevel(logging.WARNING)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    trace.setLevel(level)


@pytest.mark.parametrize("before", [True, False])
def test_compiled_models_have_no_rollout_and_no_relevance(before: bool, dynamo: None) -> None:
    model = families.tiny("clip")
    compiled: Any = torch.compile(model.vision_model, backend="eager")
    if before:
        compiled(pixel_values=images().requires_grad_())
    with record_attention(compiled, rollout=True, relevance=True) as record:
        output = compiled(pixel_values=images().requires_grad_())
        with pytest.raises(FVGError, match=r"no rollout was recorded.*give the model that torch\.compile was given"):
            record.rollout()
        with pytest.raises(FVGError, match=r"nothing was recorded for relevance.*torch\.compile was given"):
            record.relevance(output.pooler_output[:, 0])


def test_relevance_under_autocast() -> None:
    model = families.tiny("clip")
    expected = looks(model, images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = looks(model, images())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.03 * float(b.max()), rtol=0)


def flash(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    """As flash attention: (B, N, heads, d), no weights, no mask of four dimensions."""
    assert mask is None or mask.dim() == 2
    return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("family", ["clip", "metaclip_2", "siglip", "aimv2"])
def test_kernels_that_give_no_weights(family: str) -> None:
    """FlashAttention needs a GPU; what the hooks see of it is an implementation that returns no weights."""
    AttentionInterface.register("flash_like", flash)
    model = families.tiny(family)
    expected = looks(model, images())
    DualEncoder(model).vision.config._attn_implementation = "flash_like"
    for a, b in zip(looks(model, images()), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("when", ["before", "inside"])
def test_relevance_with_lora(when: str) -> None:
    """Adapters on every projection, there before the hooks or injected behind them, against autograd."""
    model = families.tiny("clip", "eager").requires_grad_(False)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    if when == "before":
        inject_adapter_in_model(config, model.vision_model)
    kept: list[Any] = []
    with record_attention(model, "all", rollout=True, relevance=True) as record:
        if when == "inside":
            inject_adapter_in_model(config, model.vision_model)
        model.eval()
        with families.giving_weights(DualEncoder(model).vision, kept):
            found = features(model, images().requires_grad_())
        weights = kept[0]
        gradients = torch.autograd.grad(found[:, 0].sum(), weights, retain_graph=True)
        relevance = record.relevance(found[:, 0])
    total = rolled = torch.eye(17)
    for weight, gradient in zip(weights, gradients, strict=True):
        total = total + (weight * gradient).relu().mean(1) @ total
        rolled = (0.5 * weight.mean(1) + 0.5 * torch.eye(17)) @ rolled
    expected, flow = (x[:, 0, 1:].reshape(2, 4, 4).detach() for x in (total, rolled))
    torch.testing.assert_close(relevance, expected, atol=1e-4 * float(expected.max()), rtol=1e-3)
    torch.testing.assert_close(record.rollout(), flow, atol=1e-6, rtol=1e-4)
    assert torch.equal(looks(model, images())[1], record.rollout())


# -- FVG models --------------------------------------------------------------------------------------------------------


def fvg(kind: Any, tokenizer: Any) -> FVGModel:
    options: dict[Any, dict[str, Any]] = {
        PromptSRC: {"prompt_depth_text": 2, "prompt_depth_vision": 2},
        MMRL: {"rep_layers": [2], "rep_dim": 8},
    }
    tuner = kind(families.tiny("clip"), tokenizer, NAMES, **options.get(kind, {}))
    with torch.no_grad():
        for parameter in tuner.trainable_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return wrap(tuner).eval()


@pytest.mark.parametrize("names", [NAMES, ["fox", "owl"], ["cat", "dog", "owl"]], ids=["base", "new", "joint"])
@pytest.mark.parametrize("kind", [CoOp, PromptSRC, MMRL])
def test_the_tuned_pass_is_recorded_not_the_plain_one_behind_it(kind: Any, names: list[str], tokenizer: Any) -> None:
    model = fvg(kind, tokenizer)
    with record_attention(model.tuner, "all", rollout=True) as expected, torch.no_grad():
        model.tuner.image_features(images())
    with model.use_classes(names), record_attention(model, "all", rollout=True, relevance=True) as record:
        logits = model(images().requires_grad_()).logits
        maps = [record.relevance(logits[:, label]) for label in (0, 1)]
    torch.testing.assert_close(record.attention(), expected.attention())
    torch.testing.assert_close(record.rollout(), expected.rollout())
    assert maps[0].max() > 0 and not torch.allclose(maps[0], maps[1])


def test_relevance_of_the_new_branch_is_that_of_autograd(tokenizer: Any) -> None:
    """z_PC mixes the tuner's and plain CLIP's logits; behind CoOp both come from the same pictures."""
    model = fvg(CoOp, tokenizer)
    encoder = model.tuner.encoder
    encoder.vision.config._attn_implementation = "eager"
    kept: list[Any] = []
    with model.use_classes(["fox", "owl"]):
        with families.giving_weights(encoder.vision, kept):
            features = model.tuner.image_features(images().requires_grad_())
        weights = kept[0][-1]  # (B, heads, N, N)
        full = model.tuner.scores(features, model.tuner.text_features())
        prior = model.tuner.scores(features, model.tuner.prior_text_features())
        b = torch.sigmoid(model.backbone_gate(L.prior_cues(full, prior, model.config.temperature)))
        logits = (1 - b[:, None]) * full + b[:, None] * prior
        gradient = torch.autograd.grad(logits[:, 0].sum(), weights)[0]
        with record_attention(model, relevance=True) as record:
            again = model(images().requires_grad_()).logits
            found = record.relevance(again[:, 0])
    torch.testing.assert_close(again, logits)
    expected = (gradient * weights).relu().mean(1)[:, 0, 1:].reshape(2, 4, 4).detach()
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.max()), rtol=1e-3)


def test_training_reaches_no_tuner_through_the_new_branch(tokenizer: Any) -> None:
    model = fvg(CoOp, tokenizer).train()
    pixels = images().requires_grad_()
    model(pixels, torch.tensor([0, 2]), foreground_mask=torch.ones(2, 1, 32, 32)).loss.backward()
    assert pixels.grad is None and all(p.grad is None for p in model.tuner.parameters())


# -- long runs ---------------------------------------------------------------------------------------------------------


def tensor_bytes() -> tuple[int, int]:
    """How many tensors are alive, and the bytes of their storage, each counted once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alive: list[Any] = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    return len(alive), sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())


def record_often(model: nn.Module, probe: AttentionProbe, times: int) -> None:
    pixels = images()[:1]
    for _ in range(times):
        with record_attention(model, "all", rollout=True, relevance=True) as record:
            record.relevance(features(model, pixels.clone().requires_grad_())[:, 0])
        with torch.no_grad(), probe.recording() as kept:
            features(model, pixels)
        assert record.attention().shape == kept.attention().shape


@pytest.mark.parametrize("times", [60, pytest.param(5_000, marks=pytest.mark.slow)])
def test_nothing_grows_over_many_forwards(times: int) -> None:
    """Two forwards a turn. Without the collector of cycles: what a block made is gone when it ends."""
    model = families.tiny("clip").requires_grad_(False)
    probe = AttentionProbe(model, "all")
    record_often(model, probe, 20)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        before, traced = tensor_bytes(), tracemalloc.get_traced_memory()[0]
        record_often(model, probe, times)
        assert tensor_bytes() == before
        grown = tracemalloc.get_traced_memory()[0] - traced
        assert grown < 1_000_000  # Python's own; torch and transformers fill half of it once, whoever calls
    finally:
        tracemalloc.stop()
        gc.enable()
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_record_that_is_kept_keeps_rows_and_no_model() -> None:
    model = families.tiny("clip")
    with record_attention(model, "all") as record, torch.no_grad():
        features(model, images())
    assert not record._pending and {type(v) for v in record._rows.values()} == {Tensor}
    kept = sum(r.untyped_storage().nbytes() for r in record._rows.values())
    assert kept == 3 * 2 * 4 * 17 * 4  # layers · B · heads · N · 4 bytes


# -- processes ---------------------------------------------------------------------------------------------------------

SCRIPT = """
import gc, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import families
from torch.nn.parallel import DistributedDataParallel
from fvg_adapter import record_attention
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
class Features(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.clip = families.tiny("clip")
    def forward(self, pixels):
        found = self.clip.get_image_features(pixel_values=pixels)
        return found if torch.is_tensor(found) else found.pooler_output
model = DistributedDataParallel(Features(), find_unused_parameters=True)
pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
with record_attention(model, "all", differentiable=True, rollout=True, relevance=True) as record:
    features = model(pixels.requires_grad_())
    relevance = record.relevance(features[:, 0])
(features.sum() + record.attention().pow(2).sum()).backward()
with record_attention(model.module.clip, "all", rollout=True, relevance=True) as alone:
    again = Features.forward(model.module, pixels)
    torch.testing.assert_close(alone.relevance(again[:, 0]), relevance)
torch.testing.assert_close(alone.attention(), record.attention().detach())
torch.testing.assert_close(alone.rollout(), record.rollout())
gradient = model.module.clip.vision_model.encoder.layers[0].self_attn.q_proj.weight.grad.clone()
other = gradient.clone()
dist.broadcast(other, 0)
torch.testing.assert_close(other, gradient)
maps = [torch.zeros_like(alone.attention()) for _ in range(2)]
dist.all_gather(maps, alone.attention().contiguous())
assert not torch.allclose(maps[0], maps[1])
del model
gc.collect()  # DDP in a cycle would keep the threads of gloo
dist.destroy_process_group()
print("fine")
"""


def test_two_processes_record_their_own(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, "utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = Path(__file__).parent
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(here)],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [process.communicate(timeout=180) for process in processes]
    assert [(p.returncode, out) for p, (out, _) in zip(processes, ends, strict=True)] == [(0, "fine\n")] * 2, ends
