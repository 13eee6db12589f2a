"""Pictures with labels and foreground masks: folders, Hub data sets, paired augmentation, few-shot and base/new splits.

```python
train = MaskedImageFolder("pets", "train", transform=PairedTransform(224, train=True))
shots, _ = few_shot_indices(train.labels, 16, seed=1)          # before the base/new cut, as CoOp draws
base, new = base_new_split(train.classes)
loader = DataLoader(train.subset(shots).keep_classes(base), batch_size=4, shuffle=True, collate_fn=collate)
```
"""

from fvg_adapter.data.base import MaskedDataset, Problem
from fvg_adapter.data.errors import (
    DataError,
    DataFileError,
    SuspiciousMasksWarning,
    UnreadableImageError,
    UnreadableImageWarning,
)
from fvg_adapter.data.folder import MaskedImageFolder, Sample
from fvg_adapter.data.hub import MaskedHubDataset, load_hub
from fvg_adapter.data.loading import collate, open_dataset
from fvg_adapter.data.splits import base_new_split, few_shot_indices, select_classes
from fvg_adapter.data.transforms import CLIP_MEAN, CLIP_STD, PairedTransform, transform_for

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "DataError",
    "DataFileError",
    "MaskedDataset",
    "MaskedHubDataset",
    "MaskedImageFolder",
    "PairedTransform",
    "Problem",
    "Sample",
    "SuspiciousMasksWarning",
    "UnreadableImageError",
    "UnreadableImageWarning",
    "base_new_split",
    "collate",
    "few_shot_indices",
    "load_hub",
    "open_dataset",
    "select_classes",
    "transform_for",
]
