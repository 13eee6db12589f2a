"""The loop is transformers.Trainer's: the best epoch is kept, and a run that was stopped goes on where it was."""

from pathlib import Path

from datasets import Dataset
from pictures import Pictures, pixels
from transformers import CLIPForImageClassification, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

MODEL, DATA = "examples/pocket/model", "examples/pocket/data"  # "openai/clip-vit-base-patch16" and your own folder


def read(rows):
    return {"pixel_values": [pixels(file) for file in rows["image"]], "labels": rows["labels"]}


def table(pictures):
    columns = {"image": [str(file) for file in pictures.files], "labels": pictures.labels}
    return Dataset.from_dict(columns).with_transform(read)


def accuracy(found):
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


set_seed(1)
few, test = Pictures(DATA, "train"), Pictures(DATA, "test")
model = CLIPForImageClassification.from_pretrained(MODEL, num_labels=len(few.classes))
arguments = TrainingArguments(
    "output/trainer",
    learning_rate=0.002,
    num_train_epochs=3,
    per_device_train_batch_size=16,
    per_device_eval_batch_size=48,
    eval_strategy="epoch",
    save_strategy="epoch",
    load_best_model_at_end=True,
    metric_for_best_model="accuracy",
    remove_unused_columns=False,  # else `image` would be gone before `read` sees it
    report_to="none",
    seed=1,
)
trainer = Trainer(model, arguments, train_dataset=table(few), eval_dataset=table(test), compute_metrics=accuracy)
last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
trainer.train(resume_from_checkpoint=last)
print(f"accuracy {100 * trainer.evaluate()['eval_accuracy']:.1f} %")
trainer.push_to_hub()
