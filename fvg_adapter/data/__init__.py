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
    ClassNameWarning,
    DataError,
    DataFileError,
    SuspiciousMasksWarning,
    UnreadableImageError,
    UnreadableImageWarning,
)
from fvg_adapter.data.files import Files, HubFiles, LocalFiles
from fvg_adapter.data.folder import MaskedImageFolder, Sample
from fvg_adapter.data.hub import MaskedHubDataset, load_hub
from fvg_adapter.data.listed import ListedDataset
from fvg_adapter.data.loading import collate, open_dataset
from fvg_adapter.data.paper_layouts import PaperSet
from fvg_adapter.data.paper_sets import ELEVEN, PAPER_SETS, VARIANTS, open_paper_set, open_release, paper_set
from fvg_adapter.data.splits import base_new_split, few_shot_indices, select_classes
from fvg_adapter.data.transforms import CLIP_MEAN, CLIP_STD, PairedTransform, transform_for

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "ClassNameWarning",
    "DataError",
    "DataFileError",
    "ELEVEN",
    "Files",
    "HubFiles",
    "ListedDataset",
    "LocalFiles",
    "MaskedDataset",
    "MaskedHubDataset",
    "MaskedImageFolder",
    "PAPER_SETS",
    "PairedTransform",
    "PaperSet",
    "Problem",
    "Sample",
    "SuspiciousMasksWarning",
    "UnreadableImageError",
    "UnreadableImageWarning",
    "VARIANTS",
    "base_new_split",
    "collate",
    "few_shot_indices",
    "load_hub",
    "open_dataset",
    "open_paper_set",
    "open_release",
    "paper_set",
    "select_classes",
    "transform_for",
]
