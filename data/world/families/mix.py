"""Two or three rules of the other families at once, each for a thing of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from longtake.data.world.detect import Detection
from longtake.data.world.families.camera import CAMERA, TEXTURE
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
)
from longtake.data.world.faults import (
    STATIC_FAULTS,
    at_rest,
    coloured_back,
    flickering,
    flipped,
    missing,
    recoloured_midway,
    redrawn,
    reshaped,
    reshaped_late,
    reversed_in_time,
    with_changes,
    with_motion,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Words
from longtake.data.world.scene import (
    COLOURS,
    DIRECTIONS,
    Change,
    Entity,
    Event,
    Scene,
    Segment,
    Shot,
)
from longtake.data.world.scorers import score_frames, scorer

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

RELATIONS = {"left": ("left of", "左边"), "right": ("right of", "右边")}
PANS = {word: CAMERA[word] for word in ("pan left", "pan right", "tilt up", "tilt down")}
SHARES, OOD_SHARES = (0.25, 0.4), (0.5, 0.6)  # of a way, in the shorter side
PAN, OOD_PAN = (0.3, 0.42), (0.2, 0.25)  # of the frame's size along it
MAX_PAN = 0.15  # of the shorter side in a frame: what turns must be seen to rest on its way
LEAN = 0.7  # how far a pair is out of line at most, as a share of its distance
GAP = 0.25  # px between things and the borders of their places
ROWS = ("top", "bottom")

MOVES = {"word": "{direction}", "colour": "{colour}"}
ALSO_MOVES = {"word": "{direction2}", "colour": "{colour2}"}
TURNS = {"start": "{colour2}", "end": "{colour3}"}
TURNS_PANNED = {"start": "{colour}", "end": "{colour2}"}
RELATED = {"one": "{colour2}", "two": "{colour3}", "word": "{relation}"}
PAIR, TRIO = (
    {"colours": ["{colour}", "{colour2}"]},
    {"colours": ["{colour}", "{colour2}", "{colour3}"]},
)
MIXED = 0.003  # another clip of the same form with the same colours and words
FIRST, ELSEWHERE = 1 / 6, 1 / 4  # of a colour to be the first thing's, or another's


def _looks_chance(canvas: Canvas) -> float:
    """Of a thing of the colour to be there and to have the asked shape."""
    return FIRST * max(1 / len(canvas.shapes), _held_out(canvas)) + ELSEWHERE / len(canvas.shapes)


def _direction_chance(canvas: Canvas) -> float:
    """Of a thing of the colour to be moving, and in the asked direction."""
    return 1 / 4 * max(1 / 4, _held_out(canvas))


def _held_out(canvas: Canvas) -> float:
    """How much the colour says of the look and the verb where only held-out triples are shown."""
    return 9 / (4 * len(canvas.shapes)) if canvas.split == "combo" else 0.0


STILL = replace(STATIC, chance=3 / 4)  # but for the form with a pan
LOOK = Ask("shape", {"shape": "{shape}", "colour": "{colour}"}, _looks_chance)
DIRECTION = Ask("direction", MOVES, _direction_chance)


def _named_chance(canvas: Canvas) -> float:
    """Over all forms: most often it is the one thing of a pan that is there, with its shape."""
    return 0.22 / len(canvas.shapes)


def _mix(*rules: dict[str, Any]) -> Ask:
    return Ask("mix", {"rules": list(rules)}, MIXED)


FORMS = {
    "march": Form(
        dense="A small {colour} {shape} moves {direction} at the {row} while a small {colour2} "
        "{shape2} moves {direction2} at the {row2} of a plain grey background. " + STATIC_CAMERA,
        short="a {colour} {shape} moves {direction} and a {colour2} {shape2} moves {direction2}",
        vague="two things move, each its own way",
        zh="灰色背景{row}一个小的{colour}{shape}向{direction}移动，同时{row2}一个小的{colour2}{shape2}"
        f"向{{direction2}}移动。{STATIC_CAMERA_ZH}",
        asks=(
            Ask("colour", PAIR, 1 / 30),
            LOOK,
            DIRECTION,
            _mix(
                {"colour": PAIR, "count_constancy": {}},
                {"direction": MOVES},
                {"direction": ALSO_MOVES},
            ),
            looks(look(), look("2"), chance=_named_chance),
            CONSTANT,
            STILL,
        ),
        flips=("colour", "direction", "direction2"),
        choices={"row": ROWS, "row2": ROWS},
    ),
    "turn": Form(
        dense="A small {colour} {shape} moves {direction} at the {row} while a small {colour2} "
        f"{{shape2}} at the {{row2}} of a plain grey background turns {{colour3}}. {STATIC_CAMERA}",
        short="a {colour} {shape} moves {direction} and a {colour2} {shape2} turns {colour3}",
        vague="one thing moves while another one changes",
        zh="灰色背景{row}一个小的{colour}{shape}向{direction}移动，同时{row2}一个小的{colour2}{shape2}"
        f"变成{{colour3}}。{STATIC_CAMERA_ZH}",
        asks=(
            LOOK,
            DIRECTION,
            Ask("turns", TURNS, 1 / 60),
            _mix({"direction": MOVES, "turns": TURNS}),
            looks(look(), look("2", turned="colour3"), chance=_named_chance),
            CONSTANT,
            STILL,
        ),
        flips=("direction", "colour3"),
        choices={"row": ROWS, "row2": ROWS},
    ),
    "trio": Form(
        dense="A small {colour} {shape} moves {direction} at the {row}. At the {row2} a small "
        "{colour2} {shape2} is {relation} a small {colour3} {shape3}. "
        f"Plain grey background. {STATIC_CAMERA}",
        short="a {colour} {shape} moves {direction}, {colour2} is {relation} {colour3}",
        vague="something moves, two things are side by side",
        zh="灰色背景{row}一个小的{colour}{shape}向{direction}移动。{row2}一个小的{colour2}{shape2}"
        f"在一个小的{{colour3}}{{shape3}}的{{relation}}。{STATIC_CAMERA_ZH}",
        asks=(
            Ask("colour", TRIO, 1 / 40),
            LOOK,
            DIRECTION,
            Ask("relation", RELATED, 1 / 80, blind=1 / 2),
            _mix(
                {"colour": TRIO, "count_constancy": {}}, {"direction": MOVES, "relation": RELATED}
            ),
            looks(look(), look("2"), look("3"), chance=_named_chance),
            CONSTANT,
            STILL,
        ),
        flips=("colour", "direction", "relation"),
        words={"relation": RELATIONS},
        choices={"row": ROWS, "row2": ROWS},
    ),
    "pan": Form(
        dense="A small {colour} {shape} on a textured grey background turns {colour2} while the "
        "camera {camera}.",
        short="a {colour} {shape} turns {colour2}, the camera {camera}",
        vague="something changes while the camera moves",
        zh="灰色纹理背景上一个小的{colour}{shape}变成{colour2}，同时镜头{camera}。",
        asks=(
            Ask("turns", TURNS_PANNED, 1 / 60),
            Ask("camera_word", {"word": "{camera}"}, 1 / 16),
            _mix({"turns": TURNS_PANNED, "camera_word": {"word": "{camera}"}}),
            looks(look(turned="colour2"), chance=_named_chance),
            CONSTANT,
        ),
        flips=("colour", "colour2", "camera"),
        words={"camera": PANS},
    ),
}


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    """The split holds out looks of the first thing; no two things have the same colour."""
    form = pick(rng, tuple(FORMS))
    verb = int(rng.integers(4))
    colours, shapes = [], []
    while len(colours) < 3:
        colour, shape = draw_look(rng, canvas, verb, taken=colours)
        colours.append(colour)
        shapes.append(shape)
    words = {"colour": colours[0], "shape": shapes[0], "colour2": colours[1]}
    if form == "pan":
        return form, {**words, "camera": tuple(PANS)[verb]}
    first = int(rng.integers(2))
    words |= {"shape2": shapes[1], "direction": tuple(DIRECTIONS)[verb]}
    words |= {"row": ROWS[first], "row2": ROWS[1 - first]}
    if form == "march":
        others = [d for d in DIRECTIONS if d != words["direction"]]
        return form, {**words, "direction2": pick(rng, others)}
    if form == "turn":
        return form, {**words, "colour3": colours[2]}
    related = {"colour3": colours[2], "shape3": shapes[2], "relation": pick(rng, tuple(RELATIONS))}
    return form, {**words, **related}


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """Each thing keeps to its own part of the frame, so no two ever touch."""
    turn = rng.uniform(0.4, 0.6) * (canvas.frames - 1)
    if form == "pan":
        return _panned(rng, canvas, words, turn)
    height, width = canvas.height / 2, canvas.width
    top, low = (0.0, height)[words["row"] == "bottom"], (0.0, height)[words["row2"] == "bottom"]
    mover = _thing(rng, canvas, words, 0, (0.0, top, width, height), words["direction"])
    if form == "march":
        box = (0.0, low, width, height)
        return canvas.scene(rng, mover, _thing(rng, canvas, words, 1, box, words["direction2"]))
    if form == "turn":
        turning = _thing(rng, canvas, words, 1, (0.0, low, width, height))
        changes = (Change(turn, "colour", words["colour3"]),)
        events = (Event(turn, "turn", (1,)),)
        return canvas.scene(rng, mover, replace(turning, changes=changes), events=events)
    halves = (0.0, width / 2) if words["relation"] == "left" else (width / 2, 0.0)
    pair = [
        _thing(rng, canvas, words, 1 + i, (left, low, width / 2, height))
        for i, left in enumerate(halves)
    ]
    return canvas.scene(rng, mover, pair[0], _beside(*pair))


def _beside(one: Entity, two: Entity) -> Entity:
    """The second thing, no further out of line with the first than LEAN of their distance."""
    (here,), (there,) = one.motion, two.motion
    most = LEAN * abs(there.x - here.x)
    y = here.y + min(max(there.y - here.y, -most), most)
    return replace(two, motion=(replace(there, y=y),))


def _thing(
    rng: np.random.Generator,
    canvas: Canvas,
    words: Words,
    number: int,
    box: tuple[float, float, float, float],
    direction: str = "",
) -> Entity:
    """A small thing that moves, or rests, inside a box (left, top, width, height) of the frame."""
    n = str(number + 1) if number else ""
    shape, radius = words[f"shape{n}"], canvas.radius("small")
    side, up, down = margins(shape, radius, GAP)
    low = np.array([box[0] + side, box[1] + up])
    free = np.array([box[2] - 2 * side, box[3] - up - down])
    share = rng.uniform(*(OOD_SHARES if canvas.split == "ood" else SHARES))
    way = np.minimum(share * canvas.short_side, free) * DIRECTIONS.get(direction, (0, 0))
    start = low + rng.random(2) * (free - abs(way)) + np.maximum(-way, 0)
    path = Segment(0.0, *start.tolist(), *(way / (canvas.frames - 1)).tolist())
    return Entity(number, shape, words[f"colour{n}"], radius, (path,))


def _panned(rng: np.random.Generator, canvas: Canvas, words: Words, turn: float) -> Scene:
    """The thing rests on the ground and stays in the picture that slides over it."""
    radius = canvas.radius("small")
    side, up, down = margins(words["shape"], radius)
    size = np.array([canvas.width, canvas.height])
    low, free = np.array([side, up]), size - np.array([2 * side, up + down])
    share = rng.uniform(*(OOD_PAN if canvas.split == "ood" else PAN))
    way = np.minimum(share * size, 0.9 * free)
    way = np.minimum(way, MAX_PAN * canvas.short_side * (canvas.frames - 1))
    shift = way * DIRECTIONS[words["camera"].split()[-1]]
    at = low + rng.random(2) * (free - abs(shift)) + np.maximum(shift, 0)
    thing = Entity(
        0,
        words["shape"],
        words["colour"],
        radius,
        (Segment(0.0, *at.tolist()),),
        changes=(Change(turn, "colour", words["colour2"]),),
    )
    vx, vy = (shift / (canvas.frames - 1)).tolist()
    shot = Shot(0, *canvas.centre, background=int(rng.integers(2**31)), vx=vx, vy=vy)
    events = (Event(turn, "turn", (0,)),)
    return canvas.scene(rng, thing, shots=(shot,), texture=TEXTURE, events=events)


@scorer
def turns(seen: Detection, start: str, end: str) -> float:
    """A thing takes another colour, once and for good, and stays where it was on its way."""
    parts = seen.saturated & np.isin(seen.label, [COLOURS.index(start), COLOURS.index(end)])
    area = parts.sum((1, 2))  # (T,)
    if area.min() < max(0.5 * np.median(area), 1):
        return 0.0
    turned = (parts & (seen.label == COLOURS.index(end))).sum((1, 2)) / area
    if turned[0] > 0.2 or turned[-1] < 0.8 or (np.diff(turned) < -0.2).any():
        return 0.0
    row, column = np.indices(parts.shape[1:])
    place = np.stack([(parts * at).sum((1, 2)) / area for at in (row, column)])
    return abs(np.diff(place)).max() < 0.2 * seen.side


@scorer
def mix(seen: Detection, rules: Sequence[Mapping[str, Mapping[str, Any]]]) -> float:
    """All rules, scores with their parameters, are obeyed at once."""
    return all(min(score_frames(seen, rule).values()) == 1 for rule in rules)


def exchanged(clip: WorldClip) -> np.ndarray | None:
    """The first and the last thing have each other's colour."""
    if clip.form == "pan":
        return None
    first, *rest, last = clip.scene.entities
    swapped = (replace(first, colour=last.colour), *rest, replace(last, colour=first.colour))
    return redrawn(clip, lambda scene: replace(scene, entities=swapped))


