"""Training on transformers.Trainer: `fit` for tuners and for the heads of an FVGModel (METHOD.md section 7)."""

from fvg_adapter.train.fitting import PRECISIONS, FitResult, fit

__all__ = ["PRECISIONS", "FitResult", "fit"]
