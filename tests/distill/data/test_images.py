"""Files of every kind that Pillow reads come out as they look: 8 bits of red, green and blue."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from fsp_kernels.distill.data.images import ImageFiles
from fsp_kernels.distill.errors import DistillError

RAMP = np.arange(0, 256, 16).repeat(2).reshape(4, 8).astype(np.uint8)


def read(path: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ImageFiles(path.parent, [path.name])[0]


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def grey(pixels: np.ndarray = RAMP) -> Tensor:
    return torch.from_numpy(pixels).expand(3, -1, -1)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_16_bits_are_scaled_to_8(tmp_path: Path, name: str) -> None:
    sixteen = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert torch.equal(read(saved(sixteen, tmp_path / name)), grey())


def test_16_bits_in_the_other_byte_order_are_scaled_to_8(tmp_path: Path) -> None:
    sixteen = Image.frombytes("I;16B", (8, 4), (RAMP.astype(">u2") * 257).tobytes())
    assert torch.equal(read(saved(sixteen, tmp_path / "x.tif")), grey())


@pytest.mark.parametrize(("mode", "kind"), [("I", np.int32), ("F", np.float32)])
def test_numbers_of_an_unknown_range_are_refused_by_file_and_mode(
    tmp_path: Path, mode: str, kind: type
) -> None:
    path = saved(Image.fromarray(RAMP.astype(kind)), tmp_path / "depth.tif")
    with pytest.raises(DistillError, match=rf"/depth\.tif: .* its mode is {mode}, whose range"):
        read(path)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("L", "x.png"),
        ("LA", "x.png"),
        ("P", "x.png"),
        ("RGB", "x.png"),
        ("RGBA", "x.png"),
        ("RGBX", "x.tif"),
        ("CMYK", "x.tif"),
        ("YCbCr", "x.tif"),
        ("LAB", "x.tif"),
    ],
)
def test_grey_looks_the_same_in_every_mode(tmp_path: Path, mode: str, name: str) -> None:
    image = Image.fromarray(RAMP)
    image = image if mode in ("L", "LA", "P") else image.convert("RGB")
    found = read(saved(image.convert(mode), tmp_path / name))
    assert found.shape == (3, 4, 8)
    # CMYK and the colour spaces round.
    assert (found.int() - grey().int()).abs().max() <= (3 if mode in ("LAB", "YCbCr") else 0)


def test_one_bit_is_black_or_white(tmp_path: Path) -> None:
    path = saved(
        Image.fromarray(RAMP).point(lambda x: 255 * (x > 99)).convert("1"), tmp_path / "x.png"
    )
    assert torch.equal(read(path), grey(np.where(RAMP > 99, 255, 0).astype(np.uint8)))


def test_transparent_pixels_keep_their_colour(tmp_path: Path) -> None:
    palette = Image.fromarray(RAMP).convert("P")
    transparent = saved(palette, tmp_path / "palette.png", transparency=bytes(256))
    assert torch.equal(read(transparent), grey())
    image = Image.merge("LA", [Image.fromarray(RAMP), Image.new("L", (8, 4), 0)])
    assert torch.equal(read(saved(image, tmp_path / "alpha.png")), grey())


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp"])
def test_an_image_is_turned_as_its_exif_data_say(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera was held upright, turned to the left
    image = Image.fromarray(RAMP).convert("RGB")
    plain = read(saved(image, tmp_path / f"plain-{name}", quality=95))
    turned = read(saved(image, tmp_path / name, quality=95, exif=exif))
    assert torch.equal(turned, plain.rot90(-1, (1, 2)))


def test_the_first_of_several_pages_counts(tmp_path: Path) -> None:
    pages = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    for name in ("x.tif", "x.png"):
        path = saved(pages[0], tmp_path / name, save_all=True, append_images=pages[1:])
        assert torch.equal(read(path), grey())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.jpg", {}),
        ("x.jpg", {"progressive": True}),
        ("x.png", {}),
        ("x.tif", {}),
        ("x.webp", {}),
    ],
)
def test_a_survey_finds_whatever_cannot_be_read(
    tmp_path: Path, name: str, options: dict[str, bool]
) -> None:
    random = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(random), tmp_path / name, **options).read_bytes()
    names = []
    for share in (0, 1, 10, 50, 90, 99, 100):
        names.append(f"{share}-{name}")
        (tmp_path / names[-1]).write_bytes(whole[: len(whole) * share // 100])
    images = ImageFiles(tmp_path, names)
    found = images.survey(range(len(names)))
    assert found[-1] is None
    assert sum(error is not None for error in found) >= len(names) - 2
    for number, error in enumerate(found):
        if error is None:
            assert images[number].shape == (3, 64, 48)
        else:
            with pytest.raises(DistillError, match=f"^{re.escape(str(error))}$"):
                _ = images[number]
