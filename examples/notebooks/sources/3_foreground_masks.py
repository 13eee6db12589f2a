# %% [markdown]
# # Foreground masks: from attention, files and segmenters
#
# **What you will have:** the same pictures with masks from three sources, how well each agrees with the truth, and a model that
# was wrapped with each.
#
# **For ViT-B/16 and real data** change the next two lines, `MODEL` and `DATA`.

# %%
MODEL = "../pocket/model"  # real: "openai/clip-vit-base-patch16"
DATA = "../pocket/data"  # real: a folder with train/<class>/, test/<class>/ and mask/

# %%
import matplotlib.pyplot as plt
import torch
from transformers import CLIPModel, CLIPTokenizer

from fvg_adapter import record_attention, wrap
from fvg_adapter.data import MaskedImageFolder, collate, transform_for
from fvg_adapter.foreground import attention_mask_from_map

clip = CLIPModel.from_pretrained(MODEL).eval()
tokenizer = CLIPTokenizer.from_pretrained(MODEL)
size = clip.config.vision_config.image_size

# %% [markdown]
# ## From files
# A `mask/` tree mirrors the pictures: `test/banana/00.webp` has its mask at `mask/test/banana/00.webp`, white on black. The data set
# finds, crops and flips it along with its picture.

# %%
pictures = MaskedImageFolder(DATA, "test", masks="optional", transform=transform_for(size, train=False))
chosen = range(0, len(pictures), max(1, len(pictures) // 24))
batch = collate([pictures[i] for i in chosen])
pixels, files = batch["pixel_values"], batch["foreground_mask"]
print("pixels", tuple(pixels.shape), "masks", tuple(files.shape))

# %% [markdown]
# ## From the model's own attention
# This is `foreground="attention"`, the default of `wrap`: patches that get at least the mean attention. `record_attention` shows the
# map it is made from.

# %%
with record_attention(clip, layers=[-1]) as record, torch.no_grad():
    clip.get_image_features(pixel_values=pixels)
maps = record.attention().mean((1, 2))  # (B, layers, heads, h, w) -> (B, h, w)
attention = attention_mask_from_map(maps, pixels.shape[-2:], threshold=1.0)  # (B, 1, H, W)


# %% [markdown]
# ## From a segmenter
# Anything that takes pixels (B, 3, H, W) and gives masks (B, H, W) will do: a network of yours, or, here, four lines that call
# foreground what differs from the picture's border.


# %%
def unlike_the_border(pixels: torch.Tensor) -> torch.Tensor:
    """Masks (B, H, W): pixels far in colour from every one of the 16 pixels spread over the border."""
    side = pixels.shape[-1]
    ring = torch.cat([pixels[..., 0, :], pixels[..., -1, :], pixels[..., 0], pixels[..., -1]], -1)  # (B, 3, 4·side)
    border = ring[..., :: side // 4].unsqueeze(-1).unsqueeze(-1)  # (B, 3, 16, 1, 1)
    distance = (pixels.unsqueeze(2) - border).norm(dim=1).amin(1)  # (B, H, W)
    return (distance > 0.6).float()


segmented = unlike_the_border(pixels).unsqueeze(1)

# %%
sources = {"file": files.float(), "attention": attention, "segmenter": segmented}


def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum((1, 2, 3)) / (a + b).clamp(max=1).sum((1, 2, 3))


for name, mask in sources.items():
    print(f"{name:10} covers {mask.mean():.2f} of a picture, IoU with the files {iou(mask, files.float()).mean():.2f}")

# %%
mean, std = torch.tensor(wrap(clip, tokenizer, ["a", "b"]).config.image_mean), torch.tensor([0.2686, 0.2613, 0.2758])
shown = (pixels * std.view(3, 1, 1) + mean.view(3, 1, 1)).clamp(0, 1).permute(0, 2, 3, 1)
figure, axes = plt.subplots(4, 6, figsize=(7.5, 5.2), layout="constrained")
for column in range(6):
    axes[0, column].imshow(shown[4 * column])
    for row, (name, mask) in enumerate(sources.items(), start=1):
        axes[row, column].imshow(shown[4 * column] * mask[4 * column, 0].unsqueeze(-1))
        axes[row, 0].set_ylabel(name)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Wrap with each
# A mask that is empty or covers nearly everything is not used: that picture trains with r = 0. Masks are for training; none is
# needed to answer.

# %%
from fvg_adapter import unwrap

for name, foreground, with_masks in (
    ("file", "given", True),
    ("attention", "attention", False),
    ("segmenter", unlike_the_border, False),
):
    model = wrap(clip, tokenizer, pictures.classes, foreground=foreground)
    given = dict(batch) if with_masks else {"pixel_values": pixels, "labels": batch["labels"]}
    output = model.train()(**given)
    used = (output.foreground_trust > 0).float().mean()
    print(f"{name:10} loss {output.loss:.2f}, masks used {100 * used:.0f} %")
    unwrap(model)
