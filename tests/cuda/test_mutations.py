"""The test of the tests: kernels with a bug, run on the host, do not pass for correct.

Each mutation is a piece of csrc/ and a wrong one to take its place. All are compiled into one
module, in which a number says which of them is in force. Races are watched for in it (race.h): a
barrier that is missing has to be reported as a race, whatever comes of it.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from calls import BF16, DEVICE, FP16, FP32, SIZES, Regime, check, four_of, pair_of, tensor
from cuda_on_host.build import ROOT, build, load
from cuda_on_host.module import extension_is

from tools.smoke import CASES as SMOKE_CASES
from tools.smoke import TOLERANCES, error_of

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="calls of the tests run on the GPU, these kernels do not"
)

# --- calls that bugs have to show in --------------------------------------------------------------

REGIMES = SIZES["cuda"].regimes


def maps(road: str, dtype: torch.dtype = FP32, norm: str = "frobenius", **options) -> None:
    regime = REGIMES[road]
    student, teacher = four_of(regime, dtypes=(dtype, dtype), **options)
    check(student, teacher, regime.of(norm), norm=norm)


def of_two_layouts() -> None:
    regime = REGIMES["one pass"]
    check([pair_of(regime)], [pair_of(regime, layout="channels last")], regime)


def ready(road: str, dtype: torch.dtype = FP32) -> None:
    regime = REGIMES[road]
    student = [pair_of(regime, dtypes=(dtype, dtype), batch=2)]
    check(student, [tensor(2, *regime.channels, dtype=dtype)], regime)


def apart() -> None:
    regime = REGIMES["one pass"]
    check([pair_of(regime)], [pair_of(regime, size=(5, 7))], regime)


def masked(road: str, which: str = "same", dtype: torch.dtype = FP32) -> None:
    """Maps are NaN where they do not count."""
    regime = REGIMES[road]
    masks = [torch.rand(2, *regime.size) < 0.5 for _ in range(2)]
    hidden = [~mask[:, None] for mask in (masks if which == "apart" else masks[:1] * 2)]
    networks = [
        tuple(
            x.detach().masked_fill(h, torch.nan).requires_grad_()
            for x in pair_of(regime, dtypes=(dtype, dtype), batch=2)
        )
        for h in hidden
    ]
    given = {"student_mask": masks[0]}
    if which == "ready":
        networks[1] = tensor(2, *regime.channels, dtype=dtype)
    else:
        given["teacher_mask"] = masks[which == "apart"]
    check(networks[:1], networks[1:], regime, **given)


def equal_columns() -> None:
    regime = REGIMES["one pass"]
    student, _ = four_of(regime)
    teacher = [tuple(x.detach().clone().requires_grad_() for x in student[0])]
    check(student, teacher, regime, norm="column")


def pooled(pool: str, dtype: torch.dtype) -> None:
    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 2, shape).to(dtype).requires_grad_()  # many maxima are shared

    student, teacher = ([(whole(2, 20, 4, 6), whole(2, 33, 2, 3))] for _ in range(2))
    check(student, teacher, Regime((20, 33), (2, 3), "one pass"), pool=pool)


def padded(line: int, channels: tuple[int, int], form: str = "matrix") -> None:
    """Lines of `line` elements end in the middle of the bytes read at a time, and NaN follows."""

    def lines(channels: int) -> torch.Tensor:
        x = torch.full((2, channels, line), torch.nan, dtype=BF16)[..., :21]
        return x.copy_(torch.randn(x.shape)).requires_grad_()

    student, teacher = ([tuple(map(lines, channels))] for _ in range(2))
    check(student, teacher, Regime(channels, (21,), "one pass", form=form))


def misaligned() -> None:
    """Strides are multiples of 16 bytes, addresses are not."""

    def shifted(channels: int) -> torch.Tensor:
        x = torch.full((2 * channels * 8 + 4,), torch.nan, dtype=BF16)[4:].view(2, channels, 8)
        return x.copy_(torch.randn(x.shape)).requires_grad_()

    student, teacher = ([(shifted(35), shifted(40))] for _ in range(2))
    check(student, teacher, Regime((35, 40), (8,), "one pass"))


CALLS: dict[str, Callable[[], None]] = {
    "one pass": partial(maps, "one pass"),
    "one pass, an element at a time": partial(maps, "one pass", layout="every second position"),
    "two samples": partial(maps, "one pass", batch=2),
    "one pass bf16": partial(maps, "one pass", BF16),
    "one pass fp16": partial(maps, "one pass", FP16),
    "one pass fp16, channels last": partial(maps, "one pass", FP16, layout="channels last"),
    "one pass, a layout for each network": of_two_layouts,
    "column": partial(maps, "one pass", norm="column"),
    "ready": partial(ready, "one pass"),
    "apart": apart,
    "masked apart": partial(masked, "one pass", "apart"),
    "tiles, masked": partial(masked, "tiles"),
    "tiles, masked apart": partial(masked, "tiles", "apart"),
    "tiles, masked ready": partial(masked, "tiles", "ready"),
    "Gram form, masked": partial(masked, "gram"),
    "equal columns": equal_columns,
    "max pooled": partial(pooled, "max", BF16),
    "avg pooled": partial(pooled, "avg", FP32),
    "padded bf16": partial(padded, 24, (35, 40)),
    "padded bf16, by 8 bytes": partial(padded, 28, (35, 40)),
    "padded bf16, by 4 bytes": partial(padded, 22, (35, 40)),
    "padded bf16, Gram form": partial(padded, 28, (140, 35), form="gram"),
    "misaligned bf16": misaligned,
    "Gram form": partial(maps, "gram"),
    "tiles": partial(maps, "tiles", BF16),
    "tiles, column": partial(maps, "tiles", norm="column"),
    "parts": partial(maps, "tiles in parts"),
    "parts, ready": partial(ready, "tiles in parts"),
}

# --- bugs -----------------------------------------------------------------------------------------


class Mutation(NamedTuple):
    """``new``, statements or an expression, in place of ``old``; ``call`` has to show it.

    ``within`` is found once in the file, and ``old`` once in it.
    """

    name: str
    call: str
    file: str
    within: str
    old: str
    new: str
    races: bool = False  # and has to be told to do so

    def planted(self, text: str, number: int) -> str:
        """The file's text with both, of which the number in force chooses."""
        for part, whole in ((self.within, text), (self.old, self.within)):
            assert whole.count(part) == 1, f"out of date, {self.file} has changed: {part}"
        if ";" in self.old:
            either = f"if (fsp_mutant == {number}) {{ {self.new} }} else {{ {self.old} }}"
        else:
            either = f"(fsp_mutant == {number} ? ({self.new}) : ({self.old}))"
        return text.replace(self.within, self.within.replace(self.old, either))


