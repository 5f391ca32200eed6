"""A hits B off its centre: B goes off along the line of their centres, A the other way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from longtake.data.world.families.collide import (
    GAP,
    TRAVEL,
    effect_first,
    goes_on,
    later_effect,
    no_effect,
    run_through,
)
from longtake.data.world.families.registry import (
    CONSTANT,
    STATIC,
    Ask,
    Canvas,
    Family,
    Form,
    draw_look,
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
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Words
from longtake.data.world.scene import DIRECTIONS, Entity, Event, Scene, Segment

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

OOD_TRAVEL = (0.68, 0.75)  # of the way there is
# angle of the line of centres to the hitter's way, degrees; flatter than ever out of distribution
ANGLES, OOD_ANGLES = (36.0, 54.0), (26.0, 32.0)


def other_side(clip: WorldClip) -> np.ndarray:
    """Both go off to the side where the other should be."""
    word = clip.words["direction"]
    return clip.frames[:, ::-1] if word in ("left", "right") else clip.frames[:, :, ::-1]


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    verb, side = int(rng.integers(4)), int(rng.integers(2))
    colour, _ = draw_look(rng, canvas, verb, shapes=("circle",))
    colour2, _ = draw_look(rng, canvas, verb, taken=[colour], shapes=("circle",))
    form = ("across", "upright")[verb // 2]
    words = {"colour": colour, "colour2": colour2, "direction": tuple(DIRECTIONS)[verb]}
    return form, {**words, "direction2": SIDES[form][side]}


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """Elastic and of equal mass: the target takes the velocity along the line of centres, the
    hitter keeps what is across it, so they part at a right angle."""
    ahead, aside = (
        np.array(DIRECTIONS[words["direction"]]),
        np.array(DIRECTIONS[words["direction2"]]),
    )
    size = np.array([canvas.width, canvas.height])
    radius, steps = canvas.radius("small"), canvas.frames - 1
    angle = np.radians(rng.uniform(*(OOD_ANGLES if canvas.split == "ood" else ANGLES)))
    share = rng.uniform(0.42, 0.58)  # of the clip until they touch
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    low = radius + GAP
    length, breadth = abs(ahead) @ size - 2 * low, abs(aside) @ size - 2 * low
    # the ways ahead and aside of the pair, but for the travel that the hitter would have had alone
    reach, spread = share + cos * cos * (1 - share), 2 * sin * cos * (1 - share)
    longest = min((length - 2 * radius * cos) / reach, (breadth - 2 * radius * sin) / spread)
    travel = rng.uniform(*(OOD_TRAVEL if canvas.split == "ood" else TRAVEL)) * longest
    start = low + rng.random() * (length - 2 * radius * cos - travel * reach)
    across = low + travel * spread / 2
    across += rng.random() * (breadth - 2 * radius * sin - travel * spread)

    def place(along: float, beside: float) -> np.ndarray:
        """A point so far ahead and aside of the corner where the two ways begin."""
        return size * (ahead + aside < 0) + along * ahead + beside * aside

    contact, velocity = share * steps, ahead * (travel / steps)
    line = cos * ahead + sin * aside
    kick = (velocity @ line) * line
    hit = place(start + travel * share, across)
    rest = hit + 2 * radius * line
    came = _path(0.0, place(start, across), velocity), _path(contact, hit, velocity - kick)
    went = _path(0.0, rest, np.zeros(2)), _path(contact, rest, kick)
    hitter = Entity(0, "circle", words["colour"], radius, came)
    target = Entity(1, "circle", words["colour2"], radius, went)
    return canvas.scene(rng, hitter, target, events=(Event(contact, "contact", (0, 1)),))


def _path(start: float, at: np.ndarray, velocity: np.ndarray) -> Segment:
    return Segment(start, *at.tolist(), *velocity.tolist())


SIDES = {"across": ("up", "down"), "upright": ("left", "right")}
LOOKS = [{"shape": "circle", "colours": [slot]} for slot in ("{colour}", "{colour2}")]
WORDS = {
    "hitter": "{colour}",
    "target": "{colour2}",
    "word": "{direction}",
    "aside": "{direction2}",
}


def _form(directions: tuple[str, str], sides: tuple[str, str]) -> Form:
    return Form(
        dense="A small {colour} circle moves {direction} and hits a still small {colour2} circle "
        "off its centre. The {colour2} circle moves off {direction} and {direction2}, the "
        f"{{colour}} circle goes on to the other side. Plain grey background. {STATIC_CAMERA}",
        short="a {colour} circle moves {direction} and hits a {colour2} circle {direction2}",
        vague="something hits something off its centre",
        zh="一个小的{colour}圆形向{direction}移动，斜着撞上静止的小的{colour2}圆形。后者向{direction}"
        f"{{direction2}}方移开，前者偏向另一侧继续移动。灰色背景。{STATIC_CAMERA_ZH}",
        asks=(
            Ask("colour", {"colours": ["{colour}", "{colour2}"]}, 1 / 15),
            Ask("causal", WORDS, lambda canvas: 1 / (40 if canvas.split == "combo" else 240)),
            Ask("looks", {"looks": LOOKS}, 1 / 15),
            Ask("count_constancy", {}, 1.0),
            CONSTANT,
            STATIC,
        ),
        flips=("colour", "colour2", "direction", "direction2"),
        choices={"direction": directions, "direction2": sides},
    )


FORMS = {
    "across": _form(("left", "right"), SIDES["across"]),
    "upright": _form(("up", "down"), SIDES["upright"]),
}

register(
    Family(
        "billiard",
        failure="things part the wrong way after a glancing hit",
        forms=FORMS,
        draw=draw,
        build=build,
        faults={
            "colour": (recoloured, missing),
            "looks": (reshaped, missing),
            "causal": (
                mirrored,
                other_side,
                no_effect,
                at_rest,
                effect_first,
                goes_on,
                run_through,
            ),
            "count_constancy": (half_gone,),
            **CONSTANCY_FAULTS,
            **STATIC_FAULTS,
        },
        nudge=later_effect,
    )
)
