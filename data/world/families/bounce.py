"""One entity moves to an edge of the frame and bounces off it: a turn exactly where it must be."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from longtake.data.world.detect import Detection
from longtake.data.world.families.registry import (
    CONSTANT,
    STATIC,
    Ask,
    Canvas,
    Family,
    Form,
    draw_look,
    pick,
    register,
)
from longtake.data.world.families.support import HELD_OUT, SHAPES, TOLERANCE
from longtake.data.world.faults import (
    CONSTANCY_FAULTS,
    STATIC_FAULTS,
    at_rest,
    missing,
    recoloured,
    reshaped,
    resized,
    with_motion,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Words
from longtake.data.world.scene import (
    DIRECTIONS,
    EXTENTS,
    SIDEWAYS,
    SIZES,
    UPRIGHT,
    Entity,
    Event,
    Scene,
    Segment,
    positions,
)
from longtake.data.world.scorers import MIN_MOVE, along, scorer, whole_subject

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

# way along the normal during the clip as a share of the shorter side; faster out of distribution
WAY = (0.5, 0.75)
OOD_WAY = (0.82, 0.9)
TURN_SHARE = (0.44, 0.54)  # of the clip
DRIFT = (0.2, 0.4)  # way along the edge
WALLS = {
    "left": ("left", "左"),
    "right": ("right", "右"),
    "up": ("top", "上"),
    "down": ("bottom", "下"),
}


def fit(shapes: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of positions (T,) on an offset plus speed x each of K shapes (K, T).

    Returns the speeds (K,) and what is left of the positions (K, T).
    """
    centred = shapes - shapes.mean(1, keepdims=True)
    speed = centred @ position / np.maximum((centred * centred).sum(1), 1e-9)
    return speed, position - position.mean() - speed[:, None] * centred


def bounces_at(position: np.ndarray, limit: float, side: int) -> bool:
    """Whether positions (T,), T >= 4, go up to a limit (px) and from there back as fast.

    The turn may fall between two frames, so it is found by fitting at − speed · |t − turn|. A frame
    of standing still before it all starts or after it ends does not count.
    """
    steps = abs(np.diff(position))
    stands = steps < 0.3 * np.median(steps)
    times = np.arange(int(stands[0]), len(position) - int(stands[-1]))
    seen = position[times]
    turns = np.linspace(times[0] + 0.3, times[-1] - 0.3, 20 * len(times))
    ways = -abs(times - turns[:, None])  # (K, T)
    speeds, errors = fit(ways, seen)
    best = int((errors * errors).sum(1).argmin())
    at = seen.mean() - speeds[best] * ways[best].mean()
    there, back = (
        abs(np.polyfit(times[part], seen[part], 1)[0]) if part.sum() > 1 else speeds[best]
        for part in (times < turns[best] - 0.25, times > turns[best] + 0.25)
    )
    return bool(
        abs(at - limit) < TOLERANCE * side
        and abs(errors[best]).max() < 0.06 * side
        and 0.6 * there < back < 1.6 * there
        and position.max() - max(position[0], position[-1]) > MIN_MOVE * side
    )


@scorer
def bounce(seen: Detection, wall: str, drift: str = "") -> float:
    """The largest entity goes to the asked edge, turns as it touches it and comes back as fast,
    never cut off; along the edge it drifts steadily in the asked direction, or not at all."""
    track = whole_subject(seen)
    if track is None:
        return 0.0
    ux, uy = DIRECTIONS[wall]
    edge = max(ux * seen.width + uy * seen.height, 0)
    reach = 0.94 * np.sqrt(track.full_area / np.pi)  # between a circle's and a square's
    if not bounces_at(along(track, wall), edge - reach, seen.side):
        return 0.0
    across = along(track, drift or ("down" if ux else "right"))
    times = np.arange(seen.num_frames)
    slope, start = np.polyfit(times, across, 1)
    if abs(across - start - slope * times).max() > TOLERANCE * seen.side:
        return 0.0
    way = slope * times[-1] / seen.side
    return way > 2 * MIN_MOVE if drift else abs(way) < 2 * MIN_MOVE


LOOKS = (
    Ask("colour", {"colours": ["{colour}"]}, 1 / 6),
    Ask("shape", {"shape": "{shape}"}, 1 / 2),
    Ask("size", {"size": "{size}"}, 1 / 2),
    CONSTANT,
    STATIC,
)
CHANCE = 1 / 4 * 1 / 4 + 1 / 4 * 1 / 8  # both are straight and alike, or both slanted and alike


def _slanted(walls: tuple[str, str], directions: tuple[str, str]) -> Form:
    return Form(
        dense="A {size} {colour} {shape} drifts {direction} on its way to the {wall} edge of the "
        "frame, bounces off it at the same speed and drifts on {direction}. "
        f"Plain grey background. {STATIC_CAMERA}",
        short="a {colour} {shape} drifts {direction} and bounces off the {wall} edge",
        vague="something slants off an edge",
        zh="一个{size}的{colour}{shape}一边向{direction}漂移，一边移向画面的{wall}边缘，"
        f"以相同的速度弹开，继续向{{direction}}漂移。灰色背景。{STATIC_CAMERA_ZH}",
        asks=(*LOOKS, Ask("bounce", {"wall": "{wall}", "drift": "{direction}"}, CHANCE)),
        flips=("colour", "shape", "wall", "direction"),
        words={"wall": WALLS},
        choices={"shape": SHAPES, "wall": walls, "direction": directions},
    )


