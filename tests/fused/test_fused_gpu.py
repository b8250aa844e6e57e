"""What only a GPU can tell: full sizes, tensor cores, streams, graphs, memory, launches."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from calls import BF16, FP16, FP32, run, tensor
from tolerances import FUSED_TF32, assert_near, flatten, fused_bounds, oracle, relative_error

import fsp_kernels as fsp
from benchmarks.checks import with_each
from benchmarks.workloads import BY_NAME, WORKLOADS, Workload, feature_maps
from fsp_kernels import reference

pytestmark = pytest.mark.gpu

# Pairs of each evaluation by the planner's own limits, in half precision; in fp32 some differ.
SHAPES = {
    "one pass": (64, 48, (14, 14)),
    "gram": (512, 384, (7, 7)),
    "tiles": (256, 192, (20, 20)),
    "tiles in parts": (256, 192, (64, 64)),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def maps_of(shape, dtype=BF16, batch=4, device="cuda", grad=True):
    m, n, size = shape
    return [
        torch.randn(batch, c, *size, device=device).to(dtype).requires_grad_(grad)
        for c in (m, n, m, n)
    ]


def loss_of(a, b, c, d, **options):
    return fsp.fsp_loss([(a, b)], [(c, d)], **options)


def check(tensors, loss, gradients, **options):
    a, b, c, d = tensors
    plan = fsp.explain([(a, b)], [(c, d)], **options)
    oracle([(a, b)], [(c, d)], **options).check_fused(plan, loss, gradients)


# --- the workloads --------------------------------------------------------------------------------


def samples_of(pairs, chosen: slice) -> list:
    return with_each(pairs, lambda x: x.detach()[chosen].double())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_workloads_at_full_size(workload: Workload, dtype):
    student, teacher = feature_maps(workload, workload.batch, dtype, device="cuda")
    plan = fsp.explain(student, teacher)
    loss, *gradients = run(student, teacher)

    # In float64 a few samples at a time: the loss is the mean of theirs.
    size, total = 2, 0.0
    for start in range(0, workload.batch, size):
        chosen = slice(start, start + size)
        count = len(range(workload.batch)[chosen])
        part = reference.fsp_loss(samples_of(student, chosen), samples_of(teacher, chosen))
        total += part * count / workload.batch
    bounds = [fused_bounds(p, dtype) for p in plan.pairs]
    assert_near(loss, total, max(b.loss for b in bounds), workload.name)

    some = slice(workload.batch - size, None)
    exact = samples_of(student, some)
    for pair in exact:
        for x in pair:
            x.requires_grad_()
    part = reference.fsp_loss(exact, samples_of(teacher, some)) * size / workload.batch
    wanted = torch.autograd.grad(part, [x for pair in exact for x in pair])
    for i, (gradient, w) in enumerate(zip(gradients, wanted, strict=True)):
        assert_near(gradient[some], w, bounds[i // 2].gradient, bounds[i // 2].reason)


# --- tensor cores ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["frobenius", "column"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@every_shape
def test_errors_are_those_that_are_stated(shape, dtype, norm):
    tensors = maps_of(shape, dtype)
    check(tensors, *split(run([tensors[:2]], [tensors[2:]], norm=norm)), norm=norm)


def split(results):
    return results[0], results[1:]


@pytest.mark.usefixtures("tf32", "chip_with_tf32")
@every_shape
def test_tf32_is_close_and_no_more_than_that(shape):
    tensors = maps_of(shape, FP32)
    loss, *gradients = run([tensors[:2]], [tensors[2:]])
    expected = oracle([tensors[:2]], [tensors[2:]])
    assert_near(loss, expected.loss, FUSED_TF32.loss, FUSED_TF32.reason)
    for gradient, wanted in zip(gradients, expected.gradients, strict=True):
        assert 1e-5 < relative_error(gradient, wanted) < FUSED_TF32.gradient


@every_shape
def test_the_gradient_survives_convergence(shape):
    _, _, c, d = maps_of(shape, FP32, grad=False)
    a, b = ((x + 1e-5 * torch.randn_like(x)).requires_grad_() for x in (c, d))
    gradients = torch.autograd.grad(loss_of(a, b, c, d), (a, b))
    for gradient, wanted in zip(gradients, oracle([(a, b)], [(c, d)]).gradients, strict=False):
        assert_near(gradient, wanted, 1e-5, "fp32, subtracted before anything is rounded")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@every_shape
def test_what_is_not_finite_shows_and_stays_in_its_sample(shape, dtype, value):
    tensors = maps_of(shape, dtype)
    with torch.no_grad():
        tensors[0][1, 3, 2, 2] = value
    expected = oracle([tensors[:2]], [tensors[2:]]).gradients
    loss, *gradients = run([tensors[:2]], [tensors[2:]])
    assert not loss.isfinite()
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert not gradient[~wanted.isfinite()].isfinite().any()
        assert gradient[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@every_shape
def test_twenty_runs_give_the_same_bits(shape, dtype):
    tensors = maps_of(shape, dtype)
    first = run([tensors[:2]], [tensors[2:]])
    for _ in range(19):
        again = run([tensors[:2]], [tensors[2:]])
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_a_map_of_more_than_2_to_the_31_elements():
    side, channels = 8300, 32  # 2.2e9 elements of one sample, 4.4 GB; its gradient is as large
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of free GPU memory")
    a = torch.randn(1, channels, side, side, device="cuda", dtype=BF16).requires_grad_()
    b = torch.randn(1, 4, side, side, device="cuda", dtype=BF16)
    c, d = (  # of any size: nothing is stored twice
        torch.randn(1, n, 1, side, device="cuda", dtype=BF16).expand(1, n, side, side)
        for n in (channels, 4)
    )
    loss = loss_of(a, b, c, d)
    (gradient,) = torch.autograd.grad(loss, a)

    positions = side * side
    rows = torch.arange(side).split(100)
    residual = (c[0, :, 0].double() @ d[0, :, 0].double().mT) / -side
    for chosen in rows:
        x, y = (t.detach()[0, :, chosen[0] : chosen[-1] + 1].flatten(1).double() for t in (a, b))
        residual += x @ y.mT / positions
    assert_near(loss, residual.square().sum(), 1e-2, "fp32 sums of 7e7 terms")
    for chosen in (rows[0], rows[-1]):
        here = slice(chosen[0], chosen[-1] + 1)
        y = b[0, :, here].flatten(1).double()
        wanted = (2 / positions) * (residual @ y)
        assert_near(gradient[0, :, here].flatten(1), wanted, 1e-2, "fp32 sums of 7e7 terms")


# --- streams, graphs, threads ---------------------------------------------------------------------


@every_shape
def test_a_call_runs_on_the_current_stream(shape):
    expected = maps_of(shape)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(
            50_000_000
        )  # what runs elsewhere would read the maps before they are there
        tensors = [x.detach().clone().requires_grad_() for x in expected]
        loss = loss_of(*tensors)
        gradients = torch.autograd.grad(loss, tensors)
    torch.cuda.current_stream().wait_stream(stream)
    check(expected, loss, gradients)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@every_shape
def test_a_cuda_graph_replays_with_new_data(shape, dtype):
    tensors = maps_of(shape, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(loss_of(*tensors), tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_of(*tensors)
        gradients = torch.autograd.grad(loss, tensors)
    for _ in range(2):
        with torch.no_grad():
            for x in tensors:
                x.copy_(torch.randn(x.shape, device="cuda"))
        graph.replay()
        torch.cuda.synchronize()
        check(tensors, loss, gradients)


def gradients_in_a_graph(tensors):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_of(*tensors)
        gradients = torch.autograd.grad(3 * loss, tensors)
    graph.replay()
    torch.cuda.synchronize()
    return loss, [g / 3 for g in gradients]


# Shapes of no other test, so that the call is the first of its kind.
@pytest.mark.parametrize(("channels", "forward_first"), [(24, False), (40, True)])
def test_a_first_call_in_a_cuda_graph_works_or_says_what_to_do(channels, forward_first):
    tensors = maps_of((channels, 56, (5, 6)), FP32)
    if forward_first:  # then it is backward's scaling that is new
        loss_of(*tensors)
    message = ""
    try:
        check(tensors, *gradients_in_a_graph(tensors))
    except RuntimeError as error:
        message = str(error)
    assert not message or "call it once before capturing" in message
    torch.autograd.grad(3 * loss_of(*tensors), tensors)
    check(tensors, *gradients_in_a_graph(tensors))


def test_threads_with_streams_of_their_own():
    calls = [maps_of(shape) for shape in SHAPES.values()] * 2
    results: list = [None] * len(calls)
    torch.cuda.synchronize()

    def work(i):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(10):
                loss = loss_of(*calls[i])
                results[i] = loss, torch.autograd.grad(loss, calls[i])
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for tensors, (loss, gradients) in zip(calls, results, strict=True):
        check(tensors, loss, gradients)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_shape
def test_tensors_need_not_be_on_the_current_device(shape):
    tensors = maps_of(shape, device="cuda:1")
    with torch.cuda.device(0):
        loss = loss_of(*tensors)
        gradients = torch.autograd.grad(loss, tensors)
        assert torch.cuda.current_device() == 0
    assert {x.device.index for x in (loss, *gradients)} == {1}
    check(tensors, loss, gradients)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_device_has_kernels_of_its_own():
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        tensors = maps_of(SHAPES["one pass"], device=device)
        loss = loss_of(*tensors)
        check(tensors, loss, torch.autograd.grad(loss, tensors))


# --- what a call costs ----------------------------------------------------------------------------


def operations(function, tmp_path) -> list[str]:
    """Names of what ran on the GPU: kernels, copies and fills."""
    function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    trace = tmp_path / "trace.json"
    profile.export_chrome_trace(str(trace))
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = json.loads(trace.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("cat") in kinds]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@every_shape
def test_a_call_launches_what_its_plan_tells_and_backward_one_kernel_more(shape, dtype, tmp_path):
    tensors = maps_of(shape, dtype)
    one = torch.ones((), device="cuda")
    launches = fsp.explain([tensors[:2]], [tensors[2:]]).launches
    forward = operations(lambda: loss_of(*tensors), tmp_path)
    both = operations(lambda: torch.autograd.grad(loss_of(*tensors), tensors, one), tmp_path)
    assert len(forward) == len(launches), forward
    assert len(both) == len(launches) + 1, both


def test_pairs_share_the_launches(tmp_path):
    student, teacher = feature_maps(BY_NAME["cifar-resnet"], 8, BF16, device="cuda")
    plan = fsp.explain(student, teacher)
    names = operations(lambda: fsp.fsp_loss(student, teacher), tmp_path)
    assert len(names) == len(plan.launches), names
    assert len(names) <= len(plan.pairs), names


def extra_memory(tensors) -> int:
    """Bytes that a forward pass takes at its peak."""
    loss_of(*tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = loss_of(*tensors)
    torch.cuda.synchronize()
    assert loss.requires_grad
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_one_pass_needs_no_memory_beyond_the_gradients(dtype):
    tensors = maps_of(SHAPES["one pass"], dtype, batch=64)
    plan = fsp.explain([tensors[:2]], [tensors[2:]])
    assert plan.workspace_bytes == 0
    assert plan.gradient_bytes <= extra_memory(tensors) < plan.gradient_bytes + (64 << 10)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@every_shape
def test_memory_is_what_the_plan_says(shape, dtype):
    tensors = maps_of(shape, dtype, batch=16)
    plan = fsp.explain([tensors[:2]], [tensors[2:]])
    extra = extra_memory(tensors)
    assert plan.gradient_bytes <= extra <= plan.extra_bytes + (64 << 10)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@every_shape
def test_nobody_waits_for_the_gpu(shape, dtype):
    tensors = maps_of(shape, dtype)
    loss_of(*tensors).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (3 * loss_of(*tensors)).backward()
        fsp.fsp_matrix(*tensors[:2]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- as a citizen of PyTorch ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@every_shape
def test_it_compiles_without_a_graph_break(shape, dtype):
    tensors = maps_of(shape, dtype)
    compiled = torch.compile(lambda *maps: 2 * loss_of(*maps), fullgraph=True)
    loss = compiled(*tensors)
    gradients = torch.autograd.grad(loss, tensors)
    check(tensors, loss / 2, [g / 2 for g in gradients])


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@every_shape
def test_autocast_leaves_the_loss_alone(shape, dtype):
    tensors = maps_of(shape, FP32)
    plain = run([tensors[:2]], [tensors[2:]])
    with torch.autocast("cuda", dtype):
        inside = run([tensors[:2]], [tensors[2:]])
    assert all(torch.equal(x, y) for x, y in zip(plain, inside, strict=True))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_a_gradient_scaler_trains_as_without_one(dtype):
    layer = torch.nn.Conv2d(16, 64, 1, bias=False, device="cuda")
    x = torch.randn(64, 16, 28, 28, device="cuda")
    _, b, c, d = maps_of((64, 48, (28, 28)), dtype, batch=64, grad=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=65536.0)
    before = layer.weight.detach().double()
    with torch.autocast("cuda", dtype):
        mapped = layer(x)
        assert mapped.dtype == dtype
        loss = loss_of(mapped, b, c, d)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()

    to_map = oracle([(mapped, b)], [(c, d)]).gradients[0]
    wanted = torch.einsum("bohw,bihw->oi", to_map, x.to(dtype).double())
    step = (before - layer.weight.detach().double()).flatten(1)
    # Small beside the weights: the step carries their rounding.
    slack = 1e-7 * before.norm()
    assert (step - wanted).norm() <= 2e-2 * wanted.norm() + slack


def test_matrices_are_twice_differentiable_at_size():
    x, y = tensor(4, 256, 56, 56), tensor(4, 192, 56, 56)
    exact = [t.detach().double().requires_grad_() for t in (x, y)]

    def second(function, x, y):
        gradients = torch.autograd.grad(function(x, y).square().sum(), (x, y), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, y))

    found = second(lambda x, y: fsp.fsp_matrix(x, y), x, y)
    for gradient, wanted in zip(found, second(reference.fsp_matrix, *exact), strict=True):
        assert_near(gradient, wanted, 1e-5, "fp32")


def test_pairs_of_every_regime_in_one_call():
    calls = [maps_of(shape, dtype) for shape in SHAPES.values() for dtype in (BF16, FP32)]
    student, teacher = [t[:2] for t in calls], [t[2:] for t in calls]
    loss, *gradients = run(student, teacher)
    plan = fsp.explain(student, teacher)
    assert len(gradients) == len(flatten(student, teacher))
    oracle(student, teacher).check_fused(plan, loss, gradients)
