"""The code of the README and of other pages runs as written; the commands and paths of all exist.

``test_tutorial.py`` runs the tutorial.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*/*.md"))
}


WITH_CODE = ["README.md", "docs/choosing.md", "docs/replacing.md"]


def blocks(language: str, page: str = "README.md") -> list[str]:
    text = PAGES[page].read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def shell_lines() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines()]


def maps(*channels: int) -> list[Tensor]:
    return [torch.rand(4, c, 8, 8, requires_grad=True) for c in channels]


def readers_variables() -> dict[str, object]:
    """What the snippets about naive ops take for granted, under the names they use."""
    feat_s, feat_t = maps(3, 5, 5, 2), maps(3, 5, 5, 2)
    s1, s2, t1, t2 = maps(3, 5, 3, 5)
    recorded = {"layer1": {"input": s1, "output": s2}}
    sides = [f"{who}_{which}" for who in ("student", "teacher") for which in ("first", "second")]
    io = {"first": "input", "second": "output"}
    return {
        "torch": torch,
        "student": [(s1, s2)],
        "teacher": [(t1, t2)],
        "feat_s": feat_s,
        "feat_t": feat_t,
        "s_shapes": [x.shape for x in feat_s[:-1]],
        "t_shapes": [x.shape for x in feat_t[:-1]],
        "fm_s1": s1,
        "fm_s2": s2,
        "fm_t1": t1,
        "fm_t2": t2,
        "fsp_pairs": {
            "pair1": {side: {"path": "layer1", "io": io[side.split("_")[1]]} for side in sides}
        },
        "student_io_dict": recorded,
        "teacher_io_dict": {"layer1": {"input": t1, "output": t2}},
        "state_S": [torch.rand(4, 6, 3, requires_grad=True) for _ in range(2)],
        "state_T": [torch.rand(4, 6, 3) for _ in range(2)],
        "mask": torch.ones(4, 6, dtype=torch.int64),
    }


def after(diff: str) -> str:
    """The code as it stands once the change is made."""
    return "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))


def before(diff: str) -> str:
    return "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("+"))


@pytest.mark.parametrize("code", [code for page in WITH_CODE for code in blocks("python", page)])
def test_python_block_runs_as_written(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("diff", blocks("diff"))
def test_replacement_of_a_naive_op_gives_a_loss_with_gradients(diff: str) -> None:
    variables = readers_variables()
    exec(compile(after(diff), "README.md", "exec"), variables)
    loss = variables["loss"]
    assert isinstance(loss, Tensor)
    assert loss.requires_grad
    assert loss > 0


def test_the_einsum_op_is_replaced_by_its_equal() -> None:
    diff = next(d for d in blocks("diff") if "einsum" in d)
    variables = readers_variables()
    exec(compile(before(diff), "README.md", "exec"), variables)
    naive = variables["loss"]
    exec(compile(after(diff), "README.md", "exec"), variables)
    torch.testing.assert_close(variables["loss"], naive)  # fp32 on both sides: default tolerances


def make_commands() -> set[str]:
    """All that the pages call, in blocks or within a sentence; ``make`` and at least a target."""
    text = "\n".join(path.read_text() for path in PAGES.values())
    quoted = re.findall(r"`(make [^`]+)`", text)
    in_blocks = re.findall(r"^(make .+?)(?:  +#.*)?$", text, flags=re.MULTILINE)
    return {command for command in (*quoted, *in_blocks) if "/path/to" not in command}


@pytest.mark.parametrize("command", sorted(make_commands()))
def test_make_target_exists(command: str) -> None:
    arguments = [*shlex.split(command), "--dry-run"]
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("line", [x for x in shell_lines() if x.startswith("python -m fsp")])
def test_environment_report_prints(line: str) -> None:
    command = shlex.split(line, comments=True)
    done = subprocess.run(
        [sys.executable, *command[1:]], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert re.search(r"^backend torch +works$", done.stdout, flags=re.MULTILINE)


def test_trainer_commands_are_understood() -> None:
    runner = pytest.importorskip("typer.testing").CliRunner()
    from fsp_kernels.distill import commands

    lines = [x for x in shell_lines() if x.startswith("fsp-distill")]
    assert lines
    for line in lines:
        command = shlex.split(line, comments=True)[1]
        arguments = [command] if command == "--help" else [command, "--help"]
        shown = runner.invoke(commands.app, arguments)
        assert shown.exit_code == 0, shown.output


@pytest.mark.parametrize("page", PAGES)
def test_every_path_of_a_page_exists(page: str) -> None:
    text, folder = PAGES[page].read_text(), PAGES[page].parent
    links = [x for x in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if not x.startswith("http")]
    missing = [link for link in links if not (folder / link).exists()]
    configs = re.findall(r"configs/[\w-]+\.yaml", text)
    missing += [config for config in configs if not (ROOT / config).exists()]
    assert not missing


def test_the_readme_can_be_read_in_minutes() -> None:
    assert len(README.split()) <= 1400


def test_the_map_of_the_code_is_complete() -> None:
    tree = README.split("## Map of the code")[1].split("## Licence")[0]
    package = ROOT / "fsp_kernels"
    modules = {p.name for p in package.glob("*.py") if not p.name.startswith("_")}
    folders = {f"{p.name}/" for p in package.iterdir() if p.is_dir() and p.name != "__pycache__"}
    missing = {name for name in modules | folders if name not in tree}
    assert not missing
