"""Adapt an image model without touching it: one picture of low rank is learnt, which is added to everything that the model sees.

    python examples/prompt_an_image_model.py

A small ViT learns to read scikit-learn's digits, once. Then all digits come through a dirty pane: a value is added to every row and to every column. Training the classifier anew helps little, since the
frozen model no longer sees the digits; LoR-VP learns, with the classifier, a picture that takes the pane away. What is saved is an adapter of some kilobytes; in the end it is folded into
the positions of the model, which is then an ordinary one. About a minute on a CPU, without a network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_ext import LorVpConfig

SIZE, SEED, SOURCE, TRAINED = 32, 0, 1200, 400


class Digits(Dataset):
    """Digits as the image processor hands them over, through a pane if one is given."""

    def __init__(self, where: slice, processor: ViTImageProcessorPil, pane: np.ndarray | None = None) -> None:
        loaded = load_digits()
        order = np.random.default_rng(SEED).permutation(len(loaded.images))[where]
        self.rows = []
        for image, label in zip(loaded.images[order], loaded.target[order], strict=True):
            enlarged = Image.fromarray((image * (255 / 16)).astype("uint8")).convert("RGB").resize((SIZE, SIZE))
            pixels = np.asarray(enlarged, dtype="float32") / 255 + (0 if pane is None else pane)
            # Resized already, in [0, 1] already: what is left is to normalise.
            values = processor(pixels, do_resize=False, do_rescale=False)["pixel_values"][0]
            self.rows.append({"pixel_values": torch.as_tensor(values), "labels": int(label)})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def dirty_pane() -> np.ndarray:
    generator = np.random.default_rng(SEED)
    rows, columns = generator.normal(size=(SIZE, 1, 3)), generator.normal(size=(1, SIZE, 3))
    return ((rows + columns) / 2**0.5).astype("float32")


def train(model: nn.Module, data: Digits, output: Path, rate: float, epochs: int) -> None:
    arguments = TrainingArguments(
        output_dir=str(output / "training"), num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=rate, lr_scheduler_type="cosine",
        save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True, seed=SEED,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.remove_callback(PrinterCallback)  # its lines would stand between those that compare the models
    trainer.train()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    model.eval()
    device = next(model.parameters()).device
    pixels = torch.stack([row["pixel_values"] for row in data]).to(device)
    labels = torch.tensor([row["labels"] for row in data])
    return (model(pixel_values=pixels).logits.argmax(-1).cpu() == labels).float().mean().item()


def fresh_classifier(folder: Path) -> nn.Module:
    torch.manual_seed(SEED)
    model = AutoModelForImageClassification.from_pretrained(folder)
    model.classifier.reset_parameters()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="over the pictures, for each model")
    parser.add_argument("--output", type=Path, default=Path("demo-output/prompted"))
    options = parser.parse_args()
    source, adapter, merged = (options.output / name for name in ("source", "adapter", "merged"))

    processor, pane = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}), dirty_pane()
    torch.manual_seed(SEED)
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=SIZE, patch_size=8, num_labels=10,
    )  # fmt: skip
    model: nn.Module = ViTForImageClassification(config)
    train(model, Digits(slice(SOURCE), processor), options.output, 3e-3, options.epochs)
    model.save_pretrained(source)
    processor.save_pretrained(source)
    test = slice(SOURCE, None)
    clean, dirty = Digits(test, processor), Digits(test, processor, pane)
    print(f"the model, clean digits:                 {accuracy(model, clean):.1%}")
    print(f"the model, dirty digits:                 {accuracy(model, dirty):.1%}")

    seen = Digits(slice(TRAINED), processor, pane)
    model = fresh_classifier(source)
    model.requires_grad_(False).classifier.requires_grad_(True)
    train(model, seen, options.output, 3e-2, options.epochs)
    print(f"with a new classifier, dirty digits:     {accuracy(model, dirty):.1%}")

    model = get_peft_model(fresh_classifier(source), LorVpConfig(r=4))
    numbers = sum(p.numel() for name, p in model.named_parameters() if "lorvp_" in name)
    train(model, seen, options.output, 3e-2, options.epochs)
    print(f"and a prompt of {numbers} numbers:            {accuracy(model, dirty):.1%}")
    model.save_pretrained(adapter)

    loaded = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(source), adapter)
    loaded.merge_and_unload().save_pretrained(merged)
    processor.save_pretrained(merged)
    print(
        f"folded into an ordinary model:           {accuracy(AutoModelForImageClassification.from_pretrained(merged), dirty):.1%}"
    )
    print(f"The adapter is in {adapter}, the ordinary model in {merged}.")


if __name__ == "__main__":
    main()
