"""What would end a study after hours, found in seconds: networks run before any is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fsp_kernels.distill.arms import Stage
from fsp_kernels.distill.config import Fsp, Pair
from fsp_kernels.distill.errors import DistillError, explain
from fsp_kernels.distill.evaluation import by_batch_statistics
from fsp_kernels.distill.objective import Objective, Tapped, Targets
from fsp_kernels.distill.pairs import PairShapes, Projection
from fsp_kernels.distill.paths import choices, describe
from fsp_kernels.distill.seeds import kept_generators
from fsp_kernels.distill.stages import evaluation_mode, run


def check_logits(
    model: nn.Module, images: Tensor, classes: int, where: str, trained: bool = True
) -> None:
    """The network gives logits: as it evaluates and, if it is to be trained, as it trains.

    They have to be finite, but not in evaluation mode before training: deep networks are not.

    Args:
        model: left as it was, with all random generators.
        images: ``(B, C, H, W)``, two at least, on the network's device.
        classes: number of logits.
        where: the network's section of the recipe, for messages.
        trained: whether it is to be trained.

    Raises:
        DistillError: it gives something else, or raises an error.
    """
    expected = len(images), classes
    with kept_generators():
        with evaluation_mode(model):
            _check_logits(run(model, images, where), expected, where, finite=not trained)
        if trained and not _waits(model):
            with by_batch_statistics(model):
                output = run(model, images, where)
            _check_logits(output, expected, where, "while it trains, ")


def check_steps(
    model: nn.Module,
    stages: Sequence[Stage],
    images: Tensor,
    where: str,
    fsp: Fsp,
    pairs: Sequence[Pair] = (),
    shapes: Sequence[PairShapes] = (),
    teacher: nn.Module | None = None,
) -> None:
    """Each stage's loss has a gradient for some weight.

    Args:
        model: left as it was, with all random generators, but without gradients.
        stages: that it is trained by.
        images: ``(B, C, H, W)``, two at least, on the networks' device.
        where: the network's section of the recipe, for messages.
        fsp: how the FSP loss is taken.
        pairs, shapes: as ``check_pairs`` takes and gives them, for stages with that loss.
        teacher: left as it was, for stages that need one.

    Raises:
        DistillError: not so, or the step raises an error.
    """
    if _waits(model):
        return
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    with kept_generators():
        targets = Targets() if teacher is None else _targets(teacher, pairs, images)
        for stage in stages:
            projection = Projection(shapes).to(images.device) if fsp.projection else None
            objective = Objective(model, stage, pairs, fsp, projection)
            try:
                with by_batch_statistics(objective), torch.enable_grad():
                    loss = objective(images, labels, targets)
                    if not loss.requires_grad:
                        raise ValueError("no weight that its loss depends on requires a gradient")
                    loss.backward()
            except DistillError as error:  # of a tap, which knows the path
                raise DistillError(f"pairs: while it trains, the {where}'s {error}") from error
            except Exception as error:
                raise DistillError(
                    f"{where}.model: cannot be trained by {stage.name}: {explain(error)}"
                ) from error
            finally:
                objective.student.taps.detach()
                objective.zero_grad()


def _waits(model: nn.Module) -> bool:
    """Whether its training mode waits for other processes, which may look later, and for a GPU."""
    synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    return synchronised and dist.is_available() and dist.is_initialized()


def _targets(teacher: nn.Module, pairs: Sequence[Pair], images: Tensor) -> Targets:
    paths, dims = [pair.teacher for pair in pairs], [pair.channel_dim for pair in pairs]
    tapped = Tapped(teacher, paths, dims)
    with evaluation_mode(teacher):
        logits, maps = tapped(images)
    tapped.taps.detach()
    return Targets(maps, logits)


def _check_logits(
    output: object, shape: tuple[int, int], where: str, mode: str = "", finite: bool = True
) -> None:
    hint = ""
    if not isinstance(output, Tensor):
        fault = describe(output)
        found = choices(output, ":output")
        hint = f"{found} as {where}.logits, or name" if found else "; name"
        hint += " a module:callable whose network gives them alone"
    elif tuple(output.shape) != shape:
        fault = f"shape {tuple(output.shape)}"
    elif not output.is_floating_point():
        fault = f"{output.dtype}"
    elif finite and not bool(output.isfinite().all()):
        fault = "numbers that are not finite"
    else:
        return
    raise DistillError(
        f"{where}.model: {mode}gives {fault}, must give finite logits (images, classes), "
        f"here {shape}{hint}"
    )
