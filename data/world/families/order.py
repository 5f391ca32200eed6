"""One thing turns another colour, another moves: do both happen, and in the asked order?"""

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
    draw_look,
    look,
    looks,
    margins,
    pick,
    register,
    still,
)
from longtake.data.world.faults import (
    CONSTANCY_FAULTS,
    STATIC_FAULTS,
    coloured_back,
    mirrored,
    redrawn,
    reshaped,
    resized,
    with_changes,
    with_motion,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Words
from longtake.data.world.scene import (
    COLOURS,
    DIRECTIONS,
    SIZES,
    Change,
    Entity,
    Event,
    Scene,
    Segment,
)
from longtake.data.world.scorers import MIN_MOVE, along, scorer

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

ORDER = {"before": ("before", "之前"), "after": ("after", "之后")}
TRAVEL = (0.25, 0.4)  # of the shorter side; farther in the same time out of distribution
OOD_TRAVEL = (0.45, 0.55)


def _looks_chance(canvas: Canvas) -> float:
    """That the mover's colour is there, and one of the turning thing's, with their shapes."""
    return 0.1 / len(canvas.shapes) ** 2


def _form(slot: str, places: tuple[str, str], directions: tuple[str, str]) -> Form:
    return Form(
        dense=f"A {{size}} {{colour}} {{shape}} on the {{{slot}}} turns {{colour2}} {{order}} a "
        f"small {{colour3}} {{shape2}} on the {{{slot}2}} moves {{direction}} on a plain grey "
        f"background. {STATIC_CAMERA}",
        short="a {colour} {shape} turns {colour2} {order} a {colour3} one moves {direction}",
        vague="one thing changes and another one moves",
        zh=f"灰色背景上，{{{slot}2}}一个小的{{colour3}}{{shape2}}向{{direction}}移动{{order}}，"
        f"{{{slot}}}一个{{size}}的{{colour}}{{shape}}变成{{colour2}}。{STATIC_CAMERA_ZH}",
        asks=(
            Ask(
                "order",
                {
                    "start": "{colour}",
                    "end": "{colour2}",
                    "mover": "{colour3}",
                    "word": "{direction}",
                    "order": "{order}",
                },
                chance=0.0,
                blind=1 / 2,
            ),
            looks(look(turned="colour2"), chance=_looks_chance),
            looks(
                look(turned="colour2", sized=True),
                {**look("2"), "colours": ["{colour3}"]},
                chance=_looks_chance,
            ),
            CONSTANT,
            STATIC,
        ),
        flips=("order", "colour2", "direction"),
        words={"order": ORDER},
        choices={"direction": directions, slot: places, f"{slot}2": places},
    )


FORMS = {
    "across": _form("row", ("top", "bottom"), ("left", "right")),
    "upright": _form("column", ("left", "right"), ("up", "down")),
}


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    """Who turns and who moves, where, and which of it is first."""
    order = int(rng.integers(2))
    colour, shape = draw_look(rng, canvas, order)
    end = pick(rng, [c for c in COLOURS if c != colour])
    mover, shape2 = draw_look(rng, canvas, order, taken=(colour, end))
    words = {"size": pick(rng, tuple(SIZES)), "colour": colour, "shape": shape, "colour2": end}
    words |= {"order": tuple(ORDER)[order], "colour3": mover, "shape2": shape2}
    form, slot = (("across", "row"), ("upright", "column"))[rng.integers(2)]
    first = int(rng.integers(2))
    places = FORMS[form].choices[slot]
    words |= {slot: places[first], f"{slot}2": places[1 - first]}
    return form, {**words, "direction": pick(rng, FORMS[form].choices["direction"])}


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """Both events fill a window of time of the same length, with rest before, between and after."""
    last = canvas.frames - 1
    lasting = max(1.0, 0.2 * last)
    wait = max(1.0, float(np.floor(rng.uniform(0.16, 0.24) * last)))
    windows = (wait, last - wait - lasting)
    turn, move = windows if words["order"] == "before" else windows[::-1]
    turn += lasting / 2
    radii = (canvas.radius(words["size"]), canvas.radius("small"))
    (x, y), (x2, y2) = _side_by_side(rng, canvas, form, words, radii)
    side, top, bottom = margins(words["shape2"], radii[1])
    low, high = (side, canvas.width - side) if form == "across" else (top, canvas.height - bottom)
    share = rng.uniform(*(OOD_TRAVEL if canvas.split == "ood" else TRAVEL))
    dx, dy = DIRECTIONS[words["direction"]]
    way = min(share * canvas.short_side, high - low)
    start = low + rng.random() * (high - low - way) + (way if dx + dy < 0 else 0.0)
    x2, y2 = (start, y2) if form == "across" else (x2, start)
    motion = (
        *still(x2, y2),
        Segment(move, x2, y2, dx * way / lasting, dy * way / lasting),
        Segment(move + lasting, x2 + dx * way, y2 + dy * way),
    )
    turning = (Change(turn, "colour", words["colour2"]),)
    return canvas.scene(
        rng,
        Entity(
            0,
            words["shape"],
            words["colour"],
            radii[0],
            still(x, y),
            words["size"],
            changes=turning,
        ),
        Entity(1, words["shape2"], words["colour3"], radii[1], motion),
        events=(
            Event(turn, "turn", (0,)),
            Event(move, "move", (1,)),
            Event(move + lasting, "stop", (1,)),
        ),
    )


def _side_by_side(
    rng: np.random.Generator,
    canvas: Canvas,
    form: str,
    words: Words,
    radii: tuple[float, float],
) -> np.ndarray:
    """Places (entity, x/y) at the asked sides of the frame, so that neither is in the other's way.

    Each takes at most half of the room that the two leave.
    """
    edges = [margins(words[s], r) for s, r in zip(("shape", "shape2"), radii, strict=True)]
    low = np.array([(side, top) for side, top, _ in edges])
    high = (canvas.width, canvas.height) - np.array([(side, bottom) for side, _, bottom in edges])
    at = low + rng.random((2, 2)) * (high - low)
    shares = rng.random(2) / 2
    axis, slot = (1, "row") if form == "across" else (0, "column")
    first = 0 if words[slot] in ("top", "left") else 1
    second = 1 - first
    size = (canvas.width, canvas.height)[axis]
    room = high[first, axis] + high[second, axis] - low[first, axis] - low[second, axis] - size
    at[first, axis] = low[first, axis] + shares[0] * room
    at[second, axis] = high[second, axis] - shares[1] * room
    return at


@scorer
def order(seen: Detection, start: str, end: str, mover: str, word: str, order: str) -> float:
    """One thing turns and another moves, each once and for good, the one in the asked order.

    At the end of the earlier event the later one has not begun in at least one frame.
    """
    turned, track = seen.turning(start, end), seen.tracks.get(mover)
    if turned is None or track is None or (track.blobs != 1).any():
        return 0.0
    if set(seen.tracks) - {start, end, mover}:
        return 0.0
    place = along(track, word)
    way = place[-1] - place[0]
    astray = np.ptp(track.y if word in ("left", "right") else track.x)
    if way < 2 * MIN_MOVE * seen.side or astray > max(0.3 * way, MIN_MOVE * seen.side):
        return 0.0
    turn, move = _span(turned), _span((place - place[0]) / way)
    if turn is None or move is None:
        return 0.0
    (one, other) = (turn, move) if order == "before" else (move, turn)
    return one[1] <= other[0]


def _span(share: np.ndarray) -> tuple[int, int] | None:
    """Last frame before and first frame after a change, of which `share` (T,) has happened.

    None where it goes back on the way, or has happened or not yet ended outside the clip.
    """
    is_over = share > 0.8
    begin, end = int(np.argmax(share > 0.2)) - 1, int(np.argmax(is_over))
    return (begin, end) if begin >= 0 and is_over[end:].all() and share.max() < 1.2 else None


def _retimed(clip: WorldClip, turn: float, move: float) -> np.ndarray:
    """Frames with the two events at other times."""
    one, two = clip.scene.entities
    first, going, end = two.motion
    by = move - going.start
    motion = (first, replace(going, start=move), replace(end, start=end.start + by))
    one = replace(one, changes=(replace(one.changes[0], start=turn),))
    return redrawn(clip, lambda s: replace(s, entities=(one, replace(two, motion=motion))))


def in_other_order(clip: WorldClip) -> np.ndarray:
    """What should come second comes first."""
    turn, move, stop = (event.time for event in clip.scene.events)
    return _retimed(clip, (move + stop) / 2, turn - (stop - move) / 2)


def at_once(clip: WorldClip) -> np.ndarray:
    """The one moves while the other turns."""
    _, move, stop = (event.time for event in clip.scene.events)
    return _retimed(clip, (move + stop) / 2, move)


def unturned(clip: WorldClip) -> np.ndarray:
    """The one keeps its colour."""
    return with_changes(clip, 0)


def unmoved(clip: WorldClip) -> np.ndarray:
    """The other stays where it is."""
    return with_motion(clip, 1, clip.scene.entities[1].motion[0])


def turned_back(clip: WorldClip) -> np.ndarray:
    """The one has its old colour again in the end."""
    return coloured_back(clip, 0)


def moved_back(clip: WorldClip) -> np.ndarray:
    """The other is back at its old place in the end."""
    motion = clip.scene.entities[1].motion
    return with_motion(clip, 1, *motion, replace(motion[0], start=clip.scene.frames - 1))


register(
    Family(
        "order",
        failure="events happen in another order, or not at all",
        forms=FORMS,
        draw=draw,
        build=build,
        faults={
            "looks": (reshaped, resized),
            **CONSTANCY_FAULTS,
            **STATIC_FAULTS,
            "order": (
                in_other_order,
                at_once,
                unturned,
                unmoved,
                turned_back,
                moved_back,
                mirrored,
            ),
        },
    )
)
