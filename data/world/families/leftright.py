"""Two entities side by side, named in either order: are spatial words obeyed?"""

from dataclasses import replace

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
from longtake.data.world.scene import SIZES, Entity, Scene, Segment

MOTIONS = ("stay still", "move up", "move down")


def _words(first: Entity, second: Entity, relation: str, motion: str) -> Words:
    short = f"a {plain_noun(first)} {relation} of a {plain_noun(second)}"
    dense = f"A {full_noun(first)} is {relation} of a {full_noun(second)}"
    zh = f"一个{zh_noun(first)}在一个{zh_noun(second)}的{ZH[relation]}边"
    if motion == "image":
        return Words(f"{dense}.", short, "two things side by side", f"{zh}。")
    zh_motion = "都静止不动" if motion == "stay still" else f"一起向{ZH[motion.split()[1]]}移动"
    return Words(
        dense=f"{dense} on a plain grey background. Both {motion}. {STATIC_CAMERA}",
        short=short if motion == "stay still" else f"{short}, both {motion}",
        vague="two things side by side",
        zh=f"{zh}，它们{zh_motion}。{STATIC_CAMERA_ZH}",
    )


@family(
    "leftright",
    min_frames=1,
    chance={"colour": 1 / 15, "left_right": 1 / 30, "count_constancy": 1.0},
    blind={"colour": 1 / 15, "left_right": 1 / 2, "count_constancy": 1.0},
)
def compose(rng: np.random.Generator, canvas: Canvas) -> Composition:
    """The pair keeps its distance and either rests or drifts up or down together."""
    verb = int(rng.integers(2))
    relation = ("left", "right")[verb]
    looks = [draw_look(rng, canvas, verb)]
    looks.append(draw_look(rng, canvas, verb, taken=[looks[0][0]]))
    is_roomy = canvas.width >= 1.4 * canvas.short_side or canvas.short_side >= 24
    sizes = [list(SIZES)[rng.integers(2)] if is_roomy else "small" for _ in looks]
    radii = [canvas.radius(size) for size in sizes]
    edges = [margins(shape, r) for (_, shape), r in zip(looks, radii, strict=True)]
    on_left = 0 if relation == "left" else 1
    need = 2 * edges[0][0] + 2 * edges[1][0]
    slack = (canvas.width - need) * rng.dirichlet((1.0, 1.0, 1.0))
    x = np.empty(2)
    x[on_left] = slack[0] + edges[on_left][0]
    x[1 - on_left] = canvas.width - slack[2] - edges[1 - on_left][0]
    motion = "image" if canvas.frames == 1 else MOTIONS[(0, 0, 1, 2)[rng.integers(4)]]
    top = max(e[1] for e in edges)
    bottom = canvas.height - max(e[2] for e in edges)
    drift = {"move up": -1.0, "move down": 1.0}.get(motion, 0.0) * 0.55 * (bottom - top)
    lean = rng.uniform(-0.4, 0.4) * min(abs(x[0] - x[1]), (bottom - top - abs(drift)))
    room = bottom - top - abs(drift) - abs(lean)
    base = top + rng.random() * room + max(-drift, 0.0)
    y = (base + max(-lean, 0.0), base + max(lean, 0.0))
    vy = drift / max(canvas.frames - 1, 1)
    first, second = (
        Entity(i, shape, colour, radii[i], (Segment(0.0, float(x[i]), y[i], 0.0, vy),), sizes[i])
        for i, (colour, shape) in enumerate(looks)
    )
    scene = Scene(
        canvas.frames,
        canvas.height,
        canvas.width,
        canvas.fps,
        (first, second),
        fixed_shot(rng, canvas),
    )
    pair = [first.colour, second.colour]
    left, right = (pair[0], pair[1]) if relation == "left" else (pair[1], pair[0])
    expect: dict[str, dict] = {
        "colour": {"colours": pair},
        "left_right": {"left": left, "right": right},
    }
    if canvas.frames > 1:
        expect["count_constancy"] = {}
    other = {"left": "right", "right": "left"}[relation]
    return Composition(
        scene=scene,
        words=_words(first, second, relation, motion),
        wrong=_words(replace(first), second, other, motion).dense,
        expect=expect,
        asked={"dense": list(expect), "short": list(expect)},
    )
