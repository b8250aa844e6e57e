"""Who computes: argument, then ``use_backend``, then the environment, then the best that works."""

import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fsp_kernels as fsp
from fsp_kernels import backends, functional, reference
from fsp_kernels.backends.torch_backend import TorchBackend
from fsp_kernels.loss_plan import Limits


class FakeBackend(TorchBackend):
    """Computes like the torch backend and remembers that it was asked to."""

    def __init__(self, name: str, unavailable: str | None = None, refuses: Sequence = ()):
        self.name = name
        self._unavailable = unavailable
        self._refuses = refuses
        self.calls: list[str] = []

    def why_unavailable(self) -> str | None:
        return self._unavailable

    def why_unsupported(self, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
        for what in (device.type, *dtypes):
            if what in self._refuses:
                return f"it has no kernels for {what}"
        return None

    def loss(self, *args):
        self.calls.append("loss")
        return super().loss(*args)

    def matrix(self, *args):
        self.calls.append("matrix")
        return super().matrix(*args)


@pytest.fixture(autouse=True)
def _untouched_selection(monkeypatch) -> Iterator[None]:
    """Each test starts from the automatic choice and leaves the process as it found it.

    Plans remember the backend chosen for a signature, and no user changes the registry, so here
    they have to be forgotten.
    """
    monkeypatch.setattr(backends, "_PROCESS", backends._Choices())
    monkeypatch.delenv("FSP_KERNELS_BACKEND", raising=False)
    functional._checked_plan.cache_clear()
    yield
    functional._checked_plan.cache_clear()


@pytest.fixture
def register(monkeypatch):
    """Register fakes, the best first, ahead of the torch backend."""

    def _register(*fakes: FakeBackend) -> None:
        registry = {fake.name: fake for fake in (*fakes, TorchBackend())}
        monkeypatch.setattr(backends, "_REGISTRY", registry)

    return _register


@pytest.fixture
def named(register) -> dict[str, FakeBackend]:
    """Three backends that work but are not the best."""
    fakes = [FakeBackend(name) for name in ("best", "argument", "default", "environment")]
    register(*fakes)
    return {fake.name: fake for fake in fakes}


def maps(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 4, 4).to(dtype), torch.randn(2, 5, 4, 4).to(dtype)


def chosen(dtype: torch.dtype = torch.float32, backend: str | None = None) -> str:
    return fsp.explain([maps(dtype)], [maps(dtype)], backend=backend).backend


# --- the order of selection -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "says",
    [
        (),
        ("environment",),
        ("default",),
        ("argument",),
        ("default", "environment"),
        ("argument", "environment"),
        ("argument", "default"),
        ("argument", "default", "environment"),
    ],
    ids=" over ".join,
)
def test_the_first_that_says_something_decides(named, monkeypatch, says):
    if "environment" in says:
        monkeypatch.setenv("FSP_KERNELS_BACKEND", "environment")
    if "default" in says:
        fsp.use_backend("default")
    argument = "argument" if "argument" in says else None
    wanted = says[0] if says else "best"

    assert chosen(backend=argument) == wanted
    fsp.fsp_loss([maps()], [maps()], backend=argument)
    fsp.fsp_matrix(*maps(), backend=argument)
    assert named.pop(wanted).calls == ["loss", "matrix"]
    assert not any(fake.calls for fake in named.values())


def test_a_module_follows_use_backend(named):
    with fsp.use_backend("default"):
        fsp.FSPLoss()([maps()], [maps()])
    assert named["default"].calls == ["loss"]


def test_a_later_choice_reaches_a_signature_seen_before(named, monkeypatch):
    for wanted in ("best", "environment", "default"):
        if wanted == "environment":
            monkeypatch.setenv("FSP_KERNELS_BACKEND", wanted)
        if wanted == "default":
            fsp.use_backend(wanted)
        fsp.fsp_loss([maps()], [maps()])
        assert named[wanted].calls == ["loss"]


def test_an_empty_environment_variable_says_nothing(named, monkeypatch):  # noqa: ARG001
    monkeypatch.setenv("FSP_KERNELS_BACKEND", "")
    assert chosen() == "best"


def test_backward_runs_on_the_backend_of_forward(named, monkeypatch):
    def scale(*args, **kwargs):
        named["argument"].calls.append("scale")
        return TorchBackend.scale(named["argument"], *args, **kwargs)

    monkeypatch.setattr(named["argument"], "scale", scale)
    student = [x.requires_grad_() for x in maps()]
    loss = fsp.fsp_loss([tuple(student)], [maps()], backend="argument")
    with fsp.use_backend("default"):
        loss.backward()
    assert named["argument"].calls == ["loss", "scale"]
    assert all(x.grad is not None for x in student)


