"""One entity moves in one direction: is the prompt followed at all?"""

import numpy as np

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
    roomiest,
)
from longtake.data.world.faults import (
    CONSTANCY_FAULTS,
    STATIC_FAULTS,
    at_rest,
    blinking,
    half_gone,
    mirrored,
    missing,
    recoloured,
    recoloured_midway,
    reshaped,
    resized,
    split_in_two,
)
from longtake.data.world.language import PLACES, STATIC_CAMERA, STATIC_CAMERA_ZH, Words, within
from longtake.data.world.scene import DIRECTIONS, SIZES, Entity, Scene, Segment

# travel during the clip as a share of the shorter side; out of distribution it is slower than ever
PACES = {"slowly": (0.16, 0.22), "quickly": (0.28, 0.5)}
OOD = {"slowly": (0.10, 0.14), "quickly": (0.52, 0.6)}

LOOKS = (
    Ask("colour", {"colours": ["{colour}"]}, 1 / 6),
    Ask("shape", {"shape": "{shape}"}, lambda canvas: 1 / len(canvas.shapes)),
    Ask("size", {"size": "{size}"}, 1 / 2),
)
MOTION = (
    Ask("direction", {"word": "{direction}"}, 1 / 4),
    Ask("pace", {"pace": "{pace}"}, 1 / 2),
    Ask("count_constancy", {}, 1.0),
    CONSTANT,
    STATIC,
)


def _moving(way: str, place: str, zh_place: str, directions: tuple[str, str]) -> Form:
    return Form(
        dense=f"A {{size}} {{colour}} {{shape}} moves {{direction}} {{pace}} in a straight line "
        f"{way} the {place} of a plain grey background. {STATIC_CAMERA}",
        short="a {colour} {shape} moves {direction}",
        vague="something moves",
        zh=f"一个{{size}}的{{colour}}{{shape}}在灰色背景{zh_place}{{pace}}向{{direction}}直线移动。"
        f"{STATIC_CAMERA_ZH}",
        asks=(*LOOKS, *MOTION),
        flips=("colour", "shape", "direction"),
        choices={"direction": directions},
    )


FORMS = {
    "across": _moving("through", "{row}", "{row}", ("left", "right")),
    "upright": _moving("along", "{column}", "{column}", ("up", "down")),
    "image": Form(
        min_frames=1,
        dense="A {size} {colour} {shape} at the {place} of a plain grey background.",
        short="a {colour} {shape}",
        vague="a thing",
        zh="灰色背景的{place}有一个{size}的{colour}{shape}。",
        asks=LOOKS,
        flips=("colour", "shape"),
    ),
}


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    """Form and words: a direction with its place across it, or an image with its place."""
    verb = int(rng.integers(4))
    colour, shape = draw_look(rng, canvas, verb)
    words = {"colour": colour, "shape": shape, "size": pick(rng, tuple(SIZES))}
    if canvas.frames == 1:
        return "image", {**words, "place": pick(rng, tuple(PLACES))}
    words |= {"direction": tuple(DIRECTIONS)[verb], "pace": pick(rng, tuple(PACES))}
    if verb < 2:
        return "across", {**words, "row": pick(rng, ("top", "middle", "bottom"))}
    return "upright", {**words, "column": pick(rng, ("left", "middle", "right"))}


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """Constant velocity, always wholly inside the frame."""
    radius = canvas.radius(words["size"])
    side, top, bottom = roomiest(canvas.shapes, radius)
    low = np.array([side, top])
    free = np.array([canvas.width - side, canvas.height - bottom]) - low
    place = words["place"].split() if form == "image" else []
    row = next((w for w in place if w in ("top", "bottom")), words.get("row", "middle"))
    column = next((w for w in place if w in ("left", "right")), words.get("column", "middle"))
    step, travel = np.zeros(2), np.zeros(2)
    if form != "image":
        step = np.array(DIRECTIONS[words["direction"]])
        paces = OOD if canvas.split == "ood" else PACES
        share = rng.uniform(*paces[words["pace"]])
        travel = np.minimum(share * canvas.short_side, free) * step
    u, v = rng.random(2)
    start = np.array([within(column, 0, free[0], u), within(row, 0, free[1], v)])
    along = abs(step) > 0
    start[along] = u * (free - abs(travel))[along] + np.maximum(-travel, 0)[along]
    vx, vy = (travel / max(canvas.frames - 1, 1)).tolist()
    segment = Segment(0.0, *(low + start).tolist(), vx, vy)
    entity = Entity(0, words["shape"], words["colour"], radius, (segment,), words["size"])
    return canvas.scene(rng, entity)


register(
    Family(
        "move",
        failure="the prompt is ignored",
        forms=FORMS,
        draw=draw,
        build=build,
        min_frames=1,
        faults={
            "colour": (recoloured, missing),
            "shape": (reshaped,),
            "size": (resized,),
            "direction": (mirrored, at_rest),
            "pace": (at_rest,),
            "count_constancy": (blinking, half_gone, recoloured_midway, split_in_two),
            **CONSTANCY_FAULTS,
            **STATIC_FAULTS,
        },
    )
)
