"""The experiment: fair arms, equal numbers each time, networks trained once, a safe folder."""

from __future__ import annotations

import io
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from studies import files_under, open_study

from fsp_kernels import fsp_matrix
from fsp_kernels.distill import records
from fsp_kernels.distill.data import EvaluationBatches
from fsp_kernels.distill.export import export_run
from fsp_kernels.distill.models import CifarResNet
from fsp_kernels.distill.objective import Tapped
from fsp_kernels.distill.records import MATRICES, MODEL, RECORD, Run
from fsp_kernels.distill.study import Study
from fsp_kernels.errors import DistillError

ARMS = ("baseline", "baseline-long", "two-stage")


def runs_of(study: Study, arm: str) -> list[Run]:
    return [records.read(study.folder_of(arm, seed)) for seed in study.config.seeds]


def numbers(run: Run) -> list[list[dict[str, float]]]:
    """All of a run but the time it took."""
    return [phase.history for phase in run.phases]


def test_every_seed_has_every_arm_in_a_folder_of_its_own(studied: Study) -> None:
    found = records.find(studied.folder)
    expected = [studied.folder_of(arm, seed) for arm in ARMS for seed in (0, 1)]
    assert set(found) == {studied.folder / "teacher", *expected}
    assert all((folder / MODEL).is_file() for folder in found)


def test_the_arms_take_the_steps_they_claim(studied: Study) -> None:
    for arm, steps in (("baseline", [6]), ("baseline-long", [14]), ("two-stage", [8, 6])):
        for run in runs_of(studied, arm):
            assert [phase.steps for phase in run.phases] == steps


def test_baselines_of_a_seed_start_equal_and_see_the_same_images(studied: Study) -> None:
    short, long = (runs_of(studied, arm) for arm in ("baseline", "baseline-long"))
    for one, other in zip(short, long, strict=True):
        assert one.task.history[0] == other.task.history[0]
        # The shorter one's rate falls after its third step, which no loss up to the fourth shows.
        assert one.task.history[1]["train_loss"] == other.task.history[1]["train_loss"]
    assert short[0].task.history[0] != short[1].task.history[0]


def test_the_distilled_student_starts_from_the_baselines_weights(
    recipe: Path, tmp_path: Path
) -> None:
    tiny = ["stage1.learning_rate=1e-30", "stage2.learning_rate=1e-30"]
    study = open_study(recipe, tmp_path / "run", *tiny)
    for arm in ("baseline", "two-stage"):
        study.student(arm, 1)
    ours, theirs = (load_file(study.folder_of(arm, 1) / MODEL) for arm in ("baseline", "two-stage"))
    assert torch.equal(ours["conv.weight"], theirs["conv.weight"])


def test_a_seed_has_its_numbers_whatever_other_seeds_and_arms_are_run(
    studied: Study, study: Study
) -> None:
    alone = study.student("two-stage", 1)
    assert numbers(alone) == numbers(runs_of(studied, "two-stage")[1])
    ours = load_file(study.folder_of("two-stage", 1) / MODEL)
    theirs = load_file(studied.folder_of("two-stage", 1) / MODEL)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_baseline_trains_no_teacher(study: Study) -> None:
    study.student("baseline", 0)
    assert not (study.folder / "teacher").exists()


def test_matrices_are_kept_of_teacher_and_student_before_and_after(studied: Study) -> None:
    tensors = load_file(studied.folder_of("two-stage", 0) / MATRICES)
    assert {name: tuple(x.shape) for name, x in tensors.items()} == {
        f"{moment}/{index}": shape
        for moment in ("teacher", "before", "after")
        for index, shape in enumerate([(16, 16), (64, 64)])
    }
    teacher = CifarResNet(14, in_channels=1).eval()
    teacher.load_state_dict(load_file(studied.folder / "teacher" / MODEL))
    [batch] = EvaluationBatches(studied.splits.validation)
    with torch.no_grad():
        paths = [pair.teacher for pair in studied.pairs]
        _, maps = Tapped(teacher, paths, [None, None])(batch.images)
    for index, pair in enumerate(maps):
        torch.testing.assert_close(tensors[f"teacher/{index}"], fsp_matrix(*pair).mean(0))
    assert not torch.equal(tensors["before/0"], tensors["after/0"])


