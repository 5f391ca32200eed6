"""A runs into B: B moves off only then, and A stops. Cause and effect."""

from __future__ import annotations

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
    alike,
    draw_look,
    look,
    looks,
    margins,
    register,
)
from longtake.data.world.faults import (
    CONSTANCY_FAULTS,
    STATIC_FAULTS,
    at_rest,
    half_gone,
    mirrored,
    missing,
    recoloured,
    reshaped,
    with_entity,
    with_motion,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Words
from longtake.data.world.render import render
from longtake.data.world.scene import DIRECTIONS, EXTENTS, Entity, Event, Scene, Segment, positions
from longtake.data.world.scorers import MIN_MOVE, scorer

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

SHAPES = ("circle", "square")  # their contact along an axis is exact
GAP = 0.3  # px to the frame's edge
SHARP = 0.03  # of the shorter side: how exactly pixels tell when two things are nearest
TRAVEL, OOD_TRAVEL = (0.88, 1.0), (0.6, 0.63)  # of the way there is


@scorer
def causal(seen: Detection, hitter: str, target: str, word: str, aside: str = "") -> float:
    """The hitter comes up to the target, which is still until they touch (± 1 frame).

    Then the target moves off in the asked direction and the hitter stops; with `aside` (a
    direction across) the target also goes that way, and the hitter goes on the other way.
    """
    one, two = seen.tracks.get(hitter), seen.tracks.get(target)
    if one is None or two is None or not (one.seen.all() and two.seen.all()):
        return 0.0
    unit, steps = seen.side, seen.num_frames - 1
    a, b = np.stack([one.x, one.y], 1), np.stack([two.x, two.y], 1)  # (T, 2)
    reach = 0.94 * (np.sqrt(one.full_area / np.pi) + np.sqrt(two.full_area / np.pi))
    gap = np.hypot(*(b - a).T) - reach
    start = int(np.argmax(gap <= gap.min() + SHARP * unit))  # of the contact, as pixels can tell
    ahead, after = np.array(DIRECTIONS[word]), a[min(start + 1, steps) :]
    came, went, turned = (after[0] - a[0]) @ ahead, b[-1] - b[start], after[-1] - after[0]
    pace = (a[start] - a[0]) @ ahead / max(start, 1)
    if pace <= 0 or came < MIN_MOVE * unit or np.hypot(*went) < MIN_MOVE * unit:
        return 0.0  # no cause, or no effect
    if not -0.12 * unit < gap.min() < 0.04 * unit + pace:
        return 0.0  # they run through each other, or do not touch
    shift = np.hypot(*(b - b[0]).T)
    early, late = np.array_split(b[: max(start, 2)], 2)  # means: a wobble is no effect
    if np.hypot(*(late.mean(0) - early.mean(0))) > max(0.012 * unit, 0.1 * shift[-1]):
        return 0.0  # an effect before its cause
    speed = np.hypot(*went) / max(steps - start, 1)  # at least; px/frame
    if np.argmax(shift > 0.05 * unit) > start + 2 + 2 * SHARP * unit / pace + 0.05 * unit / speed:
        return 0.0  # an effect long after its cause
    if not aside:
        stays = np.hypot(*(after - after[0]).T) < 0.06 * unit
        return went @ ahead > 2 * abs(went @ ahead[::-1]) and stays.all()
    side = np.array(DIRECTIONS[aside])
    return min(went @ ahead, went @ side, 1.5 * (turned @ -side)) > 0.03 * unit


def no_effect(clip: WorldClip) -> np.ndarray:
    """The target stays where it was."""
    return with_motion(clip, 1, clip.scene.entities[1].motion[0])


def effect_first(clip: WorldClip) -> np.ndarray:
    """The target moves off from the start, at the pace that brings it to the same end."""
    entity = clip.scene.entities[1]
    steps = clip.scene.frames - 1
    (x, end_x), (y, end_y) = (v.tolist() for v in positions(entity.motion, np.array([0, steps])))
    return with_motion(clip, 1, Segment(0.0, x, y, (end_x - x) / steps, (end_y - y) / steps))


def goes_on(clip: WorldClip) -> np.ndarray:
    """The hitter moves on as if nothing had happened."""
    return with_motion(clip, 0, clip.scene.entities[0].motion[0])


def run_through(clip: WorldClip) -> np.ndarray:
    """The hitter moves on and the target stays."""
    hitter, target = (replace(e, motion=e.motion[:1]) for e in clip.scene.entities)
    return render(with_entity(with_entity(clip.scene, 0, hitter), 1, target)).frames


def later_effect(scene: Scene, by_frames: float) -> Scene:
    """The scene with the target moving off so many frames after the contact."""
    target = scene.entities[1]
    before, after = target.motion
    moved = replace(after, start=after.start + by_frames)
    return with_entity(scene, 1, replace(target, motion=(before, moved)))


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    verb = int(rng.integers(4))
    colour, shape = draw_look(rng, canvas, verb, shapes=SHAPES)
    colour2, shape2 = draw_look(rng, canvas, verb, taken=[colour], shapes=SHAPES)
    words = {"colour": colour, "shape": shape, "colour2": colour2, "shape2": shape2}
    return "collision", {**words, "direction": tuple(DIRECTIONS)[verb]}


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """Elastic and of equal mass, along one axis: the velocity passes from one to the other."""
    ux, uy = DIRECTIONS[words["direction"]]
    radius = canvas.radius("small")
    reach = [EXTENTS[words[slot]][0] * radius for slot in ("shape", "shape2")]
    length, breadth = (canvas.width, canvas.height) if ux else (canvas.height, canvas.width)
    steps = canvas.frames - 1
    longest = length - 2 * sum(reach) - 2 * GAP
    travel = longest * rng.uniform(*(OOD_TRAVEL if canvas.split == "ood" else TRAVEL))
    start = reach[0] + GAP + rng.random() * (longest - travel)
    speed = travel / steps
    contact = rng.uniform(0.42, 0.58) * steps  # in frames
    edge = max(margins(words[slot], radius, GAP)[0] for slot in ("shape", "shape2"))
    across = edge + rng.random() * (breadth - 2 * edge)
    stop = start + speed * contact
    rest = stop + sum(reach)
    if ux + uy < 0:
        start, stop, rest = length - start, length - stop, length - rest

    def place(along: float) -> tuple[float, float]:
        return (along, across) if ux else (across, along)

    velocity = ux * speed, uy * speed
    came = Segment(0.0, *place(start), *velocity), Segment(contact, *place(stop))
    went = Segment(0.0, *place(rest)), Segment(contact, *place(rest), *velocity)
    hitter = Entity(0, words["shape"], words["colour"], radius, came)
    target = Entity(1, words["shape2"], words["colour2"], radius, went)
    return canvas.scene(rng, hitter, target, events=(Event(contact, "contact", (0, 1)),))


FORMS = {
    "collision": Form(
        dense="A small {colour} {shape} moves {direction} and hits a small {colour2} {shape2} that "
        "was still. The {colour} {shape} stops and the {colour2} {shape2} moves off {direction}. "
        f"Plain grey background. {STATIC_CAMERA}",
        short="a {colour} {shape} moves {direction} and hits a {colour2} {shape2}",
        vague="something hits something",
        zh="一个小的{colour}{shape}向{direction}移动，撞上静止的小的{colour2}{shape2}。前者停下，"
        f"后者向{{direction}}移开。灰色背景。{STATIC_CAMERA_ZH}",
        asks=(
            Ask("colour", {"colours": ["{colour}", "{colour2}"]}, 1 / 15),
            Ask(
                "causal",
                {"hitter": "{colour}", "target": "{colour2}", "word": "{direction}"},
                chance=1 / 120,
            ),
            looks(look(), look("2"), chance=alike(2, shapes=SHAPES)),
            Ask("count_constancy", {}, 1.0),
            CONSTANT,
            STATIC,
        ),
        flips=("colour", "colour2", "direction"),
        choices={"shape": SHAPES, "shape2": SHAPES},
    ),
}

register(
    Family(
        "collide",
        failure="causes have no effect, or effects no cause",
        forms=FORMS,
        draw=draw,
        build=build,
        faults={
            "colour": (recoloured, missing),
            "looks": (reshaped, missing),
            "causal": (mirrored, no_effect, at_rest, effect_first, goes_on, run_through),
            "count_constancy": (half_gone,),
            **CONSTANCY_FAULTS,
            **STATIC_FAULTS,
        },
        nudge=later_effect,
    )
)
