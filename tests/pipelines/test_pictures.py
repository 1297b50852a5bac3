"""Pictures as users have them: every mode, rank, dtype and range gives the picture that it shows, or one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tdm.errors import TDMError
from tdm.pipelines.pictures import pictures_of
from tdm.tests.pipelines.students import Make, load
from torch import Tensor

PIXELS = np.random.RandomState(0).randint(0, 256, (16, 24, 3), dtype="uint8")
RGB = Image.fromarray(PIXELS)
GREY = RGB.convert("L")
FLOATS = PIXELS / np.float32(255)
CHANNELS_FIRST = np.ascontiguousarray(PIXELS.transpose(2, 0, 1))


def pixels(image: Any) -> list[Tensor]:
    """[3, H, W] in [0, 1] of each picture."""
    arrays = [
        torch.from_numpy(np.array(p)).movedim(-1, 0) / 255 if isinstance(p, Image.Image) else p[0]
        for p in pictures_of(image)
    ]
    assert all(a.shape[0] == 3 for a in arrays)
    return arrays


SAME: dict[str, Any] = {
    "PIL RGB": RGB,
    "PIL RGBA": RGB.convert("RGBA"),
    "array HWC uint8": PIXELS,
    "array BHWC uint8": PIXELS[None],
    "array CHW uint8": CHANNELS_FIRST,
    "array HWC flipped twice": PIXELS[::-1][::-1],
    "array RGBA": np.array(RGB.convert("RGBA")),
    "array HWC floats": FLOATS,
    "array HWC float64": FLOATS.astype("float64"),
    "array in [-1, 1]": FLOATS * 2 - 1,
    "array uint16": PIXELS.astype("uint16") * 257,
    "tensor CHW uint8": torch.from_numpy(CHANNELS_FIRST),
    "tensor BCHW uint8": torch.from_numpy(CHANNELS_FIRST)[None],
    "tensor HWC uint8": torch.from_numpy(PIXELS),
    "tensor CHW floats": torch.from_numpy(CHANNELS_FIRST) / 255,
    "tensor BHWC floats": torch.from_numpy(FLOATS)[None],
    "tensor in [-1, 1]": torch.from_numpy(CHANNELS_FIRST)[None] / 127.5 - 1,
    "list": [RGB],
    "tuple of arrays": (PIXELS,),
}
OF_GREY: dict[str, Any] = {
    "L": GREY,
    "LA": GREY.convert("LA"),
    "HW uint8": np.array(GREY),
    "HW1": np.array(GREY)[..., None],
    "tensor HW": torch.from_numpy(np.array(GREY)),
    "tensor 1HW floats": torch.from_numpy(np.array(GREY))[None] / 255,
    "I;16": Image.fromarray(np.array(GREY).astype("uint16") * 257),
}


@pytest.mark.parametrize("name", SAME)
def test_it_is_the_picture_that_it_shows(name: str) -> None:
    (picture,) = pixels(SAME[name])
    torch.testing.assert_close(picture.float(), torch.from_numpy(CHANNELS_FIRST) / 255, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OF_GREY)
def test_grey_is_grey(name: str) -> None:
    (picture,) = pixels(OF_GREY[name])
    torch.testing.assert_close(
        picture.float(), (torch.from_numpy(np.array(GREY)) / 255).expand(3, -1, -1), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("mode", ["P", "PA", "CMYK", "1", "YCbCr", "HSV", "RGBX"])
def test_other_modes_are_what_pil_makes_of_them(mode: str) -> None:
    image = RGB.convert("P").convert(mode) if mode == "PA" else RGB.convert(mode)
    (picture,) = pixels(image)
    assert torch.equal(picture, torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0) / 255)
    bits = RGB.convert("1")
    (picture,) = pixels(np.array(bits))
    assert torch.equal(picture[0], torch.from_numpy(np.array(bits)).float())


def test_paths_are_read_as_they_lie(tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    RGB.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "b.png", exif=turned)
    for picture in pixels([tmp_path / "a.png", str(tmp_path / "b.png")]):
        assert torch.equal(picture, torch.from_numpy(CHANNELS_FIRST) / 255)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.png", "cannot read the picture nowhere.png"),
        ([], "needs a picture"),
        (None, "a NoneType is no picture"),
        (3, "a int is no picture"),
        (PIXELS.astype("int64"), "int64 does not say its range"),
        (FLOATS * 255, r"must lie in \[0, 1\] or \[-1, 1\]"),
        (FLOATS * np.nan, "must lie in"),
        (np.zeros((16, 16, 7), "uint8"), "no axis of 1, 3 or 4 channels"),
        (np.zeros((1, 1, 16, 16, 3), "uint8"), "is no picture"),
        (np.zeros((0, 16, 3), "uint8"), "is no picture"),
        (np.array([["a", "b"]]), "is no picture"),
        (torch.randn(1, 4, 8, 8) * 4, "must lie in"),  # latents
        (Image.fromarray(FLOATS[..., 0]), "mode 'F' does not say its range"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_rest_is_one_line(image: Any, message: str) -> None:
    with pytest.raises(TDMError, match=message) as refusal:
        pictures_of(image)
    assert "\n" not in str(refusal.value)


def test_image_to_image_redraws_them_all_alike(make: Make, tmp_path: Path) -> None:
    pipe = load(make("sd15"))

    def redraw(image: Any, **call: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe.image_to_image("a red cube", image, 0.3, generator=generator, output_type="pt", **call).images

    RGB.save(tmp_path / "picture.png")
    expected = redraw(RGB)
    assert expected.shape[-2:] == (16, 24)
    for image in (*SAME.values(), tmp_path / "picture.png"):
        torch.testing.assert_close(redraw(image), expected, rtol=0, atol=1e-4)
    smaller = redraw(RGB, height=8, width=16)
    torch.testing.assert_close(redraw(PIXELS, height=8, width=16), smaller, rtol=0, atol=1e-4)
    with pytest.raises(TDMError, match="needs a prompt"):
        pipe.image_to_image(None, RGB)
