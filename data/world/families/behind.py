"""Two entities that overlap: is it the asked one that is partly hidden?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from longtake.data.world.detect import Detection, Track
from longtake.data.world.families.registry import (
    STATIC,
    Ask,
    Canvas,
    Family,
    Form,
    alike,
    draw_look,
    look,
    looks,
    pick,
    register,
)
from longtake.data.world.faults import (
    STATIC_FAULTS,
    half_gone,
    mirrored,
    missing,
    pulses,
    recoloured,
    redrawn,
    reshaped,
    with_changes,
    with_motion,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Words
from longtake.data.world.scene import COLOURS, DIRECTIONS, SIZES, Change, Entity, Scene, Segment
from longtake.data.world.scorers import MIN_MOVE, along, keeps_size, scorer

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

SHAPES = ("circle", "square")  # partly hidden they are like neither, unlike a triangle's tip
DEPTHS = {"behind": ("behind", "后面"), "front": ("in front of", "前面")}
NEAREST = (1.1, 1.2)  # distance of the centres in radii: a third of the one behind is hidden
ROOM = 4.2  # radii that the first needs to be clear of the second before and after
QUICKEST = 1.2  # radii in a frame, so that the two are seen to overlap
GAP = 0.3  # px to the frame's edge
CUT = 0.12  # how much less than the one in front the one behind is like a whole shape
PAIR = (
    Ask("colour", {"colours": ["{colour}", "{colour2}"]}, 1 / 15),
    Ask("depth", {"one": "{colour}", "two": "{colour2}", "word": "{depth}"}, 1 / 30, 1 / 2),
)
PASSING = {"one": "{colour}", "two": "{colour2}", "word": "{direction}"}


@scorer
def depth(seen: Detection, one: str, two: str, word: str) -> float:
    """Where the two meet, the one in front is a whole shape, as ever, and the other is cut."""
    first, second = seen.tracks.get(one), seen.tracks.get(two)
    if first is None or second is None:
        return 0.0
    back, front = (first, second) if word == "behind" else (second, first)
    meet = _patch(seen, back) & ndimage.binary_dilation(_patch(seen, front), _AROUND)
    frames = np.nonzero(meet.any((1, 2)))[0]
    if not len(frames) or not keeps_size(front) or len(seen.shapes_of(front)) > 1:
        return 0.0
    cut = _wholeness(seen, back)[frames]
    deepest = np.argsort(cut)[: -(-len(frames) // 3)]
    return _wholeness(seen, front)[frames][deepest].mean() > cut[deepest].mean() + CUT


_AROUND = np.ones((1, 5, 5), bool)  # a seam of a false hue, a pixel wide, may lie between them


def _patch(seen: Detection, track: Track) -> np.ndarray:
    """Pixels (T, H, W) of a track's colour."""
    return seen.saturated & (seen.label == COLOURS.index(track.colour))


def _wholeness(seen: Detection, track: Track) -> np.ndarray:
    """Likeness (T,) in [0, 1] to the whole shape of the same place and area that fits best."""
    errors = seen.misfit(track, SHAPES, np.arange(seen.num_frames))
    return 1 - errors.min(0) / np.maximum(track.area, 1.0)


@scorer
def passing(seen: Detection, one: str, two: str, word: str) -> float:
    """The one goes past the other in the asked direction, and the other stays where it is."""
    first, second = seen.tracks.get(one), seen.tracks.get(two)
    if first is None or second is None or not (first.seen & second.seen)[[0, -1]].all():
        return 0.0
    ahead = (along(first, word) - along(second, word))[[0, -1]]
    moved = np.hypot(second.x[-1] - second.x[0], second.y[-1] - second.y[0])
    is_past = ahead[0] < -2 * MIN_MOVE * seen.side and ahead[1] > 2 * MIN_MOVE * seen.side
    return is_past and moved < 1.5 * MIN_MOVE * seen.side


