"""FSP distillation with Lightning: a ResNet-14 into a ResNet-8, on real digits.

Stage 1 fits ``FspDistillation``, which trains the student's weights on the FSP loss alone. Stage 2
fits ``Classifier``, which trains the student on the task. It takes seconds on a CPU. The digits
come with scikit-learn.
"""

import argparse

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from fsp_kernels import Distiller
from fsp_kernels.distill.models import CifarResNet

PAIRS = [(f"stage{i}.0.relu1", f"stage{i}") for i in (1, 2, 3)]  # first and last map of each stage


class FspDistillation(lightning.LightningModule):
    """Stage 1. Each of ``pairs`` is two module paths that exist in both networks."""

    def __init__(self, student: nn.Module, teacher: nn.Module, pairs: list[tuple[str, str]]):
        super().__init__()
        self.distiller, self.losses = Distiller(student, teacher, pairs), []

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, _ = batch
        loss = self.distiller(images).loss
        self.losses.append(loss.detach())
        return loss

    def on_fit_end(self) -> None:
        self.distiller.detach()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.distiller.parameters(), lr=3e-3)


class Classifier(lightning.LightningModule):
    """Training on the task: of the teacher, and of the student in stage 2."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def test_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        self.log("accuracy", (self.network(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=3e-3)


def trainer(steps: int = -1) -> lightning.Trainer:
    # On several devices stage 1 needs strategy="ddp_find_unused_parameters_true", because the
    # student's classifier gets no gradient.
    shared = {"accelerator": "auto", "devices": 1, "logger": False, "enable_checkpointing": False}
    return lightning.Trainer(max_steps=steps, **shared)


def main(steps: int) -> None:
    lightning.seed_everything(0)
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]  # (1797, 1, 8, 8)
    digits = TensorDataset(images, torch.tensor(data.target))
    training = DataLoader(Subset(digits, range(1400)), batch_size=64, shuffle=True)
    test = DataLoader(Subset(digits, range(1400, len(digits))), batch_size=256)
    student, teacher = CifarResNet(8, in_channels=1), CifarResNet(14, in_channels=1)
    distillation, task = FspDistillation(student, teacher, PAIRS), Classifier(student)
    trainer(steps).fit(Classifier(teacher), training)
    before = trainer().test(task, test, verbose=False)[0]["accuracy"]
    trainer(steps).fit(distillation, training)
    trainer(steps).fit(task, training)
    after = trainer().test(task, test, verbose=False)[0]["accuracy"]
    print(f"FSP loss: {distillation.losses[0]:.4g} -> {distillation.losses[-1]:.4g}")
    print(f"accuracy of the student: {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=100, help="steps of each training (%(default)s)"
    )
    main(parser.parse_args().steps)
