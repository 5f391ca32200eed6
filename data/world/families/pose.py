"""A stick figure acts out a joint track from a reference picture: character animation.

Lengths are shares of the figure's height, angles radians from straight down. Left and right are
those of the picture, as everywhere in this world. The first frame is the reference: there it
stands at rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from longtake.data.world.detect import MIN_COVERAGE, Detection
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
    blinking,
    half_gone,
    missing,
    recoloured,
    recoloured_midway,
    redrawn,
    with_entity,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Words, within
from longtake.data.world.render import render
from longtake.data.world.scene import COLOURS, Change, Entity, Limb, Scene, Segment
from longtake.data.world.scorers import scorer

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

TORSO, NECK, HEAD, ARM, THIGH, STROKE = 0.28, 0.14, 0.13, 0.34, 0.22, 0.1
SHOULDER = 0.28  # below the top of the head
AREA_RADIUS = 0.29  # of a disc with the figure's area
REST, OUT, UP = 0.87, 1.72, 2.58  # of an arm
STANCE, THIGH_BENT, SHIN_BENT = 0.36, 1.40, -0.28  # the feet keep their places in a squat
STEP = 4 * THIGH * float(np.sin(STANCE))
_TOUCHING = np.ones((3, 3))
SIDES = {"left": -1, "right": 1}
STRIDES = 2  # of a walk; as long as the legs reach, so that no foot slides
HEIGHT, LEAP = 0.62, (0.2, 0.28)  # of the shorter side; of the height
OOD_HEIGHT, OOD_LEAP = 0.72, (0.3, 0.32)

ACTIONS = {
    "wave left": ("waves its arm on the left", "挥动左侧的手臂"),
    "wave right": ("waves its arm on the right", "挥动右侧的手臂"),
    "raise": ("raises both arms", "举起双臂"),
    "jump": ("jumps", "向上跳起"),
    "squat": ("squats", "蹲下再站起"),
    "still": ("stays still", "静止不动"),
}
VERBS = (*ACTIONS, "walk left", "walk right")


def _form(dense: str, short: str, zh: str, action: str, flip: str) -> Form:
    return Form(
        dense=f"A large {{colour}} stick figure {dense} of a plain grey background. "
        f"{STATIC_CAMERA}",
        short=f"a {{colour}} stick figure {short}",
        vague="someone",
        zh=f"灰色背景{zh}{STATIC_CAMERA_ZH}",
        asks=(
            Ask("figure", {"colour": "{colour}"}, lambda c: 1 / 4 if c.split == "combo" else 1 / 6),
            Ask("pose", {"action": action}, 1 / len(VERBS)),
            STATIC,
        ),
        flips=("colour", flip),
        words={"action": ACTIONS},
        choices={"direction": ("left", "right")},
    )


FORMS = {
    "act": _form(
        dense="{action} at the {column}",
        short="{action}",
        zh="{column}有一个大的{colour}火柴人，它{action}。",
        action="{action}",
        flip="action",
    ),
    "walk": _form(
        dense="walks {direction} in front",
        short="walks {direction}",
        zh="前有一个大的{colour}火柴人，它向{direction}走。",
        action="walk {direction}",
        flip="direction",
    ),
}


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    """The split holds out pairs of a colour and an action: a figure has but one shape."""
    verb = int(rng.integers(len(VERBS)))
    colour, _ = draw_look(rng, canvas, verb % 4, shapes=("circle",))
    form, _, way = VERBS[verb].partition(" ")
    if form == "walk":
        return "walk", {"colour": colour, "direction": way}
    column = pick(rng, ("left", "middle", "right"))
    return "act", {"colour": colour, "action": VERBS[verb], "column": column}


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """The figure stands on a ground that is not drawn, and is always wholly inside the frame."""
    is_ood = canvas.split == "ood"
    height = (OOD_HEIGHT if is_ood else HEIGHT) * canvas.short_side
    leap = rng.uniform(*(OOD_LEAP if is_ood else LEAP)) * height
    u, v = rng.random(2)
    highest = height + leap + 1
    ground = highest + v * (canvas.height - 1 - highest)
    reach = (ARM + STROKE / 2) * height + 0.5
    free = canvas.width - 2 * reach
    if form == "walk":
        way, travel = words["direction"], STRIDES * STEP * height
        action, at = f"walk {way}", u * (free - travel) + (travel if way == "left" else 0.0)
    else:
        action, at = words["action"], within(words["column"], 0, free, u)
    standing = _standing(words["colour"], height, reach + at, ground)
    return canvas.scene(rng, _acting(standing, action, canvas.frames, leap), reference=0)


def _standing(colour: str, height: float, x: float, ground: float) -> Entity:
    """The figure at rest; its place is the hip."""
    strokes = [("neck", None, TORSO, np.pi), ("head", "neck", NECK, np.pi)]
    for side, sign in SIDES.items():
        strokes += [
            (f"{side}_hand", "neck", ARM, sign * REST),
            (f"{side}_knee", None, THIGH, sign * STANCE),
            (f"{side}_foot", f"{side}_knee", THIGH, sign * STANCE),
        ]
    limbs = tuple(
        Limb(
            name, parent, length * height, angle, STROKE * height, HEAD * height * (name == "head")
        )
        for name, parent, length, angle in strokes
    )
    hip = ground - (STROKE / 2 + 2 * THIGH * np.cos(STANCE)) * height
    place = (Segment(0.0, x, float(hip)),)
    radius = AREA_RADIUS * height
    return Entity(0, "stick figure", colour, radius, place, "large", limbs=limbs)


def _acting(figure: Entity, action: str, frames: int, leap: float) -> Entity:
    """The figure in action; a leap's height in px."""
    height = figure.radius / AREA_RADIUS
    verb, _, way = action.partition(" ")
    keys = _keys(verb, way, frames - 1)
    times = np.arange(frames)
    thigh, shin = (_angle(keys, f"right_{joint}", times) for joint in ("knee", "foot"))
    rest = figure.motion[0]
    y = rest.y + THIGH * height * (2 * np.cos(STANCE) - np.cos(thigh) - np.cos(shin))
    x = np.full(frames, rest.x)
    if verb == "walk":
        x += SIDES[way] * STRIDES * STEP * height * times / (frames - 1)
    if verb == "jump":
        y -= leap * np.maximum(1 - (2 * times / (frames - 1) - 1) ** 2 / 0.36, 0.0)
    steps = zip(times.tolist(), x.tolist(), y.tolist(), *_rates(x, y), strict=True)
    changes = tuple(
        Change(start, limb, angle, end - start)
        for limb, track in keys.items()
        for (start, _), (end, angle) in pairwise(track)
    )
    return replace(figure, motion=tuple(Segment(*step) for step in steps), changes=changes)


