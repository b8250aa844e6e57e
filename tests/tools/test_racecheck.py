"""racecheck's log: which hazards are races, and which its older releases cannot tell from them."""

from __future__ import annotations

import pytest
from sanitizer_logs import BULK, LDGSTS, LDS, SASS, STS, WGMMA, WGMMA_TOO, log, report

from tools.racecheck import (
    Race,
    displayed,
    is_unclear,
    opcodes_of,
    races_of,
    split,
    version_of,
)

KERNELS = {"fsp_residual": [opcodes_of(SASS)["fsp_residual"]]}
OLD, NEW = (2025, 3), (2026, 1)


def test_instructions_are_found_by_kernel_and_offset() -> None:
    found = KERNELS["fsp_residual"][0]
    assert found[0x40] == "EXIT"
    assert [found[x] for x in (LDGSTS, LDS, STS, WGMMA, BULK)] == [
        *("LDGSTS", "LDS", "STS", "HGMMA", "UBLKCP")
    ]


def test_a_report_names_all_its_accesses() -> None:
    (race,) = races_of(log(report(("Write", LDGSTS), ("Read", WGMMA), ("Read", WGMMA_TOO))))
    assert race.accesses == tuple(("fsp_residual", x) for x in (LDGSTS, WGMMA, WGMMA_TOO))
    assert race.text.startswith("Error: Race reported between Write access at fsp_residual+0x100")


def test_a_log_without_hazards_has_no_races() -> None:
    assert races_of(log()) == []
    assert displayed(log()) == 0


@pytest.mark.parametrize(
    ("accesses", "unclear"),
    [
        ((("Write", LDGSTS), ("Read", WGMMA)), True),
        ((("Write", BULK), ("Read", WGMMA), ("Read", WGMMA_TOO)), True),
        ((("Write", STS), ("Read", WGMMA)), False),  # a store by threads that nobody waited for?
        ((("Write", LDGSTS), ("Read", LDS)), False),  # racecheck follows cp.async
        ((("Write", LDGSTS), ("Write", LDGSTS)), False),
        ((("Write", LDGSTS), ("Read", WGMMA), ("Read", LDS)), False),
        ((("Write", LDGSTS), ("Read", 0x40)), False),  # no instruction that it could be
        ((("Write", LDGSTS), ("Read", 0x48)), False),
        ((("Read", WGMMA),), False),
    ],
)
@pytest.mark.parametrize("level", ["Error", "Warning", "WARNING"])
def test_only_hazards_between_wgmma_bulk_copies_and_cp_async_are_set_apart(
    accesses: tuple[tuple[str, int], ...], unclear: bool, level: str
) -> None:
    races, apart = split(log(report(*accesses, level=level)), KERNELS, OLD)
    assert (len(races), len(apart)) == ((0, 1) if unclear else (1, 0))


@pytest.mark.parametrize("version", [NEW, (2027, 0), None])
def test_from_2026_1_on_every_hazard_is_a_race(version: tuple[int, int] | None) -> None:
    races, apart = split(log(report(("Write", LDGSTS), ("Read", WGMMA))), KERNELS, version)
    assert (len(races), apart) == (1, [])


def test_of_several_kernels_of_a_name_none_may_be_one_that_races() -> None:
    race = Race("", (("fsp_residual", LDGSTS), ("fsp_residual", WGMMA)))
    other = dict.fromkeys((LDGSTS, WGMMA), "IADD3")
    assert is_unclear(race, {"fsp_residual": [*KERNELS["fsp_residual"], other]})
    other[WGMMA] = "LDS"
    assert not is_unclear(race, {"fsp_residual": [*KERNELS["fsp_residual"], other]})


def test_a_kernel_whose_machine_code_is_not_known_races() -> None:
    hazard = report(("Write", LDGSTS), ("Read", WGMMA), kernel="void fsp::product<float>(int)")
    races, apart = split(log(hazard), KERNELS, OLD)
    assert races[0].accesses[0] == ("void fsp::product<float>(int)", LDGSTS)
    assert apart == []


@pytest.mark.parametrize(
    "message",
    [
        "Error: Potential WAW hazard detected at __shared__ 0x0 in block (0,0,0) :",
        "Error: Race reported between Write access at 0x68 in fsp_residual",
        "Warning: Detected overflow of tracked cuda::barrier structures.",
        "Potential invalid __shared__ read of size 4 bytes",
    ],
)
def test_what_cannot_be_read_is_a_race(message: str) -> None:
    races, apart = split(log(f"========= {message}\n"), KERNELS, OLD)
    assert ([race.text for race in races], apart) == ([message], [])


def test_the_release_is_read() -> None:
    printed = "NVIDIA (R) Compute Sanitizer\nVersion 2025.3.1.0 (build 36400000) (public-release)\n"
    assert version_of(printed) == (2025, 3)
    assert version_of("") is None
