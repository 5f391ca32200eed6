"""Colour, size or brightness changes as asked, gradually or at once: is a change obeyed?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from longtake.data.world.detect import IN_FRAME, Detection
from longtake.data.world.families.registry import (
    STATIC,
    Ask,
    Canvas,
    Family,
    Form,
    alike,
    draw_look,
    look,
    looks,
    margins,
    pick,
    register,
    still,
)
from longtake.data.world.faults import (
    STATIC_FAULTS,
    missing,
    reshaped,
    reversed_in_time,
    with_changes,
    with_motion,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Words
from longtake.data.world.scene import COLOURS, SIZES, Change, Entity, Event, Scene
from longtake.data.world.scorers import scorer

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

OWN = {
    "manner": {"gradually": ("gradually", "逐渐"), "at once": ("at once", "突然")},
    "growth": {
        "grows": ("grows from small to large", "由小变大"),
        "shrinks": ("shrinks from large to small", "由大变小"),
    },
    "light": {"brighter": ("brighter", "变亮"), "darker": ("darker", "变暗")},
}
DARK, OOD_DARK = 0.62, 0.52  # brightness of a dark thing, where a bright one has 1
MIN_CHANGE = float(np.log(1.18))  # of size or brightness, to count as one
MAX_CHANGE = float(np.log(1.2))  # of what must stay as it is
FAINT, SOLID = 0.4, 0.8  # of a frame's greatest chroma: what is part of the thing, and wholly so


def _looks_chance(canvas: Canvas) -> float:
    """That the thing is alike or, but for held-out ones, has the colour before or after a turn."""
    turned = 0.0 if canvas.split == "combo" else 0.1 / len(canvas.shapes)
    return alike(1, range(3))(canvas) + turned


def _form(said: str, zh: str, slot: str, vague: str, end: str, options: int) -> Form:
    """`slot` says what happens, in one of `options` ways; the colour is `end` afterwards."""
    values = {"start": "{colour}", "end": end, "change": f"{{{slot}}}", "manner": "{manner}"}
    if slot == "colour2":
        values["change"] = "turns"
    named = look(turned="colour2" if slot == "colour2" else None)
    if slot == "growth":
        named["varies"] = "{growth}"
    thing = "{colour} {shape}" if slot == "growth" else "{size} {colour} {shape}"
    zh_thing = "{colour}{shape}" if slot == "growth" else "{size}的{colour}{shape}"
    return Form(
        dense=f"A {thing} {said} {{manner}}, still in its place on a plain grey background. "
        f"{STATIC_CAMERA}",
        short=f"a {{colour}} {{shape}} {said} {{manner}}",
        vague=f"something changes its {vague}",
        zh=f"灰色背景上，一个静止的{zh_thing}{{manner}}{zh}。{STATIC_CAMERA_ZH}",
        asks=(
            Ask("attribute", values, 0.01, 1 / options),
            looks(named, chance=_looks_chance),
            STATIC,
        ),
        flips=("manner", slot, "colour"),
        words=OWN,
    )


FORMS = {
    "colour": _form("turns {colour2}", "变成{colour2}", "colour2", "colour", "{colour2}", 10),
    "size": _form("{growth}", "{growth}", "growth", "size", "{colour}", 4),
    "brightness": _form("gets {light}", "{light}", "light", "light", "{colour}", 4),
}


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    """Which attribute changes, of what, how and in which manner."""
    verb = int(rng.integers(3))
    form = tuple(FORMS)[verb]
    colour, shape = draw_look(rng, canvas, verb)
    words = {"colour": colour, "shape": shape, "manner": pick(rng, tuple(OWN["manner"]))}
    if form == "size":
        return form, {**words, "growth": pick(rng, tuple(OWN["growth"]))}
    words["size"] = pick(rng, tuple(SIZES))
    if form == "brightness":
        return form, {**words, "light": pick(rng, tuple(OWN["light"]))}
    return form, {**words, "colour2": pick(rng, [c for c in COLOURS if c != colour])}


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """One thing that rests; a gradual change takes most of the clip and ends within it."""
    size = words.get("size") or {"grows": "small", "shrinks": "large"}[words["growth"]]
    radius, large = canvas.radius(size), canvas.radius("large")
    side, top, bottom = margins(words["shape"], max(radius, large if form == "size" else 0.0))
    u, v, when = rng.random(3).tolist()
    x = side + u * (canvas.width - 2 * side)
    y = top + v * (canvas.height - top - bottom)
    last = canvas.frames - 1
    lasting, start = 0.0, (0.3 + 0.4 * when) * last
    if words["manner"] == "gradually":
        lasting = max(0.7 * last, min(4.0, last))
        start = when * (last - lasting)
    before: tuple[Change, ...] = ()
    if form == "colour":
        change = Change(start, "colour", words["colour2"], lasting)
    elif form == "size":
        other = large if size == "small" else canvas.radius("small")
        change = Change(start, "radius", other / radius, lasting)
    else:
        dark = OOD_DARK if canvas.split == "ood" else DARK
        is_dark_first = words["light"] == "brighter"
        before = (Change(-1.0, "brightness", dark),) if is_dark_first else ()
        change = Change(start, "brightness", 1.0 if is_dark_first else dark, lasting)
    entity = Entity(
        0, words["shape"], words["colour"], radius, still(x, y), size, changes=(*before, change)
    )
    return canvas.scene(rng, entity, events=(Event(start, f"{form} changes", (0,)),))


@dataclass(frozen=True, slots=True)
class _Looks:
    """The one thing in T frames, whatever its colour; NaN where there is none."""

    x: np.ndarray  # (T,)
    y: np.ndarray
    radius: np.ndarray  # px
    brightness: np.ndarray  # 0 to 255
    label: np.ndarray  # index of the colour


def _looks(seen: Detection) -> _Looks:
    """What each frame shows is measured by its own hue, as it may be none of the palette's on the
    way; chroma along that hue is coverage, and noise in it cancels out."""
    strength = np.hypot(*seen.chroma)
    most = strength.max((1, 2), keepdims=True)
    parts = strength > FAINT * most
    patches, _ = ndimage.label(parts, IN_FRAME)  # pyright: ignore[reportGeneralTypeIssues]
    sizes = np.bincount(patches.ravel())
    sizes[0] = 0
    size = sizes[patches]
    thing = (size > 0) & (size == size.max((1, 2), keepdims=True))
    solid = thing & (strength > SOLID * most)
    with np.errstate(invalid="ignore", divide="ignore"):
        hue = (seen.chroma * solid).sum((2, 3)) / solid.sum((1, 2))  # (2, T)
        cover = np.einsum("ct,cthw->thw", hue / (hue * hue).sum(0), seen.chroma)
        cover *= ndimage.maximum_filter(thing, size=(1, 3, 3))
        total = cover.sum((1, 2))
        x = cover.sum(1) @ np.arange(seen.width) / total
        y = cover.sum(2) @ np.arange(seen.height) / total
        radius = np.sqrt(total / np.pi)
        brightness = (seen.frames.max(-1) * solid).sum((1, 2)) / solid.sum((1, 2))
    numbers = [(solid & (seen.label == index)).sum((1, 2)) for index in range(len(COLOURS))]
    return _Looks(x, y, radius, brightness, np.argmax(numbers, axis=0))


@scorer
def attribute(seen: Detection, start: str, end: str, change: str, manner: str) -> float:
    """One thing changes as asked, once and for good, and nothing else about it does."""
    blobs = np.array([track.blobs for track in seen.tracks.values()])  # (colours, T)
    if not blobs.size or blobs.max() > 1 or (blobs[:, [0, -1]].sum(0) > 1).any():
        return 0.0
    looks = _looks(seen)
    rest = {"size": np.log(looks.radius), "brightness": np.log(looks.brightness)}
    if change == "turns":
        share = seen.turning(start, end)
        rest.pop("brightness")  # that of the colours
    else:
        value = rest.pop("size" if change in ("grows", "shrinks") else "brightness")
        total = (value[-1] - value[0]) * (1 if change in ("grows", "brighter") else -1)
        is_kept = set(seen.tracks) == {start} and (looks.label == COLOURS.index(start)).all()
        is_kept = is_kept and np.isfinite(value).all()
        share = (value - value[0]) / (value[-1] - value[0]) if total > MIN_CHANGE else None
        share = share if is_kept else None
    if share is None or (np.maximum.accumulate(share) - share > 0.3).any() or share.max() > 1.25:
        return 0.0
    # half-way between opposite colours a thing is grey and cannot be measured
    known = (abs(share - 0.5) > 0.2) if change == "turns" else np.isfinite(share)
    if not all(np.ptp(values[known]) <= MAX_CHANGE for values in rest.values()):
        return 0.0
    if not all(np.ptp(place[known]) <= 0.06 * seen.side for place in (looks.x, looks.y)):
        return 0.0
    on_the_way = np.sum((share > 0.15) & (share < 0.85))
    return (on_the_way >= max(2.0, 0.15 * seen.num_frames)) == (manner == "gradually")


def _other(clip: WorldClip) -> Change:
    """A change of an attribute that should stay, at the time of the asked one."""
    asked = clip.scene.entities[0].changes[-1]
    if clip.form != "size":
        factor = SIZES["large"] / SIZES["small"]
        factor = factor if clip.words["size"] == "small" else 1 / factor
        return replace(asked, attribute="radius", value=factor)
    return replace(asked, attribute="brightness", value=DARK)


def unchanged(clip: WorldClip) -> np.ndarray:
    """Everything stays as it is at first."""
    return with_changes(clip, 0, *clip.scene.entities[0].changes[:-1])


def undone(clip: WorldClip) -> np.ndarray:
    """In the end it is as it was at first."""
    entity = clip.scene.entities[0]
    *before, asked = entity.changes
    was = before[0].value if before else entity.colour if clip.form == "colour" else 1.0
    back = replace(asked, start=clip.scene.frames - 1, value=was, duration=0.0)
    return with_changes(clip, 0, *entity.changes, back)


def in_other_manner(clip: WorldClip) -> np.ndarray:
    """At once instead of gradually, and the other way round."""
    *before, asked = clip.scene.entities[0].changes
    last = clip.scene.frames - 1
    if asked.duration:
        other = replace(asked, start=asked.start + asked.duration / 2, duration=0.0)
    else:
        other = replace(asked, start=0.0, duration=last)
    return with_changes(clip, 0, *before, other)


def another_instead(clip: WorldClip) -> np.ndarray:
    """Another attribute changes."""
    return with_changes(clip, 0, *clip.scene.entities[0].changes[:-1], _other(clip))


def another_too(clip: WorldClip) -> np.ndarray:
    """Another attribute changes with the asked one."""
    return with_changes(clip, 0, *clip.scene.entities[0].changes, _other(clip))


def leaving(clip: WorldClip) -> np.ndarray:
    """It changes as asked, and moves."""
    first = clip.scene.entities[0].motion[0]
    way = 0.2 * min(clip.scene.height, clip.scene.width)
    way = way if first.x < clip.scene.width / 2 else -way
    return with_motion(clip, 0, replace(first, vx=way / (clip.scene.frames - 1)))


register(
    Family(
        "attribute",
        failure="a change of one attribute is not obeyed",
        forms=FORMS,
        draw=draw,
        build=build,
        faults={
            "attribute": (
                unchanged,
                undone,
                reversed_in_time,
                in_other_manner,
                another_instead,
                another_too,
                leaving,
            ),
            "looks": (reshaped, missing),
            **STATIC_FAULTS,
        },
    )
)
