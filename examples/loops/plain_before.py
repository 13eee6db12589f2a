"""A plain PyTorch loop that fine-tunes a CLIP on a few pictures of every class and pushes it to the Hub."""

import torch
import torch.nn.functional as F
from pictures import Pictures
from torch.utils.data import DataLoader
from transformers import CLIPModel, CLIPTokenizer

MODEL, DATA = "examples/pocket/model", "examples/pocket/data"  # "openai/clip-vit-base-patch16" and your own folder

torch.manual_seed(1)
few, test = Pictures(DATA, "train"), Pictures(DATA, "test")
tokenizer = CLIPTokenizer.from_pretrained(MODEL)
model = CLIPModel.from_pretrained(MODEL)
prompts = tokenizer([f"a photo of a {name}." for name in few.classes], padding=True, return_tensors="pt")
optimizer = torch.optim.SGD(model.parameters(), lr=0.0035, momentum=0.9, weight_decay=5e-4)

model.train()
for _ in range(2):
    for batch in DataLoader(few, batch_size=16, shuffle=True):
        loss = F.cross_entropy(model(**prompts, pixel_values=batch["pixel_values"]).logits_per_image, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

model.eval()
right = 0
with torch.no_grad():
    for batch in DataLoader(test, batch_size=48):
        logits = model(**prompts, pixel_values=batch["pixel_values"]).logits_per_image
        right += int((logits.argmax(-1) == batch["labels"]).sum())
print(f"loss {loss.item():.3f}, accuracy {100 * right / len(test):.1f} %")
model.push_to_hub("me/pets")
