"""A trained network for use elsewhere: weights, a program without code of ours, and a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fsp_kernels.distill import checkpoint, records
from fsp_kernels.distill.config import Config, Data
from fsp_kernels.distill.data import Splits, load_splits
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.models import build_model
from fsp_kernels.distill.settings import read
from fsp_kernels.distill.storage import check_writable, replacing, write_text

_BATCH = 4


def export_run(folder: Path, output: Path) -> list[Path]:
    """Write the network of a finished run.

    Args:
        folder: the run's.
        output: gets ``model.safetensors``, its state dict; ``model.pt2``, a program of
            ``torch.export`` that takes a batch of any size (``torch.export.load(...).module()``);
            ``model.json``, what it takes and gives.

    Returns:
        The three paths.

    Raises:
        DistillError: there is no such run, its weights are damaged, its data are gone, the network
            can't be exported, or the exported program's logits are not the network's.
    """
    if folder.is_dir() and not records.is_finished(folder):
        runs = [str(run) for run in records.find(folder)]
        raise DistillError(f"{folder}: is no run, but holds some; choose one of {', '.join(runs)}")
    run = records.read(folder)
    stored = checkpoint.load(folder / records.MODEL)
    config = read(Config, run.config)
    splits = load_splits(_data_of(run, config))
    model = _network_of(run, config, splits)
    checkpoint.restore(model, stored, folder / records.MODEL)
    check_writable(output, 3 * sum(x.nbytes for x in stored.tensors.values()))
    paths = [output / f"model.{suffix}" for suffix in ("safetensors", "pt2", "json")]
    _write_program(model, splits, paths[1])  # first, as it may fail
    with replacing(paths[0]) as unfinished:
        save_file(stored.tensors, unfinished)
    write_text(paths[2], json.dumps(_note(run, config, splits), indent=1) + "\n")
    return paths


def _data_of(run: records.Run, config: Config) -> Data:
    data = config.data
    if run.arm == "source" and config.source is not None:
        data = config.source.data
    # All were read before the run; here it takes a few.
    return data.model_copy(update={"corrupt": "unchecked"}) if data.corrupt == "refuse" else data


def _network_of(run: records.Run, config: Config, splits: Splits) -> nn.Module:
    """The architecture; the weights that it once started from are not asked for."""
    where = "teacher" if run.arm in ("teacher", "source") else "student"
    network = getattr(config, where).model_copy(update={"weights": None, "pretrained": False})
    channels, classes = splits.image_shape[0], splits.classes
    return build_model(network, in_channels=channels, classes=classes, where=where).eval()


def _write_program(model: nn.Module, splits: Splits, path: Path) -> None:
    images = torch.stack([splits.test[index].image for index in range(_BATCH)])
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch.export raises what the model's code makes it raise
        raise DistillError(f"the network can't be exported by torch.export: {error}") from error
    with replacing(path) as unfinished:
        with unfinished.open("wb") as file:
            torch.export.save(program, file)
        with unfinished.open("rb") as file:
            _check(model, torch.export.load(file).module(), images)


@torch.no_grad()
def _check(model: nn.Module, program: Any, images: torch.Tensor) -> None:
    """What was written gives the network's logits, for a batch of another size too."""
    for batch in (images, images[:1]):
        ours, theirs = model(batch), program(batch)
        if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5):
            worst = (ours - theirs).abs().max().item()
            raise DistillError(
                f"the exported program's logits differ from the network's by {worst}"
            )


def _note(run: records.Run, config: Config, splits: Splits) -> dict[str, Any]:
    test = splits.test
    return {
        "network": run.network,
        "arm": run.arm,
        "seed": run.seed,
        "accuracy": {config.evaluation.split: run.accuracy},
        "input": {
            "shape": ["batch", *splits.image_shape],
            "dtype": "float32",
            "values": "(pixel - mean) / std of its channel, pixels in pixel_range",
            "pixel_range": test.pixel_range,
            "mean": test.mean,
            "std": test.std,
        },
        "output": {"shape": ["batch", splits.classes], "meaning": "logits"},
        "environment": run.environment,
    }
