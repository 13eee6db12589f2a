# %% [markdown]
# # Push to and load from the Hub
#
# **What you will have:** an adapter on a Hub, loaded again by its id alone, with the same logits bit for bit, and asked about other
# classes.
#
# This notebook runs against a small Hub of its own on this machine, so that it needs no account. **For the real Hub, change two
# lines**: delete the call of `serve_a_hub_here()`, and put your name for `me` (`hf auth login` once). For ViT-B/16,
# `BASE = "openai/clip-vit-base-patch16"`, which is on the Hub already, and `UPLOAD_BASE = False`.

# %%
import contextlib
import os
import sys
import tempfile

stack = contextlib.ExitStack()


def serve_a_hub_here() -> None:
    """Points huggingface_hub, which reads its settings when it is first imported, to a server in this process."""
    sys.path.insert(0, "../../tests")
    from hub_server import TOKEN, serving

    home = stack.enter_context(tempfile.TemporaryDirectory())
    here = {"HF_ENDPOINT": stack.enter_context(serving()).url, "HF_TOKEN": TOKEN, "HF_HOME": home}
    os.environ.update(here, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.update(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1", HF_HUB_DISABLE_PROGRESS_BARS="1")


serve_a_hub_here()  # real: delete this line
me = "me"  # real: your name on the Hub
BASE, UPLOAD_BASE = f"{me}/pocket-clip", True

# %%
import torch
from huggingface_hub import HfApi
from transformers import CLIPModel, CLIPTokenizer

from fvg_adapter import load, wrap
from fvg_adapter.tuners import CoOp

api = HfApi()
if UPLOAD_BASE:
    api.create_repo(BASE, exist_ok=True)
    api.upload_folder(repo_id=BASE, folder_path="../pocket/model")
clip, tokenizer = CLIPModel.from_pretrained(BASE), CLIPTokenizer.from_pretrained(BASE)
tuner = CoOp(clip, tokenizer, ["banana", "lemon", "carrot"])
model = wrap(tuner)

# %% [markdown]
# A step of training, so that there is something to keep (see the quickstart for the whole of it):

# %%
pixels = torch.randn(6, 3, *tuner.encoder.image_size, generator=torch.Generator().manual_seed(0))
optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
model(pixels, torch.tensor([0, 1, 2, 0, 1, 2])).loss.backward()
optimizer.step()
model.eval()

url = model.push_to_hub(f"{me}/fruit-fvg", commit_message="First")
print(str(url).replace(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), "https://huggingface.co"))
sorted(api.list_repo_files(f"{me}/fruit-fvg"))

# %% [markdown]
# README.md is the model card, with a header for the Hub's search. What it cannot know you say: `results=evaluate(…)`, `picture=…`,
# `dataset=…`, `license=…`. Once you edit it, here or on the Hub, it is yours and is not written over.

# %%
from huggingface_hub import ModelCard

model.push_to_hub(f"{me}/fruit-fvg", commit_message="A licence", license="apache-2.0", dataset="fruit")
card = ModelCard.load(f"{me}/fruit-fvg")
print(card.data)
print(card.text.partition("## Results")[0])

# %% [markdown]
# By the id alone: the config names the base model, and a base model that does not fit is refused.

# %%
again = load(f"{me}/fruit-fvg")
with torch.no_grad():
    print("logits are bit-equal:", torch.equal(again(pixels).logits, model(pixels).logits))

# %% [markdown]
# Other classes, a private repository, a branch:

# %%
other = load(f"{me}/fruit-fvg", classes=["purple turnip", "blue plum"])
with torch.no_grad():
    print(other.classes, other.branch_for(), tuple(other(pixels).logits.shape))
model.push_to_hub(f"{me}/secret-fvg", private=True)
model.push_to_hub(f"{me}/fruit-fvg", branch="warm")
print(type(load(f"{me}/fruit-fvg", revision="warm")).__name__)

# %% [markdown]
# What is not there is named, with the way out:

# %%
from fvg_adapter.errors import FVGError

try:
    load(BASE)
except FVGError as error:
    print("…" + str(error).partition("config.json")[2])
stack.close()