def first_rule_broken(clip: WorldClip) -> np.ndarray:
    """The first thing does not do what it should."""
    return with_changes(clip, 0) if clip.form == "pan" else at_rest(clip)


def second_rule_broken(clip: WorldClip) -> np.ndarray:
    """The first thing does what it should, the rest is not as asked."""
    if clip.form == "pan":
        return unpanned(clip)
    if clip.form == "turn":
        return with_changes(clip, 1)
    others = clip.scene.entities[1:]
    if clip.form == "march":
        path = others[0].motion[0]
        return with_motion(clip, 1, replace(path, vx=0.0, vy=0.0))
    swapped = [replace(e, motion=o.motion) for e, o in zip(others, others[::-1], strict=True)]
    return redrawn(clip, lambda scene: replace(scene, entities=(scene.entities[0], *swapped)))


def unpanned(clip: WorldClip) -> np.ndarray:
    """The camera rests."""
    shot = replace(clip.scene.shots[0], vx=0.0, vy=0.0)
    return redrawn(clip, lambda scene: replace(scene, shots=(shot,)))


def unturned(clip: WorldClip) -> np.ndarray:
    """Nothing takes another colour."""
    return with_changes(clip, _turner(clip))


def turned_back(clip: WorldClip) -> np.ndarray:
    """What turned has its old colour again in the end."""
    return coloured_back(clip, _turner(clip))


def _turner(clip: WorldClip) -> int:
    return 0 if clip.form == "pan" else 1


def other_way(clip: WorldClip) -> np.ndarray:
    """The first thing goes the other way."""
    path = clip.scene.entities[0].motion[0]
    steps = clip.scene.frames - 1
    end = (path.x + path.vx * steps, path.y + path.vy * steps)
    return with_motion(clip, 0, Segment(0.0, *end, -path.vx, -path.vy))


register(
    Family(
        "mix",
        failure="rules that hold alone break together",
        forms=FORMS,
        draw=draw,
        build=build,
        faults={
            "colour": (recoloured_midway, missing),
            "shape": (reshaped,),
            "direction": (at_rest, other_way),
            "looks": (reshaped, missing),
            "consistency": (flickering, reshaped_late),
            **STATIC_FAULTS,
            "turns": (unturned, turned_back, reversed_in_time),
            "relation": (flipped,),
            "camera_word": (unpanned, reversed_in_time),
            "mix": (exchanged, first_rule_broken, second_rule_broken, missing),
        },
    )
)
