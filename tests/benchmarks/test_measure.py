"""A step as it is timed, and the check before it."""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers
from benchmarks.contenders import Contender
from benchmarks.measure import Check, leaves, relative_error, step_of
from benchmarks.workloads import FORWARD, TRAINING, Case, Workload

TINY = Workload("tiny", 8, (((4, 6), (3, 6)), ((3, 6), (5, 3))))
EINSUM = peers.loss_over(peers.einsum_matrix)


def off_by(factor: float) -> peers.Loss:
    return peers.loss_over(lambda f, s: peers.bmm_matrix(f, s) * factor)


def gradient_is_off(student: peers.Pairs, teacher: peers.Pairs) -> torch.Tensor:
    """The right loss, half of its gradient."""
    loss = EINSUM(student, teacher)
    return (loss + loss.detach()) / 2


def check_of(case: Case, loss: peers.Loss, ours: bool = False) -> dict[str, float]:
    return Check(case, *case.maps("cpu"))(Contender("x", lambda: loss, ours=ours), loss)


@pytest.mark.parametrize(("direction", "gradients"), [(TRAINING, True), (FORWARD, False)])
def test_a_step_leaves_gradients_only_where_it_trains(direction: str, gradients: bool) -> None:
    case = Case(TINY, 3, direction=direction)
    student, teacher = case.maps("cpu")
    step_of(EINSUM, student, teacher, case.training)()
    assert [x.grad is not None for x in leaves(student)] == [gradients] * 4
    assert all(x.grad is None for x in leaves(teacher))


def test_errors_of_loss_and_gradients_are_recorded() -> None:
    assert set(check_of(Case(TINY, 3), EINSUM)) == {"loss_error", "gradient_error"}
    assert set(check_of(Case(TINY, 3, direction=FORWARD), EINSUM)) == {"loss_error"}
    assert max(check_of(Case(TINY, 3), EINSUM).values()) < 1e-5


@pytest.mark.parametrize("direction", [TRAINING, FORWARD])
def test_a_loss_off_by_a_thousandth_is_wrong(direction: str) -> None:
    with pytest.raises(AssertionError, match="x is wrong on tiny"):
        check_of(Case(TINY, 3, direction=direction), off_by(1.001))


def test_a_wrong_gradient_is_wrong_where_it_is_asked_for() -> None:
    with pytest.raises(AssertionError, match="x is wrong on tiny"):
        check_of(Case(TINY, 3), gradient_is_off)
    check_of(Case(TINY, 3, direction=FORWARD), gradient_is_off)


def test_ours_is_held_to_more_in_half_precision() -> None:
    case = Case(TINY, 8, dtype="bf16")
    check_of(case, off_by(1.03))
    with pytest.raises(AssertionError):
        check_of(case, off_by(1.03), ours=True)


def test_errors_are_relative_and_nan_is_infinitely_wrong() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error([torch.tensor([3.0, 4.5])], [truth]) == pytest.approx(0.1)
    assert relative_error([torch.full((2,), float("nan"))], [truth]) == float("inf")
