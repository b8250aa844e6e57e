"""What a plan tells is what is launched: the kernels, in order, and the memory that they take."""

from __future__ import annotations

import itertools
import random
import weakref

import pytest
import torch
from calls import DTYPES, NORMS, ROADS, four_of, pair_of, tensor
from fused_fixtures import forget
from tolerances import flatten

import fsp_kernels as fsp
from fsp_kernels.backends import get_backend
from fsp_kernels.backends.cuda import loss as cuda_loss
from fsp_kernels.backends.triton import launch
from fsp_kernels.backends.triton import loss as triton_loss
from fsp_kernels.backends.triton.configurations import FAMILIES

# Channels and sizes that take every road on some chip, by the planner's own limits.
SHAPES = (((7, 16), (6, 6)), ((64, 64), (7, 7)), ((128, 96), (4, 5)), ((300, 280), (7, 8)))
SHAPES += (((300, 280), (3, 3)), ((600, 500), (8, 10)), ((200, 129), (40, 40)))
LAYOUTS = ("contiguous", "channels last", "cropped")
WANTED = ("nothing", "the student's", "everything", "a ready matrix's")


class Memory:
    """What ``new_empty`` has given and is still held, and the most of that at any one time."""

    def __init__(self, monkeypatch):
        self.held = self.most = 0
        new_empty = torch.Tensor.new_empty

        def record(*arguments, **options):
            x = new_empty(*arguments, **options)
            if x.ndim == 0:  # the loss
                return x
            self.held += x.nbytes
            self.most = max(self.most, self.held)
            weakref.finalize(x, self.free, x.nbytes)
            return x

        monkeypatch.setattr(torch.Tensor, "new_empty", record)

    def free(self, size: int) -> None:
        self.held -= size


class Silent:
    """The launches of a program of CUDA C++, none of which is made."""

    def __init__(self, launches):
        self.launches, self.partials = launches.launches, launches.partials

    def __call__(self, *_):
        pass


def prepare_silent(*arguments):
    program = cuda_loss.PreparedLoss(*arguments)
    program._launches = Silent(program._launches)
    return program


@pytest.fixture
def launched(backend, programs, monkeypatch):
    """Runs a planned call; tells the kernels that it launched and the bytes that it held."""
    kernels: list[str] = []
    call = launch.Launch.__call__

    def record(self, *arguments):
        kernels.append(self.kernel.__name__)
        if record.runs:
            call(self, *arguments)

    monkeypatch.setattr(launch.Launch, "__call__", record)
    multiply = triton_loss.bmm_into

    def record_product(*arguments):
        kernels.append("bmm")
        return multiply(*arguments)

    monkeypatch.setattr(triton_loss, "bmm_into", record_product)

    def of(plan, maps, runs=True):
        record.runs = runs
        kernels.clear()
        programs.clear()
        with monkeypatch.context() as patch, torch.no_grad():
            memory = Memory(patch)
            if backend == "cuda" and not runs:
                patch.setattr(get_backend(backend), "prepare", prepare_silent)
            get_backend(backend).loss(maps, plan, [1.0] * len(plan.pairs))
        [program] = programs.values()
        if backend == "cuda":
            kernels.extend(x.kernel for x in program._launches.launches)
            partials = program._launches.partials
        else:
            partials = program._partials.count
        return tuple(name.removeprefix("fsp_") for name in kernels), memory.most - 4 * partials

    return of


def check(launched, student, teacher, runs=True, **options) -> fsp.LossPlan:
    plan = fsp.explain(student, teacher, **options)
    kernels, held = launched(plan, [x.detach() for x in flatten(student, teacher)], runs)
    assert kernels == plan.launches, str(plan)
    expected = plan.workspace_bytes - sum(p.pooled_bytes for p in plan.pairs)
    assert 0 <= held - expected < 16 * len(plan.pairs), str(plan)  # each begins at 16 bytes
    return plan


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("regime", ROADS, indirect=True)
def test_each_evaluation_launches_what_its_plan_tells(launched, regime, norm):
    student, teacher = four_of(regime)
    for x, needs in zip(flatten(student, teacher), (True, True, False, True), strict=True):
        x.requires_grad_(needs)
    check(launched, student, teacher, norm=norm)
    ready = [tensor(1, *regime.channels, dtype=regime.dtype)]
    check(launched, student, ready, norm=norm)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("regime", ROADS, indirect=True)
def test_a_pair_of_a_map_with_itself_launches_what_its_plan_tells(launched, regime):
    x, y = (tensor(1, regime.channels[0], *regime.size) for _ in range(2))
    assert check(launched, [(x, x)], [(y, y)]).pairs[0].symmetric


def test_products_by_blas_are_told_of(launched, backend, small):
    if backend == "cuda":
        pytest.skip("its gradients are all its own kernels'")
    small(GPU_BLAS_INTENSITY=0)
    maps = [tensor(2, c, 4, 8, dtype=torch.bfloat16) for c in (32, 24) * 2]
    plan = check(launched, [tuple(maps[:2])], [tuple(maps[2:])])
    assert plan.launches == ("residual", *("bmm",) * 4, "finish")


@pytest.mark.usefixtures("small")
def test_many_pairs_take_as_many_launches_as_the_plan_tells(launched, regimes):
    student = [pair_of(regimes[road]) for road in ROADS for _ in range(9)]
    teacher = [pair_of(regimes[road]) for road in ROADS for _ in range(9)]
    plan = check(launched, student, teacher, runs=False)
    assert plan.launches.count("one_pass") == 2
    assert plan.launches.count("residual") >= 2


def calls():
    """Pairs of maps, some of each kind."""
    choices = itertools.product(SHAPES, DTYPES, LAYOUTS, NORMS, WANTED)
    for shape, dtype, layout, norm, wanted in random.Random(0).sample(list(choices), 60):
        channels, size = shape
        student, teacher = (
            tuple(tensor(2, c, *size, dtype=dtype, layout=layout, grad=grad) for c in channels)
            for grad in (wanted != "nothing", wanted == "everything")
        )
        entry = tensor(2, *channels, grad=True) if wanted == "a ready matrix's" else teacher
        yield [student], [entry], norm


@pytest.mark.parametrize("family", FAMILIES)
def test_on_each_chip_a_call_launches_what_explain_tells(launched, backend, family, monkeypatch):
    if backend == "cuda" and family != "sm_80":
        pytest.skip("the host's build is of one chip")
    for module in (launch, triton_loss):
        monkeypatch.setattr(module, "device_family", lambda *_: family)
    evaluations = set()
    for student, teacher, norm in calls():
        forget()
        plan = check(launched, student, teacher, runs=False, norm=norm)
        evaluations |= {(p.form, p.evaluation) for p in plan.pairs}
    assert len(evaluations) == 3
