"""CUDA on the host itself: what kernels made for the purpose do, and which mistakes it catches."""

import ctypes
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cuda_on_host import build

INVALID_VALUE, INVALID_CONFIGURATION = "cudaErrorInvalidValue", "cudaErrorInvalidConfiguration"
HERE = Path(__file__).resolve().parent


class Params(ctypes.Structure):
    _fields_ = [("input", ctypes.c_void_p), ("output", ctypes.c_void_p), ("n", ctypes.c_int)]


def build_kernels(architecture=80, watched=""):
    source = HERE / "shim_kernels.cpp"
    return build.build_library("shim_kernels.so", [source], [], architecture, watched)


class Kernels:
    """shim_kernels.cpp, compiled and loaded."""

    def __init__(self, architecture=80, watched=""):
        self.library = ctypes.CDLL(str(build_kernels(architecture, watched)))
        self.library.launch.restype = ctypes.c_char_p
        dimensions = [ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t]
        self.library.launch.argtypes = [ctypes.c_char_p, Params, *dimensions]

    def error(self, name, input=None, output=None, n=0, grid=1, block=32, shared=0):  # noqa: A002
        """What the launch complains of: nothing, as a rule."""
        pointers = [None if array is None else array.ctypes.data for array in (input, output)]
        params = Params(*pointers, n)
        return self.library.launch(name.encode(), params, grid, block, shared).decode()

    def run(self, name, *args, **kwargs):
        assert self.error(name, *args, **kwargs) == ""

    def convert(self, name, values, dtype):
        result = np.empty(values.shape, dtype)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (values, result)]
        self.library[name](*pointers, ctypes.c_size_t(values.size))
        return result


@pytest.fixture(scope="session")
def kernels():
    return Kernels()


