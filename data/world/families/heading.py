"""A triangle moves tip first, also round a corner: nothing walks backwards or sideways."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from longtake.data.world.detect import Detection, Track
from longtake.data.world.families.bounce import fit
from longtake.data.world.families.registry import (
    STATIC,
    Ask,
    Canvas,
    Family,
    Form,
    draw_look,
    pick,
    register,
)
from longtake.data.world.faults import (
    STATIC_FAULTS,
    at_rest,
    flickering,
    missing,
    recoloured,
    redrawn,
    reshaped_midway,
    resized,
    reversed_in_time,
    with_changes,
    with_entity,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Words
from longtake.data.world.scene import (
    COLOURS,
    DIRECTIONS,
    EXTENTS,
    SIDEWAYS,
    SIZES,
    UPRIGHT,
    Change,
    Entity,
    Event,
    Scene,
    Segment,
)
from longtake.data.world.scorers import along, scorer, whole_subject

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

# way during the clip as a share of the shorter side; slower out of distribution
WAY = (0.34, 0.5)
OOD_WAY = (0.23, 0.29)
TURN_SHARE = (0.45, 0.55)  # of the clip
MIN_LEG = 0.04  # way in one direction, as a share of the shorter side
CLOSE = np.radians(15)  # half of what parts the four directions, as a triangle has three tips
POINTED = 0.2  # |third moment| / (area · radius³): 0.37 for a triangle, 0 for what has no tip
HELD_OUT = (0, 1, 2, 4)  # verbs for each of which one colour of the triangle is held out


def tips(seen: Detection, track: Track) -> tuple[np.ndarray, np.ndarray]:
    """Angle (T,) of one of three tips, in radians from right to down, and how pointed the blob is.

    The third moment Σ cover · (dx + i·dy)³ turns three times as fast as its triangle.
    """
    cover = np.where(seen.label == COLOURS.index(track.colour), seen.cover, 0.0)
    dx = np.arange(seen.width) + 0.5 - track.x[:, None]
    dy = np.arange(seen.height) + 0.5 - track.y[:, None]
    offset = dx[:, None, :] + 1j * dy[:, :, None]  # (T, H, W)
    radius = np.sqrt(track.area / np.pi)
    cover = cover * (cover > 0.1) * (abs(offset) < 1.7 * radius[:, None, None] + 1)
    moment = (cover * offset**3).sum((1, 2)) / (track.area * radius**3)
    return np.angle(moment) / 3, abs(moment)


def points(tip: np.ndarray, direction: str) -> np.ndarray:
    """Whether a tip points in a direction, (T,)."""
    ux, uy = DIRECTIONS[direction]
    off, third = tip - np.arctan2(uy, ux), 2 * np.pi / 3
    return abs((off + third / 2) % third - third / 2) < CLOSE


@scorer
def heading(seen: Detection, first: str, then: str = "") -> float:
    """The largest entity is pointed, moves in the asked direction, or first in one and then in
    another, and its tip is in front in all frames but one, or one in ten (either way in those about
    the turn)."""
    track = whole_subject(seen)
    if track is None:
        return 0.0
    tip, pointed = tips(seen, track)
    if np.median(pointed) < POINTED:
        return 0.0
    last = seen.num_frames - 1
    times = np.arange(last + 1)
    turns = np.linspace(1, last - 1, 10 * last)[:, None] if then else np.array([[float(last)]])
    side = then or ("down" if first in SIDEWAYS else "right")
    speed, errors = fit(np.minimum(times, turns), along(track, first))
    side_speed, side_errors = fit(np.maximum(times - turns, 0), along(track, side))
    best = int((errors**2 + side_errors**2).sum(1).argmin())
    turn = float(turns[best, 0])
    if max(abs(errors[best]).max(), abs(side_errors[best]).max()) > 0.08 * seen.side:
        return 0.0
    legs = [speed[best] * turn, *([side_speed[best] * (last - turn)] if then else [])]
    if min(legs) < MIN_LEG * seen.side:
        return 0.0
    in_front = points(tip, first) & (times < turn + 1)
    if then:
        in_front |= points(tip, then) & (times > turn - 1)
    return (~in_front).sum() <= max(1, 0.1 * seen.num_frames)


LOOKS = (
    Ask("colour", {"colours": ["{colour}"]}, lambda c: 1 / 4 if c.split == "combo" else 1 / 6),
    Ask("size", {"size": "{size}"}, 1 / 2),
    STATIC,
)
CHANCE = 1 / 4 * 1 / 4 + 1 / 4 * 1 / 8  # both go straight and alike, or turn and alike


def _turning(first: tuple[str, str], then: tuple[str, str]) -> Form:
    return Form(
        dense="A {size} {colour} triangle moves {direction}, then turns and moves {direction2}, "
        f"always with its tip in front. Plain grey background. {STATIC_CAMERA}",
        short="a {colour} triangle moves {direction}, then {direction2}, tip first",
        vague="something turns to where it goes",
        zh="一个{size}的{colour}三角形先向{direction}移动，然后转向{direction2}移动，"
        f"尖端始终朝前。灰色背景。{STATIC_CAMERA_ZH}",
        asks=(*LOOKS, Ask("heading", {"first": "{direction}", "then": "{direction2}"}, CHANCE)),
        flips=("colour", "direction", "direction2"),
        choices={"direction": first, "direction2": then},
    )


FORMS = {
    "straight": Form(
        dense="A {size} {colour} triangle moves straight {direction} with its tip in front. "
        f"Plain grey background. {STATIC_CAMERA}",
        short="a {colour} triangle moves {direction}, tip first",
        vague="something points where it goes",
        zh="一个{size}的{colour}三角形尖端朝前，向{direction}直线移动。"
        f"灰色背景。{STATIC_CAMERA_ZH}",
        asks=(*LOOKS, Ask("heading", {"first": "{direction}"}, CHANCE)),
        flips=("colour", "direction"),
    ),
    "turning upright": _turning(SIDEWAYS, UPRIGHT),
    "turning sideways": _turning(UPRIGHT, SIDEWAYS),
}


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    """The form and its words; half of the clips go straight."""
    verb = int(rng.integers(4))
    colour, _ = draw_look(rng, canvas, HELD_OUT[verb], shapes=("triangle",))
    direction = tuple(DIRECTIONS)[verb]
    words = {"colour": colour, "size": pick(rng, tuple(SIZES)), "direction": direction}
    if rng.random() < 0.5:
        return "straight", words
    if direction in SIDEWAYS:
        return "turning upright", {**words, "direction2": pick(rng, UPRIGHT)}
    return "turning sideways", {**words, "direction2": pick(rng, SIDEWAYS)}


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """Constant speed; the tip turns when the velocity does."""
    way, share, *place = rng.random(4)
    radius = canvas.radius(words["size"])
    front = EXTENTS["triangle"][1] * radius + 0.3
    back = EXTENTS["triangle"][0] * radius + 0.3  # sideways it reaches further than backwards
    low, high = OOD_WAY if canvas.split == "ood" else WAY
    steps = canvas.frames - 1
    size = np.array([canvas.width, canvas.height])
    length = min((low + way * (high - low)) * canvas.short_side, canvas.short_side - front - back)
    speed, turns = length / steps, form != "straight"
    turn = steps * (TURN_SHARE[0] + share * (TURN_SHARE[1] - TURN_SHARE[0]) if turns else 1.0)
    first = np.array(DIRECTIONS[words["direction"]])
    then = np.array(DIRECTIONS[words["direction2"]]) if turns else first
    total = speed * (first * turn + then * (steps - turn))
    least = np.where(total < 0, front - total, back)
    most = size - np.where(total > 0, front + total, back)
    start = least + np.array(place) * (most - least)
    corner = start + first * speed * turn
    motion = [Segment(0.0, *start.tolist(), *(first * speed).tolist())]
    changes, events = (), ()
    if turns:
        motion.append(Segment(turn, *corner.tolist(), *(then * speed).tolist()))
        changes = (Change(turn, "angle", _angle(then)),)
        events = (Event(turn, "turn", (0,)),)
    entity = Entity(
        0,
        "triangle",
        words["colour"],
        radius,
        tuple(motion),
        words["size"],
        angle=_angle(first),
        changes=changes,
    )
    return canvas.scene(rng, entity, events=events)


def _angle(way: np.ndarray) -> float:
    """By which a triangle, its tip up, is turned clockwise to point along (x, y)."""
    return float(np.arctan2(way[0], -way[1]))


def _rotated(clip: "WorldClip", by: float) -> np.ndarray:
    entity = clip.scene.entities[0]
    changes = tuple(replace(c, value=float(c.value) + by) for c in entity.changes)
    other = replace(entity, angle=entity.angle + by, changes=changes)
    return redrawn(clip, lambda scene: with_entity(scene, 0, other))


def backwards(clip: "WorldClip") -> np.ndarray:
    """It moves with its tip behind."""
    return _rotated(clip, np.pi)


def sideways(clip: "WorldClip") -> np.ndarray:
    """It moves with its tip at a right angle to its way."""
    return _rotated(clip, np.pi / 2)


def never_turned(clip: "WorldClip") -> np.ndarray | None:
    """It slides round the corner with its tip as before; None where there is no corner."""
    return with_changes(clip, 0) if clip.scene.events else None


register(
    Family(
        "heading",
        failure="walking backwards",
        forms=FORMS,
        draw=draw,
        build=build,
        faults={
            "colour": (recoloured, missing),
            "size": (resized,),
            "heading": (backwards, sideways, never_turned, at_rest, reversed_in_time, missing)
            + (flickering, reshaped_midway),
            **STATIC_FAULTS,
        },
    )
)
