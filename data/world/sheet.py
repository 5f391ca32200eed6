"""A picture of the families: what each measures, and frames of some of its clips in time."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longtake.data.world.clips import Description, Shapes, check_request, describe, draw_clip
from longtake.data.world.families import FAMILIES

COLUMNS = 6  # frames of a clip
PER_ROW = 2  # clips beside each other
CANDIDATES = 32  # clips of a family that are looked through for its forms
# Layout, in pixels of the picture
DPI = 100
CELL = 64  # frames are enlarged to about this, by a whole factor
LABEL, HEADER, CAPTION = 184, 48, 21
GAP, PAD, SEAM = 24, 8, 2
MIN_STRIP = 320  # room for a caption above a single frame
GREY = "0.45"
MAX_COLOURS = 256  # of the PNG: a third of the bytes, and no difference to be seen


def contact_sheet(
    path: Path | str,
    *,
    families: Sequence[str],
    split: str = "train",
    frames: int = 17,
    height: int = 32,
    width: int = 32,
    fps: float = 8,
    seed: int = 0,
    examples: int = 4,
) -> Path:
    """Write a PNG with clips of each family, one for each of its forms up to `examples` of them.

    Time goes from left to right. Raises ValueError as `check_request` does.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"--show {path}: the sheet is a .png")
    shapes = Shapes(((height, width),), (frames,), (fps,))
    check_request(families, split, shapes)
    at = np.linspace(0, frames - 1, min(COLUMNS, frames)).round().astype(int)
    blocks = []
    for number, family in enumerate(families):
        # Clips of one index look alike in all families: each gets numbers of its own.
        indices = range(number * CANDIDATES, (number + 1) * CANDIDATES)
        plans = [describe(seed, split, index, [family], shapes) for index in indices]
        strips = [_strip(plan, at) for plan in _choose(plans, examples)]
        blocks.append(_Block(family, strips))
    sheet = _Sheet(blocks, [float(t) / fps for t in at])
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _choose(plans: Sequence[Description], limit: int) -> list[Description]:
    """The first clip of each form, `limit` of them at most, and others until the row is full.

    Those are the ones that have most words unlike all that are there already.
    """
    chosen = list({plan.form: plan for plan in reversed(plans)}.values())[::-1][:limit]
    while len(chosen) % PER_ROW:
        chosen.append(max(plans, key=lambda plan: min(_distance(plan, one) for one in chosen)))
    return chosen


def _distance(one: Description, two: Description) -> int:
    """Number of slots that two descriptions fill differently."""
    return len(set(one.words.items()) - set(two.words.items()))


@dataclass(frozen=True, slots=True)
class _Strip:
    """A short caption, and enlarged frames beside each other, uint8 (H, W, 3)."""

    caption: str
    picture: np.ndarray


def _strip(plan: Description, at: np.ndarray) -> _Strip:
    clip = draw_clip(plan)
    factor = max(1, round(CELL / min(clip.frames.shape[1:3])))
    cells = clip.frames[at].repeat(factor, axis=1).repeat(factor, axis=2)
    cells = np.pad(cells, ((0, 0), (0, 0), (0, SEAM), (0, 0)), constant_values=255)
    return _Strip(clip.captions["short"], np.concatenate(cells, axis=1)[:, :-SEAM])


@dataclass(frozen=True, slots=True)
class _Block:
    """A family's place on the sheet."""

    family: str
    strips: list[_Strip]

    @property
    def row_height(self) -> int:
        return CAPTION + self.strips[0].picture.shape[0] + PAD

    @property
    def height(self) -> int:
        return -(-len(self.strips) // PER_ROW) * self.row_height + PAD


class _Sheet:
    """The picture; everything on it is placed in pixels from its upper left corner."""

    def __init__(self, blocks: Sequence[_Block], seconds: Sequence[float]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.strip = blocks[0].strips[0].picture.shape[1]
        self.slot = max(MIN_STRIP, self.strip) + GAP
        self.width = LABEL + PER_ROW * self.slot
        self.height = HEADER + sum(block.height for block in blocks) + PAD
        self.figure = Figure((self.width / DPI, self.height / DPI), dpi=DPI)
        self.canvas = FigureCanvasAgg(self.figure)
        self._write(12, HEADER - 34, "family and the failure\nthat it measures", size=8, color=GREY)
        if len(seconds) > 1:
            for column in range(PER_ROW):
                self._draw_times(LABEL + column * self.slot, seconds)
        top = HEADER
        for block in blocks:
            self._draw_block(block, top)
            top += block.height

    def save(self, path: Path) -> None:
        from PIL import Image

        self.canvas.draw()
        picture = Image.fromarray(np.asarray(self.canvas.buffer_rgba())[..., :3])
        picture.quantize(MAX_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)

    def _draw_times(self, left: float, seconds: Sequence[float]) -> None:
        """An arrow of time above a column of clips, with the second of every frame."""
        self._line(left, left + self.strip, HEADER - 8, arrowstyle="-|>", mutation_scale=9)
        self._write(left, 6, "time", size=8, color=GREY)
        step = (self.strip + SEAM) / len(seconds)
        for number, second in enumerate(seconds):
            middle = left + number * step + (step - SEAM) / 2
            self._write(middle, HEADER - 26, f"{second:.1f} s", size=8, color=GREY, ha="center")

    def _draw_block(self, block: _Block, top: float) -> None:
        self._line(8, self.width - 8, top, arrowstyle="-", linewidth=0.8)
        self._write(12, top + 8, block.family, size=13, weight="bold")
        failure = textwrap.fill(FAMILIES[block.family].failure, 24)
        self._write(12, top + 32, failure, size=8.5, color=GREY, linespacing=1.35)
        for number, strip in enumerate(block.strips):
            left = LABEL + number % PER_ROW * self.slot
            y = top + number // PER_ROW * block.row_height + PAD / 2
            self._write(left, y + 3, strip.caption, size=8.5)
            bottom = self.height - y - CAPTION - strip.picture.shape[0]
            self.figure.figimage(strip.picture, left, bottom)

    def _write(self, x: float, y: float, text: str, **style: Any) -> None:
        self.figure.text(x / self.width, 1 - y / self.height, text, va="top", **style)

    def _line(self, start: float, stop: float, y: float, **style: Any) -> None:
        from matplotlib.patches import FancyArrowPatch

        ends = [(x / self.width, 1 - y / self.height) for x in (start, stop)]
        arrow = FancyArrowPatch(*ends, shrinkA=0, shrinkB=0, color=GREY, **style)
        self.figure.add_artist(arrow)
