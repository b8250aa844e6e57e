"""Style transfer: the style loss of a VGG-19 moves one photograph towards the style of another.

The style of an image is the Gram matrices of five maps. The Gram matrix of a map is its FSP matrix
with itself, so the style loss is ``fsp_loss`` of pairs ``(x, x)``. It takes seconds on a CPU. The
photographs come with scikit-learn. The network has random weights, so that nothing is downloaded;
pretrained ones make better pictures.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torchvision.models import vgg19
from torchvision.transforms.functional import normalize

from fsp_kernels import FeatureTaps, fsp_loss, fsp_matrix

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS = {"relu1_1": "1", "relu2_1": "6", "relu3_1": "11", "relu4_1": "20", "relu5_1": "29"}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of the images that a VGG is trained on
CONTENT_WEIGHT = 0.01


def photograph(name: str, size: int) -> Tensor:
    """One of scikit-learn's photographs, cropped to a square: ``(1, 3, size, size)``, 0 to 1."""
    image = torch.tensor(load_sample_image(name), device=DEVICE).permute(2, 0, 1)[None] / 255
    side = min(image.shape[2:])
    return F.interpolate(image[..., :side, :side], size=(size, size), mode="area")


class StyleLoss(nn.Module):
    """The style loss of a VGG's maps, against the Gram matrices of a style image."""

    def __init__(self, style_maps: Sequence[Tensor]):
        super().__init__()
        self.targets = [fsp_matrix(x, x) for x in style_maps]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return fsp_loss([(x, x) for x in maps], self.targets, norm="mse")


def transfer(content: Tensor, style: Tensor, steps: int) -> tuple[Tensor, list[float]]:
    """The content image after some steps towards the style; the style loss before each step."""
    network = vgg19(weights=None).features[:30].to(DEVICE).eval().requires_grad_(False)
    losses = []
    with FeatureTaps(network, list(LAYERS.values())) as taps:

        def maps_of(image: Tensor) -> list[Tensor]:
            network(normalize(image, MEAN, STD))
            return taps.take()

        style_loss = StyleLoss(maps_of(style))
        wanted = maps_of(content)[3]  # relu4_1
        image = content.clone().requires_grad_()
        optimizer = torch.optim.Adam([image], lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            maps = maps_of(image)
            loss = style_loss(maps)
            losses.append(loss.item())
            (loss + CONTENT_WEIGHT * F.mse_loss(maps[3], wanted)).backward()
            optimizer.step()
    return image.detach().clamp(0, 1), losses


def main(steps: int, size: int) -> None:
    torch.manual_seed(0)
    _, losses = transfer(photograph("china.jpg", size), photograph("flower.jpg", size), steps)
    print(f"style loss: {losses[0]:.4g} -> {losses[-1]:.4g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--size", type=int, default=96, help="side of the images (%(default)s)")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.size)
