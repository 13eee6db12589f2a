"""The loop under accelerate: any number of processes, autocast, accumulation; `accelerate launch FILE` starts it."""

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from fvg_adapter import wrap
from pictures import Pictures
from torch.utils.data import DataLoader
from transformers import CLIPModel, CLIPTokenizer

MODEL, DATA = "examples/pocket/model", "examples/pocket/data"  # "openai/clip-vit-base-patch16" and your own folder

accelerator = Accelerator(
    mixed_precision="bf16",
    gradient_accumulation_steps=2,
    # a batch is shared out among the processes, and is the same one for any number of them
    dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=1),
)
set_seed(1)
few, test = Pictures(DATA, "train"), Pictures(DATA, "test")
model = wrap(CLIPModel.from_pretrained(MODEL), CLIPTokenizer.from_pretrained(MODEL), few.classes)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0035, momentum=0.9, weight_decay=5e-4)
loader, test_loader = DataLoader(few, batch_size=16, shuffle=True), DataLoader(test, batch_size=48)
model, optimizer, loader, test_loader = accelerator.prepare(model, optimizer, loader, test_loader)

model.train()
for _ in range(2):
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
accelerator.save_state("output/accelerate")

model.eval()
right = 0
for batch in test_loader:
    with torch.no_grad():
        found = model(batch["pixel_values"]).logits.argmax(-1)
    right += int(accelerator.gather_for_metrics(found == batch["labels"]).sum())
accelerator.print(f"accuracy {100 * right / len(test):.1f} %")
if accelerator.is_main_process:
    accelerator.unwrap_model(model).push_to_hub("me/pets")
accelerator.wait_for_everyone()  # a launcher stops the others when one that has left fails
accelerator.end_training()
