"""FSP distillation in a training loop of your own: a ResNet-14 into a ResNet-8, on real digits.

Stage 1 trains the student's weights on the FSP loss alone, without labels. Stage 2 trains the
student on the task. It takes seconds on a CPU. The digits come with scikit-learn.
"""

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fsp_kernels import Distiller
from fsp_kernels.distill.models import CifarResNet

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits: images (1797, 1, 8, 8) from 0 to 1, and labels (1797,)."""
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    return images.to(DEVICE), torch.tensor(data.target, device=DEVICE)


def batches(images: Tensor, labels: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,), device=images.device)
        yield images[chosen], labels[chosen]


def distil(
    student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor, steps: int
) -> list[float]:
    """Stage 1: train on the FSP loss alone. Returns the loss of each step."""
    distiller = Distiller(student, teacher, example=images[:2])
    optimizer = torch.optim.Adam(distiller.parameters(), lr=3e-3)
    losses = []
    distiller.train()
    for x, _ in batches(images, labels, steps):
        optimizer.zero_grad()
        loss = distiller(x).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    distiller.detach()
    return losses


def train(network: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """Train on the task, by cross-entropy: the teacher, and the student in stage 2."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    network.train()
    for x, y in batches(images, labels, steps):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()


@torch.inference_mode()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (network.eval()(images).argmax(1) == labels).float().mean().item()


def main(steps: int) -> None:
    torch.manual_seed(0)
    images, labels = digits()
    training, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])
    teacher = CifarResNet(14, in_channels=1).to(DEVICE)
    student = CifarResNet(8, in_channels=1).to(DEVICE)
    train(teacher, *training, steps)
    before = accuracy(student, *test)
    losses = distil(student, teacher, *training, steps)
    train(student, *training, steps)
    print(f"FSP loss: {losses[0]:.4g} -> {losses[-1]:.4g}")
    print(f"accuracy of the student: {before:.3f} -> {accuracy(student, *test):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=100, help="steps of each training (%(default)s)"
    )
    main(parser.parse_args().steps)
