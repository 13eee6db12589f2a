# %% [markdown]
# # Look at attention before and after tuning
#
# **What you will have:** maps of where a CLIP looks, before and after its image tower is tuned, layer by layer, and one number for
# it: the share of attention inside the foreground.
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

from fvg_adapter import record_attention
from fvg_adapter.data import MaskedImageFolder, base_new_split, collate, few_shot_indices, transform_for
from fvg_adapter.features import attention_in_mask
from fvg_adapter.tuners import LoRA

torch.manual_seed(1)
clip = CLIPModel.from_pretrained(MODEL).eval()
tokenizer = CLIPTokenizer.from_pretrained(MODEL)
size = clip.config.vision_config.image_size
train = MaskedImageFolder(DATA, "train", transform=transform_for(size, train=True, scale=(0.5, 1.0)))
test = MaskedImageFolder(DATA, "test", transform=transform_for(size, train=False))
base, _ = base_new_split(test.classes)
shots, _ = few_shot_indices(train.labels, 16, seed=1)
few = train.subset(shots).keep_classes(base)
seen = test.keep_classes(base)
batch = collate([seen[i] for i in range(0, len(seen), 3)])
pixels, masks = batch["pixel_values"], batch["foreground_mask"]


# %% [markdown]
# `record_attention` reads every layer of an ordinary forward. It changes nothing about how the model computes, and its hooks are gone
# when the block ends.


# %%
@torch.no_grad()
def look() -> torch.Tensor:
    with record_attention(clip, layers="all") as record:
        clip.get_image_features(pixel_values=pixels)
    return record.attention().mean(2)  # (B, layers, h, w), mean over heads


before = look()
print("pictures, layers, rows and columns of patches:", tuple(before.shape))

# %% [markdown]
# CoOp and KgCoOp tune text alone and leave these maps as they are. LoRA changes the towers; so do PromptSRC and MMRL.

# %%
tuner = LoRA(clip, tokenizer, few.classes)
optimizer = torch.optim.AdamW(tuner.trainable_parameters(), lr=2e-3)
loader = DataLoader(few, batch_size=32, shuffle=True, collate_fn=collate)
tuner.train()
for epoch in range(8):
    for items in loader:
        tuner(items["pixel_values"], items["labels"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
tuner.eval()
after = look()

# %%
layers = before.shape[1]


def inside(maps: torch.Tensor) -> list[float]:
    return [float(attention_in_mask(maps[:, layer], masks).mean()) for layer in range(layers)]


area = float(masks.float().mean())
figure, axis = plt.subplots(figsize=(5.5, 2.8), layout="constrained")
for name, maps in (("before", before), ("after LoRA", after)):
    axis.plot(range(layers), inside(maps), marker="o", label=name)
axis.axhline(area, color="grey", linestyle=":", label="attention spread evenly")
axis.set(xlabel="layer", ylabel="share inside the foreground", xticks=range(layers), ylim=(0, 1))
axis.legend(loc="upper left")
plt.show()
print(f"last layer: {inside(before)[-1]:.3f} before, {inside(after)[-1]:.3f} after")

# %%
mean, std = torch.tensor([0.4815, 0.4578, 0.4082]), torch.tensor([0.2686, 0.2613, 0.2758])
shown = (pixels * std.view(3, 1, 1) + mean.view(3, 1, 1)).clamp(0, 1).permute(0, 2, 3, 1)
changed = (after[:, -1] - before[:, -1]).abs().sum((1, 2)).argsort(descending=True)[:6]
figure, axes = plt.subplots(3, 6, figsize=(7.5, 4), dpi=80, layout="constrained")
for column, index in enumerate(changed.tolist()):
    top = float(torch.maximum(before[index, -1], after[index, -1]).max())
    axes[0, column].imshow(shown[index])
    axes[0, column].contour(masks[index, 0], levels=[0.5], colors="magenta", linewidths=1)
    axes[0, column].set_title(few.classes[int(batch["labels"][index])], fontsize=8)
    for row, maps in ((1, before), (2, after)):
        axes[row, column].imshow(shown[index])
        heat = torch.nn.functional.interpolate(maps[index, -1][None, None], shown.shape[1:3], mode="bilinear")[0, 0]
        axes[row, column].imshow(heat, cmap="inferno", alpha=0.6, vmin=0, vmax=top)
axes[1, 0].set_ylabel("before")
axes[2, 0].set_ylabel("after")
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
figure.suptitle("The six pictures whose attention changed most", fontsize=10)
plt.show()

# %% [markdown]
# `record_attention(clip, rollout=True)` follows all layers together, and `relevance=True` gives maps for one class's score:
# `record.rollout()`, `record.relevance(score)`.

# %%
tuner.detach()
print("after detach the maps are the first ones again:", torch.equal(look(), before))