def _rates(x: np.ndarray, y: np.ndarray) -> Iterator[list[float]]:
    """Velocities that lead from one frame to the next."""
    return (np.diff(along, append=along[-1]).tolist() for along in (x, y))


def _keys(verb: str, way: str, steps: int) -> dict[str, list[tuple[float, float]]]:
    """(time, angle) at the turning points of every limb that an action turns."""

    def both(limb: str, *keys: tuple[float, float]) -> dict[str, list[tuple[float, float]]]:
        return {
            f"{s}_{limb}": [(t * steps, sign * a) for t, a in keys] for s, sign in SIDES.items()
        }

    if verb == "wave":
        beats = np.linspace(max(1.0, 0.2 * steps), steps, 5 if steps >= 7 else 4).tolist()
        swings = [(t, SIDES[way] * (UP, OUT)[i % 2]) for i, t in enumerate(beats)]
        return {f"{way}_hand": [(0.0, SIDES[way] * REST), *swings]}
    if verb == "raise":
        return both("hand", (0.15, REST), (0.55, UP))
    if verb == "squat":
        bend = ((0.3, 0), (0.42, 1), (0.58, 1), (0.7, 0))
        thigh = both("knee", *((t, (STANCE, THIGH_BENT)[bent]) for t, bent in bend))
        return thigh | both("foot", *((t, (STANCE, SHIN_BENT)[bent]) for t, bent in bend))
    if verb == "walk":
        swing = [(i / STRIDES, STANCE * (-1) ** i) for i in range(STRIDES + 1)]
        return both("knee", *swing) | both("foot", *swing)
    return {}


