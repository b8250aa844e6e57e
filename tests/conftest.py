"""What all tests share.

Fixtures are in a conftest.py. Functions and tables that several test files use are in modules of
tests/, which are imported by their names: ``from tolerances import assert_near``. No folder of
tests is a package, so no two test files have the same name.
"""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from crosses import CROSSES, kept
from cuda_on_host.module import HOST_BUILDS
from hypothesis import settings

from fsp_kernels.backends.triton import why_not_this_triton

# Without a GPU the Triton kernels run in Triton's interpreter, which is asked for before they are
# imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Where Triton is missing or too old for its kernels, what needs them is left out.
if why_not_this_triton():
    collect_ignore_glob = [
        "triton",
        "test_plan_fused.py",
        "test_plan_alternatives.py",
        "fused/test_planned.py",
        *(f"tools/test_{x}.py" for x in ("compile_triton", "predict", "trials", "tune")),
    ]

# Tests of fused kernels, which run on a GPU where there is one.
FUSED = {"fused", "triton", "cuda"}
EXAMPLES = {"each": 3, "pairs": 10, "all": 100}  # of a property, by hypothesis


@pytest.fixture
def planner(monkeypatch):
    """Set constants of plan.py, ``planner(CHUNK_BYTES=1)``; of a table by device, that of the CPU.

    Plans made before are forgotten, and those made with them, too.
    """
    from fsp_kernels import functional, plan

    def forget():
        plan.plan_loss.cache_clear()
        functional._checked_plan.cache_clear()

    def set_to(**values):
        for name, value in values.items():
            if isinstance(getattr(plan, name), dict):
                monkeypatch.setitem(getattr(plan, name), "cpu", value)
            else:
                monkeypatch.setattr(plan, name, value)
        forget()

    yield set_to
    monkeypatch.undo()
    forget()


def pytest_addoption(parser):
    parser.addoption(
        "--host-cuda",
        choices=HOST_BUILDS,
        default="80",
        help="without a GPU: the chip that csrc/ is compiled for the host as, and whether "
        "AddressSanitizer watches (the process must have been started for it); default: 80",
    )
    parser.addoption(
        "--crosses",
        choices=CROSSES,
        default="pairs",
        help="which cases of a test with several parameters run: those that have each value, "
        "or each pair of values (the default), or all; hypothesis tries more examples accordingly",
    )


def pytest_configure(config):
    # The same examples on every machine, and none of them timed: a busy machine is not a bug.
    settings.register_profile(
        "fsp_kernels",
        deadline=None,
        derandomize=True,
        database=None,
        max_examples=EXAMPLES[config.getoption("--crosses")],
    )
    settings.load_profile("fsp_kernels")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    gpu = torch.cuda.is_available()
    quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
    for item in items:
        if item.path.parent.name in FUSED:
            item.add_marker(pytest.mark.gpu if gpu else quiet)
        if item.get_closest_marker("gpu") and not gpu:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))
    yield  # -k and -m leave out what they do
    items[:] = _kept(items, config)


def pytest_collection_finish():
    """Collections of garbage, of which the trainer has one after each stage, pass over imports."""
    gc.collect()
    gc.freeze()


def _kept(items, config):
    """The tests, and of each the cases, that ``--crosses`` asks for."""
    crosses, chosen, by_test = config.getoption("--crosses"), set(), {}
    for place, item in enumerate(items):
        if crosses == "all" or not item.get_closest_marker("thorough"):
            by_test.setdefault(item.nodeid.partition("[")[0], []).append(place)
    for places in by_test.values():
        specs = [getattr(items[i], "callspec", None) for i in places]
        cases = [{k: _key(v) for k, v in x.params.items()} if x else {} for x in specs]
        chosen.update(places[i] for i in kept(cases, crosses))
    config.hook.pytest_deselected(items=[x for i, x in enumerate(items) if i not in chosen])
    return [x for i, x in enumerate(items) if i in chosen]


def _key(value):
    """What stands for a parameter's value, in every process of xdist alike."""
    plain = value is None or isinstance(value, (bool, int, float, str, tuple))
    return repr(value) if plain else id(value)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    """Each test starts from the same random numbers and PyTorch's default precision of fp32."""
    torch.manual_seed(0)
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def heeding_ctrl_c() -> Iterator[None]:
    """As a shell starts what is in the foreground; tests may run in the background, which isn't."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