@pytest.mark.parametrize(
    "setting", ["teacher_training.steps=5", "teacher_seed=1", "data.augment=true"]
)
def test_a_teacher_of_other_settings_is_trained_anew_only_where_that_was_asked_for(
    study: Study, recipe: Path, setting: str
) -> None:
    study.train_teacher()
    before = files_under(study.folder)
    key = setting.partition("=")[0].replace("teacher_seed", "seed")
    for resume in (None, True):
        with pytest.raises(DistillError, match=f"/teacher: was trained under other .*{key}"):
            open_study(recipe, study.folder, setting, resume=resume)
    assert files_under(study.folder) == before
    open_study(recipe, study.folder, setting, resume=False).train_teacher()
    model = study.folder / "teacher" / MODEL
    assert model.read_bytes() != before[model]


def test_a_network_of_another_version_is_replaced_only_where_that_was_asked_for(
    study: Study, recipe: Path
) -> None:
    study.student("two-stage", 0)
    for folder in (study.folder / "teacher", study.folder_of("two-stage", 0)):
        path = folder / RECORD
        path.write_text(path.read_text().replace('"format": 3', '"format": 2'))
    before = files_under(study.folder)
    for resume in (None, True):
        with pytest.raises(DistillError, match=r"run\.json: was written by another version of th"):
            open_study(recipe, study.folder, resume=resume)
    assert files_under(study.folder) == before
    open_study(recipe, study.folder, "stage2.steps=3", resume=False).student("two-stage", 0)
    assert records.read(study.folder / "teacher").steps == 6
    assert records.read(study.folder_of("two-stage", 0)).steps == 11


@pytest.mark.parametrize(
    "setting", ["data.train_images=12", "execution.threads=2", "seeds=[5]", "stage1.steps=2"]
)
def test_a_teacher_does_not_depend_on_its_students(
    recipe: Path,
    tmp_path: Path,
    folder: Path,
    setting: str,
) -> None:
    images = [f"data={{dataset: imagefolder, root: {folder}, image_size: 16, batch_size: 5}}"]
    images += ["evaluation.split=test"]
    open_study(recipe, tmp_path / "run", *images).train_teacher()
    model = tmp_path / "run" / "teacher" / MODEL
    before = model.stat().st_mtime_ns
    open_study(recipe, tmp_path / "run", *images, setting).train_teacher()
    assert model.stat().st_mtime_ns == before


def test_a_teacher_of_other_images_in_another_folder_is_not_taken_for_this_ones(
    recipe: Path,
    tmp_path: Path,
    folder: Path,
) -> None:
    images = ["data.dataset=imagefolder", "data.image_size=16", "data.batch_size=10"]
    images += ["data.train_images=10", "data.teacher_images=12", "evaluation.split=test"]

    def opened(root: Path) -> Study:
        study = open_study(recipe, tmp_path / "run", *images, f"data.root={root}")
        study.train_teacher()
        return study

    first = records.read(opened(folder).folder / "teacher")
    moved = folder.rename(tmp_path / "moved")
    assert records.read(opened(moved).folder / "teacher") == first
    for part in ("train", "val"):
        (moved / part / "one").rename(moved / part / "a-class-that-comes-first")
    with pytest.raises(DistillError, match="was trained under other settings than these: images;"):
        opened(moved)


@pytest.mark.parametrize("damaged", [MODEL, RECORD])
def test_a_damaged_teacher_is_reported_and_trained_anew(
    study: Study, recipe: Path, heard: io.StringIO, damaged: str
) -> None:
    study.train_teacher()
    path = study.folder / "teacher" / damaged
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    open_study(recipe, study.folder, heard=heard).train_teacher()
    assert f"{path}: not " in heard.getvalue()
    assert "training it anew" in heard.getvalue()
    assert records.read(study.folder / "teacher").phases[0].steps == 6