def test_the_torch_backend_is_there_and_serves_a_cpu():
    assert "torch" in fsp.available_backends()
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert chosen(dtype, backend="torch") == "torch"


def test_a_cpu_is_served_by_its_kernels_if_they_are_built():
    best = "cpu" if "cpu" in fsp.available_backends() else "torch"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert chosen(dtype) == best
    assert chosen(torch.float64) == "torch"


# --- use_backend ----------------------------------------------------------------------------------


def test_use_backend_lasts(named):  # noqa: ARG001
    fsp.use_backend("default")
    assert chosen() == "default"
    assert chosen() == "default"


def test_use_backend_ends_with_its_block(named):  # noqa: ARG001
    with fsp.use_backend("default"):
        assert chosen() == "default"
    assert chosen() == "best"


def test_use_backend_ends_with_its_block_on_an_exception(named):  # noqa: ARG001
    with pytest.raises(KeyError), fsp.use_backend("default"):
        raise KeyError
    assert chosen() == "best"


def test_use_backend_nests(named):  # noqa: ARG001
    with fsp.use_backend("default"):
        with fsp.use_backend("argument"):
            assert chosen() == "argument"
            with fsp.use_backend(None):
                assert chosen() == "best"
            assert chosen() == "argument"
        assert chosen() == "default"
    assert chosen() == "best"


def test_a_block_restores_what_use_backend_set_for_good(named):  # noqa: ARG001
    fsp.use_backend("default")
    with fsp.use_backend("argument"):
        pass
    assert chosen() == "default"


def test_use_backend_none_restores_the_automatic_choice(named):  # noqa: ARG001
    fsp.use_backend("default")
    fsp.use_backend(None)
    assert chosen() == "best"


