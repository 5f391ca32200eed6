"""An entity passes behind a bar and comes out again: object permanence."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from longtake.data.world.detect import WHOLE, Detection, Track
from longtake.data.world.families.registry import (
    STATIC,
    Ask,
    Canvas,
    Family,
    Form,
    alike,
    draw_look,
    register,
    still,
)
from longtake.data.world.faults import (
    STATIC_FAULTS,
    at_rest,
    flickering,
    mirrored,
    missing,
    recoloured,
    redrawn,
    reshaped,
    reshaped_midway,
    with_changes,
    with_entity,
    with_motion,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Words
from longtake.data.world.scene import (
    BAR_GREY,
    DIRECTIONS,
    EXTENTS,
    Change,
    Entity,
    Event,
    Scene,
    Segment,
    positions,
)
from longtake.data.world.scorers import MIN_MOVE, along, scorer

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

SHAPES = ("circle", "square")  # a triangle is too wide to be seen whole on both sides of a bar
GAP = 0.3  # px between the entity and the frame's edge at the ends of its way
PAD = 0.03  # how much further the bar reaches than the entity, in shorter sides
DARK = (BAR_GREY[0] + 140) / 2  # between an occluder and the darkest background


@scorer
def permanence(seen: Detection, word: str) -> float:
    """One entity goes in the asked direction, vanishes only behind something dark, and comes out on
    its other side with its colour, shape and size, on its way as if it had never been hidden."""
    track = seen.main
    if track is None or len(seen.tracks) > 1 or (track.blobs > 1).any():
        return 0.0
    shown = track.area > 0.3 * track.full_area
    edges = np.nonzero(np.diff(shown.astype(int)))[0]
    if not (shown[0] and shown[-1] and len(edges) == 2):
        return 0.0  # never hidden, hidden more than once, or never out again
    before, after = int(edges[0]), int(edges[1]) + 1
    if not _is_dark_between(seen, track, before, after):
        return 0.0
    way = along(track, word)
    clear = np.nonzero(track.area > 0.5 * track.full_area)[0]
    first, last = clear[clear <= before], clear[clear >= after]
    if not len(first) or not len(last):
        return 0.0
    speed = (way[last[-1]] - way[first[0]]) / (last[-1] - first[0])
    if speed * (seen.num_frames - 1) < 4 * MIN_MOVE * seen.side:
        return 0.0
    steps, slack = np.diff(track.area), 0.2 * track.full_area
    if (steps[:before] > slack).any() or (steps[after:] < -slack).any():
        return 0.0  # ever less of it is seen on the way in, ever more on the way out
    times, shapes = np.arange(seen.num_frames), set()
    for side in (times <= before, times >= after):
        part = replace(track, area=track.area * side, blobs=track.blobs * side)
        if part.area.max() > WHOLE * track.full_area:
            shapes |= seen.shapes_of(part)
    if len(shapes) > 1:
        return 0.0
    expected = way[first[0]] + speed * (clear - first[0])
    slack = 0.12 * seen.side + 0.75 * speed  # most of a frame's way
    return bool((abs(way[clear] - expected) < slack).all())


def _is_dark_between(seen: Detection, track: Track, before: int, after: int) -> bool:
    """Whether the middle of where a track was lost and found again is covered by an occluder."""
    col = int((track.x[before] + track.x[after]) / 2)
    row = int((track.y[before] + track.y[after]) / 2)
    patch = seen.frames[before + 1 : after, max(row - 1, 0) : row + 2, max(col - 1, 0) : col + 2]
    return bool(patch.mean() < DARK)


def vanished_behind(clip: WorldClip) -> np.ndarray:
    """It never comes out."""
    return with_changes(clip, 0, Change(clip.scene.events[0].time, "alpha", 0.0))


def changed_behind(clip: WorldClip) -> np.ndarray:
    """Another colour comes out."""
    middle = (clip.scene.events[0].time + clip.scene.events[1].time) / 2
    colour = "red" if clip.scene.entities[0].colour != "red" else "blue"
    return with_changes(clip, 0, Change(middle, "colour", colour))


def in_the_open(clip: WorldClip) -> np.ndarray:
    """No bar at all, yet the entity is gone while it would be behind it."""
    hidden, shown = (e.time for e in clip.scene.events)
    changes = Change(hidden, "alpha", 0.0), Change(shown + 1, "alpha", 1.0)
    entity = replace(clip.scene.entities[0], changes=changes)
    return redrawn(clip, lambda s: replace(s, entities=(entity,)))


def in_front(clip: WorldClip) -> np.ndarray:
    """It passes before the bar."""
    entity = clip.scene.entities[0]
    return redrawn(clip, lambda s: with_entity(s, 0, replace(entity, layer=99)))


def turned_back(clip: WorldClip) -> np.ndarray:
    """It comes out where it went in."""
    middle = sum(e.time for e in clip.scene.events) / 2
    first = clip.scene.entities[0].motion[0]
    x, y = (float(v[0]) for v in positions((first,), np.array([middle])))
    return with_motion(clip, 0, first, Segment(middle, x, y, -first.vx, -first.vy))


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    verb = int(rng.integers(4))
    colour, shape = draw_look(rng, canvas, verb, shapes=SHAPES)
    words = {"colour": colour, "shape": shape, "direction": tuple(DIRECTIONS)[verb]}
    return ("across", "upright")[verb // 2], words


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """Constant velocity; wholly seen at both ends, wholly hidden for at least one frame between."""
    ux, uy = DIRECTIONS[words["direction"]]
    radius = canvas.radius("small")
    reach = EXTENTS[words["shape"]][0] * radius
    half = reach + PAD * canvas.short_side
    length, breadth = (canvas.width, canvas.height) if ux else (canvas.height, canvas.width)
    start, speed, middle = _way(rng, canvas, length, reach, half)
    across = reach + GAP + rng.random() * (breadth - 2 * (reach + GAP))
    bar_at = start + speed * middle
    if ux + uy < 0:
        start, bar_at = length - start, length - bar_at
    if ux:
        segment = Segment(0.0, start, across, ux * speed)
        bar_motion, bar_half = still(bar_at, breadth / 2), (half, breadth / 2 + 1)
    else:
        segment = Segment(0.0, across, start, 0.0, uy * speed)
        bar_motion, bar_half = still(breadth / 2, bar_at), (breadth / 2 + 1, half)
    entity = Entity(0, words["shape"], words["colour"], radius, (segment,))
    bar = Entity(1, "bar", "grey", half, bar_motion, "large", "occluder", layer=10, half=bar_half)
    hidden = (half - reach) / speed
    events = (Event(middle - hidden, "hidden", (0, 1)), Event(middle + hidden, "shown", (0, 1)))
    return canvas.scene(rng, entity, bar, events=events)


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


def _form(bar: str, zh_bar: str, directions: tuple[str, str]) -> Form:
    return Form(
        dense=f"A small {{colour}} {{shape}} moves {{direction}}, disappears behind a {bar} dark "
        f"grey bar and comes out on the other side. Plain grey background. {STATIC_CAMERA}",
        short="a {colour} {shape} moves {direction} behind a bar",
        vague="something moves behind something",
        zh=f"一个小的{{colour}}{{shape}}向{{direction}}移动，从{zh_bar}的深灰色挡板后面穿过并重新出现。"
        f"灰色背景。{STATIC_CAMERA_ZH}",
        asks=(
            Ask("colour", {"colours": ["{colour}"]}, 1 / 6),
            Ask("direction", {"word": "{direction}"}, 1 / 4),
            Ask("shape", {"shape": "{shape}"}, alike(1, shapes=SHAPES, colours=False)),
            Ask("permanence", {"word": "{direction}"}, 1 / 4),
            STATIC,
        ),
        flips=("colour", "direction"),
        choices={"shape": SHAPES, "direction": directions},
    )


FORMS = {
    "across": _form("vertical", "竖直", ("left", "right")),
    "upright": _form("horizontal", "水平", ("up", "down")),
}

register(
    Family(
        "occlusion",
        failure="what is hidden is forgotten",
        forms=FORMS,
        draw=draw,
        build=build,
        min_frames=8,  # seen, hidden and seen again, each to survive a shift by a frame
        faults={
            "colour": (recoloured, missing),
            "direction": (mirrored, at_rest),
            "shape": (reshaped,),
            **STATIC_FAULTS,
            "permanence": (
                flickering,
                reshaped_midway,
                mirrored,
                vanished_behind,
                changed_behind,
                in_the_open,
                in_front,
                turned_back,
            ),
        },
    )
)