def exchanged(clip: WorldClip) -> np.ndarray:
    """The one that should be behind is in front."""
    first, second = clip.scene.entities
    swapped = replace(first, layer=second.layer), replace(second, layer=first.layer)
    return redrawn(clip, lambda s: replace(s, entities=swapped))


def unhidden(clip: WorldClip) -> np.ndarray:
    """Both are so small that neither hides any of the other."""
    halved = (Change(0.0, "radius", 0.45),)
    return redrawn(
        clip, lambda s: replace(s, entities=tuple(replace(e, changes=halved) for e in s.entities))
    )


def _in_front(clip: WorldClip, *changes: Change) -> np.ndarray | None:
    """Frames in which the one in front undergoes changes; None for an image."""
    front = int(clip.words["depth"] == "behind")
    return with_changes(clip, front, *changes) if clip.scene.frames > 1 else None


def front_flickering(clip: WorldClip) -> np.ndarray | None:
    """The one in front is a third larger in every second frame."""
    return _in_front(clip, *pulses(clip.scene.frames))


def front_reshaped(clip: WorldClip) -> np.ndarray | None:
    """The one in front takes another shape in the middle of the clip."""
    return _in_front(clip, Change(clip.scene.frames // 2, "shape", "triangle"))


def stopped_halfway(clip: WorldClip) -> np.ndarray:
    """The first entity goes no further than the second."""
    path, middle = clip.scene.entities[0].motion[0], (clip.scene.frames - 1) / 2
    stop = Segment(middle, path.x + path.vx * middle, path.y + path.vy * middle)
    return with_motion(clip, 0, path, stop)


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    """At rest or passing; half of the pairs name the one behind first."""
    verb = int(rng.integers(4))
    colour, shape = draw_look(rng, canvas, verb, shapes=SHAPES)
    colour2, shape2 = draw_look(rng, canvas, verb, taken=[colour], shapes=SHAPES)
    words = {"colour": colour, "shape": shape, "colour2": colour2, "shape2": shape2}
    words["depth"] = tuple(DEPTHS)[verb % 2]
    if verb < 2 and canvas.frames >= FORMS["pass"].min_frames:
        return "pass", {**words, "direction": pick(rng, tuple(DIRECTIONS))}
    return "image" if canvas.frames == 1 else "rest", {**words, "size": pick(rng, tuple(SIZES))}


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """Equally large; only which of them is drawn later depends on the word for it."""
    radius = canvas.radius(words.get("size", "small"))
    place = _passing if form == "pass" else _resting
    paths = place(rng, canvas, radius, words)
    first, second = (
        Entity(
            number,
            words[f"shape{end}"],
            words[f"colour{end}"],
            radius,
            (path,),
            words.get("size", "small"),
            layer=number if words["depth"] == "behind" else 1 - number,
        )
        for number, (end, path) in enumerate(zip(("", "2"), paths, strict=True))
    )
    return canvas.scene(rng, first, second)


def _resting(
    rng: np.random.Generator, canvas: Canvas, radius: float, words: Words
) -> tuple[Segment, Segment]:
    """Side by side at any angle."""
    angle, apart = rng.uniform(0, 2 * np.pi), rng.uniform(*NEAREST) * radius
    half = np.array([np.cos(angle), np.sin(angle)]) * apart / 2
    low = radius + GAP + abs(half)
    centre = low + rng.random(2) * (np.array([canvas.width, canvas.height]) - 2 * low)
    return Segment(0.0, *(centre - half).tolist()), Segment(0.0, *(centre + half).tolist())


def _passing(
    rng: np.random.Generator, canvas: Canvas, radius: float, words: Words
) -> tuple[Segment, Segment]:
    """The first crosses the frame and passes the second to one side; both are whole at the ends."""
    ux, uy = DIRECTIONS[words["direction"]]
    length, breadth = (canvas.width, canvas.height) if ux else (canvas.height, canvas.width)
    low = radius + GAP
    middle = length / 2 + rng.uniform(-1, 1) * max(length / 2 - low - ROOM / 2 * radius, 0.0)
    aside = rng.uniform(*NEAREST) * radius * (1 if rng.random() < 0.5 else -1)
    across = low + max(-aside, 0.0) + rng.random() * (breadth - 2 * low - abs(aside))
    steps = canvas.frames - 1
    way = min(length - 2 * low, max(QUICKEST * steps, ROOM) * radius)
    start = min(max(middle - way / 2, low), length - low - way) + (way if ux + uy < 0 else 0.0)
    speed = way / steps
    if ux:
        return Segment(0.0, start, across, ux * speed), Segment(0.0, middle, across + aside)
    return Segment(0.0, across, start, 0.0, uy * speed), Segment(0.0, across + aside, middle)


def _looks_chance(canvas: Canvas) -> float:
    """Half of the others are at rest, where what is partly hidden may be of any shape."""
    return alike(2, range(2), SHAPES)(canvas) / 2


NOUNS = "a {size} {colour} {shape} is {depth} a {size} {colour2} {shape2} and they overlap"
SHORT = "a {colour} {shape} {depth} a {colour2} {shape2}"
ZH = "一个{size}的{colour}{shape}在一个{size}的{colour2}{shape2}的{depth}，两者部分重叠"
FORMS = {
    "image": Form(
        min_frames=1,
        dense=f"On a plain grey background {NOUNS}.",
        short=SHORT,
        vague="two things that overlap",
        zh=f"灰色背景上{ZH}。",
        asks=PAIR,
        flips=("colour", "colour2", "depth"),
        words={"depth": DEPTHS},
        choices={"shape": SHAPES, "shape2": SHAPES},
    ),
    "rest": Form(
        dense=f"On a plain grey background {NOUNS}. Both stay still. {STATIC_CAMERA}",
        short=f"{SHORT}, both stay still",
        vague="two still things that overlap",
        zh=f"灰色背景上{ZH}，它们都静止不动。{STATIC_CAMERA_ZH}",
        asks=(*PAIR, Ask("count_constancy", {}, 1.0), STATIC),
        flips=("colour", "colour2", "depth"),
        words={"depth": DEPTHS},
        choices={"shape": SHAPES, "shape2": SHAPES},
    ),
    "pass": Form(
        min_frames=3,
        dense="A small {colour} {shape} moves {direction} and passes {depth} a still small "
        f"{{colour2}} {{shape2}}; they overlap on the way. Plain grey background. {STATIC_CAMERA}",
        short="a {colour} {shape} moves {direction} {depth} a {colour2} {shape2}",
        vague="something passes something",
        zh="一个小的{colour}{shape}向{direction}移动，从一个静止的小的{colour2}{shape2}的{depth}"
        f"经过，途中部分重叠。灰色背景。{STATIC_CAMERA_ZH}",
        asks=(
            *PAIR,
            Ask("passing", PASSING, 1 / 240, 1 / 4),
            looks(look(), look("2"), chance=_looks_chance),
            Ask("count_constancy", {}, 1.0),
            STATIC,
        ),
        flips=("colour", "colour2", "direction", "depth"),
        words={"depth": DEPTHS},
        choices={"shape": SHAPES, "shape2": SHAPES},
    ),
}

register(
    Family(
        "behind",
        failure="who hides whom is confused",
        forms=FORMS,
        draw=draw,
        build=build,
        min_frames=1,
        min_side=24,  # of what a small thing hides at 16 px, too little is left to judge
        faults={
            "colour": (recoloured, missing),
            "depth": (exchanged, unhidden, missing, front_flickering, front_reshaped),
            "passing": (mirrored, stopped_halfway, missing),
            "looks": (reshaped, missing),
            "count_constancy": (half_gone,),
            **STATIC_FAULTS,
        },
    )
)
