"""A puff reaches the flame of a candle and puts it out, or misses it: effects need their cause."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from longtake.data.world.contact import (
    GAP,
    MISSED_BY,
    approach,
    delayed,
    effect_faults,
    gap_between,
    obeys_contact,
)
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
    at_rest,
    mirrored,
    missing,
    recoloured,
    with_changes,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Words
from longtake.data.world.scene import COLOURS, EXTENTS, Change, Entity, Event, Scene
from longtake.data.world.scorers import scorer

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

FLAME = 0.85  # of the puff's radius: the puff is the larger one to be seen
STICK = 0.06  # half-width of the candle, of the shorter side
MIN_STICK = 0.2  # of the shorter side
# distance at which a circle meets the slanted side of an equilateral triangle at its height
SLANT = 2 / np.sqrt(3)
LIT = 0.4  # of the flame's area
CONTACT = {
    "reaches": ("reaches and puts out", "碰到后火焰熄灭"),
    "misses": ("misses and leaves lit", "没有碰到，火焰一直亮着"),
}

FORM = Form(
    dense="A small round {colour} puff moves {direction}, then {contact} a small {colour2} flame "
    f"on a dark candle. Plain grey background. {STATIC_CAMERA}",
    short="a {colour} puff {contact} a {colour2} flame",
    vague="something comes near a light",
    zh="一小团圆形的{colour}烟雾向{direction}移动，靠近深色蜡烛上小小的{colour2}火焰，{contact}。"
    f"灰色背景。{STATIC_CAMERA_ZH}",
    asks=(
        Ask("colour", {"colours": ["{colour}", "{colour2}"]}, 1 / 15),
        Ask("direction", {"word": "{direction}"}, 1 / 2),
        Ask(
            "flame",
            {"puff": "{colour}", "flame": "{colour2}", "contact": "{contact}"},
            # of the held-out puffs each has a colour, a direction and an outcome of its own
            lambda canvas: 1 / 20 if canvas.split == "combo" else 1 / 60,
            1 / 2,
        ),
        CONSTANT,
        STATIC,
    ),
    flips=("colour", "colour2", "contact"),
    words={"contact": CONTACT},
    choices={"direction": ("left", "right")},
)


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    """Direction and outcome together are what a held-out puff does."""
    direction = pick(rng, ("left", "right"))
    contact = pick(rng, tuple(CONTACT))
    verb = 2 * (direction == "right") + (contact == "misses")
    puff, _ = draw_look(rng, canvas, verb, shapes=("circle",))
    flame = pick(rng, [colour for colour in COLOURS if colour != puff])
    words = {"colour": puff, "colour2": flame, "direction": direction, "contact": contact}
    return "candle", words


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """The flame stands low enough for a puff to pass above it."""
    side = canvas.short_side
    radius = canvas.radius("small")
    flame_radius = FLAME * radius
    beside, above, below = (extent * flame_radius for extent in EXTENTS["triangle"])
    aside = radius + above + MISSED_BY[1] * side
    highest = GAP + radius + aside
    y = highest + rng.random() * (canvas.height - MIN_STICK * side - below - highest)
    touches = words["contact"] == "reaches"
    way = approach(
        rng,
        canvas,
        words["direction"],
        touches=touches,
        extents=(radius, beside),
        reach=SLANT * (radius + below),
        across=y,
        aside=-aside,
    )
    x, _ = way.target
    out = (Change(way.time, "alpha", 0.0),) if touches else ()
    base, half_width = y + below, STICK * side
    half = (half_width, (canvas.height - base) / 2)
    return canvas.scene(
        rng,
        Entity(0, "circle", words["colour"], radius, way.motion),
        Entity(1, "triangle", words["colour2"], flame_radius, still(x, y), layer=1, changes=out),
        Entity(2, "bar", "grey", half_width, still(x, base + half[1]), role="candle", half=half),
        events=tuple(Event(way.time, type, (0, 1)) for type in ("contact", "out") if touches),
    )


@scorer
def flame(seen: Detection, puff: str, flame: str, contact: str) -> float:
    """The puff comes up to the flame, which stays in its place and is lit until contact (± 1 frame)
    and never again; where the puff is to miss it, it never touches and the flame is always lit."""
    one, two = seen.tracks.get(puff), seen.tracks.get(flame)
    if one is None or two is None or not (one.blobs == 1).all() or (two.blobs > 1).any():
        return 0.0
    lit = two.area > LIT * two.full_area
    drift = np.hypot(two.x - np.nanmedian(two.x), two.y - np.nanmedian(two.y))
    if (drift[lit] > 0.08 * seen.side).any():
        return 0.0
    gap = gap_between(one, two, 1.03)
    return obeys_contact(seen, ~lit, gap, contact == "reaches")


def _out_without_contact(clip: WorldClip) -> np.ndarray | None:
    """Missed, and out all the same."""
    if clip.scene.events:
        return None
    return with_changes(clip, 1, Change(clip.scene.frames / 2, "alpha", 0.0))


register(
    Family(
        "candle",
        failure="an effect without its cause, or a cause without its effect",
        forms={"candle": FORM},
        draw=draw,
        build=build,
        nudge=delayed,
        undone=("colour",),  # the flame's, once it is out
        faults={
            "colour": (recoloured, missing),
            "direction": (mirrored, at_rest),
            **CONSTANCY_FAULTS,
            **STATIC_FAULTS,
            "flame": (*effect_faults(1, 1.0, 0.0), _out_without_contact, at_rest),
        },
    )
)
