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
CANDIDATES = 48


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


def _paths(rng: np.random.Generator, canvas: Canvas, edges: list, radii: list) -> list[np.ndarray]:
    """For each entity start x, y and end x, y, so that no two ever hide each other by half.

    Each is the first of some random candidates that keeps clear of those before it at every frame.
    """
    times = np.linspace(0.0, 1.0, max(2 * canvas.frames - 1, 1))[None, :, None]
    placed: list[tuple[np.ndarray, float]] = []
    chosen: list[np.ndarray] = []
    while len(chosen) < len(edges):
        (side, top, bottom), radius = edges[len(chosen)], radii[len(chosen)]
        low = np.array([side, top])
        free = np.array([canvas.width - side, canvas.height - bottom]) - low
        ends = low + rng.random((CANDIDATES, 2, 2)) * free  # candidate, start/end, x/y
        line = ends[:, None, 0] * (1 - times) + ends[:, None, 1] * times  # (K, T, 2)
        room = np.full(CANDIDATES, np.inf)
        for other, other_radius in placed:
            distance = np.hypot(*np.moveaxis(line - other, -1, 0)).min(axis=1)
            room = np.minimum(room, distance / (radius + other_radius))
        best = int(np.argmax(room >= 0.9))
        if room[best] < 0.9:  # a dead end: begin again
            placed, chosen = [], []
            continue
        placed.append((line[best], radius))
        chosen.append(ends[best].ravel())
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
    for i, (x, y, end_x, end_y) in enumerate(path.tolist() for path in paths):
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
