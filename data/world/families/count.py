"""One to six entities on crossing paths: do subjects multiply, merge or vanish?"""

from dataclasses import replace

import numpy as np

from longtake.data.world.captions import (
    NUMBERS,
    STATIC_CAMERA,
    STATIC_CAMERA_ZH,
    ZH,
    ZH_NUMBERS,
    Words,
    full_noun,
    join,
    other_colour,
    plain_noun,
)
from longtake.data.world.families.registry import (
    Canvas,
    Composition,
    draw_look,
    family,
    fixed_shot,
    margins,
)
from longtake.data.world.scene import COLOURS, SIZES, Entity, Scene, Segment

MAX_TRAINED = 4
CANDIDATES = 64
CLEARANCE = 0.9  # least distance of two centres, in the sum of their radii


def _words(entities: list[Entity], is_image: bool) -> Words:
    number = NUMBERS[len(entities)]
    shapes = {e.shape for e in entities}
    plural = f"{shapes.pop()}s" if len(shapes) == 1 else "shapes"
    if len(entities) == 1:
        head = "One shape"
        short = f"one {plain_noun(entities[0])}"
        vague = "a thing"
    else:
        head = f"{number.capitalize()} {plural}"
        short = f"{number} {plural}: {join([e.colour for e in entities])}"
        vague = "some things"
    listing = join([f"a {full_noun(e)}" for e in entities])
    zh_count = f"{ZH_NUMBERS[len(entities)]}个图形"
    zh_list = "、".join(f"{ZH[e.size]}的{ZH[e.colour]}{ZH[e.shape]}" for e in entities)
    if is_image:
        dense = f"{head} on a plain grey background: {listing}."
        return Words(dense, short, vague, f"灰色背景上有{zh_count}：{zh_list}。")
    verb = "drifts" if len(entities) == 1 else "drift"
    return Words(
        dense=f"{head} {verb} on a plain grey background: {listing}. {STATIC_CAMERA}",
        short=short,
        vague=vague,
        zh=f"{zh_count}在灰色背景上飘动：{zh_list}。{STATIC_CAMERA_ZH}",
    )


def _closest(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Least length of a vector (K, 2) that goes linearly from `start` to `end`, (K,)."""
    way = end - start
    at = np.clip(-(start * way).sum(1) / np.maximum((way * way).sum(1), 1e-9), 0.0, 1.0)
    nearest = start + way * at[:, None]
    return np.sqrt((nearest * nearest).sum(1))


def _paths(rng: np.random.Generator, canvas: Canvas, edges: list, radii: list) -> list[np.ndarray]:
    """Start and end (2, 2) of every entity, so that no two ever hide much of each other.

    Each is the first of some random candidates that keeps clear of those before it at every time.
    """
    size = np.array([canvas.width, canvas.height])
    longest = 1.0 if len(edges) <= MAX_TRAINED else 0.5
    chosen: list[np.ndarray] = []
    while len(chosen) < len(edges):
        (side, top, bottom), radius = edges[len(chosen)], radii[len(chosen)]
        low = np.array([side, top])
        ends = low + rng.random((2, CANDIDATES, 2)) * (size - np.array([side, bottom]) - low)
        ends[1] = ends[0] + (ends[1] - ends[0]) * rng.uniform(0.0, longest, (CANDIDATES, 1))
        room = np.full(CANDIDATES, np.inf)
        for other, other_radius in zip(chosen, radii, strict=False):
            distance = _closest(ends[0] - other[0], ends[1] - other[1])
            room = np.minimum(room, distance / (radius + other_radius))
        best = int(np.argmax(room >= CLEARANCE))
        if room[best] >= CLEARANCE:
            chosen.append(ends[:, best])
        else:
            chosen = []  # a dead end: begin again
    return chosen


@family(
    "count",
    min_frames=1,
    chance={"count": 1 / 4, "count_constancy": 1.0},
    blind={"count": 1 / 4, "count_constancy": 1.0},
)
def compose(rng: np.random.Generator, canvas: Canvas) -> Composition:
    """Straight paths that may cross; colours are all different, so a twin is always a fault."""
    is_ood = canvas.split == "ood"
    number = int(rng.integers(MAX_TRAINED + 1, 7) if is_ood else rng.integers(1, MAX_TRAINED + 1))
    verb = number % 4
    looks = [draw_look(rng, canvas, verb)]
    while len(looks) < number:
        looks.append(draw_look(rng, canvas, verb, taken=[colour for colour, _ in looks]))
    if rng.random() < 0.5 and canvas.split == "train":
        shared = looks[0][1]
        looks = [(colour, shared) for colour, _ in looks]
    is_roomy = number <= 3 and canvas.short_side >= 24
    sizes = [list(SIZES)[rng.integers(2)] if is_roomy else "small" for _ in looks]
    radii = [canvas.radius(size) for size in sizes]
    edges = [margins(shape, r, 0.3) for (_, shape), r in zip(looks, radii, strict=True)]
    paths = _paths(rng, canvas, edges, radii)
    steps = max(canvas.frames - 1, 1)
    entities = []
    for i, (x, y, end_x, end_y) in enumerate(path.ravel().tolist() for path in paths):
        segment = Segment(0.0, x, y, (end_x - x) / steps, (end_y - y) / steps)
        colour, shape = looks[i]
        entities.append(Entity(i, shape, colour, radii[i], (segment,), sizes[i], layer=i))
    scene = Scene(
        canvas.frames,
        canvas.height,
        canvas.width,
        canvas.fps,
        tuple(entities),
        fixed_shot(rng, canvas),
    )
    is_image = canvas.frames == 1
    expect: dict[str, dict] = {"count": {"count": number}}
    if not is_image:
        expect["count_constancy"] = {}
    if number < len(COLOURS):
        flipped = replace(entities[0], colour=other_colour(looks[0][0], [c for c, _ in looks]))
    else:
        flipped = replace(entities[0], size={"small": "large", "large": "small"}[sizes[0]])
    return Composition(
        scene=scene,
        words=_words(entities, is_image),
        wrong=_words([flipped, *entities[1:]], is_image).dense,
        expect=expect,
        asked={"dense": list(expect), "short": list(expect)},
    )
