"""The stages: what each one changes, what it leaves alone, and that seeds decide everything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from studies import GROUP_NORM_NET, open_study, results
from torch import Tensor, nn

from fsp_kernels.distill.evaluation import Evaluations
from fsp_kernels.distill.models import CifarResNet
from fsp_kernels.distill.records import Phase
from fsp_kernels.distill.runtime import synchronise_batch_norm
from fsp_kernels.distill.study import Study
from fsp_kernels.distill.teacher import LiveTeacher
from fsp_kernels.distill.train import Job, NetworkTraining
from fsp_kernels.errors import DistillError


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    after = model.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


class Bench:
    """A study whose stages are run one at a time, with an untrained teacher."""

    def __init__(self, study: Study) -> None:
        self.study, self.runtime = study, study.runtime
        self.student = self.new_student(0)
        network = self.runtime.new_network(study.config.teacher, study.splits, 1, "teacher")
        self.teacher = LiveTeacher(network, study.pairs, self.runtime.accelerator, compiled=False)
        self.evaluations = Evaluations(study.splits, self.runtime, self.teacher)

    def new_student(self, seed: int) -> nn.Module:
        study = self.study
        return self.runtime.new_network(study.config.student, study.splits, seed, "student")

    def run(self, arm: str, *stages: int) -> list[Phase]:
        """Train the student by the stages of these numbers, or by all."""
        all_stages = self.study.stages(arm)
        job = Job(
            arm=arm,
            label="test seed 0",
            seed=0,
            stages=tuple(all_stages[i] for i in stages) or all_stages,
            data=self.study.config.data,
            images=self.study.splits.train,
            folder=self.study.folder / "test",
            settings={},
            pairs=self.study.pairs,
            shapes=self.study.shapes,
        )
        training = NetworkTraining(self.runtime, job, self.student, self.evaluations, self.teacher)
        return training.run()


@pytest.fixture
def bench(study: Study) -> Bench:
    return Bench(study)


def bench_with(recipe: Path, tmp_path: Path, *overrides: str) -> Bench:
    folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
    return Bench(open_study(recipe, folder, *overrides))


def test_the_seed_decides_the_initial_weights(bench: Bench) -> None:
    first, again, other = map(bench.new_student, (3, 3, 4))
    assert not changed(weights_of(first), again)
    assert changed(weights_of(first), other)


def test_stage_1_trains_the_student_up_to_the_last_map_and_leaves_no_hook(bench: Bench) -> None:
    before = weights_of(bench.student)
    [phase] = bench.run("two-stage", 0)
    moved = changed(before, bench.student)
    assert phase.history[-1]["fsp_loss"] < 0.9 * phase.history[0]["fsp_loss"]
    assert not phase.has_task
    assert {"conv.weight", "stage1.0.conv1.weight", "stage3.0.conv2.weight"} <= moved
    assert not any(name.startswith("fc.") for name in moved)
    # It evaluates three times, in training mode too; only the 8 steps move the statistics.
    assert bench.student.get_buffer("bn.num_batches_tracked").item() == 8
    modules = list(bench.student.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize("arm", ["two-stage-kd", "one-stage-kd"])
def test_the_teacher_is_left_bitwise_alone(bench: Bench, arm: str) -> None:
    before = weights_of(bench.teacher.network)
    bench.run(arm)
    assert not changed(before, bench.teacher.network)
    assert all(p.grad is None for p in bench.teacher.network.parameters())


def test_the_task_starts_from_the_weights_of_stage_1(bench: Bench) -> None:
    bench.run("two-stage", 0)
    expected = bench.evaluations.task(bench.student.eval())
    [phase] = bench.run("two-stage", 1)
    first = phase.history[0]
    assert {name: first[name] for name in expected} == expected


def test_the_task_learns(recipe: Path, tmp_path: Path) -> None:
    [phase] = bench_with(recipe, tmp_path, "stage2.steps=40").run("baseline")
    assert phase.history[0]["accuracy"] < 0.3
    assert phase.history[-1]["accuracy"] > 0.7  # 40 images, 40 steps
    assert phase.history[-1]["train_loss"] < 0.5 * phase.history[1]["train_loss"]


def test_soft_targets_bring_the_student_closer_to_the_teachers_logits(bench: Bench) -> None:
    images = bench.study.splits.train[0].image[None].expand(2, -1, -1, -1)

    def distance(arm: str) -> float:
        bench.student = bench.new_student(0)
        bench.run(arm)
        with torch.no_grad():
            ours, theirs = bench.student.train()(images), bench.teacher.network(images)
        return (ours.softmax(1) - theirs.softmax(1)).abs().sum().item()

    assert distance("kd") < distance("baseline-long")


def test_a_phase_is_evaluated_at_its_start_every_so_often_and_at_its_end(bench: Bench) -> None:
    [phase] = bench.run("baseline")
    assert [row["step"] for row in phase.history] == [0, 4, 6]
    assert ["train_loss" in row for row in phase.history] == [False, True, True]
    assert phase.seconds > 0
    assert not phase.stopped


def test_epochs_are_whole_passes_over_the_images(recipe: Path, tmp_path: Path) -> None:
    # 40 images in batches of 20: two steps an epoch.
    bench = bench_with(recipe, tmp_path, "stage2.steps=null", "stage2.epochs=3")
    assert bench.run("baseline")[0].steps == 6
    assert bench.run("baseline-long")[0].steps == 14


def test_a_stopping_rule_ends_a_stage(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluations, "stopping_loss", lambda *_: 1.0)
    bench = bench_with(recipe, tmp_path, "stage2.steps=40", "stage2.stop.patience=2")
    [phase] = bench.run("baseline")
    assert phase.stopped
    # The first evaluation sets the mark, two more are not below it.
    assert [row["step"] for row in phase.history] == [0, 4, 8]


def test_the_rate_falls_at_the_milestones(recipe: Path, tmp_path: Path) -> None:
    # With a rate of next to nothing after half of the steps, the second half moves no weight.
    common = ["stage2.weight_decay=0", "stage2.momentum=0"]
    short = bench_with(recipe, tmp_path, *common, "stage2.steps=4", "stage2.milestones=[1.0]")
    long = bench_with(
        recipe, tmp_path, *common, "stage2.steps=8", "stage2.milestones=[0.5]", "stage2.decay=1e-30"
    )
    short.run("baseline")
    long.run("baseline")
    for ours, theirs in zip(short.student.parameters(), long.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_clipping_bounds_the_step(recipe: Path, tmp_path: Path) -> None:
    training = "{steps: 1, learning_rate: 1, momentum: 0, weight_decay: 0, schedule: constant"
    bench = bench_with(recipe, tmp_path, f"stage2={training}, clip: 0.001}}")
    before = [p.detach().clone() for p in bench.student.parameters()]
    bench.run("baseline")
    moved = torch.cat(
        [(p - q).flatten() for p, q in zip(bench.student.parameters(), before, strict=True)]
    )
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_accumulated_passes_make_the_step_of_the_whole_batch(recipe: Path, tmp_path: Path) -> None:
    # Without batch statistics the gradient is the mean over images, however they are divided.
    finals = []
    for passes in (1, 4):
        options = [f"student.model={GROUP_NORM_NET}", f"execution.accumulation={passes}"]
        bench = bench_with(recipe, tmp_path, *options)
        bench.run("two-stage")
        finals.append(bench.student.state_dict()["fc.weight"])
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-4, atol=1e-6)


def test_a_projection_lets_a_narrow_student_learn_from_a_wide_teacher(
    recipe: Path, tmp_path: Path
) -> None:
    wide = ["teacher.arguments={width: 2}", "fsp.projection=true", "stage1.steps=20"]
    bench = bench_with(recipe, tmp_path, *wide)
    [phase] = bench.run("two-stage", 0)
    assert phase.history[-1]["fsp_loss"] < 0.9 * phase.history[0]["fsp_loss"]
    assert not any("projection" in name for name in bench.student.state_dict())


@pytest.mark.parametrize(
    "option",
    [
        "stage2={steps: 20, optimizer: adam, learning_rate: 3e-3}",
        "stage2={steps: 20, optimizer: adamw, learning_rate: 3e-3}",
        "execution={precision: bf16, threads: 1}",
        "execution={channels_last: true, threads: 1}",
        "execution={precision: bf16, channels_last: true, accumulation: 2, threads: 1}",
    ],
)
def test_each_optimiser_and_way_to_execute_learns(
    recipe: Path, tmp_path: Path, option: str
) -> None:
    bench = bench_with(recipe, tmp_path, "stage2.steps=20", option)
    first, second = bench.run("two-stage")
    assert first.history[-1]["fsp_loss"] < first.history[0]["fsp_loss"]
    assert second.history[-1]["loss"] < 0.9 * second.history[0]["loss"]
    weight = bench.student.get_parameter("stage1.0.conv1.weight")
    if "channels_last" in option:
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_compiled_networks_learn_the_same(recipe: Path, tmp_path: Path) -> None:
    plain = bench_with(recipe, tmp_path)
    plain.run("two-stage", 0)
    compiled = bench_with(recipe, tmp_path, "execution.compile=true")
    compiled.run("two-stage", 0)
    for ours, theirs in zip(compiled.student.parameters(), plain.student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("execution.precision=fp16", r"^execution\.precision: is 'fp16', must be 'fp32' or"),
        (
            "execution.sync_batch_norm=true",
            r"^execution\.sync_batch_norm: is true, must be false on a CPU: .* works on GPUs only",
        ),
    ],
)
def test_what_only_a_gpu_can_do_is_refused_on_a_cpu(
    recipe: Path, tmp_path: Path, option: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    with pytest.raises(DistillError, match=message):
        open_study(recipe, tmp_path / "run", option)
    assert not (tmp_path / "run").exists()


def test_all_batch_normalisation_is_synchronised_and_weights_stay() -> None:
    network = CifarResNet(8)
    before = weights_of(network)
    count = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    converted = synchronise_batch_norm(network)
    kinds = [type(module) for module in converted.modules()]
    assert kinds.count(nn.SyncBatchNorm) == count > 0
    assert nn.BatchNorm2d not in kinds
    assert not changed(before, converted)


def test_synchronising_what_does_more_than_normalise_is_refused() -> None:
    class BatchNormAndRelu(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    network = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNormAndRelu(3))
    with pytest.raises(DistillError, match=r"execution\.sync_batch_norm: .* 1 is a BatchNormAndRe"):
        synchronise_batch_norm(network)


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("ACCELERATE_USE_FSDP", "true", True),
        ("ACCELERATE_USE_DEEPSPEED", "true", True),
        ("ACCELERATE_USE_MEGATRON_LM", "1", True),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", True),
        ("ACCELERATE_DYNAMO_BACKEND", "no", False),
        ("ACCELERATE_USE_FSDP", "false", False),
    ],
)
def test_what_accelerate_launch_asks_for_and_the_trainer_does_not_do_is_refused_by_name(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    refused: bool,
) -> None:
    monkeypatch.setenv(name, value)
    if not refused:
        open_study(recipe, tmp_path / "run")
        return
    with pytest.raises(DistillError, match=f"^{name}: is '{value}', must be unset"):
        open_study(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus_are_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: gpu)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(DistillError, match="started 3 processes on this machine, which has 2 GPUs"):
        open_study(recipe, tmp_path / "run")


def test_a_diverging_loss_names_step_pair_and_a_checkpoint_of_finite_weights(
    recipe: Path, tmp_path: Path
) -> None:
    bench = bench_with(recipe, tmp_path, "stage1.learning_rate=1e6")
    with pytest.raises(DistillError) as caught:
        bench.run("two-stage", 0)
    message = str(caught.value)
    assert "test seed 0, stage 1: the loss is nan in step" in message
    assert "the FSP loss of stage1.0.relu1 -> stage1 is" in message
    assert "try a smaller learning rate" in message
    weights = load_file(message.split("last good checkpoint: ")[1].split(";")[0])
    assert all(torch.isfinite(x).all() for x in weights.values() if x.is_floating_point())


def test_a_task_loss_that_is_not_finite_is_the_logits(recipe: Path, tmp_path: Path) -> None:
    bench = bench_with(recipe, tmp_path, "stage2.learning_rate=1e20", "stage2.steps=20")
    with pytest.raises(DistillError, match="the student's logits are not finite"):
        bench.run("baseline")


def test_same_seed_same_bits_whatever_was_drawn_before(recipe: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        study = open_study(recipe, tmp_path / name, "data.augment=true")
        torch.rand(17)  # the state of the global generator must not matter
        study.student("two-stage", 1)
        found.append(results(study.folder_of("two-stage", 1)))
    assert found[0] == found[1]