def test_a_teacher_that_comes_trained_is_measured_not_trained(recipe: Path, tmp_path: Path) -> None:
    weights = CifarResNet(14, in_channels=1).state_dict()
    save_file(weights, tmp_path / "given.safetensors")
    given = ["teacher_training=null", f"teacher.weights={tmp_path / 'given.safetensors'}"]
    study = open_study(recipe, tmp_path / "run", *given)
    kept = study.train_teacher().network.state_dict()
    assert all(torch.equal(kept[name], weights[name]) for name in weights)
    run = records.read(study.folder / "teacher")
    assert (run.steps, run.phases[0].name) == (0, "as given")
    assert 0 <= run.accuracy <= 1


SOURCE = (
    "source={data: {dataset: mnist5k, image_size: 8, augment: false, batch_size: 20, "
    "train_images: 200, teacher_images: 200}, training: {steps: 4, learning_rate: 0.05}}"
)


def test_a_teacher_with_a_source_starts_from_what_the_source_made_of_it(
    recipe: Path, tmp_path: Path
) -> None:
    still = ["teacher_training.learning_rate=1e-30", "teacher_training.steps=1"]
    study = open_study(recipe, tmp_path / "run", SOURCE, *still)
    study.train_teacher()
    source, teacher = (load_file(study.folder / arm / MODEL) for arm in ("source", "teacher"))
    assert torch.equal(source["stage1.0.conv1.weight"], teacher["stage1.0.conv1.weight"])
    fresh = study.runtime.new_network(study.config.teacher, study.splits, 1000, "teacher")
    assert not torch.equal(source["conv.weight"], fresh.state_dict()["conv.weight"])


def test_a_source_of_other_images_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"source\.data"):
        open_study(recipe, tmp_path / "run", SOURCE.replace("image_size: 8, ", ""))


@pytest.mark.parametrize("why", ["evaluation.split=validation", "source.training.stop.patience=2"])
def test_a_source_without_validation_images_is_refused_where_they_are_needed(
    recipe: Path, tmp_path: Path, why: str
) -> None:
    source = SOURCE.replace("batch_size", "validation_images: 0, batch_size")
    with pytest.raises(DistillError, match=r"^source\.data\.validation_images: is 0, must be at"):
        open_study(recipe, tmp_path / "run", source, "evaluation.split=test", why)
    assert not (tmp_path / "run").exists()


def test_a_cached_teacher_teaches_the_same(recipe: Path, tmp_path: Path) -> None:
    live = open_study(recipe, tmp_path / "live").student("two-stage-kd", 0)
    cached = open_study(recipe, tmp_path / "cached", "fsp.cache_teacher=true")
    stored = cached.student("two-stage-kd", 0)
    assert len(list((cached.folder / "teacher" / "cache").iterdir())) == 1
    for ours, theirs in zip(stored.phases, live.phases, strict=True):
        assert ours.history[-1]["train_loss"] == pytest.approx(
            theirs.history[-1]["train_loss"], rel=1e-3
        )


def test_arms_and_seeds_are_added_to_what_is_finished(study: Study, recipe: Path) -> None:
    study.student("baseline", 0)
    study.student("two-stage", 0)
    more = open_study(recipe, study.folder, "arms=[baseline, kd]", "seeds=[0, 3]", "kd.weight=0.5")
    more.all()
    assert [(run.arm, run.seed) for run in more.reused] == [("teacher", 1000), ("baseline", 0)]
    assert [(run.arm, run.seed) for run in more.trained] == [("kd", 0), ("baseline", 3), ("kd", 3)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.arguments={width: 2}"], r"pairs\.0: the student's FSP matrix is 32 x 32"),
        (["student.model=cifar/resnet7"], r"student\.model: "),
        (["data.teacher_images=900"], r"data\.teacher_images: is 900, must be at most 797"),
        (
            ["pairs=[{student: [stage1, stage9], teacher: [stage1, stage1]}]"],
            r"pairs.*stage9.*has no module",
        ),
        (
            ["stage2.epochs=60000000", "stage2.steps=null"],
            r"stage2\.epochs: is 60000000, which are 120000000 steps, must be at most 100000000",
        ),
        (
            ["data.train_images=null", "data.teacher_images=null", "data.batch_size=800"],
            r"data\.batch_size: is 800, must be at most 797",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    recipe: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(DistillError, match=message):
        open_study(recipe, tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


USERS_NETS = """
from fsp_kernels.distill.models import CifarResNet

class Twice(CifarResNet):
    def __init__(self, classes):
        super().__init__(8, in_channels=1, classes=classes)

    def forward(self, x):
        return super().forward(x), x

class Auxiliary(Twice):
    def forward(self, x):
        logits, x = super().forward(x)
        return (logits, x) if self.training else logits

def frozen(classes):
    return CifarResNet(8, in_channels=1, classes=classes).requires_grad_(False)

def seven():
    return CifarResNet(8, in_channels=1, classes=7)
"""


@pytest.fixture
def users_nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_nets.py").write_text(USERS_NETS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_nets", raising=False)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            "Twice",
            r"model: gives a tuple of 2, must give .* as {role}\.logits, or name a module:call",
        ),
        ("Auxiliary", r"model: while it trains, gives a tuple of 2"),
        ("frozen", r"model: cannot be trained by (stage 2|task): no weight"),
        ("seven", r"model: gives shape \(2, 7\), must give .*, here \(2, 10\)"),
    ],
)
@pytest.mark.usefixtures("users_nets")
def test_a_network_that_cannot_be_trained_is_refused_before_anything_changes(
    recipe: Path, tmp_path: Path, role: str, network: str, message: str
) -> None:
    with pytest.raises(DistillError, match=rf"^{role}\.{message.replace('{role}', role)}"):
        open_study(recipe, tmp_path / "run", f"{role}.model=users_nets:{network}")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("users_nets")
