"""One to six entities, on crossing paths or all alike: do subjects multiply, merge or vanish?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np

from longtake.data.world.families.registry import (
    CONSTANT,
    STATIC,
    Ask,
    Canvas,
    Family,
    Form,
    draw_look,
    margins,
    pick,
    register,
)
from longtake.data.world.faults import (
    CONSTANCY_FAULTS,
    STATIC_FAULTS,
    blinking,
    half_gone,
    missing,
    recoloured_midway,
    redrawn,
    with_changes,
)
from longtake.data.world.language import (
    NUMBERS,
    STATIC_CAMERA,
    STATIC_CAMERA_ZH,
    ZH_NUMBERS,
    Words,
)
from longtake.data.world.scene import (
    COLOURS,
    SIZES,
    Change,
    Entity,
    Scene,
    Segment,
)

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

TRAINED, OOD = (1, 2, 3, 4), (5, 6)
ALIKE = 0.4  # share of the clips of several entities in which all look the same
ALIKE_SHAPES = ("circle", "square")  # six triangles in a row do not fit in 16 px
PROPOSALS = 24
CLEARANCE = 0.9  # least distance of two centres, in the sum of their radii
GAP = 0.3  # px to the frame's edge
APART = 1.3  # px between two of one colour, so that they are two blobs


def _names(index: int) -> tuple[str, str, str]:
    """Slots for the size, the colour and the shape of an entity: size, size2, ..."""
    end = str(index + 1) if index else ""
    return f"size{end}", f"colour{end}", f"shape{end}"


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    """Every number is as likely; several are either all named or, as six must be, all alike."""
    numbers = OOD if canvas.split == "ood" else TRAINED
    number = numbers[rng.integers(len(numbers))]
    end = " image" if canvas.frames == 1 else ""
    if number == len(COLOURS) or (number > 1 and rng.random() < ALIKE):
        colour, shape = draw_look(rng, canvas, number % 4, shapes=ALIKE_SHAPES)
        words = {"colour": colour, "shape": shape, "number": str(number)}
        return ("alike" if number in TRAINED else "many") + end, words
    looks: list[tuple[str, str]] = []
    while len(looks) < number:
        looks.append(draw_look(rng, canvas, number % 4, taken=[colour for colour, _ in looks]))
    is_roomy = number <= 3 and canvas.short_side >= 24
    words = {}
    for i, (colour, shape) in enumerate(looks):
        size = pick(rng, tuple(SIZES)) if is_roomy else "small"
        words |= dict(zip(_names(i), (size, colour, shape), strict=True))
    return NUMBERS[number] + end, words


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """Colours are all different, so that a twin is always a fault, or all the same."""
    if "number" in words:
        looks = [("small", words["colour"], words["shape"])] * int(words["number"])
        paths = _grid(rng, canvas, words["shape"], len(looks))
    else:
        number = NUMBERS.index(form.split()[0])
        looks = [tuple(words[slot] for slot in _names(i)) for i in range(number)]
        paths = _crossing(rng, canvas, looks)
    entities = [
        Entity(i, shape, colour, canvas.radius(size), (path,), size, layer=i)
        for i, ((size, colour, shape), path) in enumerate(zip(looks, paths, strict=True))
    ]
    return canvas.scene(rng, *entities)


def _cells(canvas: Canvas, number: int) -> np.ndarray:
    """Cells (n, 2) of a grid for so many things, more of them along the longer side."""
    columns = 2 if number <= max(TRAINED) else 3
    cells = np.array([(i, j) for j in range(2) for i in range(columns)])
    return cells if canvas.width >= canvas.height else cells[:, ::-1]


def _grid(rng: np.random.Generator, canvas: Canvas, shape: str, number: int) -> list[Segment]:
    """Resting things in cells of a grid, taken in an order that does not depend on the number."""
    cells = rng.permutation(_cells(canvas, number))
    side, top, bottom = margins(shape, canvas.radius("small"), GAP)
    room = np.array([canvas.width - 2 * side, canvas.height - top - bottom])
    steps = cells.max(0)
    closest = 2 * canvas.radius("small") + APART
    spacing = closest + rng.random(2) * (room / steps - closest)
    start = (side, top) + rng.random(2) * (room - spacing * steps)
    return [Segment(0.0, *at) for at in (start + spacing * cells[:number]).tolist()]


def _crossing(
    rng: np.random.Generator, canvas: Canvas, looks: list[tuple[str, str, str]]
) -> list[Segment]:
    """Straight paths of which no two ever hide much of each other: the first of some proposals.

    All start in cells of a grid and end in cells. The last proposal is always possible: all turn
    a little about the centre, so no distance shrinks to less than three quarters.
    """
    number = len(looks)
    cells = _cells(canvas, number)
    grid = cells / cells.max(0)  # (n, 2) in [0, 1]
    order = rng.random((PROPOSALS, 2, len(cells))).argsort(-1)[..., :number]
    ends = grid[order] + rng.uniform(-0.3, 0.3, (PROPOSALS, 2, number, 2))
    ends = ends.clip(0.0, 1.0)  # (K, start or end, n, 2)
    longest = 1.0 if number <= max(TRAINED) else 0.6
    ends[:, 1] = ends[:, 0] + (ends[:, 1] - ends[:, 0]) * rng.uniform(0.4, 1.0) * longest
    turned = np.stack([1 - grid[:, 1], grid[:, 0]], 1)
    ends[-1] = np.stack([grid, 0.7 * grid + 0.3 * turned])[:, order[-1, 0]]
    radii = np.array([canvas.radius(size) for size, _, _ in looks])
    edges = np.array(
        [margins(shape, r, GAP) for (_, _, shape), r in zip(looks, radii, strict=True)]
    )
    low = edges[:, :2]
    ends = low + ends * ((canvas.width, canvas.height) - low - edges[:, [0, 2]])
    one, two = np.triu_indices(number, 1)
    apart = ends[:, :, one] - ends[:, :, two]  # (K, 2, pairs, 2)
    room = (_closest(apart[:, 0], apart[:, 1]) / (radii[one] + radii[two])).min(1, initial=np.inf)
    best = ends[np.argmax(room >= CLEARANCE) if (room >= CLEARANCE).any() else np.argmax(room)]
    velocity = (best[1] - best[0]) / max(canvas.frames - 1, 1)
    return [Segment(0.0, *at) for at in np.concatenate([best[0], velocity], 1).tolist()]


def _closest(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Least length of vectors (..., 2) that go linearly from `start` to `end`."""
    way = end - start
    at = -(start * way).sum(-1) / np.maximum((way * way).sum(-1), 1e-9)
    nearest = start + way * at.clip(0.0, 1.0)[..., None]
    return np.sqrt((nearest * nearest).sum(-1))