FORMS = {
    "straight": Form(
        dense="A {size} {colour} {shape} moves straight to the {wall} edge of the frame, bounces "
        f"off it and moves straight back at the same speed. Plain grey background. {STATIC_CAMERA}",
        short="a {colour} {shape} bounces straight back off the {wall} edge",
        vague="something comes back from an edge",
        zh="一个{size}的{colour}{shape}笔直移向画面的{wall}边缘，碰到后弹开，"
        f"以相同的速度笔直返回。灰色背景。{STATIC_CAMERA_ZH}",
        asks=(*LOOKS, Ask("bounce", {"wall": "{wall}"}, CHANCE)),
        flips=("colour", "shape", "wall"),
        words={"wall": WALLS},
        choices={"shape": SHAPES},
    ),
    "slanted across": _slanted(SIDEWAYS, UPRIGHT),
    "slanted upright": _slanted(UPRIGHT, SIDEWAYS),
}


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    """The form and its words; half of the clips go straight."""
    verb = int(rng.integers(4))
    colour, shape = draw_look(rng, canvas, HELD_OUT[verb], shapes=SHAPES)
    wall = tuple(DIRECTIONS)[verb]
    words = {"colour": colour, "shape": shape, "size": pick(rng, tuple(SIZES)), "wall": wall}
    if rng.random() < 0.5:
        return "straight", words
    if wall in SIDEWAYS:
        return "slanted across", {**words, "direction": pick(rng, UPRIGHT)}
    return "slanted upright", {**words, "direction": pick(rng, SIDEWAYS)}


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """Constant speed; at the contact only the velocity along the edge's normal changes its sign.

    The way there is a circle's: what reaches less far touches the edge later.
    """
    way, turn, drift, place = rng.random(4)
    radius = canvas.radius(words["size"])
    reach = EXTENTS[words["shape"]][0] * radius
    side, steps = canvas.short_side, canvas.frames - 1
    ux, uy = DIRECTIONS[words["wall"]]
    breadth = canvas.height if ux else canvas.width
    low, high = OOD_WAY if canvas.split == "ood" else WAY
    speed = (low + way * (high - low)) * side / steps
    contact = (TURN_SHARE[0] + turn * (TURN_SHARE[1] - TURN_SHARE[0])) * steps
    sign = sum(DIRECTIONS[words["direction"]]) if "direction" in words else 0
    slide = sign * (DRIFT[0] + drift * (DRIFT[1] - DRIFT[0])) * side / steps
    free = breadth - 2 * radius - 1 - abs(slide) * steps
    start = radius + 0.5 + place * free + max(-slide * steps, 0)
    edge = 0 if ux + uy < 0 else (canvas.width if ux else canvas.height)
    come = edge - (ux + uy) * (radius + speed * contact)
    at_wall = edge - (ux + uy) * reach
    contact += (radius - reach) / speed
    touch = start + slide * contact
    if ux:
        before = Segment(0.0, come, start, ux * speed, slide)
        after = Segment(contact, at_wall, touch, -ux * speed, slide)
    else:
        before = Segment(0.0, start, come, slide, uy * speed)
        after = Segment(contact, touch, at_wall, slide, -uy * speed)
    entity = Entity(0, words["shape"], words["colour"], radius, (before, after), words["size"])
    return canvas.scene(rng, entity, events=(Event(contact, "bounce", (0,)),))


def _bounced(
    clip: "WorldClip", *, speed: float = 1.0, back: float = 1.0, shift: float = 0.0
) -> np.ndarray:
    """Along the normal: other factors of the speed there and back, all moved by `shift` px."""
    before, after = clip.scene.entities[0].motion
    ux, uy = DIRECTIONS[clip.words["wall"]]
    there = replace(
        before,
        x=before.x + shift * ux,
        y=before.y + shift * uy,
        vx=before.vx * (speed if ux else 1.0),
        vy=before.vy * (speed if uy else 1.0),
    )
    x, y = positions((there,), np.array([after.start]))
    again = Segment(
        after.start,
        float(x[0]),
        float(y[0]),
        after.vx * (speed * back if ux else 1.0),
        after.vy * (speed * back if uy else 1.0),
    )
    return with_motion(clip, 0, there, again)


def turned_too_soon(clip: "WorldClip") -> np.ndarray:
    """It turns well before it touches the edge."""
    return _bounced(clip, speed=0.4)


def left_the_frame(clip: "WorldClip") -> np.ndarray:
    """It comes back only when half of it is outside."""
    return _bounced(clip, shift=clip.scene.entities[0].radius)


def stuck(clip: "WorldClip") -> np.ndarray:
    """It stays at the edge."""
    return _bounced(clip, back=0.0)


def slowed(clip: "WorldClip") -> np.ndarray:
    """It comes back at less than half its speed."""
    return _bounced(clip, back=0.4)


def never_arrives(clip: "WorldClip") -> np.ndarray:
    """It creeps towards the edge all the time."""
    return _bounced(clip, speed=0.4, back=-1.0)


register(
    Family(
        "bounce",
        failure="walls that stop, swallow or do nothing",
        forms=FORMS,
        draw=draw,
        build=build,
        faults={
            "colour": (recoloured, missing),
            "shape": (reshaped,),
            "size": (resized,),
            **CONSTANCY_FAULTS,
            **STATIC_FAULTS,
            "bounce": (
                turned_too_soon,
                left_the_frame,
                stuck,
                slowed,
                never_arrives,
                at_rest,
                missing,
            ),
        },
    )
)