@pytest.fixture(scope="session", params=[75, 80])
def kernels_of_any_chip(request):
    return Kernels(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ---- threads, barriers, shuffles


def test_indices(kernels):
    out = np.zeros((3 * 96, 4), np.uint32)
    kernels.run("indices", output=out, grid=3, block=96)
    thread, block = np.meshgrid(np.arange(96), np.arange(3))
    expected = np.stack([thread, block, 0 * thread + 96, 0 * thread + 3], axis=-1)
    np.testing.assert_array_equal(out, expected.reshape(-1, 4))


@pytest.mark.parametrize("block", [32, 256, 1024])
def test_barrier(kernels, block):
    out = np.zeros((2, block), np.float32)
    kernels.run("reverse", output=out, grid=2, block=block, shared=4 * block)
    np.testing.assert_array_equal(out, [np.arange(block)[::-1]] * 2)


def test_missing_barrier_is_seen_from_either_side(kernels):
    out = np.zeros((2, 256), np.float32)
    kernels.run("reverse_without_barrier", output=out, grid=2, block=256, shared=1024)
    poisoned = np.isnan(out).reshape(2, 2, 128).any(axis=2)
    np.testing.assert_array_equal(poisoned, [[True, False], [False, True]])


def test_missing_warp_barrier_is_seen_from_either_side(kernels):
    out = np.zeros((2, 16, 2), np.float32)
    kernels.run("swap_in_warp_without_barrier", output=out, grid=2, block=32, shared=128)
    odd_or_even = np.isnan(out).all(axis=1)
    np.testing.assert_array_equal(odd_or_even.sum(axis=1), [1, 1])
    assert (odd_or_even[0] != odd_or_even[1]).all()
    kernels.run("swap_in_warp", output=out, grid=2, block=32, shared=128)
    np.testing.assert_array_equal(out, [np.arange(32).reshape(16, 2)[:, ::-1]] * 2)


def test_barriers_in_a_loop(kernels):
    out = np.zeros(128, np.int32)
    kernels.run("rotate", output=out, n=5, block=128, shared=512)
    np.testing.assert_array_equal(out, np.roll(np.arange(128), -5))


def test_shuffles(kernels):
    out = np.zeros((64, 6), np.int32)
    kernels.run("shuffles", output=out, block=64)
    lane = np.arange(32)
    down = np.where(lane < 30, lane + 2, lane)
    down_of_8 = np.where(lane % 8 < 5, lane + 3, lane)
    columns = [0 * lane + 5, lane // 8 * 8 + 3, lane ^ 4, down, down_of_8, lane ^ 1]
    np.testing.assert_array_equal(out, np.tile(np.stack(columns, axis=1), (2, 1)))


def test_exited_threads_do_not_hold_up_a_barrier(kernels):
    out = np.zeros(64, np.int32)
    kernels.run("half_the_block_leaves", output=out, block=64)
    np.testing.assert_array_equal(out, [1] * 32 + [0] * 32)


def test_launches_from_several_threads_take_turns(kernels):
    outs = [np.zeros((2, 256), np.float32) for _ in range(4)]

    def launch(out):
        for _ in range(20):
            kernels.run("reverse", output=out, grid=2, block=256, shared=1024)

    with ThreadPoolExecutor(len(outs)) as pool:
        list(pool.map(launch, outs))
    np.testing.assert_array_equal(outs, [[np.arange(256)[::-1]] * 2] * len(outs))


# ---- matrices


def fragment_of(matrix):
    """The documented layout: lane i holds elements 2 (i % 4) and the next of row i / 4."""
    return matrix.reshape(32, 2)


def test_ldmatrix(kernels_of_any_chip):
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((32, 4, 2), np.uint16)
    kernels_of_any_chip.run("load_matrices", matrices, out, shared=512)
    expected = np.stack([fragment_of(m) for m in matrices], axis=1)
    np.testing.assert_array_equal(out, expected)
    kernels_of_any_chip.run("load_matrices_transposed", matrices, out, shared=512)
    expected = np.stack([fragment_of(np.ascontiguousarray(m.T)) for m in matrices], axis=1)
    np.testing.assert_array_equal(out, expected)


def to_bfloat16(x):
    return np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)


def truncated(x):
    """`x` as float32, rounded toward zero."""
    nearest = x.astype(np.float32)
    too_large = np.abs(nearest.astype(np.float64)) > np.abs(x)
    return np.where(too_large, np.nextafter(nearest, np.float32(0)), nearest)


def product(a, b, d):
    with np.errstate(invalid="ignore"):
        return truncated(d + a.astype(np.float64) @ b.astype(np.float64))


def check_multiply_16_bits(kernels, name, a, b, d, bits):
    out = d.copy()
    operands = np.concatenate([bits(a).ravel(), bits(b).ravel()])
    kernels.run(name, operands, out, shared=2 * operands.size)
    np.testing.assert_array_equal(out, product(a, b, d))


def half_bits(x):
    return x.astype(np.float16).view(np.uint16)


def bfloat16_bits(x):
    return (to_bfloat16(x) >> 16).astype(np.uint16)


def test_mma_f16(kernels_of_any_chip, rng):
    a, b = (rng.normal(size=s).astype(np.float16) for s in [(16, 16), (16, 8)])
    d = rng.normal(size=(16, 8)).astype(np.float32)
    check_multiply_16_bits(kernels_of_any_chip, "multiply_f16", a, b, d, half_bits)


def test_mma_bf16(kernels, rng):
    a, b = (to_bfloat16(rng.normal(size=s)).view(np.float32) for s in [(16, 16), (16, 8)])
    d = rng.normal(size=(16, 8)).astype(np.float32)
    check_multiply_16_bits(kernels, "multiply_bf16", a, b, d, bfloat16_bits)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_mma_passes_on_what_is_not_finite(kernels, rng, special):
    a, b = (rng.normal(size=s).astype(np.float16) for s in [(16, 16), (16, 8)])
    a[3, 7] = special
    b[7, 2] = 0
    d = np.zeros((16, 8), np.float32)
    check_multiply_16_bits(kernels, "multiply_f16", a, b, d, half_bits)


def test_mma_tf32_ignores_the_low_bits(kernels, rng):
    a, b = (rng.normal(size=s).astype(np.float32) for s in [(16, 8), (8, 8)])
    d = rng.normal(size=(16, 8)).astype(np.float32)
    out = d.copy()
    kernels.run("multiply_tf32", np.concatenate([a.ravel(), b.ravel()]), out)
    a, b = ((x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for x in (a, b))
    np.testing.assert_array_equal(out, product(a, b, d))


# ---- asynchronous copies


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("copy_and_wait_for_both", [True, True]),
        ("copy_and_wait_for_the_first", [True, False]),
        ("copy_and_wait_for_none", [False, False]),
    ],
)
def test_copies_are_seen_after_their_wait_only(kernels, rng, name, seen):
    source = rng.normal(size=(64, 2, 4)).astype(np.float32)
    out = np.zeros_like(source)
    kernels.run(name, source, out, n=16, block=64, shared=source.nbytes)
    expected = np.where(np.array(seen)[:, None], source, np.float32(np.nan))
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("n", [0, 4, 12])
def test_copies_fill_up_with_zeros(kernels, rng, n):
    source = rng.normal(size=(32, 2, 4)).astype(np.float32)
    out = np.ones_like(source)
    kernels.run("copy_and_wait_for_both", source, out, n=n, shared=source.nbytes)
    np.testing.assert_array_equal(out, np.where(np.arange(4) < n // 4, source, 0))


def test_copies_of_words(kernels, rng):
    source = rng.normal(size=32).astype(np.float32)
    out = np.ones_like(source)
    kernels.run("copy_words", source, out, shared=128)
    np.testing.assert_array_equal(out, np.where(np.arange(32) % 2 == 0, source, 0))


# ---- mistakes


@pytest.mark.parametrize(
    ("name", "n", "message"),
    [
        ("lanes_at_different_operations", 0, "waits at __syncwarp"),
        ("lanes_at_different_places", 0, "waits at __syncwarp"),
        ("half_a_warp_shuffles", 0, "has exited while .* waits at __shfl_xor_sync"),
        ("warps_at_different_barriers", 0, "warp 1, lane 0 waits at __syncthreads"),
        ("half_a_warp_at_the_barrier", 0, "while .* waits at __syncthreads"),
        ("mask_of_half_a_warp", 0, "only whole warps"),
        ("shared_overrun", 1000, "beyond the end of shared memory"),
        ("matrix_misaligned", 0, "at ldmatrix_x4 .*: an address is not aligned"),
        ("matrix_beyond_the_end", 1024, "at ldmatrix_x4 .*: an address is not within shared"),
        ("copy_misaligned", 0, "at cp_async .*: an address is not aligned"),
        ("copy_beyond_the_end", 64, "at cp_async .*: an address is not within shared"),
        ("copy_beyond_the_end", -1, "at cp_async .*: an address is not within shared"),
        ("copy_never_waited_for", 0, "never waited for"),
    ],
)
def test_mistakes_are_errors(kernels, name, n, message):
    data, out = np.zeros(1024, np.float32), np.zeros((2, 64), np.float32)
    error = kernels.error(name, data, out, n=n, grid=2, block=64, shared=1024)
    assert re.match(rf"launch \d+ of kernel\(Params\) .*{message}", error), error
    # The next launch is none the worse for it.
    kernels.run("reverse", output=out, grid=2, block=64, shared=256)
    np.testing.assert_array_equal(out, [np.arange(64)[::-1]] * 2)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"grid": 0}, INVALID_CONFIGURATION),
        ({"block": 0}, INVALID_CONFIGURATION),
        ({"block": 1056}, INVALID_CONFIGURATION),
        ({"shared": 48 * 1024 + 1}, INVALID_VALUE),
    ],
)
def test_launches_that_cuda_refuses(kernels, arguments, error):
    assert kernels.error("reverse", **arguments) == error
    assert kernels.library.last_error() != 0
    assert kernels.library.last_error() == 0


