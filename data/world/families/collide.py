"""A runs into B: B moves off only then, and A stops. Cause and effect."""

import numpy as np

from longtake.data.world.captions import (
    STATIC_CAMERA,
    STATIC_CAMERA_ZH,
    ZH,
    Words,
    full_noun,
    plain_noun,
    zh_noun,
)
from longtake.data.world.families.registry import (
    Canvas,
    Composition,
    draw_look,
    family,
    fixed_shot,
    margins,
)
from longtake.data.world.scene import DIRECTIONS, EXTENTS, Entity, Event, Scene, Segment

SHAPES = ("circle", "square")  # their contact along an axis is exact
GAP = 0.3
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def _words(hitter: Entity, target: Entity, word: str) -> Words:
    one, two = plain_noun(hitter), plain_noun(target)
    return Words(
        dense=f"A {full_noun(hitter)} moves {word} and hits a {full_noun(target)} that was still. "
        f"The {one} stops and the {two} moves off {word}. Plain grey background. {STATIC_CAMERA}",
        short=f"a {one} moves {word} and hits a {two}",
        vague="something hits something",
        zh=f"一个{zh_noun(hitter)}向{ZH[word]}移动，撞上静止的{zh_noun(target)}。前者停下，"
        f"后者向{ZH[word]}移开。{STATIC_CAMERA_ZH}",
    )


def _entity(number: int, look: tuple[str, str], radius: float, *path: Segment) -> Entity:
    colour, shape = look
    return Entity(number, shape, colour, radius, path)


@family(
    "collide",
    min_frames=5,
    chance={"colour": 1 / 15, "causal": 1 / 120, "count_constancy": 1.0},
    blind={"colour": 1 / 15, "causal": 0.0, "count_constancy": 1.0},
)
def compose(rng: np.random.Generator, canvas: Canvas) -> Composition:
    """Elastic and of equal mass, along one axis: the velocity passes from one to the other."""
    verb = int(rng.integers(4))
    word = list(DIRECTIONS)[verb]
    direction = np.array(DIRECTIONS[word], np.float64)
    first = draw_look(rng, canvas, verb, shapes=SHAPES)
    second = draw_look(rng, canvas, verb, taken=[first[0]], shapes=SHAPES)
    radius = canvas.radius("small")
    reach = [EXTENTS[shape][0] * radius for _, shape in (first, second)]
    length, breadth = canvas.width, canvas.height
    if direction[1]:
        length, breadth = breadth, length
    steps = canvas.frames - 1
    longest = length - 2 * sum(reach) - 2 * GAP
    travel = longest * (0.6 if canvas.split == "ood" else rng.uniform(0.88, 1.0))
    start = reach[0] + GAP + rng.random() * (longest - travel)
    speed = travel / steps
    contact = rng.uniform(0.42, 0.58) * steps  # in frames
    edge = max(margins(shape, radius, GAP)[0] for _, shape in (first, second))
    across = edge + rng.random() * (breadth - 2 * edge)
    stop = start + speed * contact
    rest = stop + sum(reach)
    if direction.sum() < 0:
        start, stop, rest = length - start, length - stop, length - rest

    def place(along: float) -> tuple[float, float]:
        return (along, across) if direction[0] else (across, along)

    vx, vy = (direction * speed).tolist()
    struck = Segment(contact, *place(rest), vx, vy)
    still = Segment(contact, *place(stop))
    hitter = _entity(0, first, radius, Segment(0.0, *place(start), vx, vy), still)
    target = _entity(1, second, radius, Segment(0.0, *place(rest)), struck)
    scene = Scene(
        canvas.frames,
        canvas.height,
        canvas.width,
        canvas.fps,
        (hitter, target),
        fixed_shot(rng, canvas),
        (Event(contact, "contact", (0, 1)),),
    )
    expect = {
        "colour": {"colours": [first[0], second[0]]},
        "causal": {"hitter": first[0], "target": second[0], "word": word},
        "count_constancy": {},
    }
    return Composition(
        scene=scene,
        words=_words(hitter, target, word),
        wrong=_words(hitter, target, OPPOSITE[word]).dense,
        expect=expect,
        asked={"dense": list(expect), "short": list(expect)},
    )
