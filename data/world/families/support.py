"""Things fall ever faster and come to rest on what is below them: nothing floats or sinks."""

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
    still,
)
from longtake.data.world.faults import (
    CONSTANCY_FAULTS,
    STATIC_FAULTS,
    flipped,
    half_gone,
    missing,
    recoloured,
    reshaped,
    with_motion,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Vocabulary, Words
from longtake.data.world.scene import EXTENTS, Entity, Event, Scene, Segment
from longtake.data.world.scorers import scorer, whole_subject

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

SHAPES = ("circle", "square")  # what they stand on is as far from their centre as their sides are
HELD_OUT = (0, 2, 5, 7)  # verbs for which one colour of each of these shapes is held out
# acceleration in frame heights per clip length squared; heavier out of distribution
GRAVITY = (1.8, 2.2)
OOD_GRAVITY = (2.8, 3.6)
THICKNESS = 0.1  # of a bar, as a share of the shorter side; at least 2 px
SHELF_TOP = (0.60, 0.66)  # of the height
SHELF_WIDTH = (0.42, 0.48)  # of the width
TOLERANCE = 0.08  # of the shorter side
DARK = 95  # brightest channel of a solid bar at most; the darkest background has about 120
SIDES: Vocabulary = {"left": ("left", "左边"), "right": ("right", "右边")}
OPPOSITE = {"left": "right", "right": "left"}


def bar(number: int, left: float, top: float, right: float, bottom: float, role: str) -> Entity:
    """A dark grey bar at rest, given by its edges in px."""
    half = ((right - left) / 2, (bottom - top) / 2)
    middle = still((left + right) / 2, (top + bottom) / 2)
    return Entity(number, "bar", "grey", min(half), middle, "large", role, half=half)


def thickness(canvas: Canvas) -> int:
    """Of a bar in px."""
    return max(2, round(THICKNESS * canvas.short_side))


def solid_parts(seen: Detection) -> np.ndarray:
    """Where something dark stands, (H, W) bool: in at least a third of the frames."""
    return (seen.frames.max(-1) < DARK).mean(0) >= 1 / 3


@scorer
def gravity(seen: Detection, target: str, side: str, falls: bool) -> float:
    """On the asked side the largest entity stands on what is asked for, or falls on it ever faster
    and stays; it is never in it. A shelf ends above the ground and beside what falls past it."""
    track = whole_subject(seen)
    if track is None:
        return 0.0
    tolerance = TOLERANCE * seen.side
    at, reach = float(np.median(track.x)), 0.94 * np.sqrt(track.full_area / np.pi)
    if abs(track.x - at).max() > 1.5 * tolerance or (at < seen.width / 2) != (side == "left"):
        return 0.0
    top = _top_of(target, solid_parts(seen), at, reach)
    height = top - reach - track.y  # of the entity above its place, px
    if not abs(height[-1]) < tolerance or height.min() < -tolerance:
        return 0.0
    if not falls:
        return abs(height).max() < tolerance
    landed = int(np.argmax(height < tolerance))
    if height[0] < 2 * tolerance or height[landed:].max() > tolerance:
        return 0.0
    return _quickens(track.y[:landed], 0.1 * tolerance)


def _top_of(target: str, dark: np.ndarray, at: float, reach: float) -> float:
    """Row of the top of the asked support below a column; NaN where another or none is there."""
    tops = dark & ~np.roll(dark, 1, axis=0)
    tops[0] = dark[0]
    is_shelf = tops.sum(0) >= 2  # (W,): something ends above something else
    here = slice(max(round(at - 0.5 * reach), 0), max(round(at + 0.5 * reach), 1))
    if dark[-1].mean() < 0.8 or is_shelf.sum() < reach:
        return np.nan  # no ground, or no shelf anywhere
    if is_shelf[here].mean() != (target == "shelf"):
        return np.nan
    return float(np.median(dark[:, here].argmax(0)))


def _quickens(y: np.ndarray, slack: float) -> bool:
    """Whether falling heights (T,) in whole steps grow faster; one step alone cannot tell."""
    steps = np.diff(y)
    half = len(steps) // 2
    if not half:
        return True
    early, late = steps[:half].sum(), steps[-half:].sum()  # ways: the slack is one of places
    return bool(steps.min() > -slack and late > 1.3 * early + slack)


ON = {"shelf": ("a shelf", "架子"), "ground": ("the ground beside a shelf", "架子旁边的地面")}
ONTO = {
    "shelf": ("onto a shelf", "落在架子上"),
    "ground": ("past a shelf to the ground", "从架子旁边落到地面上"),
}
CHANCE = (0.75**2 + 0.25**2) / 4  # both fall or both rest, on the same support and side
SOLID = "The shelf and the ground are dark grey. Plain grey background."
SOLID_ZH = "架子和地面是深灰色的，背景是灰色。"


def _form(dense: str, short: str, vague: str, zh: str, falls: bool, targets: Vocabulary) -> Form:
    values = {"target": "{target}", "side": "{side}", "falls": falls}
    return Form(
        dense=f"A small {{colour}} {{shape}} {dense} {SOLID} {STATIC_CAMERA}",
        short=f"a {{colour}} {{shape}} {short}",
        vague=vague,
        zh=f"{zh}{SOLID_ZH}{STATIC_CAMERA_ZH}",
        asks=(
            Ask("colour", {"colours": ["{colour}"]}, 1 / 6),
            Ask("shape", {"shape": "{shape}"}, 1 / 2),
            Ask("gravity", values, CHANCE),
            CONSTANT,
            STATIC,
        ),
        flips=("colour", "shape", "target", "side"),
        words={"target": targets, "side": SIDES},
        choices={"shape": SHAPES},
    )


FORMS = {
    "falls": _form(
        "falls faster and faster {target} on the {side} and stays there.",
        "falls {target} on the {side}",
        "something falls and stays where it lands",
        "一个小的{colour}{shape}在{side}越落越快，{target}，然后停住不动。",
        True,
        ONTO,
    ),
    "rests": _form(
        "rests on the {side} on {target} and does not move.",
        "rests on the {side} on {target}",
        "something rests on something",
        "一个小的{colour}{shape}静止在{side}的{target}上，一动不动。",
        False,
        ON,
    ),
}


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    form = "falls" if rng.random() < 0.75 else "rests"
    target, side = pick(rng, tuple(ON)), pick(rng, tuple(SIDES))
    verb = HELD_OUT[2 * (form == "rests") + (target == "ground")]
    colour, shape = draw_look(rng, canvas, verb, shapes=SHAPES)
    return form, {"colour": colour, "shape": shape, "target": target, "side": side}


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """From rest, y = y₀ + g·t² / 2 until √(2h / g), where h is the way down to the support."""
    u, v, w, pull, width = rng.random(5)
    height, thick = canvas.height, thickness(canvas)
    radius = canvas.radius("small")
    reach = EXTENTS[words["shape"]][0] * radius
    low, high = SHELF_TOP
    shelf_top = round((low + u * (high - low)) * height)
    ground_top = height - thick
    shelf_width = round((SHELF_WIDTH[0] + width * (SHELF_WIDTH[1] - SHELF_WIDTH[0])) * canvas.width)
    x = radius + 0.5 + v * (shelf_width - 2 * radius - 1)
    x = x if words["side"] == "left" else canvas.width - x
    on_shelf = words["target"] == "shelf"
    shelf_side = words["side"] if on_shelf else OPPOSITE[words["side"]]
    left = 0 if shelf_side == "left" else canvas.width - shelf_width
    shelf = bar(1, left, shelf_top, left + shelf_width, shelf_top + thick, "support")
    ground = bar(2, -1, ground_top, canvas.width + 1, height + 1, "support")
    rest = (shelf_top if on_shelf else ground_top) - reach
    motion, events = still(x, rest), ()
    if form == "falls":
        low, high = OOD_GRAVITY if canvas.split == "ood" else GRAVITY
        g = (low + pull * (high - low)) * height / (canvas.frames - 1) ** 2
        start = radius + 0.5 + w * 0.03 * height
        landing = float(np.sqrt(2 * (rest - start) / g))
        motion = (Segment(0.0, x, start, ay=g), Segment(landing, x, rest))
        events = (Event(landing, "landing", (0, 1 if on_shelf else 2)),)
    entity = Entity(0, words["shape"], words["colour"], radius, motion, layer=1)
    return canvas.scene(rng, entity, shelf, ground, events=events)


def floating(clip: "WorldClip") -> np.ndarray:
    """It stops in the air, or hangs there."""
    *fall, rest = clip.scene.entities[0].motion
    if not fall:
        return with_motion(clip, 0, replace(rest, y=rest.y - 0.2 * clip.scene.height))
    stop = 0.7 * rest.start
    return with_motion(
        clip, 0, fall[0], Segment(stop, rest.x, fall[0].y + fall[0].ay * stop**2 / 2)
    )


def hovering(clip: "WorldClip") -> np.ndarray | None:
    """It stays where it should fall from."""
    first, *rest = clip.scene.entities[0].motion
    return with_motion(clip, 0, replace(first, ay=0.0)) if rest else None


def through(clip: "WorldClip") -> np.ndarray | None:
    """It falls on through its support."""
    fall, *rest = clip.scene.entities[0].motion
    return with_motion(clip, 0, fall) if rest else None


def sinking(clip: "WorldClip") -> np.ndarray:
    """It reaches its support and sinks into it."""
    rest = clip.scene.entities[0].motion[-1]
    time_left = clip.scene.frames - 1 - rest.start
    speed = 0.2 * clip.scene.height / time_left
    return with_motion(clip, 0, *clip.scene.entities[0].motion[:-1], replace(rest, vy=speed))


def rising(clip: "WorldClip") -> np.ndarray:
    """It falls upward, from its support."""
    rest = clip.scene.entities[0].motion[-1]
    steps = clip.scene.frames - 1
    rise = Segment(0.0, rest.x, rest.y, ay=-0.5 * clip.scene.height / steps**2)
    return with_motion(clip, 0, rise)


def steady(clip: "WorldClip") -> np.ndarray | None:
    """It falls at constant speed, for three frames at least."""
    fall, *rest = clip.scene.entities[0].motion
    if not rest:
        return None
    landing = max(rest[0].start, 3.0)
    speed = (rest[0].y - fall.y) / landing
    return with_motion(clip, 0, replace(fall, vy=speed, ay=0.0), replace(rest[0], start=landing))


register(
    Family(
        "support",
        failure="things float or sink",
        forms=FORMS,
        draw=draw,
        build=build,
        faults={
            "colour": (recoloured, missing),
            "shape": (reshaped,),
            **CONSTANCY_FAULTS,
            **STATIC_FAULTS,
            "gravity": (
                floating,
                hovering,
                through,
                sinking,
                rising,
                steady,
                flipped,
                half_gone,
                missing,
            ),
        },
    )
)