def test_shared_memory_beyond_48_kib_is_asked_for(kernels_of_any_chip):
    library = kernels_of_any_chip.library
    limit = library.device_attribute(97)
    assert limit == {7: 65536, 8: 166912}[library.device_attribute(75)]
    assert library.set_shared_limit(b"indices", limit + 1) != 0
    assert library.set_shared_limit(b"indices", limit) == 0
    out = np.zeros((32, 4), np.uint32)
    kernels_of_any_chip.run("indices", output=out, shared=limit)


# ---- conversions


EVERY_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def floats_to_round(rng):
    """Floats of every exponent, and the ones halfway between two 16-bit numbers."""
    random = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    special = np.concatenate([[0x1000, 0x8000, 0x10000], np.arange(0x33000000, 0x33800004, 0x1FFF)])
    halves = EVERY_16_BITS.view(np.float16).astype(np.float32).view(np.uint32)
    ties = np.concatenate([halves + np.uint32(0x1000), EVERY_16_BITS * np.uint32(65536) + 0x8000])
    return np.concatenate([random, special, halves, ties]).astype(np.uint32).view(np.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_half(kernels, rng):
    widened = kernels.convert("half_to_float", EVERY_16_BITS, np.float32)
    np.testing.assert_array_equal(widened, EVERY_16_BITS.view(np.float16).astype(np.float32))
    floats = floats_to_round(rng)
    narrowed = kernels.convert("float_to_half", floats, np.uint16).view(np.float16)
    np.testing.assert_array_equal(narrowed, floats.astype(np.float16))


def test_bfloat16(kernels, rng):
    import torch

    widened = kernels.convert("bfloat16_to_float", EVERY_16_BITS, np.float32)
    expected = torch.from_numpy(EVERY_16_BITS.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(widened, expected)
    floats = floats_to_round(rng)
    bits = kernels.convert("float_to_bfloat16", floats, np.uint16).view(np.int16)
    narrowed = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(narrowed, torch.from_numpy(floats).bfloat16().float().numpy())


# ---- the architecture, the sanitizers


@pytest.mark.parametrize("call", ["mma_bf16", "mma_tf32", "cp_async<16>"])
def test_turing_lacks_what_ampere_brought(call):
    source = f"#include <ptx_on_host.h>\nauto* function = &fsp::{call};\n"
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{HERE}", "-xc++", "-"]

    def compiles(architecture):
        define = f"-D__CUDA_ARCH__={architecture}"
        result = subprocess.run(
            [*command, define], input=source, capture_output=True, text=True, check=False
        )
        return result.returncode == 0

    assert compiles(800)
    assert not compiles(750)


SANITIZED = """
import numpy as np
import test_shim
kernels = test_shim.Kernels(watched="sanitizers")
data, out = np.zeros(64, np.float32), np.zeros((2, 64), np.float32)
for _ in range(2):
    kernels.run("reverse", output=out, grid=2, block=64, shared=256)
    assert "has exited" in kernels.error("half_a_warp_shuffles", output=out, block=64)
copied = np.zeros((64, 8), np.float32)
kernels.run("copy_and_wait_for_both", copied, copied, n=16, block=64, shared=2048)
print("clean", flush=True)
kernels.run({name!r}, data, out, n={n}, grid=1, block=32, shared=256)
print("done", flush=True)
"""


@pytest.fixture(scope="session")
def sanitized_kernels():
    return build_kernels(watched="sanitizers")


@pytest.mark.usefixtures("sanitized_kernels")
@pytest.mark.parametrize(
    ("name", "n", "report"),
    [
        ("read_global", 63, None),
        ("read_global", 64, "heap-buffer-overflow"),
        ("read_local", 7, None),
        ("read_local", 8, "stack-buffer-overflow"),
        ("read_vector", 1, "misaligned address"),
        ("shared_overrun", 256 - 32, None),
        ("shared_overrun", 256 - 31, "heap-buffer-overflow"),
    ],
)
def test_sanitizers(name, n, report):
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    result = subprocess.run(
        [sys.executable, "-c", SANITIZED.format(name=name, n=n)],
        env={**os.environ, **build.sanitizer_environment(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if report is None:
        assert result.stdout == "clean\ndone\n", result.stderr
    else:
        assert result.stdout == "clean\n", result.stderr
        assert report in result.stderr
        assert "shim_kernels.cpp" in result.stderr
