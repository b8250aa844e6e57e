"""Run networks before any is trained, to find in seconds what would end a study after hours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fsp_kernels.distill.arms import TrainingStage
from fsp_kernels.distill.config import Fsp, Pair
from fsp_kernels.distill.evaluation import by_batch_statistics
from fsp_kernels.distill.objective import Objective, Tapped, Targets
from fsp_kernels.distill.seeds import kept_generators
from fsp_kernels.errors import DistillError, explain
from fsp_kernels.features.pairs import PairShapes, Projection
from fsp_kernels.features.paths import choices, describe
from fsp_kernels.features.stages import evaluation_mode, run


def check_logits(
    model: nn.Module, images: Tensor, classes: int, where: str, trained: bool = True
) -> None:
    """Check that a network gives logits in evaluation mode and, if it is trained, in training mode.

    The network and all random generators are left as they were. ``images`` are ``(B, C, H, W)``, at
    least two, on its device; ``where`` is its section of the recipe. The logits of a network that
    is going to be trained need not be finite in evaluation mode, since its running statistics are
    not yet those of any images.

    Raises:
        DistillError: it gives something else, or raises an error.
    """
    shape = len(images), classes
    with kept_generators():
        with evaluation_mode(model):
            _check_output(run(model, images, where), shape, where, finite=not trained)
        if trained and not _waits_for_processes(model):
            with by_batch_statistics(model):
                output = run(model, images, where)
            _check_output(output, shape, where, "while it trains, ")


def check_steps(
    model: nn.Module,
    stages: Sequence[TrainingStage],
    images: Tensor,
    where: str,
    fsp: Fsp,
    pairs: Sequence[Pair] = (),
    shapes: Sequence[PairShapes] = (),
    teacher: nn.Module | None = None,
) -> None:
    """Check that the loss of each stage that trains a network has a gradient for some weight.

    The networks and all random generators are left as they were, but without gradients. ``images``
    and ``where`` are as for ``check_logits``. Stages with the FSP loss need ``pairs`` and
    ``shapes``, as ``check_pairs`` takes and gives them, and the ``teacher``.

    Raises:
        DistillError: a loss has none, or the step raises an error.
    """
    if _waits_for_processes(model):
        return
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    with kept_generators():
        targets = _targets(teacher, pairs, images)
        for stage in stages:
            projection = Projection(shapes).to(images.device) if fsp.projection else None
            objective = Objective(model, stage, pairs, fsp, projection)
            try:
                with by_batch_statistics(objective), torch.enable_grad():
                    loss = objective(images, labels, targets)
                    if not loss.requires_grad:
                        raise ValueError("no weight that its loss depends on requires a gradient")
                    loss.backward()
            except DistillError as error:  # of a tap; it names the path
                raise DistillError(f"pairs: while it trains, the {where}'s {error}") from error
            except Exception as error:
                problem = f"cannot be trained by {stage.name}: {explain(error)}"
                raise DistillError(f"{where}.model: {problem}") from error
            finally:
                objective.student.taps.detach()
                objective.zero_grad()


def _waits_for_processes(model: nn.Module) -> bool:
    """Whether training mode needs all processes, which may not run this check together."""
    synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    return synchronised and dist.is_available() and dist.is_initialized()


def _targets(teacher: nn.Module | None, pairs: Sequence[Pair], images: Tensor) -> Targets:
    if teacher is None:
        return Targets()
    tapped = Tapped(teacher, [pair.teacher for pair in pairs], [x.channel_dim for x in pairs])
    with evaluation_mode(teacher):
        logits, maps = tapped(images)
    tapped.taps.detach()
    return Targets(maps, logits)


def _check_output(
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
    elif finite and not output.isfinite().all():
        fault = "numbers that are not finite"
    else:
        return
    raise DistillError(
        f"{where}.model: {mode}gives {fault}, must give finite logits (images, classes), "
        f"here {shape}{hint}"
    )
