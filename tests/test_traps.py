"""Every trap of the authors' code, fallen into on purpose: the golden tests must notice each.

A copy of the package is changed in one place, and the tests that should notice are run against it: a process each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


class Trap(NamedTuple):
    """A file of the package, what stands in it, what the mistake would be, and the tests that must fail."""

    file: str
    right: str
    wrong: str
    tests: str


COOP, KGCOOP, SRC, MMRL = (f"test_golden_{name}.py" for name in ("coop", "kgcoop", "promptsrc", "mmrl"))
TRAPS = {
    "prompts without their full stop": Trap(
        "tuners/prompts.py",
        '[f"{words} {plain(c)}." for c in classes]',
        '[f"{words} {plain(c)}" for c in classes]',
        COOP,
    ),
    "underscores in names": Trap("tuners/prompts.py", 'name.replace("_", " ").strip()', "name.strip()", COOP),
    "middle: the larger half first": Trap("tuners/prompts.py", "n_ctx // 2 if", "n_ctx // 2 + 1 if", COOP),
    "names counted with start and end": Trap(
        "tuners/prompts.py", '["input_ids"]) - 2  # without', '["input_ids"])  # without', COOP
    ),
    "weight decay spares the prompts": Trap(
        "tuners/recipes.py",
        "momentum=self.momentum, weight_decay=self.weight_decay",
        "momentum=self.momentum",
        "test_recipes.py",
    ),
    "Nesterov": Trap(
        "tuners/recipes.py",
        "momentum=self.momentum, weight_decay=self.weight_decay",
        "momentum=self.momentum, weight_decay=self.weight_decay, nesterov=True",
        "test_recipes.py",
    ),
    "a schedule that reaches 0": Trap(
        "tuners/recipes.py",
        "math.pi * (epoch - warmup_epochs) / epochs",
        "math.pi * epoch / (epochs - 1)",
        "test_recipes.py",
    ),
    "the teacher has the student's prompt": Trap(
        "tuners/kgcoop.py", "fill(self._teacher_template, name) for", 'fill("a photo of a {}.", name) for', KGCOOP
    ),
    "prompts appended instead of put in": Trap(
        "tuners/promptsrc.py", "return _put(output, self.text_ctx, 1)", "return _put(output, self.text_ctx, 2)", SRC
    ),
    "deep prompts off by one layer": Trap(
        "tuners/promptsrc.py", "layer = encoder.text_layers[k]", "layer = encoder.text_layers[k - 1]", SRC
    ),
    "vision prompts before the patches": Trap(
        "tuners/promptsrc.py", "first = hidden.shape[1] - self._n_vision", "first = 1", SRC
    ),
    "vision prompts off by one layer": Trap(
        "tuners/promptsrc.py", "layer = encoder.vision_layers[k]", "layer = encoder.vision_layers[k - 1]", SRC
    ),
    "templates normalised one by one": Trap(
        "tuners/promptsrc.py",
        "total + self._encode(self.tokenized([fill(template, c) for c in self.classes]))",
        "total + F.normalize(self._encode(self.tokenized([fill(template, c) for c in self.classes])), dim=-1)",
        SRC,
    ),
    "the KL divided by B": Trap("tuners/promptsrc.py", "divergence / logits.numel()", "divergence / len(logits)", SRC),
    "the KL the other way round": Trap(
        "tuners/promptsrc.py",
        "F.kl_div(F.log_softmax(logits, dim=-1), target,",
        "F.kl_div(target, F.log_softmax(logits, dim=-1),",
        SRC,
    ),
    "epochs averaged from 0": Trap("tuners/averaging.py", "torch.arange(1, epochs + 1", "torch.arange(0, epochs", SRC),
    "rep layers counted from 0": Trap(
        "tuners/mmrl.py", "layer = layers[number - 1]", "layer = layers[number % len(layers)]", MMRL
    ),
    "rep tokens inserted in every layer": Trap(
        "tuners/mmrl.py",
        "behind = hidden[:, 1:] if index == 0 else hidden[:, 1 + self._n_rep :]",
        "behind = hidden[:, 1:]",
        MMRL,
    ),
    "the end of text not where it is": Trap(
        "tuners/mmrl.py",
        "(torch.cat([hidden[:, :1], hidden[:, 1 + self._n_rep :]], dim=1), *args[1:])",
        "(hidden[:, : -self._n_rep], *args[1:])",
        MMRL,
    ),
    "the mean before the LayerNorm": Trap(
        "tuners/mmrl.py",
        "self.encoder.vision.post_layernorm(_THREAD.tokens)",
        "self.encoder.vision.post_layernorm(_THREAD.tokens.mean(1, keepdim=True))",
        MMRL,
    ),
    "the CLIP's own scale": Trap("tuners/mmrl.py", "LOGIT_SCALE = 100.0", "LOGIT_SCALE = 14.0", MMRL),
    "one map for all layers": Trap("tuners/mmrl.py", "self.r2v_weight[index]", "self.r2v_weight[0]", MMRL),
    "cross entropy of the fusion": Trap(
        "tuners/mmrl.py", "F.cross_entropy(self.scores(main, text), labels)", "F.cross_entropy(logits, labels)", MMRL
    ),
    "a regulariser on r": Trap(
        "tuners/mmrl.py", "F.cosine_similarity(main, plain[0]", "F.cosine_similarity(rep, plain[0]", MMRL
    ),
    "new classes scored by the fusion": Trap(
        "tuners/mmrl.py",
        "return self._fused(main, rep), main",
        "return self._fused(main, rep), self._fused(main, rep)",
        MMRL,
    ),
    "stale text features": Trap(
        "tuners/cache.py", "any(p.requires_grad for p in parameters)", "False", f"{MMRL} test_model.py"
    ),
}


def copied(folder: Path) -> Path:
    """The package and its tests in a folder of their own; the golden files are linked."""
    ignored = shutil.ignore_patterns("__pycache__", "golden")
    for part in ("fvg_adapter", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    (folder / "tests" / "golden").symlink_to(ROOT / "tests" / "golden")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(folder: Path, tests: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    files = [f"tests/{name}" for name in tests.split()]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *files], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", TRAPS)
def test_the_golden_tests_notice(name: str, tmp_path: Path) -> None:
    trap = TRAPS[name]
    changed = copied(tmp_path) / "fvg_adapter" / trap.file
    text = changed.read_text("utf-8")
    assert trap.right in text, f"{trap.file} has no {trap.right!r} any more; bring this trap up to date"
    changed.write_text(text.replace(trap.right, trap.wrong), "utf-8")
    found = run(tmp_path, trap.tests)
    assert found.returncode == 1, found.stdout[-1500:] + found.stderr[-500:]
    assert " failed" in found.stdout, found.stdout[-1500:]


def test_without_a_mistake_they_pass(tmp_path: Path) -> None:
    found = run(copied(tmp_path), f"{COOP} {KGCOOP}")
    assert found.returncode == 0, found.stdout[-1500:]