def in_a_thread(function):
    """What a function returns in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_choice_for_good_reaches_other_threads(named):  # noqa: ARG001
    fsp.use_backend("default")
    assert in_a_thread(chosen) == "default"
    in_a_thread(lambda: fsp.use_backend("argument"))
    assert chosen() == "argument"


def test_a_block_concerns_its_own_thread(named):  # noqa: ARG001
    fsp.use_backend("default")
    with fsp.use_backend("argument"):
        assert in_a_thread(chosen) == "default"

        def other() -> str:
            with fsp.use_backend("best"):
                return chosen()

        assert in_a_thread(other) == "best"
        assert chosen() == "argument"


def test_blocks_of_two_threads_may_interleave(named):  # noqa: ARG001
    entered, left = threading.Event(), threading.Event()

    def other() -> list[str]:
        with fsp.use_backend("default"):
            seen = [chosen()]
            entered.set()
            left.wait(timeout=10)
            seen.append(chosen())
        return [*seen, chosen()]

    with ThreadPoolExecutor(1) as pool:
        with fsp.use_backend("argument"):
            result = pool.submit(other)
            entered.wait(timeout=10)
            inside = chosen()
        outside = chosen()
        left.set()
        assert result.result() == ["default", "default", "best"]
    assert (inside, outside, chosen()) == ("argument", "best", "best")


def test_many_blocks_in_many_threads_leave_nothing_behind(named):
    wrong = []

    def enter_and_leave(name: str) -> None:
        for _ in range(200):
            with fsp.use_backend(name):
                if backends.requested_backend(None) != name:
                    wrong.append(name)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(enter_and_leave, [*named] * 2))
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert backends.requested_backend(None) is None


def test_blocks_of_generators_may_end_in_any_order(named):  # noqa: ARG001
    def block(name: str) -> Iterator[None]:
        with fsp.use_backend(name):
            yield

    first, second = block("default"), block("argument")
    next(first)
    next(second)
    assert chosen() == "argument"
    assert next(first, "ended") == "ended"
    assert chosen() == "argument"
    assert next(second, "ended") == "ended"
    assert chosen() == "best"


def test_a_block_may_be_entered_again_inside_of_itself(named):  # noqa: ARG001
    block, other = fsp.use_backend("default"), fsp.use_backend("argument")
    with block:
        with other:
            with block:
                assert chosen() == "default"
            assert chosen() == "argument"
        assert chosen() == "default"
    assert chosen() == "best"


def test_a_compiled_call_follows_use_backend_in_its_thread(named):
    def calls() -> dict[str, int]:
        compiled([maps()], [maps()])
        found = {name: len(fake.calls) for name, fake in named.items() if fake.calls}
        for fake in named.values():
            fake.calls.clear()
        return found

    compiled = torch.compile(fsp.fsp_loss, fullgraph=True, backend="eager")
    assert calls() == {"best": 1}
    with fsp.use_backend("argument"):
        assert calls() == {"argument": 1}
        assert in_a_thread(calls) == {"best": 1}
    fsp.use_backend("default")
    assert calls() == {"default": 1}
    torch._dynamo.reset()


def test_a_block_may_be_inside_of_a_compiled_call(named):
    def losses() -> torch.Tensor:
        with fsp.use_backend("default"):
            outer = fsp.fsp_loss([maps()], [maps()])
            with fsp.use_backend("argument"):
                return outer + fsp.fsp_loss([maps()], [maps()])

    torch.compile(losses, fullgraph=True, backend="eager")()
    assert named["default"].calls == named["argument"].calls == ["loss"]
    assert chosen() == "best"
    torch._dynamo.reset()


def test_use_backend_refuses_an_unknown_name():
    with pytest.raises(
        ValueError, match=r"^backend: got 'tritn', expected one of 'triton', 'cuda', 'cpu', 'torch'"
    ):
        fsp.use_backend("tritn")


def test_use_backend_refuses_one_that_is_not_available(register):
    register(FakeBackend("fast", unavailable="no GPU was found"))
    with pytest.raises(RuntimeError, match=r"'fast' is not available .*: no GPU was found"):
        fsp.use_backend("fast")


def test_a_refused_block_is_not_entered_and_changes_nothing(named):  # noqa: ARG001
    fsp.use_backend("default")
    with pytest.raises(ValueError, match="unknown"), fsp.use_backend("unknown"):
        pytest.fail("entered")
    assert chosen() == "default"


def test_repr_shows_the_backend_in_use():
    assert repr(fsp.use_backend("torch")) == "use_backend('torch')"


# --- a backend that cannot serve ------------------------------------------------------------------


@pytest.fixture(params=["argument", "use_backend", "environment"])
def ask_for(request, monkeypatch):
    """The ways to ask for a backend by name; yields the ``backend`` argument that goes with it."""

    def _ask_for(name: str) -> str | None:
        if request.param == "argument":
            return name
        if request.param == "environment":
            monkeypatch.setenv("FSP_KERNELS_BACKEND", name)
        else:
            fsp.use_backend(name)
        return None

    return _ask_for


CALLS = {
    "fsp_loss": lambda x, backend: fsp.fsp_loss([x], [x], backend=backend),
    "explain": lambda x, backend: fsp.explain([x], [x], backend=backend),
    "fsp_matrix": lambda x, backend: fsp.fsp_matrix(*x, backend=backend),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_an_unavailable_backend_asked_for_by_name_says_why(register, ask_for, call):
    fake = FakeBackend("fast")
    register(fake)
    argument = ask_for("fast")
    fake._unavailable = "no GPU was found"
    with pytest.raises(
        RuntimeError, match=r"^backend 'fast' is not available on this machine: no GPU was found$"
    ):
        call(maps(), argument)


@every_call
@pytest.mark.parametrize("unserved", ["cpu", torch.bfloat16], ids=["device", "dtype"])
def test_an_unsupporting_backend_asked_for_by_name_says_why(register, ask_for, call, unserved):
    register(FakeBackend("fast", refuses=[unserved]))
    argument = ask_for("fast")
    with pytest.raises(
        ValueError,
        match=rf"^backend 'fast' cannot serve these tensors: it has no kernels for {unserved}$",
    ):
        call(maps(torch.bfloat16), argument)


@every_call
def test_an_unsupporting_backend_serves_other_tensors(register, ask_for, call):
    fake = FakeBackend("fast", refuses=[torch.bfloat16])
    register(fake)
    call(maps(torch.float32), ask_for("fast"))
    assert fake.calls != [] or call is CALLS["explain"]


@every_call
def test_an_unknown_backend_lists_the_known_ones(register, call):
    register(FakeBackend("fast"))
    with pytest.raises(ValueError, match=r"^backend: got 'fats', expected one of 'fast', 'torch'"):
        call(maps(), "fats")


@every_call
def test_an_unknown_name_in_the_environment_is_an_error(monkeypatch, call):
    monkeypatch.setenv("FSP_KERNELS_BACKEND", "fats")
    with pytest.raises(
        ValueError, match=r"got 'fats', expected one of 'triton', 'cuda', 'cpu', 'torch'"
    ):
        call(maps(), None)


@every_call
@pytest.mark.parametrize(
    "fake",
    [
        FakeBackend("fast", unavailable="no GPU was found"),
        FakeBackend("fast", refuses=["cpu"]),
        FakeBackend("fast", refuses=[torch.float32]),
    ],
    ids=["unavailable", "device", "dtype"],
)
def test_the_automatic_choice_passes_over_what_cannot_serve(register, call, fake):
    register(fake)
    call(maps(), None)
    assert fake.calls == []
    assert chosen() == "torch"


def test_the_automatic_choice_passes_over_what_has_to_be_named(register, monkeypatch):
    fake = FakeBackend("interpreter")
    monkeypatch.setattr(fake, "automatic", False)
    register(fake)
    assert chosen() == "torch"
    assert chosen(backend="interpreter") == "interpreter"
    with fsp.use_backend("interpreter"):
        assert chosen() == "interpreter"


def test_the_automatic_choice_is_made_for_the_tensors_at_hand(register):
    register(FakeBackend("fast", refuses=[torch.float64]))
    assert chosen(torch.float32) == "fast"
    assert chosen(torch.float64) == "torch"


@pytest.mark.parametrize("place", range(4))
def test_every_map_counts(register, place):
    register(FakeBackend("fast", refuses=[torch.float64]))
    four = [*maps(), *maps()]
    assert fsp.explain([tuple(four[:2])], [tuple(four[2:])]).backend == "fast"
    four[place] = four[place].double()
    assert fsp.explain([tuple(four[:2])], [tuple(four[2:])]).backend == "torch"


# --- what there is --------------------------------------------------------------------------------


def test_available_backends_are_those_that_work_best_first(register):
    register(
        FakeBackend("fastest"), FakeBackend("broken", unavailable="so it is"), FakeBackend("fast")
    )
    assert fsp.available_backends() == ("fastest", "fast", "torch")


def test_registered_backends_include_those_that_do_not_work(register):
    register(FakeBackend("broken", unavailable="so it is"))
    assert list(backends.registered_backends()) == ["broken", "torch"]


def test_the_registry_is_handed_out_as_a_copy():
    backends.registered_backends().clear()
    assert "torch" in backends.registered_backends()


@pytest.mark.parametrize("name", list(backends.registered_backends()))
def test_a_backend_is_registered_under_its_name(name):
    assert backends.registered_backends()[name].name == name


# --- a backend of one's own ---------------------------------------------------------------------


class Literal:
    """The definition as a backend: all that one takes."""

    name, automatic = "literal", False

    def why_unavailable(self):
        return None

    def why_unsupported(self, device, dtypes):  # noqa: ARG002
        return None

    def limits(self, device, student, teacher, precision):  # noqa: ARG002
        return Limits(evaluations=("tiles",), gram_positions=0, launch_pairs=2, launch_products=4)

    def matrix(self, first, second):
        return first @ second.mT / first.shape[2]

    def matrix_backward(self, gradient, other, channels_last):  # noqa: ARG002
        return gradient @ other / other.shape[2]

    def loss(self, maps, plan, weights, masks):  # noqa: ARG002
        wanted = [
            x.detach().requires_grad_(m.gradient_dtype is not None)
            for x, m in zip(maps, plan.maps, strict=True)
        ]
        pairs = [(wanted[i], wanted[i + 1]) for i in range(0, len(wanted), 2)]
        with torch.enable_grad():
            loss = reference.fsp_loss(pairs[::2], pairs[1::2], weights, plan.pool, plan.norm)
        return loss.detach(), list(
            torch.autograd.grad(loss, [x for x in wanted if x.requires_grad])
        )

    def scale(self, gradients, scaling, factor, in_place):  # noqa: ARG002
        return [(g * factor).to(dtype) for g, dtype in zip(gradients, scaling.dtypes, strict=True)]


def test_a_backend_is_a_class_and_an_entry_of_the_registry(monkeypatch):
    monkeypatch.setitem(backends._REGISTRY, "literal", Literal())
    student = [tuple(torch.randn(2, c, 4, 4, requires_grad=True) for c in (3, 5)) for _ in range(3)]
    teacher = [tuple(torch.randn(2, c, 4, 4) for c in (3, 5)) for _ in range(3)]
    plan = fsp.explain(student, teacher, backend="literal")
    assert "by the literal backend" in str(plan)
    assert plan.launches == ("residual", "gradients") * 2 + ("finish",)
    loss = fsp.fsp_loss(student, teacher, backend="literal")
    maps = [x for pair in student for x in pair]
    expected = reference.fsp_loss(student, teacher)
    assert torch.equal(loss, expected)
    found, wanted = torch.autograd.grad(loss, maps), torch.autograd.grad(expected, maps)
    assert all(map(torch.equal, found, wanted))
    matrix = fsp.fsp_matrix(*student[0], backend="literal")
    assert torch.allclose(matrix, reference.fsp_matrix(*student[0]))
