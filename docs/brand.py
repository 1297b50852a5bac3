"""Icon and banner for ComfyUI's registry, of pictures that the bundled student draws: `python docs/brand.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from tdm import TDMPipeline

FOLDER = Path(__file__).parent
ICON, BANNER = (400, 400), (1260, 540)  # the registry wants a square of at most 400 pixels, and 21 to 9
NIGHT, WHITE, GREY = "#16143c", "#ffffff", "#b9b7d9"
SEED = 2
PROMPTS = (
    "two red stars above a blue ball at night",
    "three yellow rings left of a purple square in the snow",
    "a green heart on the beach",
    "two pink triangles right of a blue cross in a meadow",
    "one red heart under two green boxes at sea",
    "an orange moon over the waves",
)


def main() -> None:
    """Draw and write both."""
    pipe = TDMPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    runs = [calls(pipe, prompt, SEED) for prompt in PROMPTS]
    strips(runs[0], ICON[0]).save(FOLDER / "icon.png", optimize=True)
    banner(runs[0], [run[-1] for run in runs]).save(FOLDER / "banner.png", optimize=True)


def calls(pipe: TDMPipeline, prompt: str, seed: int) -> list[Image.Image]:
    """What the student sees after each of its 4 network calls; the last is the picture."""
    generator = torch.Generator().manual_seed(seed)
    *steps, _, done = pipe.stream(prompt, generator=generator)
    return [*(step.preview[0] for step in steps), done.output.images[0]]


def strips(steps: list[Image.Image], size: int) -> Image.Image:
    """One picture, from left to right as it is after each call; rounded, and clear outside."""
    picture = Image.new("RGBA", (size, size))
    for i, step in enumerate(steps):
        left, right = (size * j // len(steps) for j in (i, i + 1))
        picture.paste(step.resize((size, size), Image.Resampling.LANCZOS).crop((left, 0, right, size)), (left, 0))
    picture.putalpha(_rounded(size))
    return picture


def banner(steps: list[Image.Image], pictures: list[Image.Image]) -> Image.Image:
    """The name and the promise on the left, what 4 calls draw on the right."""
    result = Image.new("RGB", BANNER, NIGHT)
    draw = ImageDraw.Draw(result)
    draw.text((60, 70), "TDM", WHITE, _font(120, "bold"))
    draw.text(
        (64, 215), "Few-step students,\nrun in ComfyUI exactly\nas they were trained", WHITE, _font(28), spacing=10
    )
    for i, step in enumerate(steps):
        _put(result, step, 96, (64 + 108 * i, 370))
    draw.text((64, 478), "4 network calls, no guidance", GREY, _font(20))
    for i, picture in enumerate(pictures):
        _put(result, picture, 200, (572 + 216 * (i % 3), 62 + 216 * (i // 3)))
    return result


def _put(canvas: Image.Image, picture: Image.Image, size: int, at: tuple[int, int]) -> None:
    canvas.paste(picture.resize((size, size), Image.Resampling.LANCZOS), at, _rounded(size))


def _rounded(size: int) -> Image.Image:
    large = Image.new("L", (4 * size, 4 * size))
    ImageDraw.Draw(large).rounded_rectangle((0, 0, 4 * size - 1, 4 * size - 1), radius=size // 2, fill=255)
    return large.resize((size, size), Image.Resampling.LANCZOS)


def _font(size: int, weight: str = "normal") -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    font_file = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight))
    return ImageFont.truetype(font_file, size)


if __name__ == "__main__":
    main()
