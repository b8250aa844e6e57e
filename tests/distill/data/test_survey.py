"""Every image is looked at once, by one of the processes of a group; all know of all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from accelerate import Accelerator

from distill.processes import run_group
from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data.images import CorruptImageError
from fsp_kernels.distill.data.survey import survey
from fsp_kernels.distill.errors import DistillError


class Part:
    """Images of the given kinds, which notes who is asked for which."""

    def __init__(self, kinds: str) -> None:
        """``.`` a sound image, ``c`` a corrupt one, ``w`` one that is not as it must be."""
        self.kinds, self.asked = kinds, []

    def __len__(self) -> int:
        return len(self.kinds)

    def survey(self, numbers: Sequence[int]) -> list[int | DistillError]:
        self.asked += numbers
        errors = {"c": CorruptImageError, "w": DistillError}
        return [errors.get(self.kinds[n], lambda _, n=n: n * n)(f"image {n}") for n in numbers]


def look(parts: Sequence[Part], corrupt: str = "refuse") -> list[dict[int, int]]:
    return survey(parts, Data(dataset="a:b", corrupt=corrupt), "here", lambda _: None)


def test_what_is_found_is_told_by_part_and_number() -> None:
    assert look([Part("..."), Part("..")]) == [{0: 0, 1: 1, 2: 4}, {0: 0, 1: 1}]


def test_corrupt_images_are_left_out_or_refused() -> None:
    assert look([Part(".c."), Part("..")], "skip") == [{0: 0, 2: 4}, {0: 0, 1: 1}]
    with pytest.raises(
        DistillError, match=r"^here: 1 of 5 images cannot be read:\nimage 1\nhere\.c"
    ):
        look([Part(".c."), Part("..")])


def test_a_part_must_have_an_image_left() -> None:
    with pytest.raises(
        DistillError, match=r"^here: 2 of 5 images cannot be read, and none is left"
    ):
        look([Part("cc"), Part("...")], "skip")


def test_nothing_skips_what_is_not_as_it_must_be() -> None:
    with pytest.raises(
        DistillError, match=r"^here: 1 of 3 images are not as they must be:\nimage 2$"
    ):
        look([Part(".cw")], "skip")


def _in_a_group(rank: int, folder: Path) -> None:
    Accelerator(cpu=True)  # by which the processes of a group know of one another
    parts = [Part(".c..c"), Part("..")]
    found = look(parts, "skip")
    try:
        look([Part(".c")])
    except DistillError as error:
        message = str(error)
    note = {"found": [[*part] for part in found], "asked": [p.asked for p in parts]}
    (folder / f"{rank}.json").write_text(json.dumps(note | {"message": message}))


def test_the_processes_of_a_group_share_the_work_and_agree(tmp_path: Path) -> None:
    run_group(2, _in_a_group, tmp_path)
    notes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [note["asked"] for note in notes] == [[[0, 2, 4], [0]], [[1, 3], [1]]]
    for note in notes:
        assert note["found"] == [[0, 2, 3], [0, 1]]
        assert note["message"].startswith("here: 1 of 2 images cannot be read:\nimage 1\n")
