"""A wall with a gap: one goes through the gap, or comes back from the wall, never through it."""

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from longtake.data.world.detect import Detection
from longtake.data.world.families.bounce import bounces_at
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
from longtake.data.world.families.support import (
    HELD_OUT,
    SHAPES,
    TOLERANCE,
    bar,
    solid_parts,
    thickness,
)
from longtake.data.world.faults import (
    CONSTANCY_FAULTS,
    STATIC_FAULTS,
    at_rest,
    missing,
    recoloured,
    redrawn,
    reshaped,
    with_entity,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Vocabulary, Words
from longtake.data.world.scene import COLOURS, DIRECTIONS, EXTENTS, Entity, Event, Scene, Segment
from longtake.data.world.scorers import MIN_MOVE, along, scorer, whole_subject

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

# what the gap is wider than the entity, as a share of the shorter side; wider out of distribution
CLEARANCE = (0.10, 0.14)
OOD_CLEARANCE = (0.22, 0.25)
OOD_WALL_AT = (0.58, 0.62)  # further, and so in the same time faster
GAP_AT = 0.3  # of the breadth, from the side on which the gap is
WALL_AT = (0.50, 0.55)  # where the wall begins, as a share of the way across the frame
TURN_SHARE = (0.50, 0.55)  # of the clip: it never goes back further than it came from
MIN_APPROACH = 0.17  # of the shorter side
OUTCOMES: Vocabulary = {
    "through": ("goes through the gap in a wall", "穿过墙上的缺口"),
    "back": ("bounces off a wall with a gap", "撞上有缺口的墙后弹回"),
}


@scorer
def solid(seen: Detection, word: str, outcome: str, gap: str = "") -> float:
    """The largest entity comes in the asked direction and goes on through the gap of the wall, or
    turns where it touches the solid part; it never overlaps the wall, nor leaps over it."""
    track = whole_subject(seen)
    if track is None:
        return 0.0
    dark = solid_parts(seen)
    colour = (seen.label == COLOURS.index(track.colour)) & dark
    if (seen.cover * colour).sum((1, 2)).max() > 0.12 * track.full_area:
        return 0.0  # in front of the wall; what is behind it is not whole
    is_across, is_back = word in ("left", "right"), sum(DIRECTIONS[word]) < 0
    picture = dark if is_across else dark.T
    wall = _wall(picture[:, ::-1] if is_back else picture)
    if wall is None or (gap and wall.is_low != (gap in ("top", "left"))):
        return 0.0
    way = along(track, word) + is_back * picture.shape[1]
    place = track.y if is_across else track.x
    line = float(np.median(place))
    if way[0] > wall.near or abs(place - line).max() > 2 * TOLERANCE * seen.side:
        return 0.0
    if (wall.low < line < wall.high) != (outcome == "through"):
        return 0.0
    if outcome == "back":
        reach = 0.94 * np.sqrt(track.full_area / np.pi)
        return bounces_at(way, wall.near - reach, seen.side)
    steps, slack = np.diff(way), MIN_MOVE * seen.side
    return way[-1] > wall.far and -slack < steps.min() and steps.max() < 2 * steps.mean() + slack


class _Wall(NamedTuple):
    """Columns [near, far) of a wall across the way, rows [low, high) of its gap."""

    near: int
    far: int
    low: int
    high: int
    is_low: bool  # the gap is in the half where rows begin


def _wall(dark: np.ndarray) -> _Wall | None:
    """The wall in a picture (rows, columns) of what is dark; None unless there is one gap in it."""
    columns = np.nonzero(dark.mean(0) > 0.3)[0]
    if not len(columns) or np.ptp(columns) > 0.3 * dark.shape[1]:
        return None
    near, far = columns[0], columns[-1] + 1
    is_open = dark[:, near:far].mean(1) < 0.5
    rows = np.nonzero(is_open)[0]
    if not len(rows) or np.ptp(rows) != len(rows) - 1:
        return None
    low, high = rows[0], rows[-1] + 1
    return _Wall(near, far, low, high, low + high < len(is_open))


def _form(direction: tuple[str, str], place: str, places: tuple[str, str]) -> Form:
    values = {"word": "{direction}", "outcome": "{outcome}"}
    return Form(
        dense=f"A small {{colour}} {{shape}} moves {{direction}} and {{outcome}}. The wall is dark "
        f"grey and solid, its gap is at the {{{place}}}. Plain grey background. {STATIC_CAMERA}",
        short="a {colour} {shape} moves {direction} and {outcome}",
        vague="something meets a wall",
        zh=f"一个小的{{colour}}{{shape}}向{{direction}}移动，{{outcome}}。墙是深灰色的实心墙，"
        f"缺口在{{{place}}}。灰色背景。{STATIC_CAMERA_ZH}",
        asks=(
            Ask("colour", {"colours": ["{colour}"]}, 1 / 6),
            Ask("shape", {"shape": "{shape}"}, 1 / 2),
            CONSTANT,
            STATIC,
            Ask("solid", values, 1 / 8),
            Ask("solid", {**values, "gap": f"{{{place}}}"}, 1 / 16),  # where the place is said too
        ),
        flips=("colour", "shape", "direction", "outcome"),
        words={"outcome": OUTCOMES},
        choices={"shape": SHAPES, "direction": direction, place: places},
    )


FORMS = {
    "across": _form(("left", "right"), "row", ("top", "bottom")),
    "upright": _form(("up", "down"), "column", ("left", "right")),
}


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    verb = int(rng.integers(4))
    colour, shape = draw_look(rng, canvas, HELD_OUT[verb], shapes=SHAPES)
    words = {"colour": colour, "shape": shape, "direction": tuple(DIRECTIONS)[verb]}
    words["outcome"] = pick(rng, tuple(OUTCOMES))
    if verb < 2:
        return "across", {**words, "row": pick(rng, ("top", "bottom"))}
    return "upright", {**words, "column": pick(rng, ("left", "right"))}


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """Constant speed; the contact turns the velocity round, the gap leaves it as it is."""
    wide, at, begin, line, when = rng.random(5)
    side, thick = canvas.short_side, thickness(canvas)
    radius = canvas.radius("small")
    reach = EXTENTS[words["shape"]][0] * radius
    length, breadth = canvas.width, canvas.height
    if form == "upright":
        length, breadth = breadth, length
    low, high = OOD_CLEARANCE if canvas.split == "ood" else CLEARANCE
    gap = int(np.ceil(2 * radius + (low + wide * (high - low)) * side))
    low, high = OOD_WALL_AT if canvas.split == "ood" else WALL_AT
    near = int((low + at * (high - low)) * length)
    far, gap_low = near + thick, round(GAP_AT * breadth - gap / 2)
    gap_high = gap_low + gap
    first = radius + 0.3
    slack = 0.0 if canvas.split == "ood" else 0.1 * side
    start = first + begin * np.clip(near - radius - first - MIN_APPROACH * side, 0, slack)
    is_through = words["outcome"] == "through"
    lines = (gap_low, gap_high) if is_through else (gap_high, breadth)
    across = lines[0] + first + line * max(lines[1] - lines[0] - 2 * first, 0)
    steps = canvas.frames - 1
    contact = (TURN_SHARE[0] + when * (TURN_SHARE[1] - TURN_SHARE[0])) * steps
    speed = (near - radius - start) / contact  # a circle's: what reaches less far turns later
    contact += (radius - reach) / speed
    if is_through:
        speed = (far + radius + 0.5 * (length - far - 2 * radius) - start) / steps
    motion = [Segment(0.0, start, across, speed)]
    event = Event((near - start) / speed, "passage", (0, 1, 2))
    if not is_through:
        motion.append(Segment(contact, near - reach, across, -speed))
        event = Event(contact, "bounce", (0, 2))
    entities = (
        Entity(0, words["shape"], words["colour"], radius, tuple(motion), layer=1),
        bar(1, near, -1, far, gap_low, "wall"),
        bar(2, near, gap_high, far, breadth + 1, "wall"),
    )
    turned = [_turned(entity, length, breadth, words) for entity in entities]
    return canvas.scene(rng, *turned, events=(event,))


def _turned(entity: Entity, length: int, breadth: int, words: Words) -> Entity:
    """From a scene where it moves right and the gap is at the top, to the one that is asked for."""
    is_back = words["direction"] in ("left", "up")
    is_low = words.get("row") == "bottom" or words.get("column") == "right"
    motion, half = [], entity.half
    for part in entity.motion:
        x, vx = (length - part.x, -part.vx) if is_back else (part.x, part.vx)
        y = breadth - part.y if is_low else part.y
        if "row" in words:
            motion.append(Segment(part.start, x, y, vx, 0.0))
        else:
            motion.append(Segment(part.start, y, x, 0.0, vx))
    if half is not None and "column" in words:
        half = half[::-1]
    return replace(entity, motion=tuple(motion), half=half)


def _replayed(
    clip: "WorldClip", place: str, *, leap: bool = False, turned: float = 1.0, layer: int = 1
) -> np.ndarray:
    """It moves on another line: where the `gap` is, or the `solid` part, or on the `same`.

    It goes through, or leaps over the wall; otherwise `turned` is the factor of its velocity from
    the wall on.
    """
    scene, words = clip.scene, clip.words
    entity, wall, steps = scene.entities[0], scene.entities[2], scene.frames - 1
    ux, uy = DIRECTIONS[words["direction"]]
    x, y = entity.motion[0].x, entity.motion[0].y
    to_wall = ux * (wall.motion[0].x - x) + uy * (wall.motion[0].y - y)
    touch = to_wall - wall.radius - entity.radius
    beyond = to_wall + wall.radius + entity.radius
    to_edge = max(ux * (scene.width - x), -ux * x, uy * (scene.height - y), -uy * y)
    end = (beyond + to_edge - entity.radius) / 2
    if place != "same" and (place == "gap") != (words["outcome"] == "through"):
        x, y = (x, scene.height - y) if ux else (scene.width - x, y)
    skipped = (beyond - touch) * leap
    speed = 2 * touch / steps if turned != 1 else (end - skipped) / steps
    at = touch + skipped
    motion = (
        Segment(0.0, x, y, ux * speed, uy * speed),
        Segment(touch / speed, x + ux * at, y + uy * at, ux * speed * turned, uy * speed * turned),
    )
    other = replace(entity, motion=motion, layer=layer)
    return redrawn(clip, lambda scene: with_entity(scene, 0, other))


def passed_over(clip: "WorldClip") -> np.ndarray:
    """It passes in front of the solid part."""
    return _replayed(clip, "solid")


def passed_behind(clip: "WorldClip") -> np.ndarray:
    """It passes behind the solid part."""
    return _replayed(clip, "solid", layer=-1)


def leapt(clip: "WorldClip") -> np.ndarray:
    """It is before the wall, and in the next frame beyond it."""
    return _replayed(clip, "same", leap=True)


def turned_at_gap(clip: "WorldClip") -> np.ndarray:
    """It turns back where the gap is."""
    return _replayed(clip, "gap", turned=-1.0)


def stopped(clip: "WorldClip") -> np.ndarray:
    """It stays at the wall."""
    return _replayed(clip, "same", turned=0.0)


register(
    Family(
        "hoop",
        failure="solid things are passed through",
        forms=FORMS,
        draw=draw,
        build=build,
        faults={
            "colour": (recoloured, missing),
            "shape": (reshaped,),
            **CONSTANCY_FAULTS,
            **STATIC_FAULTS,
            "solid": (
                passed_over,
                passed_behind,
                leapt,
                turned_at_gap,
                stopped,
                at_rest,
                missing,
            ),
        },
    )
)
