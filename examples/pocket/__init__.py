"""The pocket suite: a CLIP and few-shot tasks small enough to build, tune and break on a laptop.

A test bench for FVG-PT, not a claim about natural images. Stages: `glyphs` (pictographs from npm packages),
`backgrounds` and `compose` (pictures with true masks), `pretrain` (the pocket CLIP), `tasks` (image folders),
`preconditions` (is there a background shortcut to repair?). `python -m examples.pocket.build` runs them all. It may
import numpy, PIL, torch and transformers; only `preconditions` imports `fvg_adapter`.
"""
