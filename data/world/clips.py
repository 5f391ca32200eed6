"""Clips of the world: each a pure function of (seed, split, index), made again at will."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from math import inf
from typing import Any, TypeVar

import numpy as np

from longtake.data.randomness import derive_seed
from longtake.data.world.describe import Reading
from longtake.data.world.families import FAMILIES, SPLITS, Canvas, Form
from longtake.data.world.language import MAX_DENSE, MAX_SHORT, Words
from longtake.data.world.render import Rendering, render
from longtake.data.world.scene import Scene, camera_path

LICENCE = "CC0-1.0"
SOURCE = "longtake.world"
MIN_SIDE = 16  # px; H.264 knows no less
MAX_ASPECT = 3  # of the longer side to the shorter

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Shapes:
    """What clips may be like: sizes (height, width) in px, lengths in frames (1 is an image) and
    rates in frames per second. Which of them a clip gets is drawn evenly from its index.
    """

    sizes: tuple[tuple[int, int], ...] = ((32, 32),)
    frames: tuple[int, ...] = (17,)
    fps: tuple[float, ...] = (8,)

    def allowed(self, family: str) -> "Shapes":
        """Those of them that a family can be drawn at; there may be none."""
        need = FAMILIES[family]
        return replace(
            self,
            sizes=tuple(size for size in self.sizes if min(size) >= need.min_side),
            frames=tuple(count for count in self.frames if count >= need.min_frames),
        )

    def fits(self, family: str) -> bool:
        """Whether a family can be drawn at any of them."""
        can = self.allowed(family)
        return bool(can.sizes and can.frames)

    def canvas(self, seed: int, split: str, index: int, family: str) -> Canvas:
        """The size, length and rate of a clip."""
        can = self.allowed(family)

        def draw(purpose: str, values: tuple[Value, ...]) -> Value:
            return values[derive_seed(seed, split, index, purpose) % len(values)]

        height, width = draw("size", can.sizes)
        return Canvas(draw("frames", can.frames), height, width, draw("fps", can.fps), split)


@dataclass(frozen=True, slots=True)
class Description:
    """What a clip is to be like: all that can be said of it before it is drawn."""

    seed: int
    index: int
    canvas: Canvas
    family: str
    form: str
    words: Words

    @property
    def key(self) -> str:
        return f"{self.canvas.split}-{self.index:08d}"

    @property
    def wording(self) -> Form:
        return FAMILIES[self.family].forms[self.form]

    def reading(self, kind: str | None = None) -> Reading:
        """What its caption of a kind says; without a kind, all that can be said."""
        words = self.words if kind is None else self.wording.said(kind, self.words)
        return Reading(self.family, self.form, words)

    def generator(self, purpose: str) -> np.random.Generator:
        return _generator(self.seed, self.canvas.split, self.index, purpose)

    def flipped(self, purpose: str) -> tuple[str, "Description"]:
        """A slot that short captions say too, and the description with another value in it."""
        rng = self.generator(purpose)
        slot = self.wording.flips[rng.integers(len(self.wording.flips))]
        words = self.wording.flipped(rng, self.canvas, self.words, slot)
        return slot, replace(self, words=words)


@dataclass(frozen=True, slots=True)
class WorldClip:
    """frames uint8 (T, H, W, 3); captions by kind; truth as WORLD.md's record, JSON-ready.

    `scores` are what the frames are worth by what the truth record expects.
    """

    key: str
    family: str
    split: str
    frames: np.ndarray
    fps: float
    captions: dict[str, str]
    truth: dict[str, Any]
    scores: dict[str, float]
    scene: Scene
    description: Description

    @property
    def form(self) -> str:
        return self.description.form

    @property
    def words(self) -> Words:
        return self.description.words

    def reading(self, kind: str) -> Reading:
        """What its caption of a kind says."""
        return self.description.reading(kind)

    def record(self) -> dict[str, Any]:
        """The content of the sample's `key.json`.

        Among its scores, which filters can use, are `defect` (0 or 1) and `defect_<type>` (1).
        """
        defects = [defect["type"] for defect in self.truth["defects"]]
        flags = {f"defect_{name}": 1.0 for name in defects}
        return {
            "captions": self.captions,
            "fps": self.fps,
            "licence": LICENCE,
            "source": SOURCE,
            "source_id": self.key,
            "split": self.split,
            "family": self.family,
            "truth": self.truth,
            "scores": {**self.scores, "defect": float(bool(defects)), **flags},
        }


def check_request(families: Sequence[str], split: str, shapes: Shapes) -> None:
    """ValueError for what cannot be drawn: unknown names, too few frames, too small a frame."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    if not families:
        raise ValueError(f"families is empty: name at least one of {', '.join(sorted(FAMILIES))}")
    for name in families:
        if name not in FAMILIES:
            raise ValueError(f"family {name!r} is unknown: use {', '.join(sorted(FAMILIES))}")
    if not (shapes.sizes and shapes.frames and shapes.fps):
        raise ValueError("sizes, frames and fps must name at least one value each")
    for height, width in shapes.sizes:
        if min(height, width) < MIN_SIDE or height % 2 or width % 2:
            raise ValueError(
                f"size {height}x{width} must be even and at least {MIN_SIDE}x{MIN_SIDE}"
            )
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise ValueError(
                f"size {height}x{width}: one side may be {MAX_ASPECT} times the other, or scenes "
                "do not fit"
            )
    if min(shapes.frames) < 1:
        raise ValueError(f"frames={min(shapes.frames)} must be at least 1 (1 is an image)")
    if not all(0 < fps < inf for fps in shapes.fps):
        raise ValueError(f"fps={', '.join(map(str, shapes.fps))} must be positive")
    unfit = [name for name in families if not shapes.fits(name)]
    if unfit:
        needs = ", ".join(
            f"{name} (frames >= {FAMILIES[name].min_frames}, "
            f"shorter side >= {FAMILIES[name].min_side} px)"
            for name in unfit
        )
        fit = ",".join(name for name in families if name not in unfit)
        raise ValueError(
            f"none of frames {', '.join(map(str, shapes.frames))} and sizes "
            f"{', '.join(f'{h}x{w}' for h, w in shapes.sizes)} will do for {needs}: "
            + (f"add others, or leave them out: families {fit}" if fit else "add others")
        )