def test_a_frozen_teacher_is_fine_if_it_is_not_trained(recipe: Path, tmp_path: Path) -> None:
    save_file(CifarResNet(8, in_channels=1).state_dict(), tmp_path / "w.safetensors")
    given = [f"teacher={{model: 'users_nets:frozen', weights: {tmp_path / 'w.safetensors'}}}"]
    open_study(recipe, tmp_path / "run", "teacher_training=null", *given)


def test_weights_that_are_not_finite_are_refused(recipe: Path, tmp_path: Path) -> None:
    weights = CifarResNet(14, in_channels=1).state_dict()
    weights["fc.bias"].fill_(torch.nan)
    save_file(weights, tmp_path / "w.safetensors")
    given = ["teacher_training=null", f"teacher.weights={tmp_path / 'w.safetensors'}"]
    with pytest.raises(DistillError, match=r"^teacher\.model: gives numbers that are not finite"):
        open_study(recipe, tmp_path / "run", *given)


@pytest.mark.usefixtures("users_nets")
def test_a_network_whose_logits_are_chosen_is_trained_like_any_other(
    recipe: Path, tmp_path: Path, studied: Study
) -> None:
    chosen = "student={model: 'users_nets:Auxiliary', logits: ':output[0]'}"
    ours = open_study(recipe, tmp_path / "run", chosen).student("two-stage", 0)
    assert numbers(ours) == numbers(runs_of(studied, "two-stage")[0])
    paths = export_run(tmp_path / "run" / "two-stage" / "seed-0", tmp_path / "exported")
    assert all(path.is_file() for path in paths)


def test_a_folder_with_other_things_in_it_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    before = files_under(folder)
    with pytest.raises(DistillError, match="is not empty and holds no earlier run"):
        open_study(recipe, folder)
    assert files_under(folder) == before


def test_a_disk_without_space_is_refused_at_the_door(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1 << 20

    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage)
    with pytest.raises(DistillError, match="its disk has 1 MiB free, the run needs about"):
        open_study(recipe, tmp_path / "run")


def test_a_record_says_on_what_it_was_made_and_names_no_machine(studied: Study) -> None:
    run = runs_of(studied, "baseline")[0]
    assert run.environment["torch"] == version("torch")
    assert run.environment["device"].endswith(" cores")
    assert platform.node() not in " ".join(run.environment.values()).split()
    assert set(run.environment) <= {
        "python", "fsp-kernels", "torch", "torchvision", "accelerate", "numpy", "platform", "device"
    }  # fmt: skip
    assert run.config["student"]["model"] == "cifar/resnet8"


def test_two_processes_do_not_train_in_one_folder(study: Study, recipe: Path) -> None:
    command = [sys.executable, "-m", "fsp_kernels.distill", "train", recipe, "-o", study.folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "another process is training in it" in done.stderr
    assert not (study.folder / "teacher").exists()