def _angle(keys: dict[str, list[tuple[float, float]]], limb: str, times: np.ndarray) -> np.ndarray:
    """Angle of a limb of the leg at `times` (T,)."""
    track = keys.get(limb, [(0.0, STANCE)])
    return np.interp(times, *np.array(track).T)


@dataclass(frozen=True, slots=True)
class _Body:
    """What a silhouette says of a figure in T frames; lengths in its height, NaN for unseen."""

    x: np.ndarray  # (T,) of the body's axis
    top: np.ndarray
    bottom: np.ndarray
    area: np.ndarray
    arms: dict[str, np.ndarray]  # (T,) angle by side
    spread: np.ndarray  # (T,) of the feet


def _body(seen: Detection, colour: str) -> _Body | None:
    """The figure of a colour; None where a frame shows nothing of it."""
    masks = (seen.label == COLOURS.index(colour)) & (seen.cover > MIN_COVERAGE)
    points = []
    for mask in masks:
        labels, number = ndimage.label(mask, _TOUCHING)  # pyright: ignore[reportGeneralTypeIssues]
        if not number:
            return None
        largest = np.bincount(labels.ravel())[1:].argmax() + 1
        y, x = np.nonzero(labels == largest)
        points.append((x + 0.5, y + 0.5))
    height = float(np.percentile([np.ptp(y) + 1 for _, y in points], 80))
    rows = [_posture(x / height, y / height, 1 / height) for x, y in points]
    x, top, bottom, area, left, right, spread = np.array(rows).T
    return _Body(x, top, bottom, area, {"left": left, "right": right}, spread)


def _posture(x: np.ndarray, y: np.ndarray, pixel: float) -> tuple[float, ...]:
    """Axis, top, bottom, area, angles of the arms and spread of the feet."""
    columns, filled = np.unique(x, return_counts=True)
    axis = columns[filled > 0.8 * filled.max()].mean()  # head and torso, whatever the limbs do
    top, bottom = y.min() - pixel / 2, y.max() + pixel / 2
    arms = []
    for sign in SIDES.values():
        beside = (sign * (x - axis) > 0.15) & (y < top + 0.49)  # neither head, torso nor knee
        dx, dy = abs(x[beside] - axis), y[beside] - top - SHOULDER
        far = np.hypot(dx, dy)
        hand = far > max(far.max(initial=0.0) - 0.1, 0.27)
        arms.append(np.arctan2(dx[hand].mean(), dy[hand].mean()) if hand.any() else np.nan)
    feet = x[y > bottom - 0.15]
    return axis, top, bottom, len(x) * pixel**2, *arms, np.ptp(feet) + pixel


@scorer
def figure(seen: Detection, colour: str) -> float:
    """One connected figure of the colour and nothing else, with a head, two arms and two legs."""
    if set(seen.tracks) != {colour} or (seen.tracks[colour].blobs != 1).any():
        return 0.0
    body = _body(seen, colour)
    if body is None or body.area.min() < 0.6 * np.median(body.area):
        return 0.0
    limbs = np.array(
        [*(~np.isnan(arm) for arm in body.arms.values()), body.spread > 0.24]
    )  # (3, T)
    halves = np.array_split(limbs, 2, axis=1)  # legs cross in a walk, but soon part again
    return all(half.any(axis=1).all() for half in halves)


@scorer
def pose(seen: Detection, action: str) -> float:
    """The largest figure does what was asked and nothing else."""
    body = None if seen.main is None else _body(seen, seen.main.colour)
    return body is not None and _actions(body) == {action}


