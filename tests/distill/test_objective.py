"""What a stage minimises, against the losses written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsp_kernels import reference
from fsp_kernels.distill.arms import TrainingStage
from fsp_kernels.distill.config import Fsp, Pair, SoftTargets, Training
from fsp_kernels.distill.models import CifarResNet
from fsp_kernels.distill.objective import Objective, Tapped, Targets, task_loss
from fsp_kernels.features.pairs import PairShapes, Projection

PAIRS = (
    Pair(student=("stage1.0.relu1", "stage1"), teacher=("unused", "unused"), weight=2.0),
    Pair(student=("stage2.0.relu1", "stage2"), teacher=("unused", "unused"), weight=0.5),
)
TRAINING = Training(steps=1, learning_rate=0.1)


def stage(**kinds: object) -> TrainingStage:
    return TrainingStage("test", "stage1", TRAINING, 1, **kinds)  # type: ignore[arg-type]


def objective(of: TrainingStage, projection: Projection | None = None) -> Objective:
    torch.manual_seed(1)
    network = CifarResNet(8, in_channels=1).train()
    return Objective(network, of, PAIRS, Fsp(), projection)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(6, 1, 8, 8, generator=generator)
    return images, torch.randint(10, (6,), generator=generator)


@pytest.fixture
def targets(batch: tuple[Tensor, Tensor]) -> Targets:
    torch.manual_seed(3)
    paths = [pair.student for pair in PAIRS]
    with torch.no_grad():
        logits, maps = Tapped(CifarResNet(14, in_channels=1), paths, [None] * 2)(batch[0])
    return Targets(maps, logits)


def maps_of(network: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    return Tapped(network, [pair.student for pair in PAIRS], [None, None])(images)[1]


def test_stage_1_is_the_fsp_loss_alone_weighted_by_pair(
    batch: tuple[Tensor, Tensor], targets: Targets
) -> None:
    ours = objective(stage(task=False, fsp=1.0))
    loss = ours(*batch, targets)
    maps = [tuple(x.double() for x in p) for p in maps_of(ours.student.network, batch[0])]
    theirs = [tuple(x.double() for x in p) for p in targets.pairs]
    torch.testing.assert_close(
        loss.double(), reference.fsp_loss(maps, theirs, weights=[2.0, 0.5]), rtol=1e-5, atol=0
    )


class Tokens(nn.Module):
    """Maps (B, 16, C) of images (B, 1, 8, 8), and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.embed(images.reshape(-1, 16, 4)).relu()).mean(1))


def test_pairs_of_tokens_are_compared_channel_by_channel(batch: tuple[Tensor, Tensor]) -> None:
    paths = ("embed", "block")
    pairs = [Pair(student=paths, teacher=paths, channel_dim=-1)]
    student, teacher = Tokens(), Tokens()
    _, theirs = Tapped(teacher, [paths], [-1])(batch[0])
    ours = Objective(student, stage(task=False, fsp=1.0), pairs, Fsp(), None)
    loss = ours(*batch, Targets(theirs))

    def transposed(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
        [(first, second)] = Tapped(network, [paths], [1])(batch[0])[1]
        return [(first.mT.double(), second.mT.double())]

    expected = reference.fsp_loss(transposed(student), transposed(teacher))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_stage_1_has_no_gradient_for_the_head_and_one_for_all_before_the_last_map(
    batch: tuple[Tensor, Tensor], targets: Targets
) -> None:
    ours = objective(stage(task=False, fsp=1.0))
    ours(*batch, targets).backward()
    without = {n for n, p in ours.student.network.named_parameters() if p.grad is None}
    assert "fc.weight" in without
    assert all(name.startswith(("fc", "stage3")) for name in without)


def test_the_task_is_the_mean_cross_entropy_of_the_networks_logits(
    batch: tuple[Tensor, Tensor],
) -> None:
    ours = objective(stage())
    loss = ours(*batch, Targets())
    torch.testing.assert_close(loss, F.cross_entropy(ours.student.network(batch[0]), batch[1]))


def test_the_joint_loss_is_the_task_plus_beta_times_fsp(
    batch: tuple[Tensor, Tensor], targets: Targets
) -> None:
    parts = [objective(s)(*batch, targets) for s in (stage(), stage(task=False, fsp=1.0))]
    both = objective(stage(fsp=0.25))(*batch, targets)
    torch.testing.assert_close(both, parts[0] + 0.25 * parts[1])


def test_soft_targets_are_hintons(batch: tuple[Tensor, Tensor], targets: Targets) -> None:
    kd = SoftTargets(weight=0.7, temperature=3.0)
    logits = torch.randn(6, 10, dtype=torch.float64)
    assert targets.logits is not None
    soft = targets.logits.double()
    p, q = (soft / 3).softmax(1), (logits / 3).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    expected = 0.3 * F.cross_entropy(logits, batch[1]) + 0.7 * 9 * divergence
    found = task_loss(logits, batch[1], soft, kd)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_each_pairs_loss_adds_up_to_the_whole(
    batch: tuple[Tensor, Tensor], targets: Targets
) -> None:
    ours = objective(stage(task=False, fsp=1.0))
    _, maps = ours.student(batch[0])
    each = ours.fsp_loss(maps, targets, "none")
    assert each.shape == (2,)
    torch.testing.assert_close(each.sum(), ours.fsp_loss(maps, targets))


def test_a_stage_without_fsp_taps_nothing() -> None:
    network = objective(stage()).student.network
    assert not any(module._forward_hooks for module in network.modules())


def test_a_projection_is_trained_with_the_student_and_no_part_of_it(
    batch: tuple[Tensor, Tensor],
) -> None:
    sizes = ((8, 8), (8, 8))
    shapes = [
        PairShapes((16, 16), (24, 16), sizes, sizes),
        PairShapes((32, 32), (32, 32), sizes, sizes),
    ]
    projection = Projection(shapes)
    ours = objective(stage(task=False, fsp=1.0), projection)
    wide = torch.randn(6, 24, 8, 8)
    theirs = Targets([(wide, torch.randn(6, 16, 8, 8)), (torch.randn(6, 32, 4, 4),) * 2])
    ours(*batch, theirs).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projection.parameters())
    assert {id(p) for p in projection.parameters()} <= {id(p) for p in ours.parameters()}
    assert len(list(ours.student.network.parameters())) == len(
        list(CifarResNet(8, in_channels=1).parameters())
    )


def test_losses_are_in_fp32_under_autocast_and_maps_stay_half(
    batch: tuple[Tensor, Tensor], targets: Targets
) -> None:
    ours = objective(stage(fsp=1.0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(*batch, targets)
        _, maps = ours.student(batch[0])
    assert loss.dtype == torch.float32
    assert maps[0][0].dtype == torch.bfloat16
    assert loss.isfinite()


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_loss_and_gradients(
    batch: tuple[Tensor, Tensor], targets: Targets
) -> None:
    of = stage(fsp=0.1)
    plain = objective(of)
    torch.manual_seed(1)
    network = CifarResNet(8, in_channels=1).train()
    compiled = Objective(network, of, PAIRS, Fsp(), None, compiled=True)
    for each in (plain, compiled):
        each(*batch, targets).backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_fsp_options_reach_the_loss(batch: tuple[Tensor, Tensor], targets: Targets) -> None:
    ours = objective(stage(task=False, fsp=1.0))
    frobenius = ours(*batch, targets)
    ours.fsp = ours.fsp.model_copy(update={"norm": "mse"})
    assert ours(*batch, targets) < 0.1 * frobenius
