# %% [markdown]
# # Quickstart
#
# **What you will have:** a CLIP with tuned prompts and FVG-PT behind it, its accuracy on tuned and on unseen classes beside plain
# CLIP and the tuner alone, a small file of what it learnt, and a picture of where it looks. It takes well under a minute on two cores.
#
# **For ViT-B/16 and real data** change the next two lines, `MODEL` and `DATA`, and nothing else.

# %%
MODEL = "../pocket/model"  # real: "openai/clip-vit-base-patch16"
DATA = "../pocket/data"  # real: a folder with train/<class>/, test/<class>/ and mask/

# %%
import tempfile
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPTokenizer

from fvg_adapter import FeatureBank, evaluate, load, wrap
from fvg_adapter.data import MaskedImageFolder, base_new_split, few_shot_indices, transform_for
from fvg_adapter.train import fit
from fvg_adapter.tuners import CoOp, Stage, ZeroShot

torch.manual_seed(1)
clip = CLIPModel.from_pretrained(MODEL)
tokenizer = CLIPTokenizer.from_pretrained(MODEL)
size = clip.config.vision_config.image_size

# %% [markdown]
# Sixteen pictures a class of the first half of the classes ("base"); the other half ("new") is never trained on.

# %%
train = MaskedImageFolder(DATA, "train", transform=transform_for(size, train=True, scale=(0.5, 1.0)))
test = MaskedImageFolder(DATA, "test", transform=transform_for(size, train=False))
base, new = base_new_split(test.classes)
shots, _ = few_shot_indices(train.labels, 16, seed=1)
few = train.subset(shots).keep_classes(base)
base_test, new_test = test.keep_classes(base), test.keep_classes(new)
print(len(few), "pictures of", ", ".join(few.classes))

# %% [markdown]
# Stage one, prompts; stage two, FVG-PT behind the frozen tuner. A `FeatureBank` encodes the pictures once, since neither stage
# changes the image tower.

# %%
tuner = CoOp(clip, tokenizer, few.classes)
fit(tuner, FeatureBank.encode(tuner, few, views=4), recipe=Stage("sgd", 0.05, 32, "here", epochs=20), progress=False)

model = wrap(tuner, foreground="given")  # masks come with the pictures; "attention" needs none
result = fit(model, FeatureBank.encode(model, few, views=4), progress=False)
print(model.status())

# %%
plain = ZeroShot(clip, tokenizer, few.classes)
for name, scored in (("CLIP", plain), ("CoOp", tuner), ("CoOp + FVG-PT", model)):
    found = evaluate(scored, base_test, new_test)
    print(
        f"{name:14} base {found['base']:.1f}  new {found['new']:.1f}  HM {found['hm']:.1f}  joint {found['joint_hm']:.1f}"
    )

# %% [markdown]
# One seed of one small task: a look at how things work, not a result. `docs/results.md` has nine tasks, three seeds and the controls.
#
# Where it looks, and what the three answer:

# %%
from IPython.display import Image

from fvg_adapter.visualize import before_after

folder = Path(tempfile.mkdtemp())
Image(before_after(model, base_test, folder / "look.png", new_set=new_test, pictures=4))

# %% [markdown]
# Save it, load it, ask about any names:

# %%
model.save_pretrained(folder / "adapter")
print({file.name: file.stat().st_size for file in sorted((folder / "adapter").iterdir())})
again = load(folder / "adapter", clip=clip, tokenizer=tokenizer)
picture = new_test.with_transform(None)[0]["image"]
again.predict(picture, classes=[*new_test.classes, "purple turnip"], top_k=3)
