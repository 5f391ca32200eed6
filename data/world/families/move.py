"""One entity moves in one direction: is the prompt followed at all?"""

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
    region,
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
from longtake.data.world.scene import DIRECTIONS, SIZES, Entity, Scene, Segment

# travel during the clip as a share of the shorter side; the third is faster or slower than training
SLOW, FAST, OOD = (0.16, 0.22), (0.28, 0.5), (0.10, 0.14)


def _words(entity: Entity, word: str, pace: str, place: str, is_image: bool) -> Words:
    noun, full = plain_noun(entity), full_noun(entity)
    if is_image:
        dense = f"A {full} at the {place} of a plain grey background."
        return Words(dense, f"a {noun}", "a thing", f"灰色背景上有一个{zh_noun(entity)}。")
    return Words(
        dense=f"A {full} starts at the {place} and moves {word} {pace} in a straight line "
        f"over a plain grey background. {STATIC_CAMERA}",
        short=f"a {noun} moves {word}",
        vague="something moves",
        zh=f"一个{zh_noun(entity)}在灰色背景上{ZH[pace]}向{ZH[word]}直线移动。{STATIC_CAMERA_ZH}",
    )


@family(
    "move",
    min_frames=1,
    chance={"colour": 1 / 6, "shape": 1 / 3, "size": 1 / 2, "direction": 1 / 4},
    blind={"colour": 1 / 6, "shape": 1 / 3, "size": 1 / 2, "direction": 1 / 4},
)
def compose(rng: np.random.Generator, canvas: Canvas) -> Composition:
    """Constant velocity, always wholly inside the frame."""
    verb = int(rng.integers(4))
    word = list(DIRECTIONS)[verb]
    ux, uy = DIRECTIONS[word]
    colour, shape = draw_look(rng, canvas, verb)
    size = list(SIZES)[rng.integers(2)]
    radius = canvas.radius(size)
    side, top, bottom = margins(shape, radius)
    low = np.array([side, top])
    free = np.array([canvas.width - side, canvas.height - bottom]) - low
    is_fast = bool(rng.random() < 0.5)
    share = rng.uniform(*(OOD if canvas.split == "ood" else FAST if is_fast else SLOW))
    pace = "quickly" if is_fast and canvas.split != "ood" else "slowly"
    step = np.array([ux, uy])
    travel = np.minimum(share * canvas.short_side, free) * step
    start = low + rng.random(2) * (free - abs(travel)) + np.maximum(-travel, 0)
    velocity = travel / max(canvas.frames - 1, 1)
    segment = Segment(0.0, float(start[0]), float(start[1]), float(velocity[0]), float(velocity[1]))
    entity = Entity(0, shape, colour, radius, (segment,), size)
    scene = Scene(
        canvas.frames, canvas.height, canvas.width, canvas.fps, (entity,), fixed_shot(rng, canvas)
    )
    place = region(start[0], start[1], canvas.width, canvas.height)
    is_image = canvas.frames == 1
    expect = {
        "colour": {"colours": [colour]},
        "shape": {"colour": colour, "shape": shape},
        "size": {"size": size},
    }
    if not is_image:
        expect["direction"] = {"word": word}
    flipped = replace(entity, colour=other_colour(colour, [colour]))
    return Composition(
        scene=scene,
        words=_words(entity, word, pace, place, is_image),
        wrong=_words(flipped, word, pace, place, is_image).dense,
        expect=expect,
        asked={"dense": list(expect), "short": [s for s in expect if s != "size"]},
    )
