"""What a family of scenes is, and the register of all of them.

A family is one module of this folder: a function that composes a scene and its words, decorated
with `family`. Scores it expects are named with their parameters in `Composition.expect`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longtake.data.world.captions import Words
from longtake.data.world.scene import COLOURS, EXTENTS, SHAPES, SIZES, Scene, Segment, Shot

SPLITS = ("train", "val", "combo", "ood")


@dataclass(frozen=True, slots=True)
class Canvas:
    """The clip to be filled: sizes in pixels, fps in frames per second."""

    frames: int
    height: int
    width: int
    fps: float
    split: str

    @property
    def short_side(self) -> int:
        return min(self.height, self.width)

    @property
    def centre(self) -> tuple[float, float]:
        return self.width / 2, self.height / 2

    def radius(self, size: str) -> float:
        """Radius in pixels of a size word; `ood` is outside what the other splits show."""
        if self.split == "ood":
            return {"small": 0.13, "large": 0.245}[size] * self.short_side
        return SIZES[size] * self.short_side


@dataclass(frozen=True, slots=True)
class Composition:
    """A scene, its words, the words with one attribute flipped, and the scores it can be given.

    `expect` maps a score to its parameters; `asked` says which of them each caption kind determines
    (a score that the caption does not ask for would be a coin toss).
    """

    scene: Scene
    words: Words
    wrong: str
    expect: Mapping[str, Mapping[str, Any]]
    asked: Mapping[str, Sequence[str]]


Compose = Callable[[np.random.Generator, Canvas], Composition]


@dataclass(frozen=True, slots=True)
class Family:
    """`chance`: what each score is worth when captions are shuffled between the family's clips.
    `blind`: what it is worth when all is drawn as asked except the attribute it measures."""

    name: str
    compose: Compose
    min_frames: int
    chance: Mapping[str, float] = field(default_factory=dict)
    blind: Mapping[str, float] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {}


def family(
    name: str,
    *,
    min_frames: int,
    chance: Mapping[str, float],
    blind: Mapping[str, float],
) -> Callable[[Compose], Compose]:
    """Enter a compose function into the register under `name`."""

    def enter(compose: Compose) -> Compose:
        if name in FAMILIES:
            raise ValueError(f"family {name!r} is defined twice: rename one of its modules")
        FAMILIES[name] = Family(name, compose, min_frames, chance, blind)
        return compose

    return enter


def is_held_out(colour: str, shape: str, verb: int) -> bool:
    """Whether a colour x shape x verb triple is kept for the `combo` split (one in eight).

    Every colour, shape, verb and every pair of them still occurs in training.
    """
    return (COLOURS.index(colour) + 2 * SHAPES.index(shape) + 4 * verb) % 9 == 4


def draw_look(
    rng: np.random.Generator,
    canvas: Canvas,
    verb: int,
    *,
    taken: Sequence[str] = (),
    shapes: Sequence[str] = SHAPES,
) -> tuple[str, str]:
    """Colour (not one of `taken`) and shape of a subject, on the split's side of the hold-out.

    In `combo` it is the first subject (nothing taken) whose triple is a held-out one.
    """
    colours = [c for c in COLOURS if c not in taken]
    while True:
        colour = colours[rng.integers(len(colours))]
        shape = shapes[rng.integers(len(shapes))]
        if canvas.split == "combo" and taken:
            return colour, shape
        if is_held_out(colour, shape, verb) == (canvas.split == "combo"):
            return colour, shape


def margins(entity_shape: str, radius: float, gap: float = 0.5) -> tuple[float, float, float]:
    """Least distances (side, top, bottom) of a centre from the frame so that nothing is cut off."""
    side, up, down = EXTENTS[entity_shape]
    return side * radius + gap, up * radius + gap, down * radius + gap


def fixed_shot(rng: np.random.Generator, canvas: Canvas) -> tuple[Shot, ...]:
    """One shot, camera at rest on the world's origin."""
    x, y = canvas.centre
    return (Shot(0, x, y, background=int(rng.integers(2**31))),)


def still(x: float, y: float) -> tuple[Segment, ...]:
    return (Segment(0.0, x, y),)
