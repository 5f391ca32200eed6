"""One thing bites another, which keeps the mark, or misses it: states that must not be forgotten.

A bite is a dark disc on the food's near side.
"""

from __future__ import annotations

from dataclasses import replace
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
from longtake.data.world.detect import Detection, Track
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
    reshaped,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Words
from longtake.data.world.render import render
from longtake.data.world.scene import BAR_GREY, DIRECTIONS, EXTENTS, Change, Entity, Event, Scene
from longtake.data.world.scorers import scorer

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

SHAPES = ("circle", "square")  # their contact along an axis is exact
MARK_AT, MARK = 0.55, 0.45  # distance of the mark from the food's centre and its radius, in radii
DARK = 125  # of 255, in the brightest channel: darker than any background
MARKED = 0.02  # of the food's area, dark: what counts as a mark; a true one has up to a fifth
CONTACT = {
    "bites": ("bites a dark mark into", "咬到它并留下深色印记"),
    "misses": ("misses and leaves no mark on", "没有碰到它，也没有留下印记"),
}

FORM = Form(
    dense="A small {colour} {shape} moves {direction}, then {contact} a small {colour2} {shape2} "
    f"that is still. Plain grey background. {STATIC_CAMERA}",
    short="a {colour} {shape} {contact} a {colour2} {shape2}",
    vague="something comes near something",
    zh="一个小的{colour}{shape}向{direction}移动，靠近一个静止的小{colour2}{shape2}，{contact}。"
    f"灰色背景。{STATIC_CAMERA_ZH}",
    asks=(
        Ask("colour", {"colours": ["{colour}", "{colour2}"]}, 1 / 15),
        Ask(
            "direction",
            {"word": "{direction}", "colour": "{colour}"},
            # each held-out colour of an eater goes in one direction only
            lambda canvas: 3 / 16 if canvas.split == "combo" else 1 / 24,
            1 / 4,
        ),
        Ask(
            "bite",
            {"eater": "{colour}", "food": "{colour2}", "contact": "{contact}"},
            chance=1 / 60,
            blind=1 / 2,
        ),
        looks(look(), look("2"), chance=alike(2, shapes=SHAPES)),
        CONSTANT,
        STATIC,
    ),
    flips=("colour", "colour2", "contact"),
    words={"contact": CONTACT},
    choices={"shape": SHAPES, "shape2": SHAPES},
)


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    """Eater and food may be alike in shape, never in colour."""
    verb = int(rng.integers(4))
    colour, shape = draw_look(rng, canvas, verb, shapes=SHAPES)
    colour2, shape2 = draw_look(rng, canvas, verb, taken=[colour], shapes=SHAPES)
    return "bite", {
        "colour": colour,
        "shape": shape,
        "colour2": colour2,
        "shape2": shape2,
        "direction": tuple(DIRECTIONS)[verb],
        "contact": pick(rng, tuple(CONTACT)),
    }


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """The food lies on one side of the frame, so that there is room to pass it on the other."""
    radius = canvas.radius("small")
    ux, uy = DIRECTIONS[words["direction"]]
    breadth = canvas.height if ux else canvas.width
    eater, food = (EXTENTS[words[slot]][0] * radius for slot in ("shape", "shape2"))
    aside = eater + food + MISSED_BY[1] * canvas.short_side
    edge = GAP + radius
    across = edge + rng.random() * (breadth - 2 * edge - aside)
    if rng.random() < 0.5:
        across, aside = breadth - across, -aside
    bites = words["contact"] == "bites"
    way = approach(
        rng,
        canvas,
        words["direction"],
        touches=bites,
        extents=(eater, food),
        reach=eater + food,
        across=across,
        aside=aside,
    )
    x, y = way.target
    eater = Entity(0, words["shape"], words["colour"], radius, way.motion, layer=1)
    food = Entity(1, words["shape2"], words["colour2"], radius, still(x, y))
    if not bites:
        return canvas.scene(rng, eater, food)
    events = (Event(way.time, "contact", (0, 1)), Event(way.time, "bite", (1, 2)))
    return canvas.scene(rng, eater, food, _mark(food, (ux, uy), way.time), events=events)


def _mark(food: Entity, towards: tuple[int, int], time: float) -> Entity:
    """What a bite from an eater that goes `towards` it leaves in the food, from a time on."""
    (place,) = food.motion
    back = MARK_AT * food.radius
    motion = still(place.x - back * towards[0], place.y - back * towards[1])
    shown = (Change(0, "alpha", 0.0), Change(time, "alpha", 1.0))
    radius = MARK * food.radius
    return Entity(2, "circle", "grey", radius, motion, role="mark", layer=2, changes=shown)


@scorer
def bite(seen: Detection, eater: str, food: str, contact: str) -> float:
    """The eater comes up to the food, which stays in its place and has a dark mark from contact on
    (± 1 frame) and never before; where the eater is to miss it, it never touches nor marks it."""
    one, two = seen.tracks.get(eater), seen.tracks.get(food)
    if one is None or two is None or not ((one.blobs == 1) & (two.blobs == 1)).all():
        return 0.0
    if (np.hypot(two.x - two.x[0], two.y - two.y[0]) > 0.08 * seen.side).any():
        return 0.0
    gap = gap_between(one, two, 0.94)
    return obeys_contact(seen, _dark_share(seen, two) > MARKED, gap, contact == "bites")


def _dark_share(seen: Detection, track: Track) -> np.ndarray:
    """How much of a thing is as dark as a mark, (T,), as a share of its area."""
    rows = np.arange(seen.height)[:, None] + 0.5 - track.y[:, None, None]
    cols = np.arange(seen.width) + 0.5 - track.x[:, None, None]
    inside = rows**2 + cols**2 < track.full_area / np.pi
    dark = (DARK - seen.frames.max(-1).astype(float)) / (DARK - BAR_GREY[0])
    return (dark.clip(0.0, 1.0) * inside).sum((1, 2)) / track.full_area


def _bitten_without_contact(clip: WorldClip) -> np.ndarray | None:
    """Missed, and marked all the same."""
    scene = clip.scene
    if scene.events:
        return None
    mark = _mark(scene.entities[1], DIRECTIONS[clip.words["direction"]], scene.frames / 2)
    return render(replace(scene, entities=(*scene.entities, mark))).frames


register(
    Family(
        "bite",
        failure="what has happened is forgotten",
        forms={"bite": FORM},
        draw=draw,
        build=build,
        nudge=delayed,
        faults={
            "colour": (recoloured, missing),
            "direction": (mirrored, at_rest),
            "looks": (reshaped, missing),
            **CONSTANCY_FAULTS,
            **STATIC_FAULTS,
            "bite": (*effect_faults(2, 0.0, 1.0), _bitten_without_contact, at_rest),
        },
    )
)
