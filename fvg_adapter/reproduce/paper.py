"""The paper's figures (arXiv 2603.08708; averages of eleven data sets, ViT-B/16), to stand beside measured ones."""

from __future__ import annotations

from collections.abc import Mapping

HM: Mapping[str, tuple[float, float]] = {
    "coop": (75.09, 77.76),
    "kgcoop": (76.88, 78.10),
    "promptsrc": (77.24, 77.89),
    "mmrl": (80.10, 80.75),
}
"""Base-to-new: HM of the average base and the average new accuracy, alone and with FVG-PT, by `Tuner.kind`."""

TARGETS: Mapping[str, tuple[float, float]] = {
    "coop": (64.57, 65.72),
    "kgcoop": (65.41, 65.82),
    "promptsrc": (64.76, 65.03),
    "mmrl": (66.47, 66.99),
}
"""Cross-dataset: average accuracy of the targets, alone and with FVG-PT."""

ABLATION: Mapping[str, tuple[float, float]] = {
    "alone": (80.94, 70.03),
    "fvg [FDC only]": (81.04, 63.14),
    "fvg [PC only]": (80.94, 73.62),
    "fvg [FRG+FDC]": (82.40, 63.45),
    "fvg [FDC+PC]": (81.04, 73.62),
    "fvg": (82.40, 73.62),
}
"""Average base and new accuracy behind CoOp, by row."""

SWEEPS: Mapping[str, float] = {
    "fvg [lambda_d=1]": 77.50,
    "fvg [lambda_d=50]": 77.60,
    "fvg [width=16]": 77.50,
    "fvg [width=32]": 77.53,
    "fvg [width=128]": 77.62,
}
"""HM behind CoOp, by row; λ_d = 10 and width 64 are the setting itself (77.76)."""
