"""Two entities beside or above each other, named in either order: are spatial words obeyed?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from longtake.data.world.detect import Detection
from longtake.data.world.families.registry import (
    CONSTANT,
    STATIC,
    Ask,
    Canvas,
    Family,
    Fault,
    Form,
    alike,
    draw_look,
    look,
    looks,
    margins,
    pick,
    register,
)
from longtake.data.world.faults import (
    CONSTANCY_FAULTS,
    STATIC_FAULTS,
    flipped,
    half_gone,
    missing,
    recoloured,
    recoloured_midway,
    reshaped,
    resized,
    with_motion,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Words
from longtake.data.world.scene import DIRECTIONS, SIZES, Entity, Scene, Segment
from longtake.data.world.scorers import MIN_MOVE, scorer, travel

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

RELATIONS = {
    "left": ("left of", "左边"),
    "right": ("right of", "右边"),
    "above": ("above", "上方"),
    "below": ("below", "下方"),
}
# where the second entity lies from the first
TOWARDS = {"left": (1, 0), "right": (-1, 0), "above": (0, 1), "below": (0, -1)}
MOTIONS = {
    "still": ("stay still", "都静止不动"),
    "left": ("move left", "一起向左移动"),
    "right": ("move right", "一起向右移动"),
    "up": ("move up", "一起向上移动"),
    "down": ("move down", "一起向下移动"),
}
DRIFT = 0.55  # way of a moving pair, as a share of the room there is
OOD_DRIFT = 0.14  # of the shorter side: shorter than ever
LEAN = 0.4  # how far they are out of line at most, as a share of their distance


def _looks_chance(canvas: Canvas) -> float:
    """That colours, shapes and sizes are those of another pair; few are large in a small frame."""
    return alike(2, range(2))(canvas) / 2


PAIR = (
    looks(look(), look("2"), chance=alike(2, range(2))),
    looks(look(sized=True), look("2", sized=True), chance=_looks_chance),
    Ask("colour", {"colours": ["{colour}", "{colour2}"]}, 1 / 15),
    Ask(
        "relation",
        {"one": "{colour}", "two": "{colour2}", "word": "{relation}"},
        chance=1 / 30,
        blind=1 / 2,
    ),
)


@scorer
def relation(seen: Detection, one: str, two: str, word: str) -> float:
    """The one lies on the asked side of the other, clearly so, in nine frames of ten."""
    first, second = seen.tracks.get(one), seen.tracks.get(two)
    if first is None or second is None:
        return 0.0
    apart = np.array([second.x - first.x, second.y - first.y])  # (2, T)
    ahead, aside = np.array(TOWARDS[word]) @ apart, np.array(TOWARDS[word][::-1]) @ apart
    with np.errstate(invalid="ignore"):
        is_so = (ahead > MIN_MOVE * seen.side) & (ahead > abs(aside))
    return is_so.mean() >= 0.9


@scorer
def together(seen: Detection, motion: str) -> float:
    """All entities, two at least, stay still or move in the asked direction."""
    ways = np.array([travel(track) for track in seen.tracks.values()])  # (n, 2)
    if len(ways) < 2:
        return 0.0
    if motion == "still":
        return (abs(ways) < MIN_MOVE * seen.side).all()
    ahead, aside = ways @ DIRECTIONS[motion], ways @ DIRECTIONS[motion][::-1]
    return ((ahead > MIN_MOVE * seen.side) & (ahead > 1.5 * abs(aside))).all()


def turned(clip: WorldClip) -> np.ndarray:
    """Seen across the diagonal: beside becomes above."""
    return np.ascontiguousarray(clip.frames.swapaxes(1, 2))


def upside_down(clip: WorldClip) -> np.ndarray:
    """Above and below exchanged."""
    return clip.frames[:, ::-1]


def parted(clip: WorldClip) -> np.ndarray:
    """The first entity rests where both should move, and moves where both should rest."""
    scene, path = clip.scene, clip.scene.entities[0].motion[0]
    if clip.words["motion"] != "still":
        return with_motion(clip, 0, Segment(0.0, path.x, path.y))
    centre = np.array([scene.width, scene.height]) / 2 - (path.x, path.y)
    step = np.sign(centre) * 0.15 * min(scene.width, scene.height) / (scene.frames - 1)
    return with_motion(clip, 0, Segment(0.0, path.x, path.y, *step.tolist()))


def draw(axis: int, rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    """A pair along an axis (0 is x), no larger than what fits side by side."""
    verb = int(rng.integers(2))
    words = {"relation": tuple(RELATIONS)[2 * axis + verb]}
    colour, shape = draw_look(rng, canvas, verb)
    colour2, shape2 = draw_look(rng, canvas, verb, taken=[colour])
    words |= {"colour": colour, "shape": shape, "colour2": colour2, "shape2": shape2}
    sizes = [pick(rng, tuple(SIZES)), pick(rng, tuple(SIZES))]
    length = (canvas.width, canvas.height)[axis]
    for number in (1, 0):  # what is too large for the two of them becomes small
        pairs = zip((shape, shape2), sizes, strict=True)
        need = [sum(_edges(axis, s, canvas.radius(z))) for s, z in pairs]
        if sum(need) > length:
            sizes[number] = "small"
    words |= {"size": sizes[0], "size2": sizes[1]}
    if canvas.frames == 1:
        return "image", words
    sideways = (("up", "down"), ("left", "right"))[axis]
    return "video", {**words, "motion": pick(rng, ("still", "still", *sideways))}


def _edges(axis: int, shape: str, radius: float) -> tuple[float, float]:
    """Least distance of a centre from both ends of an axis."""
    side, top, bottom = margins(shape, radius)
    return ((side, side), (top, bottom))[axis]


def build(axis: int, rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """The pair keeps its distance and either rests or drifts across it together."""
    looks = [(words[f"shape{n}"], canvas.radius(words[f"size{n}"])) for n in ("", "2")]
    order = (0, 1) if sum(TOWARDS[words["relation"]]) > 0 else (1, 0)
    size = (canvas.width, canvas.height)
    ends = [_edges(axis, *looks[i]) for i in order]
    first, last = sorted(rng.random(2))
    slack = size[axis] - sum(ends[0]) - sum(ends[1])
    near, far = ends[0][0] + slack * first, size[axis] - ends[1][1] - slack * (1 - last)
    aside = [_edges(1 - axis, *look) for look in looks]
    low, high = max(a[0] for a in aside), size[1 - axis] - max(a[1] for a in aside)
    motion = words.get("motion", "still")
    way = OOD_DRIFT * canvas.short_side if canvas.split == "ood" else DRIFT * (high - low)
    drift = 0.0 if motion == "still" else sum(DIRECTIONS[motion]) * way
    room = high - low - abs(drift)
    lean = rng.uniform(-LEAN, LEAN) * min(far - near, room)
    base = low + rng.random() * (room - abs(lean)) + max(-drift, 0.0)
    across = base + max(-lean, 0.0), base + max(lean, 0.0)
    speed = drift / max(canvas.frames - 1, 1)
    entities = []
    for number, (shape, radius) in enumerate(looks):
        at, v = [0.0, 0.0], [0.0, 0.0]
        at[axis], at[1 - axis] = (near, far)[order.index(number)], across[number]
        v[1 - axis] = speed
        end = "2" if number else ""
        path = (Segment(0.0, *at, *v),)
        entities.append(
            Entity(number, shape, words[f"colour{end}"], radius, path, words[f"size{end}"])
        )
    return canvas.scene(rng, *entities)


def _forms(relations: tuple[str, str], motions: tuple[str, str]) -> dict[str, Form]:
    said = "A {size} {colour} {shape} is {relation} a {size2} {colour2} {shape2}"
    short = "a {colour} {shape} {relation} a {colour2} {shape2}"
    zh = "一个{size}的{colour}{shape}在一个{size2}的{colour2}{shape2}的{relation}"
    return {
        "image": Form(
            min_frames=1,
            dense=f"{said} on a plain grey background.",
            short=short,
            vague="two things",
            zh=f"灰色背景上{zh}。",
            asks=PAIR,
            flips=("colour", "colour2", "relation"),
            words={"relation": RELATIONS},
            choices={"relation": relations},
        ),
        "video": Form(
            dense=f"{said} on a plain grey background. Both {{motion}}. {STATIC_CAMERA}",
            short=f"{short}, both {{motion}}",
            vague="two things before a plain wall",
            zh=f"灰色背景上{zh}，它们{{motion}}。{STATIC_CAMERA_ZH}",
            asks=(
                *PAIR,
                Ask("together", {"motion": "{motion}"}, 3 / 8),
                Ask("count_constancy", {}, 1.0),
                CONSTANT,
                STATIC,
            ),
            flips=("colour", "colour2", "relation", "motion"),
            words={"relation": RELATIONS, "motion": MOTIONS},
            choices={"relation": relations, "motion": ("still", *motions)},
        ),
    }


def _register(axis: int, name: str, exchanged: Fault, motions: tuple[str, str]) -> None:
    relations = tuple(RELATIONS)[2 * axis : 2 * axis + 2]
    register(
        Family(
            name,
            failure="spatial words are confused",
            forms=_forms(relations, motions),
            draw=partial(draw, axis),
            build=partial(build, axis),
            min_frames=1,
            faults={
                "colour": (recoloured, missing),
                "relation": (exchanged, turned, missing),
                "looks": (reshaped, resized, missing),
                "together": (parted, missing),
                "count_constancy": (half_gone, recoloured_midway),
                **CONSTANCY_FAULTS,
                **STATIC_FAULTS,
            },
        )
    )


_register(0, "leftright", flipped, ("up", "down"))
_register(1, "above", upside_down, ("left", "right"))
