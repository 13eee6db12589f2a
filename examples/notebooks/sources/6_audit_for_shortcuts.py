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
from fvg_adapter.data import MaskedImageFolder, base_new_split, few_shot_indices, transform_for
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
# ## Which classes lean on their background?
# `audit` scores every picture whole, without its background, and without its object. A class leans on its background where the background
# alone says its name; the evidence is how sure that is, in standard errors. From the command line: `fvg-adapter audit ADAPTER DATA`.

# %%
from fvg_adapter.audit import audit

home = MaskedImageFolder(DATA, SPLITS[0], classes=train.classes, transform=transform_for(size, train=False))
seen = home.keep_classes(base)
audits = {name: audit(scored, seen, relevance=False) for name, scored in models.items()}
for name, report in audits.items():
    total = report.summary
    print(
        f"{name}: {total.whole:.1f} % whole, {total.foreground:.1f} % object alone, {total.background:.1f} % background alone"
    )
    for suspect in report.classes[:3]:
        print(f"    {suspect.name:12} lean {suspect.lean:5.2f} nats, evidence {suspect.evidence:5.1f}")

# %% [markdown]
# ## Right for the wrong reason
# Pictures that a model names rightly as a whole, and wrongly when only the object is shown:

# %%
suspects = {
    name: [p for p in report.pictures if p.answer == p.label != p.answer_foreground] for name, report in audits.items()
}
for name, report in audits.items():
    right = sum(p.answer == p.label for p in report.pictures)
    print(f"{name:15} {len(suspects[name])} of {right} right answers need the background")

# %%
mean, std = torch.tensor(model.config.image_mean), torch.tensor(model.config.image_std)


def shown(image: torch.Tensor) -> torch.Tensor:
    return (image * std.view(3, 1, 1) + mean.view(3, 1, 1)).clamp(0, 1).permute(1, 2, 0)


figure, axes = plt.subplots(2, 6, figsize=(8, 3), squeeze=False, layout="constrained")
for column, picture in enumerate(sorted(suspects["CoOp"], key=lambda p: -p.lean)[:6]):
    item = seen[picture.index]
    view = foreground_view(item["pixel_values"][None], item["foreground_mask"][None])[0]
    axes[0, column].imshow(shown(item["pixel_values"]))
    axes[0, column].set_title(picture.label, fontsize=8, color="darkgreen")
    axes[1, column].imshow(shown(view))
    axes[1, column].set_title(picture.answer_foreground, fontsize=8, color="firebrick")
for axis in axes.flat:
    axis.set_axis_off()
figure.suptitle("CoOp: right with the background (above), wrong without it (below)", fontsize=9)
plt.show()
