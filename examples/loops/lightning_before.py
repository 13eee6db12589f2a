"""The loop is PyTorch Lightning's; a run that was stopped goes on from its last checkpoint."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pictures import Pictures
from torch.utils.data import DataLoader
from transformers import CLIPForImageClassification

MODEL, DATA = "examples/pocket/model", "examples/pocket/data"  # "openai/clip-vit-base-patch16" and your own folder


class FewShot(L.LightningModule):
    def __init__(self, classes):
        super().__init__()
        self.model = CLIPForImageClassification.from_pretrained(MODEL, num_labels=len(classes))

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.0035, momentum=0.9, weight_decay=5e-4)

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def validation_step(self, batch, index):
        found = self.model(batch["pixel_values"]).logits.argmax(-1)
        self.log("accuracy", (found == batch["labels"]).float().mean(), batch_size=len(found))


L.seed_everything(1)
few, test = Pictures(DATA, "train"), Pictures(DATA, "test")
module = FewShot(few.classes)
trainer = L.Trainer(
    max_epochs=2,
    default_root_dir="output/lightning",
    callbacks=[ModelCheckpoint("output/lightning", save_last=True)],
    enable_progress_bar=False,
    enable_model_summary=False,
    logger=False,
)
trainer.fit(module, DataLoader(few, batch_size=16, shuffle=True), DataLoader(test, batch_size=48), ckpt_path="last")
print(f"accuracy {100 * trainer.callback_metrics['accuracy']:.1f} %")
module.model.push_to_hub("me/pets")
