"""A trainer in the style of Dassl, on which the code of CoOp and its family is built: base class and one trainer."""

from pathlib import Path

import torch
from fvg_adapter import wrap
from pictures import Pictures
from torch.utils.data import DataLoader
from transformers import CLIPModel, CLIPTokenizer

MODEL, DATA = "examples/pocket/model", "examples/pocket/data"  # "openai/clip-vit-base-patch16" and your own folder


class TrainerX:
    """What Dassl's base class does for its trainers: epochs, batches, optimiser steps, checkpoints and the test."""

    def __init__(self, epochs=2, batch_size=16, folder="output/dassl"):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.few, self.test_set = Pictures(DATA, "train"), Pictures(DATA, "test")
        self.epochs, self.batch_size, self.folder = epochs, batch_size, Path(folder)
        self.build_model()

    def register_model(self, name, model, optim):
        self.name, self.model, self.optim = name, model, optim

    def model_backward_and_update(self, loss):
        if not torch.isfinite(loss).all():
            raise FloatingPointError("Loss is infinite or NaN!")
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()

    def train(self):
        for epoch in range(self.epochs):
            self.model.train()
            for batch in DataLoader(self.few, self.batch_size, shuffle=True):
                summary = self.forward_backward(batch)
            print(f"epoch [{epoch + 1}/{self.epochs}]", summary)
        self.save_model()
        self.test()

    def save_model(self):
        (self.folder / self.name).mkdir(parents=True, exist_ok=True)
        checkpoint = {"state_dict": self.model.state_dict(), "epoch": self.epochs, "optimizer": self.optim.state_dict()}
        torch.save(checkpoint, self.folder / self.name / f"model.pth.tar-{self.epochs}")

    def load_model(self, epoch):
        file = self.folder / self.name / f"model.pth.tar-{epoch}"
        self.model.load_state_dict(torch.load(file, weights_only=True)["state_dict"])

    @torch.no_grad()
    def test(self):
        self.model.eval()
        batches = [self.parse_batch_train(batch) for batch in DataLoader(self.test_set, 48)]
        right = sum(int((self.model_inference(image).argmax(-1) == label).sum()) for image, label in batches)
        print(f"accuracy: {100 * right / len(self.test_set):.1f}%")


class FewShot(TrainerX):
    def build_model(self):
        model = wrap(CLIPModel.from_pretrained(MODEL), CLIPTokenizer.from_pretrained(MODEL), self.few.classes)
        optim = torch.optim.SGD(model.parameters(), lr=0.0035, momentum=0.9, weight_decay=5e-4)
        self.register_model("clip", model.to(self.device), optim)

    def forward_backward(self, batch):
        image, label = self.parse_batch_train(batch)
        loss = self.model(image, label).loss
        self.model_backward_and_update(loss)
        return {"loss": loss.item()}

    def parse_batch_train(self, batch):
        return batch["pixel_values"].to(self.device), batch["labels"].to(self.device)

    def model_inference(self, image):
        return self.model(image).logits


torch.manual_seed(1)
trainer = FewShot()
trainer.train()
trainer.model.push_to_hub("me/pets")
