"""Export a trained network: its weights, a program without code of this package, and a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fsp_kernels.distill import checkpoint, records
from fsp_kernels.distill.config import Config
from fsp_kernels.distill.data import Splits, load_splits
from fsp_kernels.distill.models import build_model
from fsp_kernels.distill.settings import read
from fsp_kernels.distill.storage import check_writable, replacing, write_text
from fsp_kernels.errors import DistillError

_BATCH = 4


def export_run(folder: Path, output: Path) -> list[Path]:
    """Write the network of the finished run in ``folder`` to three files in ``output``.

    ``model.safetensors`` is its state dict, ``model.pt2`` a program of ``torch.export`` for batches
    of any size (``torch.export.load(...).module()``), ``model.json`` describes input and output.

    Raises:
        DistillError: there is no such run, its weights are damaged, its data are gone, the network
            can't be exported, or the exported program's logits are not the network's.
    """
    if folder.is_dir() and not records.is_finished(folder):
        runs = ", ".join(map(str, records.find(folder)))
        raise DistillError(f"{folder}: is not a run, but contains some; choose one of {runs}")
    run, path = records.read(folder), folder / records.MODEL
    stored = checkpoint.load(path)
    config = read(Config, run.config)
    role = "teacher" if run.arm in ("teacher", "source") else "student"
    data = config.source.data if run.arm == "source" and config.source else config.data
    if data.corrupt == "refuse":  # only a few images are needed here
        data = data.model_copy(update={"corrupt": "unchecked"})
    splits = load_splits(data)
    # Initial weights are not needed, and may be gone.
    network = getattr(config, role).model_copy(update={"weights": None, "pretrained": False})
    channels, classes = splits.image_shape[0], splits.classes
    model = build_model(network, in_channels=channels, classes=classes, where=role).eval()
    checkpoint.restore(model, stored, path)
    check_writable(output, 3 * sum(x.nbytes for x in stored.tensors.values()))
    paths = [output / f"model.{suffix}" for suffix in ("safetensors", "pt2", "json")]
    _write_program(model, splits, paths[1])  # first, since it may fail
    with replacing(paths[0]) as unfinished:
        save_file(stored.tensors, unfinished)
    write_text(paths[2], json.dumps(_note(run, config, splits), indent=1) + "\n")
    return paths


@torch.no_grad()
def _write_program(model: nn.Module, splits: Splits, path: Path) -> None:
    """Export the network and check that what was written gives the network's logits."""
    images = torch.stack([splits.test[index].image for index in range(_BATCH)])
    batch = torch.export.Dim("batch", min=1)
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    except Exception as error:  # whatever the model's code raises
        raise DistillError(f"the network can't be exported by torch.export: {error}") from error
    with replacing(path) as unfinished:
        with unfinished.open("wb") as file:
            torch.export.save(program, file)
        with unfinished.open("rb") as file:
            written = torch.export.load(file).module()
        for some in (images, images[:1]):
            ours, theirs = model(some), written(some)
            if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5):
                raise DistillError(
                    "the exported program's logits differ from the network's by "
                    f"{(ours - theirs).abs().max().item()}"
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