def _actions(body: _Body) -> set[str]:
    """Everything that a figure is seen to do; `still` if nothing."""
    found = set()
    shift = body.x[-1] - body.x[0]
    if abs(shift) > 0.2:
        is_striding = body.spread.min() < 0.7 * body.spread.max()
        found.add(f"{'walk' if is_striding else 'glide'} {'left' if shift < 0 else 'right'}")
    raised = {side for side, arm in body.arms.items() if (arm > np.pi / 2).mean() >= 0.2}
    if raised == set(SIDES):
        found.add("raise")
    else:
        found |= {f"{'wave' if _dips(body.arms[s]) else 'hold'} {s}" for s in raised}
    if min(body.bottom[0], body.bottom[-1]) - body.bottom.min() > 0.1:
        found.add("jump")
    elif body.top.max() - max(body.top[0], body.top[-1]) > 0.1:
        found.add("squat")
    return found or {"still"}


def _dips(arm: np.ndarray) -> bool:
    """Whether a raised arm goes down and up again, and stays raised the while."""
    up = np.nonzero(arm > np.pi / 2)[0]
    track = arm[up[0] : up[-1] + 1]
    before, after = np.fmax.accumulate(track), np.fmax.accumulate(track[::-1])[::-1]
    return bool((track > np.pi / 2).all() and (np.minimum(before, after) - track).max() > 0.25)


def _redone(clip: WorldClip, action: str) -> np.ndarray:
    """Frames in which the figure does something else."""
    scene, standing = clip.scene, clip.scene.entities[0]
    standing = replace(standing, motion=standing.motion[:1])
    height = standing.radius / AREA_RADIUS
    acting = _acting(standing, action, scene.frames, LEAP[0] * height)
    return redrawn(clip, lambda s: with_entity(s, 0, acting))


def _asked(clip: WorldClip) -> str:
    return clip.truth["expect"]["pose"]["action"]


def frozen(clip: WorldClip) -> np.ndarray | None:
    """Nobody moves."""
    return None if _asked(clip) == "still" else _redone(clip, "still")


def other_action(clip: WorldClip) -> np.ndarray:
    """Another action than the asked one."""
    return _redone(clip, "squat" if _asked(clip) == "jump" else "jump")


def other_side(clip: WorldClip) -> np.ndarray | None:
    """The other arm, or the other way."""
    return clip.frames[:, :, ::-1] if _asked(clip).split()[-1] in SIDES else None


def without(scene: Scene, *limbs: str) -> np.ndarray:
    """Frames in which the first figure lacks some limbs."""
    figure = scene.entities[0]
    rest = tuple(limb for limb in figure.limbs if limb.name not in limbs)
    changes = tuple(change for change in figure.changes if change.attribute not in limbs)
    return render(with_entity(scene, 0, replace(figure, limbs=rest, changes=changes))).frames


def arm_missing(clip: WorldClip) -> np.ndarray:
    """The figure has one arm."""
    return without(clip.scene, "left_hand")


def leg_missing(clip: WorldClip) -> np.ndarray:
    """The figure has one leg."""
    return without(clip.scene, "right_knee", "right_foot")


def arm_lost(clip: WorldClip) -> np.ndarray:
    """An arm is gone from the middle of the clip on."""
    middle = clip.scene.frames // 2
    return np.concatenate([clip.frames[:middle], arm_missing(clip)[middle:]])


def stiff(clip: WorldClip) -> np.ndarray | None:
    """A raised arm is held up, a walker's legs do not move."""
    if _asked(clip).split()[-1] not in SIDES:
        return None
    figure = clip.scene.entities[0]
    changes = figure.changes[:1] if clip.form == "act" else ()
    return redrawn(clip, lambda s: with_entity(s, 0, replace(figure, changes=changes)))


register(
    Family(
        "pose",
        failure="a character does not act as its joints are told to",
        forms=FORMS,
        draw=draw,
        build=build,
        min_side=32,
        faults={
            "figure": (recoloured, recoloured_midway, half_gone, blinking)
            + (arm_missing, leg_missing, arm_lost, missing),
            **STATIC_FAULTS,
            "pose": (frozen, other_action, other_side, stiff),
        },
    )
)
