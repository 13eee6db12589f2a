# %% [markdown]
# # Audit a model for shortcuts
#
# **What you will have:** for plain CLIP, a tuner and FVG-PT: how much of the accuracy hangs on the background, where the attention
# lies, how far answers move when only the foreground is shown, and the pictures that were right for the wrong reason.
#
# **For ViT-B/16 and real data** change the next two lines. `test_home` and `test_swapped` are the pocket suite's tests with the
# backgrounds of training and with another class's; with your own data, leave out the splits that you do not have.

# %%
MODEL = "../pocket/model"  # real: "openai/clip-vit-base-patch16"
DATA = "../pocket/data"  # real: a folder with train/<class>/, test/<class>/ and mask/

# %%
import matplotlib.pyplot as plt
import torch
from transformers import CLIPModel, CLIPTokenizer

from fvg_adapter import FeatureBank, evaluate, wrap
from fvg_adapter.data import MaskedImageFolder, base_new_split, collate, few_shot_indices, transform_for
from fvg_adapter.foreground import foreground_view
from fvg_adapter.train import fit
from fvg_adapter.tuners import CoOp, Stage, ZeroShot

torch.manual_seed(1)
clip = CLIPModel.from_pretrained(MODEL)
tokenizer = CLIPTokenizer.from_pretrained(MODEL)
size = clip.config.vision_config.image_size
train = MaskedImageFolder(DATA, "train", transform=transform_for(size, train=True, scale=(0.5, 1.0)))
base, new = base_new_split(train.classes)
shots, _ = few_shot_indices(train.labels, 16, seed=1)
few = train.subset(shots).keep_classes(base)

plain = ZeroShot(clip, tokenizer, few.classes)
tuner = CoOp(clip, tokenizer, few.classes)
fit(tuner, FeatureBank.encode(tuner, few, views=4), recipe=Stage("sgd", 0.05, 32, "here", epochs=20), progress=False)
model = wrap(tuner, foreground="given")
fit(model, FeatureBank.encode(model, few, views=4), progress=False)
models = {"CLIP": plain, "CoOp": tuner, "CoOp + FVG-PT": model}

# %% [markdown]
# ## Does accuracy hang on the background?
# The same objects before the backgrounds of training (`test_home`), random ones (`test`) and another class's (`test_swapped`). A model
# that looks at the object scores the same on all three.

# %%
SPLITS = ("test_home", "test", "test_swapped")
found = {}
for split in SPLITS:
    data = MaskedImageFolder(DATA, split, classes=train.classes, transform=transform_for(size, train=False))
    for name, scored in models.items():
        found[name, split] = evaluate(scored, data.keep_classes(base), data.keep_classes(new))

print(f"{'base accuracy':15}" + "".join(f"{split:>14}" for split in SPLITS) + f"{'lost':>8}")
for name in models:
    scores = [found[name, split]["base"] for split in SPLITS]
    print(f"{name:15}" + "".join(f"{score:14.1f}" for score in scores) + f"{scores[0] - scores[-1]:8.1f}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
for axis, key, title in (
    (axes[0], "base", "base accuracy, %"),
    (axes[1], "d_fg", "D_fg, nats (less is better)"),
    (axes[2], "attention_in_mask", "attention inside the object"),
):
    for name in models:
        axis.plot(SPLITS, [found[name, split][key] for split in SPLITS], marker="o", label=name)
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)
axes[2].set_ylim(0, 1)
axes[0].legend(fontsize=7)
plt.show()

# %% [markdown]
# D_fg is KL(whole picture ‖ foreground alone): how far answers move when the background is taken away. Read it beside the entropy, since
# a flatter softmax lowers it for nothing. CoOp and FVG-PT leave the image tower alone, so all three share one attention.
#
# ## Right for the wrong reason
# Pictures that a model names rightly as a whole, and wrongly when only the object is shown:

# %%
home = MaskedImageFolder(DATA, "test_home", classes=train.classes, transform=transform_for(size, train=False))
seen = home.keep_classes(base)
batch = collate([seen[i] for i in range(len(seen))])
pixels, labels, masks = batch["pixel_values"], batch["labels"], batch["foreground_mask"]
views = foreground_view(pixels, masks)
suspects = {}
for name, scored in models.items():
    scored.eval()
    with torch.no_grad():
        whole, alone = scored(pixels).logits.argmax(-1), scored(views).logits.argmax(-1)
    suspects[name] = (whole == labels) & (alone != labels)
    print(f"{name:15} {int(suspects[name].sum())} of {int((whole == labels).sum())} right answers need the background")

# %%
mean, std = torch.tensor(model.config.image_mean), torch.tensor(model.config.image_std)


def shown(image: torch.Tensor) -> torch.Tensor:
    return (image * std.view(3, 1, 1) + mean.view(3, 1, 1)).clamp(0, 1).permute(1, 2, 0)


wrong = suspects["CoOp"].nonzero().flatten()[:6].tolist()
figure, axes = plt.subplots(2, 6, figsize=(8, 3), squeeze=False, layout="constrained")
with torch.no_grad():
    answers = tuner(views).logits.argmax(-1)
for column, index in enumerate(wrong):
    axes[0, column].imshow(shown(pixels[index]))
    axes[0, column].set_title(few.classes[int(labels[index])], fontsize=8, color="darkgreen")
    axes[1, column].imshow(shown(views[index]))
    axes[1, column].set_title(few.classes[int(answers[index])], fontsize=8, color="firebrick")
for axis in axes.flat:
    axis.set_axis_off()
figure.suptitle("CoOp: right with the background (above), wrong without it (below)", fontsize=9)
plt.show()
