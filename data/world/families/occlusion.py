"""An entity passes behind a bar and comes out again: object permanence."""

from dataclasses import replace

import numpy as np

from longtake.data.world.captions import (
    STATIC_CAMERA,
    STATIC_CAMERA_ZH,
    ZH,
    Words,
    full_noun,
    other_colour,
    plain_noun,
    zh_noun,
)
from longtake.data.world.families.registry import (
    Canvas,
    Composition,
    draw_look,
    family,
    fixed_shot,
    still,
)
from longtake.data.world.scene import DIRECTIONS, EXTENTS, Entity, Event, Scene, Segment

SHAPES = ("circle", "square")  # a triangle is too wide to be seen whole on both sides of a bar
GAP = 0.3  # px between the entity and the frame's edge at the ends of its way
PAD = 0.03  # how much further the bar reaches than the entity, in shorter sides


def _words(entity: Entity, word: str, bar: str) -> Words:
    noun, full = plain_noun(entity), full_noun(entity)
    zh_bar = {"vertical": "竖直", "horizontal": "水平"}[bar]
    return Words(
        dense=f"A {full} moves {word}, disappears behind a {bar} dark grey bar and comes out on "
        f"the other side. Plain grey background. {STATIC_CAMERA}",
        short=f"a {noun} moves {word} behind a bar",
        vague="something moves behind something",
        zh=f"一个{zh_noun(entity)}向{ZH[word]}移动，从{zh_bar}的深灰色挡板后面穿过并重新出现。"
        f"{STATIC_CAMERA_ZH}",
    )


def _way(
    rng: np.random.Generator, canvas: Canvas, length: float, reach: float, half: float
) -> tuple[float, float, int]:
    """Start and velocity along the axis, and the frame at which the entity is at the bar's centre.

    At that whole frame it is wholly hidden, however fast it moves.
    """
    steps = canvas.frames - 1
    need = half + reach  # from the bar's centre to where the entity is wholly seen
    longest = length - 2 * (reach + GAP)
    travel = longest - rng.random() * max(longest - 2.3 * need, 0.0)
    start = reach + GAP + rng.random() * (longest - travel)
    first = int(np.ceil(steps * need / travel - 1e-9))
    last = steps - first
    middle = int(rng.integers(first, last + 1)) if first <= last else steps // 2
    return start, travel / steps, middle


@family(
    "occlusion",
    min_frames=5,
    chance={"colour": 1 / 6, "direction": 1 / 4, "permanence": 1 / 4},
    blind={"colour": 1 / 6, "direction": 1 / 4, "permanence": 1 / 4},
)
def compose(rng: np.random.Generator, canvas: Canvas) -> Composition:
    """Constant velocity; wholly seen at both ends, wholly hidden for at least one frame between."""
    verb = int(rng.integers(4))
    word = list(DIRECTIONS)[verb]
    ux, uy = DIRECTIONS[word]
    colour, shape = draw_look(rng, canvas, verb, shapes=SHAPES)
    radius = canvas.radius("small")
    reach = EXTENTS[shape][0] * radius
    half = reach + PAD * canvas.short_side
    length, breadth = (canvas.width, canvas.height) if ux else (canvas.height, canvas.width)
    start, speed, middle = _way(rng, canvas, length, reach, half)
    across = reach + GAP + rng.random() * (breadth - 2 * (reach + GAP))
    bar_at = start + speed * middle
    sign = ux + uy
    if sign < 0:
        start, bar_at = length - start, length - bar_at
    velocity = (ux * speed, uy * speed)
    hidden = (half - reach) / speed
    if ux:
        segment = Segment(0.0, start, across, *velocity)
        bar_motion, bar_half = still(bar_at, breadth / 2), (half, breadth / 2 + 1)
    else:
        segment = Segment(0.0, across, start, *velocity)
        bar_motion, bar_half = still(breadth / 2, bar_at), (breadth / 2 + 1, half)
    entity = Entity(0, shape, colour, radius, (segment,), "small")
    bar = Entity(1, "bar", "grey", half, bar_motion, "large", "occluder", layer=10, half=bar_half)
    events = (Event(middle - hidden, "hidden", (0, 1)), Event(middle + hidden, "shown", (0, 1)))
    scene = Scene(
        canvas.frames,
        canvas.height,
        canvas.width,
        canvas.fps,
        (entity, bar),
        fixed_shot(rng, canvas),
        events,
    )
    upright = "vertical" if ux else "horizontal"
    flipped = replace(entity, colour=other_colour(colour, [colour]))
    expect = {
        "colour": {"colours": [colour]},
        "direction": {"word": word},
        "permanence": {"word": word},
    }
    return Composition(
        scene=scene,
        words=_words(entity, word, upright),
        wrong=_words(flipped, word, upright).dense,
        expect=expect,
        asked={"dense": list(expect), "short": list(expect)},
    )
