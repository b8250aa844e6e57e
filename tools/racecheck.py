"""Which hazards that compute-sanitizer's racecheck reports are races.

Releases before 2026.1 report hazards that do not exist. Its release notes say of 2026.1 "Fixed
false positives in racecheck when using warpgroup-level synchronizations on Hopper", and of 2025.4
"Fixed multiple false-positives in racecheck involving mbarrier usage". A hazard of these releases
is *unclear* where both sides are instructions that read or write shared memory by themselves, after
the thread has gone on: wgmma, bulk copies (TMA), and cp.async beside them. Everything else is a
race:

* any hazard in which a thread itself reads or writes (LDS, STS, LDSM, STSM, atomics);
* hazards between cp.async alone, whose commits and waits racecheck follows since 2021;
* any hazard whose instruction is not known for sure. A report names a kernel and an offset, and the
  instruction is looked up at that offset in each kernel of that name that the run has compiled;
* any hazard that a release from 2026.1 on reports.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

FIXED = (2026, 1)  # the first release without these false reports
# Instructions that read or write shared memory, as the machine code calls them (SASS): after the
# thread has gone on, and before it does. LD, ST and ATOM may go to any memory.
WGMMA_AND_BULK = {"HGMMA", "QGMMA", "IGMMA", "BGMMA", "UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP"}
CP_ASYNC = {"LDGSTS"}
BY_THREADS = {"LDS", "STS", "LDSM", "STSM", "ATOMS", "LD", "ST", "ATOM", "RED", "STAS", "REDAS"}

Access = tuple[str, int]  # a kernel's name and an offset in its machine code
Opcodes = dict[int, str]  # by offset


class Race(NamedTuple):
    """One report: its text, and the accesses that it names."""

    text: str
    accesses: tuple[Access, ...]


def version_of(text: str) -> tuple[int, int] | None:
    """The release, as ``compute-sanitizer --version`` prints it."""
    found = re.search(r"Version (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def reports_of(log: str) -> list[str]:
    """The reports of a log of any of the sanitizer's tools, and its other messages."""
    return re.split(r"^=+ (?=\S)", log, flags=re.MULTILINE)[1:]


def races_of(log: str) -> list[Race]:
    """The hazards of racecheck's log; one whose accesses cannot be read has none."""
    races = []
    for report in reports_of(log):
        words = " ".join(re.sub(r"^=+", "", report, flags=re.MULTILINE).split())
        if re.match(r"(error|warning|warn|info|potential)\b", words, flags=re.IGNORECASE) is None:
            continue
        found = re.findall(r"\b(?:Read|Write) access at (.+?)\+(0x[0-9a-f]+)", words)
        whole = len(found) == len(re.findall(r"\baccess at\b", words))
        accesses = [(name, int(offset, 16)) for name, offset in found] if whole else []
        races.append(Race(words, tuple(accesses)))
    return races


def opcodes_of(sass: str) -> dict[str, Opcodes]:
    """The instructions of each kernel in what ``cuobjdump --dump-sass`` prints."""
    kernels: dict[str, Opcodes] = {}
    instructions: Opcodes = {}
    for line in sass.splitlines():
        if name := re.match(r"\s*Function : (\S+)", line):
            instructions = kernels.setdefault(name[1], {})
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", line):
            instructions[int(found[1], 16)] = found[2]
    return kernels


def disassembled(cubins: Iterable[Path], cuobjdump: str) -> dict[str, list[Opcodes]]:
    """The instructions of every kernel in some files, all of one name together."""
    kernels: dict[str, list[Opcodes]] = {}
    for path in cubins:
        command = [cuobjdump, "--dump-sass", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        for name, instructions in opcodes_of(done.stdout).items():
            kernels.setdefault(name, []).append(instructions)
    return kernels


def is_unclear(race: Race, kernels: Mapping[str, Sequence[Opcodes]]) -> bool:
    """Whether a release before 2026.1 may report this though it is no race; see above."""
    if len(race.accesses) < 2:
        return False
    found: set[str] = set()
    for name, offset in race.accesses:
        here = {instructions.get(offset) for instructions in kernels.get(name, ())}
        shared = here & (WGMMA_AND_BULK | CP_ASYNC | BY_THREADS)
        if not shared or shared & BY_THREADS:
            return False
        found |= {str(opcode) for opcode in shared}
    return bool(found & WGMMA_AND_BULK)


def split(
    log: str, kernels: Mapping[str, Sequence[Opcodes]], version: tuple[int, int] | None
) -> tuple[list[Race], list[Race]]:
    """The races of a log, and the hazards that are unclear in this release."""
    races = races_of(log)
    if version is None or version >= FIXED:
        return races, []
    unclear = [race for race in races if is_unclear(race, kernels)]
    return [race for race in races if race not in unclear], unclear


def displayed(log: str) -> int | None:
    """How many hazards the log itself says that it holds."""
    found = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", log)
    return int(found[1]) if found else None
