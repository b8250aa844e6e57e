"""``examples/style_loss.py`` moves an image towards a style, by the usual style loss."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fsp_kernels as fsp

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
SCRIPT = Path(__file__).parents[2] / "examples" / "style_loss.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("style_loss", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gram(x):
    f = x.flatten(2)
    return f @ f.mT / f.shape[2]


def test_the_loss_is_the_usual_one(example):
    sizes = {4: 8, 6: 4, 9: 2}
    maps, style = (
        [torch.randn(b, c, s, s, requires_grad=b > 1) for c, s in sizes.items()] for b in (2, 1)
    )
    criterion = example.StyleLoss(style)
    loss = criterion(maps)
    expected = sum((gram(x) - gram(y)).square().mean() for x, y in zip(maps, style, strict=True))
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(x, maps) for x in (loss, expected))
    torch.testing.assert_close(found, wanted)
    plan = fsp.explain([(x, x) for x in maps], criterion.targets, norm="mse")
    assert all(pair.symmetric for pair in plan.pairs)


def test_the_image_moves_towards_the_style(example):
    torch.manual_seed(0)
    content, style = (example.photograph(f"{x}.jpg", 32) for x in ("china", "flower"))
    assert content.shape == (1, 3, 32, 32)
    before = content.clone()
    image, losses = example.transfer(content, style, steps=4)
    assert torch.equal(content, before)
    assert 0 < losses[-1] < 0.9 * losses[0]
    assert not torch.equal(image, content)
    assert 0 <= image.min() < image.max() <= 1


@pytest.mark.slow
def test_the_script_prints_how_the_loss_falls(tmp_path):
    command = [sys.executable, str(SCRIPT), "--steps", "10", "--size", "32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    [numbers] = re.findall(r"^style loss: (\S+) -> (\S+)$", done.stdout, flags=re.MULTILINE)
    start, end = map(float, numbers)
    assert 0 < end < 0.5 * start
    assert not list(tmp_path.iterdir())
