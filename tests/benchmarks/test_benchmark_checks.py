"""The step that is timed, and its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import fake_gpu
import pytest
import torch
from torch import Tensor

from benchmarks import accuracy, bench_plan, cases, contenders, measure, networks, peers
from benchmarks.checks import Truth, maps_of, relative_error, require_small, step_of
from benchmarks.contenders import Contender
from benchmarks.measure import Rounds
from benchmarks.workloads import FORWARD, PASSES, TRAINING, Case, Workload, feature_maps
from fsp_kernels.distill.models import CifarResNet

TINY = Workload("tiny", 8, (((4, 6), (3, 6)), ((3, 6), (5, 3))))
PAIR = Case(Workload("pair", 8, (((12, 3), (12, 3)),)), 3)
NETWORKS = replace(
    networks.BY_NAME["cifar-resnet26-8"],
    cpu_batch=3,
    image_size=8,
    teacher=partial(CifarResNet, 14),
)
EINSUM = peers.loss_over(peers.einsum_matrix)
TWICE = Rounds(2, 2, 0.0)


def off_by(factor):
    return peers.loss_over(lambda *maps: peers.bmm_matrix(*maps) * factor)


def gradient_is_off(student, teacher):
    """The right loss, half of its gradient."""
    loss = EINSUM(student, teacher)
    return (loss + loss.detach()) / 2


def check_of(case, loss, ours=False):
    student, teacher = case.maps("cpu")
    errors = Truth(student, teacher, case.training).errors(loss)
    who = Contender("x", lambda: loss, ours=ours)
    require_small(who, errors, student[0][0].dtype, case.workload.name)
    return errors


@pytest.mark.parametrize("direction", PASSES)
def test_a_map_with_itself_stays_one_tensor(direction):
    def loss(student, teacher):
        assert all(first is second for first, second in (*student, *teacher))
        return EINSUM(student, teacher)

    workload = Workload("symmetric", 8, (((6, 4), (6, 4)),), symmetric=True)
    check_of(Case(workload, 3, direction=direction), loss)
    step_of(loss, *feature_maps(workload, 3), direction == TRAINING)()


class Watch:
    """The naive op, which notes whether its maps are leaves and what is accumulated for them."""

    def __init__(self):
        self.leaves: list[bool] = []
        self.accumulated: list[Tensor] = []

    def __call__(self, student, teacher):
        for x in maps_of(student):
            self.leaves.append(x.is_leaf)
            for node, _ in [] if x.grad_fn is None else x.grad_fn.next_functions:
                if hasattr(node, "variable"):  # the node that accumulates into a leaf's .grad
                    node.variable.register_post_accumulate_grad_hook(self.accumulated.append)
        return EINSUM(student, teacher)


def measure_case(who, device="cpu"):
    cases.measure_case(PAIR, [who], device, TWICE)


def measure_plan(_):
    cases.measure_case(PAIR, bench_plan.contenders_of(PAIR, "cpu", "torch"), "cpu", TWICE)


def measure_step(who):
    measure.measure([who], networks.StepProblem(NETWORKS, "cpu", "fp32").prepare, "cpu", TWICE)


PARTS: dict[str, Callable[[Contender], object]] = {
    "loss, scaling": measure_case,
    "loss, scaling on a GPU": partial(measure_case, device="cuda"),
    "plan": measure_plan,
    "step": measure_step,
    "accuracy": lambda who: accuracy.measure_errors([who], "cpu", "fp32", (2, 8, 4, 4), (1.0,)),
    "memory": lambda who: cases.lone_step(PAIR, who.name)(),
    "memory of a step": lambda who: networks.lone_step(NETWORKS.name, who.name)(),
}


@pytest.mark.parametrize("part", PARTS)
def test_maps_are_results_of_layers_and_no_gradient_of_theirs_is_accumulated(part, monkeypatch):
    watch = Watch()
    who = Contender("watch", lambda: watch)
    monkeypatch.setitem(contenders.BY_NAME, who.name, who)
    monkeypatch.setitem(networks.BY_NAME, NETWORKS.name, NETWORKS)
    monkeypatch.setattr(bench_plan, "planned_loss", lambda _, __, x: watch([x[:2]], [x[2:]]))
    if "GPU" in part:
        fake_gpu.install(monkeypatch)
    PARTS[part](who)
    assert watch.leaves
    assert not any(watch.leaves)
    assert watch.accumulated == []


def test_errors_of_loss_and_gradients_are_recorded():
    assert set(check_of(Case(TINY, 3), EINSUM)) == {"loss_error", "gradient_error"}
    assert set(check_of(Case(TINY, 3, direction=FORWARD), EINSUM)) == {"loss_error"}
    assert max(check_of(Case(TINY, 3), EINSUM).values()) < 1e-5


@pytest.mark.parametrize("direction", [TRAINING, FORWARD])
def test_a_loss_off_by_a_thousandth_is_wrong(direction):
    with pytest.raises(AssertionError, match="x is wrong on tiny"):
        check_of(Case(TINY, 3, direction=direction), off_by(1.001))


def test_a_wrong_gradient_is_wrong_where_it_is_asked_for():
    with pytest.raises(AssertionError, match="x is wrong on tiny"):
        check_of(Case(TINY, 3), gradient_is_off)
    check_of(Case(TINY, 3, direction=FORWARD), gradient_is_off)


def test_ours_is_held_to_more_in_half_precision():
    case = Case(TINY, 8, dtype="bf16")
    check_of(case, off_by(1.03))
    with pytest.raises(AssertionError):
        check_of(case, off_by(1.03), ours=True)


def test_errors_are_relative_and_nan_is_infinitely_wrong():
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error([torch.tensor([3.0, 4.5])], [truth]) == pytest.approx(0.1)
    assert relative_error([torch.full((2,), float("nan"))], [truth]) == float("inf")