DEFAULT_SHAPES = Shapes()
_check_once = cache(check_request)


def describe(
    seed: int, split: str, index: int, families: Sequence[str], shapes: Shapes
) -> Description:
    """What clip `index` of a split is like; families take turns.

    Raises ValueError as `check_request` does.
    """
    _check_once(tuple(families), split, shapes)
    family = families[index % len(families)]
    canvas = shapes.canvas(seed, split, index, family)
    form, words = FAMILIES[family].draw(_generator(seed, split, index, "words"), canvas)
    words |= FAMILIES[family].forms[form].fixed
    return Description(seed, index, canvas, family, form, words)


def make_clip(
    seed: int,
    split: str,
    index: int,
    *,
    families: Sequence[str],
    frames: int = 17,
    height: int = 32,
    width: int = 32,
    fps: float = 8,
) -> WorldClip:
    """Clip `index` of a split; families take turns. Raises ValueError as `check_request` does."""
    shapes = Shapes(((height, width),), (frames,), (fps,))
    return draw_clip(describe(seed, split, index, families, shapes))


def make_pair(
    seed: int,
    split: str,
    index: int,
    *,
    families: Sequence[str],
    frames: int = 17,
    height: int = 32,
    width: int = 32,
    fps: float = 8,
) -> tuple[WorldClip, WorldClip]:
    """Clip `index` and its twin, whose captions differ in one word, and only so the scenes.

    The word is drawn from those that the short caption says as well; the twin's key ends in it.
    """
    shapes = Shapes(((height, width),), (frames,), (fps,))
    plan = describe(seed, split, index, families, shapes)
    slot, other = plan.flipped("pair")
    return draw_clip(plan), replace(draw_clip(other), key=f"{plan.key}-{slot}")


def draw_clip(plan: Description) -> WorldClip:
    """The clip of a description: its scene, frames, captions and truth."""
    canvas, form = plan.canvas, plan.wording
    scene = FAMILIES[plan.family].build(plan.generator("build"), canvas, plan.form, plan.words)
    drawn = render(scene)
    captions = form.captions(plan.words)
    slot, wrong = plan.flipped("wrong")
    captions["wrong"] = form.captions(wrong.words)["dense"]
    assert len(captions["dense"]) <= MAX_DENSE and len(captions["short"]) <= MAX_SHORT, captions
    expect = form.expect(plan.words)
    truth = {
        "family": plan.family,
        "form": plan.form,
        "words": dict(plan.words),
        **truth_of(scene, drawn),
        "expect": expect,
        "wrong": {"slot": slot, "value": wrong.words[slot]},
    }
    return WorldClip(
        key=plan.key,
        family=plan.family,
        split=canvas.split,
        frames=drawn.frames,
        fps=canvas.fps,
        captions=captions,
        truth=truth,
        scores=dict.fromkeys(expect, 1.0),
        scene=scene,
        description=plan,
    )


def _generator(seed: int, split: str, index: int, purpose: str) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(derive_seed(seed, split, index, purpose)))


def truth_of(scene: Scene, drawn: Rendering) -> dict[str, Any]:
    """Everything that is true of a scene as it was drawn, as plain JSON types."""
    tracks = np.array([(t.x, t.y, t.radius, t.visible) for t in drawn.tracks])  # (E, 4, T)
    steps = np.diff(tracks[:, :2]) if len(tracks) else np.zeros((0, 2, 0))
    motion = float(np.sqrt((steps**2).sum(1)).mean()) if steps.size else 0.0
    cam_x, cam_y, zoom = camera_path(scene)
    starts = [s.start for s in scene.shots] + [scene.frames]
    return {
        "frames": scene.frames,
        "height": scene.height,
        "width": scene.width,
        "entities": [
            {
                "id": e.id,
                "shape": e.shape,
                "colour": e.colour,
                "size": e.size,
                "mark": e.mark,
                "role": e.role,
                "z": e.layer,
                **dict(zip(("x", "y", "r", "visible"), rows, strict=True)),
                "joints": {
                    name: {"x": x.round(2).tolist(), "y": y.round(2).tolist()}
                    for name, (x, y) in t.joints.items()
                },
            }
            for e, t, rows in zip(
                scene.everything, drawn.tracks, tracks.round(2).tolist(), strict=True
            )
        ],
        "events": [
            {"frame": round(e.time, 2), "type": e.type, "ids": list(e.ids)} for e in scene.events
        ],
        "camera": {
            "cx": cam_x.round(2).tolist(),
            "cy": cam_y.round(2).tolist(),
            "zoom": zoom.round(4).tolist(),
        },
        "shots": [{"start": a, "end": b} for a, b in pairwise(starts)],
        "panels": [
            {
                "top": p.top,
                "left": p.left,
                "height": p.scene.height,
                "width": p.scene.width,
                "ids": [e.id for e in p.scene.everything],
            }
            for p in scene.panels
        ],
        "reference": scene.reference,
        "count": sum(e.role == "subject" for e in scene.everything),
        "motion": round(motion, 3),
        "defects": [],
    }
