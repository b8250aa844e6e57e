"""The documentation site builds without a warning, and its page of the API is complete."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fsp_kernels as fsp

ROOT = Path(__file__).parents[1]
API = (ROOT / "docs/api.md").read_text()
NOT_IN_GIT = {".git", ".venv", "build", "runs"}


def build(config: Path, to: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", config, "--site-dir", to]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        command, cwd=config.parent, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_the_site_builds_and_holds_what_its_pages_show(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    assert "Fused GPU and CPU kernels" in pages[site / "index.html"]  # the README
    # Pictures, and files outside docs/, are within the site.
    shown = [
        (page.parent / source)
        for page, text in pages.items()
        if page.name == "index.html"
        for source in re.findall(r'<img [^>]*src="([^":]+)"', text)
    ]
    assert any(path.name == "accuracy.png" for path in shown)
    assert [path for path in shown if not path.is_file()] == []
    plan = pages[site / "fsp_kernels/plan.py/index.html"]
    assert "def plan_loss" in re.sub("<[^>]+>", "", plan)
    # Nothing is fetched from elsewhere.
    fetched = re.compile(r'<(?:script|link|img)[^>]* (?:src|href)="?(?:https?:)?//[^ >]+')
    assert [found for text in pages.values() for found in fetched.findall(text)] == []


@pytest.mark.slow
def test_dead_links_fail_the_build(tmp_path: Path) -> None:
    for path in ROOT.iterdir():
        if path.name not in NOT_IN_GIT | {"docs", "mkdocs.yml"}:
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    dead = ["gone.md", "../gone.py", "gpu.md#gone", "#gone", "../CONTRIBUTING.md#gone"]
    with (tmp_path / "docs/choosing.md").open("a") as page:
        page.write("\n".join(f"[x]({link})" for link in dead))
    done = build(tmp_path / "mkdocs.yml", tmp_path / "build")
    assert done.returncode == 1
    warned = "\n".join(x for x in done.stderr.splitlines() if x.startswith("WARNING"))
    assert [link for link in dead if f"{link.removeprefix('../')}'" not in warned] == []


def entries() -> set[str]:
    return set(re.findall(r"^::: (\S+)$", API, flags=re.MULTILINE))


def test_the_api_has_every_public_name() -> None:
    functions = {name for name in fsp.__all__ if name not in ("__version__", "compat", "operators")}
    assert {f"fsp_kernels.{name}" for name in functions} <= entries()
    for module in fsp.compat.__all__:
        inside = vars(getattr(fsp.compat, module))
        path = f"fsp_kernels.compat.{module}"
        own = {
            f"{path}.{name}"
            for name, value in inside.items()
            if not name.startswith("_") and getattr(value, "__module__", "") == path
        }
        assert own
        assert own <= entries()


@pytest.mark.parametrize("name", ["matrix", "matrix_backward", "loss"])
def test_the_api_has_the_schema_of_each_operator(name: str) -> None:
    text = " ".join(API.split())
    [shown] = re.findall(rf"torch\.ops\.(fsp\.{name}\(.*?)(?:, \.\.\.|\) ->)", text)
    schema = str(getattr(torch.ops.fsp, name).default._schema).replace("::", ".")
    assert schema.startswith(shown)


def test_the_api_has_every_environment_variable() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "fsp_kernels").rglob("*.py")]
    used = re.findall(r"FSP_KERNELS_[A-Z]+", "\n".join(path.read_text() for path in sources))
    assert used
    assert {name for name in used if f"`{name}`" not in API} == set()
