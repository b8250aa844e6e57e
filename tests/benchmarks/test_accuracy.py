"""The part ``accuracy``, on smaller maps."""

import pytest
import torch

from benchmarks import accuracy, contenders, peers
from benchmarks.checks import Truth
from benchmarks.contenders import Contender
from fsp_kernels import reference

SHAPE = (2, 64, 5, 5)
OURS, EINSUM = contenders.BY_NAME["ours (torch)"], contenders.BY_NAME["einsum"]


def measure(*chosen, dtype="fp32", noises=(1e-5,)):
    return accuracy.measure_errors(chosen, "cpu", dtype, SHAPE, noises)


def gradient_errors(rows):
    return {row["contender"]: row["gradient_error"] for row in rows}


def test_ours_keeps_the_gradient_the_naive_op_loses():
    gradient = gradient_errors(measure(OURS, EINSUM))
    assert gradient.pop("einsum") > 1e-4
    assert list(gradient) == [
        "ours (torch)",
        "ours (torch), matrix form",
        "ours (torch), gram form",
    ]
    # fp32 resolves 6e-8; a few such errors may add up, none of them is amplified.
    assert max(gradient.values()) < 2e-6


def test_errors_of_ours_do_not_grow_near_convergence():
    errors = measure(OURS, noises=accuracy.NOISES)
    assert len(errors) == 3 * len(accuracy.NOISES)
    assert max(max(e["gradient_error"], e["loss_error"]) for e in errors) < 2e-6


# What one rounding of the gradient costs at most. Without its loss scale most of a gradient in fp16
# would be flushed to zero here.
@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_in_half_precision_ours_loses_what_rounding_its_gradient_costs(dtype, bound):
    errors = measure(OURS, dtype=dtype, noises=(1e-6,))
    assert max(gradient_errors(errors).values()) < bound


def test_a_row_tells_contender_noise_and_errors():
    (row,) = measure(EINSUM, dtype="bf16", noises=(1e-1,))
    assert row.keys() == {"contender", "ours", "noise", "loss_error", "gradient_error"}
    assert (row["contender"], row["noise"]) == ("einsum", 1e-1)


def test_the_student_differs_by_the_noise():
    student, teacher = accuracy.nearby_maps(1e-3, SHAPE, torch.float32, "cpu")
    off = (student[0][0] - teacher[0][0]).std().item()
    assert off == pytest.approx(1e-3, rel=0.1)


def test_rounding_the_maps_is_no_error():
    def exact(student, teacher):
        (a, b), (c, d) = student[0], teacher[0]
        return reference.fsp_loss([(a.double(), b.double())], [(c.double(), d.double())])

    truth = Truth(*accuracy.nearby_maps(1e-3, SHAPE, torch.bfloat16, "cpu"))
    assert truth.errors(exact)["loss_error"] < 1e-14


def test_where_student_and_teacher_are_equal_there_is_no_relative_error():
    missing, measured = measure(EINSUM, noises=(0.0, 1.0))
    assert measured["noise"] == 1.0
    assert "reason" not in measured
    assert "student and teacher equal" in missing["reason"]
    assert not missing["fault"]


def test_a_cpu_says_that_it_has_no_tf32():
    rows = measure(OURS, EINSUM, dtype="tf32", noises=(1.0, 0.1))
    assert len(rows) == 4 * 2
    assert {row["reason"] for row in rows} == {"a CPU has no TF32"}


def test_tf32_is_asked_for_and_taken_back(monkeypatch):
    seen = []

    def build():
        seen.append(torch.get_float32_matmul_precision())
        return EINSUM.build()

    monkeypatch.setattr(accuracy, "why_not_measured", lambda *_: None)
    before = torch.get_float32_matmul_precision()
    measure(Contender("curious", build), dtype="tf32")
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == before


def test_a_broken_contender_does_not_stop_the_others():
    def broken(_student, _teacher):
        raise RuntimeError("broken")

    failed, measured = measure(Contender("broken", lambda: broken), EINSUM)
    assert (failed["contender"], failed["fault"]) == ("broken", True)
    assert "gradient_error" in measured


def test_a_contender_that_is_too_large_is_not_run(monkeypatch):
    monkeypatch.setattr(peers, "BROADCAST_LIMIT", 1)
    (row,) = measure(contenders.BY_NAME["broadcast"])
    assert row["reason"].startswith("not run: holds")


@pytest.mark.parametrize("form", accuracy.FORMS)
def test_a_form_is_the_one_it_is_named_for(form, monkeypatch):
    plans = []
    original = accuracy.planned_loss

    def planned_loss(plan, *rest):
        plans.append(plan)
        return original(plan, *rest)

    monkeypatch.setattr(accuracy, "planned_loss", planned_loss)
    student, teacher = accuracy.nearby_maps(1.0, SHAPE, torch.float32, "cpu")
    accuracy.loss_by(form)(student, teacher)
    assert [plan.pairs[0].form for plan in plans] == [form]
