"""Distillation steps of whole networks, on networks small enough for a test."""

import pickle
from argparse import Namespace
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import contenders, networks, peers, training_step
from benchmarks.bench_step import contenders_of
from benchmarks.contenders import Contender
from benchmarks.measure import NotRun, Rounds, measure
from benchmarks.networks import StepProblem
from benchmarks.recording import COLUMNS
from fsp_kernels.distill.models import CifarResNet

OURS, EINSUM = contenders.BY_NAME["ours (torch)"], contenders.BY_NAME["einsum"]
TINY = replace(
    networks.BY_NAME["cifar-resnet26-8"],
    name="tiny",
    cpu_batch=3,
    image_size=8,
    teacher=partial(CifarResNet, 14),
)


def distillation(dtype="fp32", contender=EINSUM):
    return StepProblem(TINY, "cpu", dtype).distillation(contender.build())


def gradients(found):
    """Of the first step, as the optimiser keeps them in its momentum."""
    of, named = found._optimiser.state, found.student.named_parameters()
    return {name: of[p]["momentum_buffer"] for name, p in named if p in of}


def sizes(where, dtype="fp32"):
    """Channels and side of the student's maps, after checking that the teacher's are alike."""
    found = StepProblem(where, "cpu", dtype).distillation(EINSUM.build())
    shapes = [[x.shape for x in pair] for pair in found.student_maps()]
    assert shapes == [[x.shape for x in pair] for pair in found.teacher_maps()]
    return [[(channels, side) for _, channels, side, _ in pair] for pair in shapes]


@pytest.mark.parametrize(
    ("name", "image_size", "expected"),
    [
        ("cifar-resnet26-8", 32, [(16, 32), (32, 16), (64, 8)]),
        ("imagenet-resnet34-18", 64, [(64, 16), (128, 8), (256, 4), (512, 2)]),
    ],
)
def test_both_maps_of_a_pair_end_a_stage(name, image_size, expected):
    pytest.importorskip("torchvision")
    where = replace(networks.BY_NAME[name], cpu_batch=2, image_size=image_size)
    assert sizes(where) == [[size] * 2 for size in expected]


@pytest.mark.parametrize("contender", [OURS, EINSUM], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", networks.PRACTICE)
def test_a_step_in_pieces_gives_the_gradients_of_a_whole_one_and_leaves_none(dtype, contender):
    problem = StepProblem(TINY, "cpu", dtype)
    whole, split = (problem.distillation(contender.build()) for _ in range(2))
    whole.step()
    split.split_step(lambda: None)
    expected = gradients(whole)
    assert len(expected) > 20
    # Where gradients meet they may be added in another order.
    rtol = {"fp32": 1e-5, "bf16": 2e-2}[dtype]
    for name, value in gradients(split).items():
        error = (value - expected[name]).norm() / expected[name].norm()
        assert error < rtol, name
    assert all(p.grad is None for x in (whole, split) for p in x.student.parameters())


def test_a_step_trains_the_student_and_leaves_the_teacher(monkeypatch):
    monkeypatch.setattr(training_step, "LEARNING_RATE", 1e-3)
    found = distillation()
    before = [
        {name: x.clone() for name, x in model.state_dict().items()}
        for model in (found.student, found.teacher)
    ]
    losses = [found.step().item() for _ in range(5)]
    assert losses[-1] < losses[0]
    changed = {k for k, x in found.student.state_dict().items() if not x.equal(before[0][k])}
    assert {"conv.weight", "stage3.0.conv2.weight", "stage3.0.bn2.running_mean"} < changed
    assert all(x.equal(before[1][name]) for name, x in found.teacher.state_dict().items())


def test_contenders_have_equal_networks_of_their_own():
    problem = StepProblem(TINY, "cpu", "fp32")
    one, other = (problem.distillation(EINSUM.build()) for _ in range(2))
    for mine, theirs in ((one.student, other.student), (one.teacher, other.teacher)):
        for x, y in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert x.equal(y)
            assert x.data_ptr() != y.data_ptr()


def test_steps_leave_the_loss_where_it_is():
    found = distillation()
    losses = [found.step().item() for _ in range(20)]
    assert losses[-1] == pytest.approx(losses[0], rel=1e-5)


def test_a_settled_network_normalises_its_maps():
    model = CifarResNet(14)
    images = torch.randn(8, 3, 8, 8)
    networks.settle(model, images)
    with torch.no_grad():
        trained_on, seen_again = model.train()(images), model.eval()(images)
    # Up to the variance's n and n - 1.
    assert (trained_on - seen_again).norm() < 0.1 * trained_on.norm()
    norms = [m for m in distillation().teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.running_mean.norm() > 0 for norm in norms)


def test_bf16_is_autocast_in_channels_last():
    for pairs in (distillation("bf16").teacher_maps(), distillation("bf16").student_maps()):
        for x in training_step.maps_of(pairs):
            assert x.dtype == torch.bfloat16
            assert x.is_contiguous(memory_format=torch.channels_last)


def test_a_wrong_contender_is_not_timed():
    def matrix(*maps):
        return 1.001 * peers.bmm_matrix(*maps)

    wrong = Contender("wrong", lambda: peers.loss_over(matrix))
    with pytest.raises(AssertionError, match="wrong is wrong on tiny"):
        StepProblem(TINY, "cpu", "fp32").prepare(wrong)


@pytest.mark.parametrize(
    ("where", "dtype", "reason"),
    [
        (replace(TINY, needs="no_such_package"), "fp32", "needs no_such_package"),
        (TINY, "fp16", "not run: networks are trained in fp32 and bf16"),
    ],
    ids=["package", "dtype"],
)
def test_networks_that_cannot_be_measured_say_why(where, dtype, reason):
    with pytest.raises(NotRun, match=reason):
        StepProblem(where, "cpu", dtype).prepare(EINSUM)


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ([], [*map("ours ({})".format, contenders.backends_on("cpu")), "einsum", "torch.compile"]),
        (["bmm"], ["bmm"]),
    ],
)
def test_only_some_peers_take_steps_unless_asked_for(asked, names):
    found = contenders_of(Namespace(device="cpu", contender=asked))
    assert [c.name for c in found] == names


def test_steps_are_timed_whole_and_in_pieces():
    prepare = StepProblem(TINY, "cpu", "fp32").prepare
    for row in measure([OURS, EINSUM], prepare, "cpu", Rounds(3, 3, 0.0)):
        assert (row["rounds"], row["batch"]) == (3, 3)
        assert row["ours"] == (row["contender"] == OURS.name)
        assert all(row[piece] > 0 for piece in training_step.SEGMENTS)
        assert set(row) <= set(COLUMNS)


def test_a_step_for_its_memory_can_be_sent_to_another_process(monkeypatch):
    monkeypatch.setitem(networks.BY_NAME, "tiny", TINY)
    job = pickle.loads(pickle.dumps(partial(networks.lone_step, "tiny", "einsum")))
    assert job()() > 0