def instead(name: str, call: str, file: str, old: str, new: str) -> Mutation:
    return Mutation(name, call, file, old, old, new)


def without(name: str, call: str, file: str, old: str, within: str = "") -> Mutation:
    return Mutation(name, call, file, within or old, old, "")


def race(mutation: Mutation) -> Mutation:
    return mutation._replace(races=True)


def no_barrier(name: str, call: str, file: str, within: str) -> Mutation:
    return race(without(name, call, file, "__syncthreads();", within))


# A race tells both places by file and line, and which calls of the kernel lead there.
PLACE = r"\w+\.cuh:\d+( \(in [^()]*\))?" if shutil.which("addr2line") else r"\S+\+0x\w+"
RACE = rf"races in (shared|global) memory: it (reads|writes) at {PLACE}; warp .* at {PLACE}, "

NONE = -1
MUTATIONS = [
    # Barriers.
    no_barrier(
        "others' copies are not awaited",
        "one pass bf16",
        "pipeline.cuh",
        "__syncthreads();  // what other threads copied",
    ),
    no_barrier(
        "a stage is loaded while it is read",
        "one pass",
        "pipeline.cuh",
        "__syncthreads();  // nobody reads this stage",
    ),
    no_barrier(
        "differences are multiplied before they are there",
        "one pass bf16",
        "residual.cuh",
        "pair.maps[3]);\n            __syncthreads();",
    ),
    no_barrier(
        "differences are multiplied before they are there: Gram form",
        "Gram form",
        "gram.cuh",
        "teacher);\n          __syncthreads();",
    ),
    no_barrier(
        "positions are multiplied before they are hidden",
        "masked apart",
        "residual.cuh",
        "__syncthreads();  // the zeros are there",
    ),
    no_barrier(
        "positions are subtracted before they are hidden: Gram form",
        "Gram form, masked",
        "gram.cuh",
        "__syncthreads();  // the zeros are there",
    ),
    no_barrier(
        "a gradient is written before its positions are hidden",
        "tiles, masked",
        "maps.cuh",
        "__syncthreads();  // the zeros are there",
    ),
    no_barrier(
        "columns are measured before they are there",
        "column",
        "one_pass.cuh",
        "__syncthreads();  // the sums of all warps are there",
    ),
    no_barrier(
        "columns are divided by lengths that are not there",
        "column",
        "one_pass.cuh",
        "__syncthreads();  // the inverses are there",
    ),
    no_barrier(
        "a gradient is written before it is there: one pass",
        "one pass bf16",
        "one_pass.cuh",
        "result.store(own(), Own::position_line, ratio);\n          __syncthreads();",
    ),
    no_barrier(
        "a gradient is written before it is there: Gram form",
        "Gram form",
        "gram.cuh",
        "sign);\n      __syncthreads();",
    ),
    no_barrier(
        "a gradient is written before it is there: tiles",
        "tiles",
        "tiles.cuh",
        "ratio_of(product, map_sample));\n  __syncthreads();",
    ),
    no_barrier(
        "a block is added to before others have set it",
        "Gram form",
        "gram.cuh",
        "__syncthreads();  // a transposed element",
    ),
    no_barrier(
        "a block's sum misses warps",
        "one pass bf16",
        "accumulator.cuh",
        "__syncthreads();\n  value = 0;",
    ),
    no_barrier(
        "a column's sum misses warps",
        "tiles, column",
        "combine.cuh",
        "sums[threadIdx.x] = length;\n  __syncthreads();",
    ),
    no_barrier(
        "a column's sum is overwritten",
        "tiles, column",
        "combine.cuh",
        "sums[i * 32 + lane];\n  __syncthreads();",
    ),
    # Copies to shared memory.
    race(without("copies are not awaited", "one pass", "pipeline.cuh", "wait_for_copies<1>();")),
    race(
        instead(
            "copies are awaited a stage too late",
            "one pass",
            "pipeline.cuh",
            "wait_for_copies<1>();",
            "wait_for_copies<2>();",
        )
    ),
    race(without("copies are not committed", "one pass", "pipeline.cuh", "commit_copies();")),
    race(
        instead(
            "two blocks write one partial loss",
            "two samples",
            "one_pass.cuh",
            "pair.partial + place.program",
            "pair.partial",
        )
    ),
    race(
        instead(
            "two blocks write one tile of a gradient",
            "tiles",
            "tiles.cuh",
            "place.program / down % across * Of::positions",
            "0",
        )
    ),
    # What lies beyond the end.
    Mutation(
        "positions beyond the end are read",
        "one pass, an element at a time",
        "maps.cuh",
        "return c < channels && k < positions",
        "c < channels && k < positions",
        "c < channels",
    ),
    Mutation(
        "channels beyond the end are read",
        "one pass, an element at a time",
        "maps.cuh",
        "copied = inside(c, k)",
        "inside(c, k)",
        "k < positions",
    ),
    instead(
        "zeros are not copied as such: an element at a time",
        "one pass, an element at a time",
        "maps.cuh",
        "copied ? 4 : 0",
        "4",
    ),
    instead(
        "zeros are not copied as such: 16 bytes at a time",
        "padded bf16",
        "maps.cuh",
        "elements * sizeof(T)",
        "BYTES",
    ),
    instead(
        "the last 16 bytes of a line are read as a whole",
        "padded bf16",
        "maps.cuh",
        "left < unit ? left : unit",
        "unit",
    ),
    instead(
        "lines beyond the last are read",
        "padded bf16",
        "maps.cuh",
        "line < lines ? inside : 0",
        "inside",
    ),
    instead(
        "the last 8 bytes of a line are read as 16",
        "padded bf16, by 8 bytes",
        "maps.cuh",
        "load_units<8, LINES, INNER>(tile, stride, global, step, lines, size);",
        "load_units<16, LINES, INNER>(tile, stride, global, step, lines, size);",
    ),
    instead(
        "the last 4 bytes of a line are read as 8",
        "padded bf16, by 4 bytes",
        "maps.cuh",
        "load_units<4, LINES, INNER>(tile, stride, global, step, lines, size);",
        "load_units<8, LINES, INNER>(tile, stride, global, step, lines, size);",
    ),
    instead(
        "the last halves of a line are read as a whole",
        "padded bf16, Gram form",
        "maps.cuh",
        "left > 2 ? source[2] : 0",
        "source[2]",
    ),
    instead(
        "lines of halves beyond the last are read",
        "padded bf16, Gram form",
        "maps.cuh",
        "line >= lines || left <= 0",
        "left <= 0",
    ),
    Mutation(
        "an address is taken for a multiple of what strides are",
        "misaligned bf16",
        "launch_sequence.cpp",
        "while (address % map.unit != 0) map.unit /= 2;",
        "address % map.unit != 0",
        "false",
    ),
    # Fragments.
    instead(
        "registers of b swapped",
        "one pass bf16",
        "product.cuh",
        "Mma16<typename X::Element>::mma(result.values[i][j][e], lines[i], columns.r[2 * e],\n"
        "                                        columns.r[2 * e + 1]);",
        "Mma16<typename X::Element>::mma(result.values[i][j][e], lines[i], columns.r[2 * e + 1],"
        " columns.r[2 * e]);",
    ),
    instead(
        "lines of ldmatrix",
        "one pass bf16",
        "product.cuh",
        "line += 8 * (COLUMNS ? third : second);",
        "line += 8 * (COLUMNS ? second : third);",
    ),
    instead(
        "summed elements of ldmatrix",
        "one pass bf16",
        "product.cuh",
        "k += row * (COLUMNS ? second : third);",
        "k += row * (COLUMNS ? third : second);",
    ),
    instead(
        "the order of summed elements beside fp16",
        "one pass fp16",
        "product.cuh",
        "SPREAD ? lane % 8 / 2 + lane % 2 * 4 : lane % 8",
        "lane % 8",
    ),
    instead(
        "the order of summed elements beside fp16: channels last",
        "one pass fp16, channels last",
        "product.cuh",
        "PAIRS ? lane % 4 * 2 + half : lane % 4 + half * 4",
        "lane % 4 + half * 4",
    ),
    instead(
        "elements of a TF32 fragment",
        "one pass",
        "product.cuh",
        "x.at(line + lane / 4 + down * 8, k + at)",
        "x.at(line + lane / 4 + half * 8, k + at)",
    ),
    instead(
        "the second of two slopes",
        "one pass bf16",
        "one_pass.cuh",
        "rounded(second)",
        "rounded(first)",
    ),
    instead(
        "places of results",
        "one pass",
        "accumulator.cuh",
        "line + 16 * i + e % 2 * 8",
        "line + 16 * i + e / 2 * 8",
    ),
    # Terms and signs.
    without(
        "a product of three",
        "one pass",
        "product.cuh",
        "mma_tf32(d, lines[i].high.r, columns.low.r[2 * e], columns.low.r[2 * e + 1]);",
    ),
    instead(
        "a difference of zero",
        "one pass",
        "residual.cuh",
        "subtract<Shape>(tile(3), tile(1), tile(3), pair.maps[1], pair.maps[3]);",
        "subtract<Shape>(tile(3), tile(3), tile(3), pair.maps[3], pair.maps[3]);",
    ),
    instead(
        "a difference of maps that lie in two ways",
        "one pass, a layout for each network",
        "maps.cuh",
        "y[place(of_y, c, k)]",
        "y[place(of_x, c, k)]",
    ),
    instead(
        "the teacher's sign where it comes alone",
        "apart",
        "residual.cuh",
        "-1.0f / by",
        "1.0f / by",
    ),
    instead(
        "the teacher's sign in its gradient",
        "one pass",
        "one_pass.cuh",
        "-divisor(pair, 0, sample) / divisor(pair, 1, sample)",
        "divisor(pair, 0, sample) / divisor(pair, 1, sample)",
    ),
    Mutation(
        "the teacher's sign in its gradient: Gram form",
        "Gram form",
        "gram.cuh",
        "map < 2 ? 1.0f : -1.0f",
        "map < 2 ? 1.0f : -1.0f",
        "1.0f",
    ),
    instead(
        "an inner product counted once", "Gram form", "gram.cuh", "2 * of(first.yx)", "of(first.yx)"
    ),
    instead(
        "a block taken from itself",
        "Gram form",
        "gram.cuh",
        "put.transposed(by_x, first.yx); put(by_y, first.yy);",
        "put(by_x, first.yx); put(by_y, first.yy);",
    ),
    instead(
        "the slope of a column of zeros",
        "equal columns",
        "residual.cuh",
        "length == 0 ? 0.0f : 1.0f / length",
        "1.0f / length",
    ),
    # Masks.
    Mutation(
        "the mask of the first positions for all",
        "masked apart",
        "maps.cuh",
        "positions + position + k] != 0",
        "position + k",
        "k",
    ),
    instead(
        "the mask of the first sample for all",
        "tiles, masked",
        "maps.cuh",
        "static_cast<int64_t>(sample) * positions",
        "0",
    ),
    Mutation(
        "the mask of the student for both networks",
        "masked apart",
        "residual.cuh",
        "pair.masks[first / 2].data,",
        "pair.masks[first / 2].data",
        "pair.masks[0].data",
    ),
    instead(
        "the other network's mask in a gradient",
        "masked apart",
        "one_pass.cuh",
        "pair.masks[teacher].data",
        "pair.masks[1 - teacher].data",
    ),
    instead(
        "all positions are counted",
        "tiles, masked",
        "maps.cuh",
        "counts == nullptr ? static_cast<float>(pair.positions[network]) : counts[sample]",
        "static_cast<float>(pair.positions[network])",
    ),
    without(
        "the teacher's positions that count do not divide its gradient",
        "tiles, masked apart",
        "maps.cuh",
        "ratio /= product.divisor[sample];",
    ),
    without(
        "the student's positions that count do not multiply a gradient",
        "tiles, masked ready",
        "maps.cuh",
        "ratio *= product.multiplier[sample];",
    ),
    # Parts.
    instead(
        "the last blocks of positions in no part",
        "parts",
        "residual.cuh",
        "(blocks + parts - 1) / parts",
        "blocks / parts",
    ),
    instead(
        "the last part is not added",
        "parts",
        "combine.cuh",
        "part < pair.parts",
        "part < pair.parts - 1",
    ),
    instead(
        "the ready matrix in every part",
        "parts, ready",
        "residual.cuh",
        "pair.residual == Residual::ready && part == 0",
        "pair.residual == Residual::ready",
    ),
    # Pooling.
    instead(
        "the last of equal maxima",
        "max pooled",
        "maps.cuh",
        "value > best.value",
        "value >= best.value",
    ),
    instead(
        "a maximum's gradient everywhere",
        "max pooled",
        "maps.cuh",
        "number == chosen ? value : 0.0f",
        "value",
    ),
    instead(
        "windows one after another",
        "max pooled",
        "maps.cuh",
        "map.height - map.window[2] * map.width",
        "map.height",
    ),
    instead(
        "an average's gradient as it is",
        "avg pooled",
        "maps.cuh",
        "value * window_share(own)",
        "value",
    ),
    # The rest.
    instead(
        "the first element after the last four",
        "one pass fp16",
        "elementwise.cuh",
        "4 * fours + first",
        "4 * fours + first + 1",
    ),
]


