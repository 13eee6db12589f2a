# %% [markdown]
# # Tune and wrap in your own loop
#
# **What you will have:** prompts and FVG-PT trained by a loop that is yours line by line, what each loss did, and your model back
# as it was, byte for byte.
#
# **For ViT-B/16 and real data** change the next two lines, `MODEL` and `DATA`.

# %%
MODEL = "../pocket/model"  # real: "openai/clip-vit-base-patch16"
DATA = "../pocket/data"  # real: a folder with train/<class>/, test/<class>/ and mask/

# %%
import matplotlib.pyplot as plt
import torch
from torch.utils.data import DataLoader
from transformers import CLIPModel, CLIPTokenizer

from fvg_adapter import unwrap, wrap
from fvg_adapter.data import MaskedImageFolder, base_new_split, collate, few_shot_indices, transform_for
from fvg_adapter.tuners import CoOp

torch.manual_seed(1)
clip = CLIPModel.from_pretrained(MODEL)
tokenizer = CLIPTokenizer.from_pretrained(MODEL)
before = {name: value.clone() for name, value in clip.state_dict().items()}

pictures = MaskedImageFolder(DATA, "train", transform=transform_for(clip.config.vision_config.image_size, train=True))
base, _ = base_new_split(pictures.classes)
shots, _ = few_shot_indices(pictures.labels, 16, seed=1)
few = pictures.subset(shots).keep_classes(base)
loader = DataLoader(few, batch_size=32, shuffle=True, collate_fn=collate)
print({name: tuple(value.shape) for name, value in next(iter(loader)).items()})

# %% [markdown]
# Stage one. The tuner is a module like any other; only the prompt's context vectors learn.

# %%
tuner = CoOp(clip, tokenizer, few.classes)
optimizer = torch.optim.SGD(tuner.trainable_parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
tuning = []
for epoch in range(4):
    for batch in loader:
        loss = tuner(batch["pixel_values"], batch["labels"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tuning.append(loss.item())

# %% [markdown]
# Stage two. The batch carries `pixel_values`, `labels` and, where there are any, `foreground_mask`; `model(**batch).loss` is the
# whole loss of FVG-PT, and the tuner stays frozen.

# %%
model = wrap(tuner)
optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.0035, momentum=0.9, weight_decay=5e-4)
terms, trust = [], []
for epoch in range(4):
    for batch in loader:
        output = model(**batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        terms.append({name: value.item() for name, value in output.losses.items()})
        trust.append(output.foreground_trust.mean().item())

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
left.plot(tuning)
left.set(title="stage one: cross entropy", xlabel="step")
for name in terms[0]:
    middle.plot([term[name] for term in terms], label=name)
middle.set(title="stage two: the five losses", xlabel="step")
middle.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
right.plot(trust)
right.set(title="mean trust in the foreground, r", xlabel="step")
plt.show()

# %% [markdown]
# `unwrap` gives back what was wrapped, `detach` takes the tuner off your CLIP:

# %%
assert unwrap(model) is tuner
assert tuner.detach() is clip
assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())
print("every tensor of the CLIP is what it was, and nothing hangs on it:", not clip.vision_model._forward_hooks)
