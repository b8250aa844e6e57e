"""FSP distillation with Hugging Face's Trainer: a ViT of four layers into one of two, on digits.

The loss is the cross-entropy plus the FSP loss of the hidden states, whose channels are last. It
takes seconds on a CPU. The digits come with scikit-learn, and nothing is downloaded.
"""

import argparse
import tempfile
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset, Subset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from fsp_kernels import Distiller

# The student's first and second layer learn from the teacher's second and fourth.
PAIRS = [
    (
        (":output.hidden_states[1]", ":output.hidden_states[2]"),
        (":output.hidden_states[2]", ":output.hidden_states[4]"),
    )
]
WEIGHT = 2e-3  # so that the FSP loss is about as large as the cross-entropy


class FspTrainer(Trainer):
    """Trains a ``Distiller``."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        found = model(**inputs, output_hidden_states=True)
        loss = found.output.loss + WEIGHT * found.loss
        return (loss, {"logits": found.output.logits}) if return_outputs else loss


class Digits(Dataset):
    """scikit-learn's digits: images (1, 8, 8) from 0 to 1."""

    def __init__(self) -> None:
        data = load_digits()
        self.images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
        self.labels = torch.tensor(data.target)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def vit(layers: int) -> ViTForImageClassification:
    """A small ViT with patches of 2 x 2 pixels, so 17 tokens of 64 channels."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    image = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    return ViTForImageClassification(ViTConfig(num_hidden_layers=layers, **sizes, **image))


def arguments(steps: int, folder: str) -> TrainingArguments:
    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        warmup_steps=steps // 5,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )


@torch.inference_mode()
def accuracy(network: nn.Module, digits: Subset) -> float:
    images, labels = digits.dataset.images[digits.indices], digits.dataset.labels[digits.indices]
    device = next(network.parameters()).device
    found = network.eval()(images.to(device)).logits.argmax(1)
    return (found.cpu() == labels).float().mean().item()


@torch.inference_mode()
def fsp_loss(distiller: Distiller, digits: Digits) -> float:
    """Of the first 256 images."""
    images = digits.images[:256].to(distiller.teacher.device)
    return distiller(images, output_hidden_states=True).loss.item()


def main(steps: int) -> None:
    set_seed(0)
    digits = Digits()
    training, test = Subset(digits, range(1400)), Subset(digits, range(1400, len(digits)))
    teacher, student = vit(layers=4), vit(layers=2)
    with tempfile.TemporaryDirectory() as folder:
        options = arguments(steps, folder)
        Trainer(teacher, options, train_dataset=training).train()
        before = accuracy(student, test)
        images = digits.images[:2].to(teacher.device)
        example = {"pixel_values": images, "output_hidden_states": True}
        distiller = Distiller(
            student.to(teacher.device), teacher, PAIRS, example=example, channel_dim=-1
        )
        start = fsp_loss(distiller, digits)
        FspTrainer(distiller, options, train_dataset=training).train()
    print(f"FSP loss: {start:.4g} -> {fsp_loss(distiller, digits):.4g}")
    print(f"accuracy of the teacher: {accuracy(teacher, test):.3f}")
    print(f"accuracy of the student: {before:.3f} -> {accuracy(student, test):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=100, help="steps of each training (%(default)s)"
    )
    main(parser.parse_args().steps)