def split(clip: WorldClip) -> np.ndarray:
    """The first entity is two small pieces from the start."""
    return _in_pieces(clip, 0)


def split_midway(clip: WorldClip) -> np.ndarray:
    """The first entity falls into two small pieces in the middle of the clip."""
    return _in_pieces(clip, clip.scene.frames // 2)


def _in_pieces(clip: WorldClip, start: int) -> np.ndarray:
    first, *others = clip.scene.entities
    path, aside = first.motion[0], first.radius * 2 / 3  # the pieces stay where it was
    whole = replace(first, changes=(Change(start, "alpha", 0.0),))
    hidden = Change(0, "alpha", 0.0), Change(start, "alpha", 1.0)
    pieces = [
        replace(
            first,
            id=number,
            radius=first.radius / 3,
            motion=(replace(path, x=path.x + by),),
            changes=hidden,
        )
        for number, by in ((98, -aside), (99, aside))
    ]
    return redrawn(clip, lambda s: replace(s, entities=(whole, *others, *pieces)))


def miscoloured(clip: WorldClip) -> np.ndarray:
    """The first entity has a colour that none has, or if all are taken that of the next."""
    colours = [entity.colour for entity in clip.scene.entities]
    free = [colour for colour in COLOURS if colour not in colours] or colours[1:]
    return with_changes(clip, 0, Change(0, "colour", free[0]))


def changed_midway(clip: WorldClip) -> np.ndarray | None:
    """The first entity takes another colour in the middle of the clip; None where all are taken."""
    colours = {entity.colour for entity in clip.scene.entities}
    return recoloured_midway(clip) if len(colours) <= max(TRAINED) else None


def _count_chance(canvas: Canvas) -> float:
    return 1 / len(OOD if canvas.split == "ood" else TRAINED)


def _colour_chance(canvas: Canvas, colours: int) -> float:
    """That another clip has the same set of colours."""
    numbers = OOD if canvas.split == "ood" else TRAINED
    alike = sum(1.0 if n == len(COLOURS) else ALIKE for n in numbers if n > 1) / len(numbers)
    if colours == 1:
        return (alike + (1 in numbers) / len(numbers)) / len(COLOURS)
    return (1 - ALIKE) / len(numbers) / comb(len(COLOURS), colours)


def _form(
    dense: str,
    short: str,
    zh: str,
    colours: list[str],
    number: str,
    is_image: bool,
    flips: tuple[str, ...],
    **rest: Any,
) -> Form:
    """A form for clips of so many entities of these colours; its image says nothing of time."""
    distinct = len(colours)
    asks = (
        Ask("count", {"count": number}, _count_chance),
        Ask(
            "colour",
            {"colours": colours},
            chance=partial(_colour_chance, colours=distinct),
            blind=1 / comb(len(COLOURS), distinct),
        ),
    )
    vague = "something" if number == "1" else "some things"
    if is_image:
        return Form(dense, short, vague, zh, asks, flips, min_frames=1, **rest)
    return Form(
        dense=f"{dense} {STATIC_CAMERA}",
        short=short,
        vague=vague,
        zh=f"{zh}{STATIC_CAMERA_ZH}",
        asks=(*asks, Ask("count_constancy", {}, 1.0), CONSTANT, STATIC),
        flips=flips,
        **rest,
    )


def _named(number: int, is_image: bool) -> Form:
    """Every entity is named."""
    names = [_names(i) for i in range(number)]
    colours = [f"{{{colour}}}" for _, colour, _ in names]
    nouns = _listed([f"a {{{z}}} {{{c}}} {{{s}}}" for z, c, s in names])
    zh_nouns = "、".join(f"{{{z}}}的{{{c}}}{{{s}}}" for z, c, s in names)
    plural, drift = ("", " drifts") if number == 1 else ("s", " drift")
    drift, zh_drift = ("", "有") if is_image else (drift, "飘动着")
    word = NUMBERS[number]
    short = f"{word} shape{plural}{drift}: {_listed(colours)}"
    return _form(
        dense=f"{word.capitalize()} shape{plural}{drift} on a plain grey background: {nouns}.",
        short=f"one {{colour}} {{shape}}{drift}" if number == 1 else short,
        zh=f"灰色背景上{zh_drift}{ZH_NUMBERS[number]}个图形：{zh_nouns}。",
        colours=colours,
        number=str(number),
        is_image=is_image,
        flips=tuple(colour for _, colour, _ in names),
    )


def _listed(parts: list[str]) -> str:
    return " and ".join(p for p in (", ".join(parts[:-1]), parts[-1]) if p)


def _alike(numbers: tuple[str, ...], is_image: bool) -> Form:
    still, zh_still = ("", "") if is_image else (" All stay still.", "，它们都静止不动")
    return _form(
        dense="There are {number} small {colour} {shape}s on a plain grey background."
        f"{still}",
        short="{number} {colour} {shape}s" + ("" if is_image else ", all still"),
        zh=f"灰色背景上有{{number}}个小的{{colour}}{{shape}}{zh_still}。",
        colours=["{colour}"],
        number="{number}",
        is_image=is_image,
        flips=("number", "colour"),
        words={"number": {str(n): (NUMBERS[n], ZH_NUMBERS[n]) for n in range(2, 7)}},
        choices={"shape": ALIKE_SHAPES, "number": numbers},
    )


FORMS = {}
for _end, _is_image in (("", False), (" image", True)):
    FORMS |= {NUMBERS[n] + _end: _named(n, _is_image) for n in range(1, 6)}
    FORMS[f"alike{_end}"] = _alike(("2", "3", "4"), _is_image)
    FORMS[f"many{_end}"] = _alike(("5", "6"), _is_image)

register(
    Family(
        "count",
        failure="subjects multiply or vanish",
        forms=FORMS,
        draw=draw,
        build=build,
        min_frames=1,
        faults={
            "colour": (miscoloured,),
            "count": (missing, split),
            "count_constancy": (blinking, half_gone, changed_midway, split_midway),
            **CONSTANCY_FAULTS,
            **STATIC_FAULTS,
        },
    )
)