# --- the module with all of them ------------------------------------------------------------------


def plant(csrc: Path) -> None:
    """Add all bugs to a copy of the sources."""
    for number, mutation in enumerate(MUTATIONS):
        file = csrc / mutation.file
        file.write_text(mutation.planted(file.read_text(), number))
    for name in {mutation.file for mutation in MUTATIONS}:
        file = csrc / name
        file.write_text('extern "C" int fsp_mutant;\n' + file.read_text())
    (csrc / "mutant.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) int fsp_mutant;\n'
        f"int fsp_mutant = {NONE};\n"
    )


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    """The module, and the number that is in force in it."""
    csrc = tmp_path_factory.mktemp("mutants") / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    plant(csrc)
    path = build(watched="races", csrc=csrc)
    return load(path), ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "fsp_mutant")


@pytest.fixture
def cuda_extension(mutants):
    module, _ = mutants
    with extension_is(module):
        yield


@pytest.fixture
def mutant(mutants):
    _, number = mutants
    yield number
    number.value = NONE


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_bug_is_one_of_the_kernels_as_they_are(mutation):
    mutation.planted((ROOT / "csrc" / mutation.file).read_text(), NONE)


@pytest.mark.thorough
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_kernels_without_a_bug_pass(call):
    call()


@pytest.mark.thorough
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "case", [case for case in SMOKE_CASES if "split" not in case.name], ids=lambda case: case.name
)
def test_kernels_without_a_bug_do_not_race(case):
    """Nor in larger calls, but for those whose million elements take as long as all others."""
    assert error_of(case, "cuda", DEVICE) <= TOLERANCES[case.dtype]


@pytest.mark.thorough
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=[m.name for m in MUTATIONS])
def test_a_bug_is_found(number, mutant):
    mutant.value = number
    mutation = MUTATIONS[number]
    found = (RuntimeError, RACE) if mutation.races else ((AssertionError, RuntimeError), None)
    with pytest.raises(found[0], match=found[1]):
        CALLS[mutation.call]()
