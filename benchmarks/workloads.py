"""The shapes that are measured, in one literal table, and the maps made from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Layer = tuple[int, int]  # channels and side of the square map; for tokens, channels and tokens
Pairs = Sequence[tuple[Tensor, Tensor]]
# (student, teacher, student_mask=None, teacher_mask=None) -> loss; both masks are the same
Loss = Callable[..., Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
TOKENS = "tokens"  # the layout of a transformer's maps, which have no other
FORWARD = "forward"  # the loss alone, as in validation
TRAINING = "forward+backward"
PASSES = (FORWARD, TRAINING)


@dataclass(frozen=True)
class Workload:
    """Feature maps of one distillation step: ``batch`` is the GPU's, see ``batch_on``.

    In a ``symmetric`` workload both maps of a pair are one tensor, of equal layers. In a ``padded``
    one, which has tokens, samples are sequences of different lengths; a mask tells their positions.
    """

    name: str
    batch: int
    layers: tuple[tuple[Layer, Layer], ...]
    tokens: bool = False
    symmetric: bool = False
    padded: bool = False

    @property
    def cpu_batch(self) -> int:
        """An eighth of the batch, and at least 4, so that a round on a CPU takes seconds."""
        return max(4, self.batch // 8)

    def batch_on(self, device: str) -> int:
        """The batch that is measured on a device."""
        return self.cpu_batch if device == "cpu" else self.batch

    def shape(self, layer: Layer, batch: int) -> tuple[int, ...]:
        """``(B, C, H, W)``, or ``(B, C, tokens)`` for a transformer's layer."""
        channels, size = layer
        return (batch, channels, size) if self.tokens else (batch, channels, size, size)

    def positions(self, pair: tuple[Layer, Layer]) -> int:
        """K of a pair: the larger map is pooled to the smaller one."""
        size = min(pair[0][1], pair[1][1])
        return size if self.tokens else size * size

    def mask(self, batch: int, device: str = "cpu") -> Tensor | None:
        """Which positions count, ``(B, tokens)``: sequences from an eighth of the tokens to all."""
        if not self.padded:
            return None
        tokens = self.layers[0][0][1]
        lengths = torch.linspace(tokens / 8, tokens, batch, device=device).round()
        return torch.arange(tokens, device=device) < lengths[:, None]

    def layouts(self, chosen: Sequence[str]) -> tuple[str, ...]:
        """The chosen memory formats; a transformer's maps have only ``TOKENS``."""
        return (TOKENS,) if self.tokens else tuple(chosen)


@dataclass(frozen=True)
class Case:
    """Work that is measured; all contenders do it on the same tensors."""

    workload: Workload
    batch: int
    dtype: str = "fp32"
    layout: str = "nchw"
    direction: str = TRAINING  # of PASSES

    @property
    def training(self) -> bool:
        """Whether gradients are computed."""
        return self.direction == TRAINING

    @property
    def identity(self) -> dict[str, str]:
        """The columns of ``results.csv`` that tell cases of one part apart."""
        return {
            "workload": self.workload.name,
            "dtype": self.dtype,
            "layout": self.layout,
            "pass": self.direction,
        }

    def __str__(self) -> str:
        return ", ".join(self.identity.values())

    def maps(self, device: str) -> tuple[Pairs, Pairs]:
        """``(student, teacher)``; the student's maps require gradients."""
        dtype = DTYPES[self.dtype]
        return feature_maps(self.workload, self.batch, dtype, device=device, layout=self.layout)

    def masked(self, loss: Loss, device: str) -> Loss:
        """The loss with the mask of the workload, if it has one."""
        mask = self.workload.mask(self.batch, device)
        return loss if mask is None else partial(loss, student_mask=mask, teacher_mask=mask)


WORKLOADS = (
    Workload(
        "cifar-resnet",
        256,
        (((16, 32), (16, 32)), ((32, 16), (32, 16)), ((64, 8), (64, 8))),
    ),
    Workload(
        "cifar-resnet-x4",
        64,
        (((32, 32), (64, 32)), ((64, 32), (128, 16)), ((128, 16), (256, 8))),
    ),
    Workload(
        "imagenet-resnet18",
        64,
        (
            ((64, 56), (64, 56)),
            ((128, 28), (128, 28)),
            ((256, 14), (256, 14)),
            ((512, 7), (512, 7)),
        ),
    ),
    Workload(
        "imagenet-resnet50",
        32,
        (
            ((256, 56), (256, 56)),
            ((512, 28), (512, 28)),
            ((1024, 14), (1024, 14)),
            ((2048, 7), (2048, 7)),
        ),
    ),
    Workload(
        "torchdistill-resnet34-18",
        32,
        (
            ((64, 56), (64, 56)),
            ((128, 28), (128, 28)),
            ((256, 14), (256, 14)),
            ((512, 7), (512, 7)),
        ),
    ),
    Workload("wide-late-512", 32, (((512, 7), (512, 7)),)),
    Workload("wide-late-2048", 32, (((2048, 7), (2048, 7)),)),
    Workload("tokens-vit-b", 64, (((768, 196), (768, 196)),), tokens=True),
    Workload("tokens-padded", 64, (((768, 256), (768, 256)),), tokens=True, padded=True),
    Workload("segmentation", 4, (((256, 128), (256, 128)),)),
    # The maps of a VGG-19 whose Gram matrices are the style of an image of 256 x 256 pixels:
    # relu1_1, relu2_1, ..., relu5_1.
    Workload(
        "style-vgg",
        4,
        tuple(
            ((channels, side),) * 2
            for channels, side in ((64, 256), (128, 128), (256, 64), (512, 32), (512, 16))
        ),
        symmetric=True,
    ),
)
BY_NAME = {workload.name: workload for workload in WORKLOADS}
# A quick run's, which take seconds: few channels, pooled maps, few positions.
QUICK = ("cifar-resnet", "cifar-resnet-x4", "wide-late-512")


def feature_map(
    workload: Workload,
    layer: Layer,
    batch: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    layout: str,
) -> Tensor:
    """Normal noise after a ReLU: half of it is zero, as in late layers of a CNN."""
    shape = workload.shape(layer, batch)
    if workload.tokens:
        shape = (shape[0], shape[2], shape[1])  # (B, tokens, channels), as transformers keep them
    device = generator.device
    x = torch.randn(shape, dtype=dtype, device=device, generator=generator).relu_()
    if workload.tokens:
        return x.transpose(1, 2)
    return x.to(memory_format=LAYOUTS[layout])


def feature_maps(
    workload: Workload,
    batch: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
    layout: str = "nchw",
) -> tuple[Pairs, Pairs]:
    """``(student, teacher)``: independent maps of equal shapes; the student's require gradients."""
    generator = torch.Generator(device).manual_seed(seed)

    def map_of(layer: Layer) -> Tensor:
        return feature_map(workload, layer, batch, dtype, generator, layout)

    def network() -> list[tuple[Tensor, Tensor]]:
        if workload.symmetric:
            return [(x, x) for x in (map_of(first) for first, _ in workload.layers)]
        return [(map_of(first), map_of(second)) for first, second in workload.layers]

    student, teacher = network(), network()
    for pair in student:
        for x in pair:
            x.requires_grad_()
    return student, teacher
