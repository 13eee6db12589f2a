"""Foreground masks from segmentation models: one source over transformers' families, for `wrap(…, foreground=…)`.

```python
segmenter = Segmenter.from_pretrained("CIDAS/clipseg-rd64-refined")          # asked with the class name of each picture
model = wrap(clip, tokenizer, classes, foreground=segmenter)
```
"""

from fvg_adapter.segmenters.cleaning import clean
from fvg_adapter.segmenters.labels import STUFF
from fvg_adapter.segmenters.named import source_named
from fvg_adapter.segmenters.segmenter import Segmenter

__all__ = ["STUFF", "Segmenter", "clean", "source_named"]
