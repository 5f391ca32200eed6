"""A cup falls, breaks on the ground, then its liquid spreads: are events in their order?

In the other form it falls on a cushion and stays whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from longtake.data.world.contact import delayed
from longtake.data.world.detect import Detection, Track
from longtake.data.world.families.registry import (
    STATIC,
    Ask,
    Canvas,
    Family,
    Form,
    alike,
    draw_look,
    margins,
    pick,
    register,
    still,
)
from longtake.data.world.faults import (
    STATIC_FAULTS,
    at_rest,
    flickering,
    half_gone,
    recoloured,
    redrawn,
    reshaped,
    reversed_in_time,
    split_in_two,
    with_entity,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Words
from longtake.data.world.render import render
from longtake.data.world.scene import (
    COLOURS,
    EXTENTS,
    Change,
    Entity,
    Event,
    Scene,
    Segment,
    positions,
)
from longtake.data.world.scorers import SAME_AREA, scorer

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

# frame times as shares of the clip; out of distribution gravity is weaker than it ever was
LANDS, OOD_LANDS, SPREADS, SPREADING = (0.34, 0.4), (0.44, 0.48), (0.52, 0.56), 0.4
# half-sizes, of the shorter side
GROUND, PUDDLE, CUSHION = 0.1, (0.34, 0.09), (0.24, 0.07)
SHARD, SHARD_AT = 0.7, 1.4  # radius of a shard (half the area), and its way, in the cup's radii
DROP = 0.12  # of the shorter side: what counts as having begun to fall
LEVEL = 0.3  # of the shorter side, between the centres of what lies on the ground
STRAIGHT = 0.1  # of the shorter side
SPREAD = 1.15  # by which a puddle's area grows at least
VESSELS = {"circle": ("bowl", "碗"), "square": ("cup", "杯子"), "triangle": ("vase", "花瓶")}
VESSEL = {"looks": [{"shape": "{vessel}", "colours": ["{colour}"]}]}


def _looks_chance(canvas: Canvas) -> float:
    """Of another vessel to be alike, or another liquid to have its colour and about its shape."""
    return alike(1, (0, 2))(canvas) + 1 / 18


FORMS = {
    "breaks": Form(
        dense="A small {colour} {vessel} falls straight down and breaks in two on the dark ground. "
        f"Then {{colour2}} liquid spreads under it. Plain grey background. {STATIC_CAMERA}",
        short="a {colour} {vessel} falls, breaks and spills {colour2} liquid",
        vague="something falls and breaks",
        zh="一个小的{colour}{vessel}笔直落下，在深色地面上摔成两块，然后{colour2}液体在下面流开。"
        f"灰色背景。{STATIC_CAMERA_ZH}",
        asks=(
            Ask("colour", {"colours": ["{colour}", "{colour2}"]}, 1 / 15),
            Ask("spill", {"cup": "{colour}", "liquid": "{colour2}"}, 1 / 60),
            Ask("looks", VESSEL, _looks_chance),
            STATIC,
        ),
        flips=("colour", "colour2"),
        words={"vessel": VESSELS},
    ),
    "whole": Form(
        dense="A small {colour} {vessel} falls straight down on a {colour2} cushion on the dark "
        f"ground and stays whole. Plain grey background. {STATIC_CAMERA}",
        short="a {colour} {vessel} falls on a {colour2} cushion",
        vague="something falls on something soft",
        zh="一个小的{colour}{vessel}笔直落在深色地面的{colour2}垫子上，没有摔碎。灰色背景。"
        f"{STATIC_CAMERA_ZH}",
        asks=(
            Ask("colour", {"colours": ["{colour}", "{colour2}"]}, 1 / 15),
            Ask("spill", {"cup": "{colour}", "cushion": "{colour2}"}, 1 / 60),
            Ask("looks", VESSEL, _looks_chance),
            STATIC,
        ),
        flips=("colour", "colour2"),
        words={"vessel": VESSELS},
    ),
}


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    """To break or not is what a held-out cup does."""
    form = pick(rng, tuple(FORMS))
    verb = 2 * (form == "whole")
    colour, vessel = draw_look(rng, canvas, verb, shapes=tuple(VESSELS))
    colour2 = pick(rng, [other for other in COLOURS if other != colour])
    return form, {"colour": colour, "vessel": vessel, "colour2": colour2}


def _bar(number: int, role: str, colour: str, x: float, y: float, *half: float) -> Entity:
    size = (half[0], half[1])
    return Entity(number, "bar", colour, min(size), still(x, y), role=role, half=size)


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """From rest near the top, under gravity, to rest; shards and puddle have room on both sides."""
    side, steps = canvas.short_side, canvas.frames - 1
    radius = canvas.radius("small")
    _, up, _ = margins(words["vessel"], radius)
    room = max(radius * (SHARD_AT + SHARD * EXTENTS["triangle"][0]), PUDDLE[0] * side) + 0.5
    x = room + rng.random() * (canvas.width - 2 * room)
    start = up + rng.random() * 0.08 * canvas.height
    time = steps * rng.uniform(*(OOD_LANDS if canvas.split == "ood" else LANDS))
    wet = steps * rng.uniform(*SPREADS)
    ground = canvas.height - 2 * GROUND * side
    floor = ground - (2 * CUSHION[1] * side if form == "whole" else 0.0)
    rest = floor - EXTENTS[words["vessel"]][2] * radius
    fall = Segment(0.0, x, start, ay=2 * (rest - start) / time**2)
    motion = (fall, Segment(time, x, rest))
    cup = Entity(0, words["vessel"], words["colour"], radius, motion, layer=1)
    soil = ground + GROUND * side
    earth = _bar(1, "ground", "grey", canvas.width / 2, soil, canvas.width / 2, GROUND * side)
    landing = Event(time, "contact", (0, 1))
    if form == "whole":
        half = [share * side for share in CUSHION]
        cushion = _bar(2, "cushion", words["colour2"], x, ground - half[1], *half)
        return canvas.scene(rng, cup, earth, cushion, events=(replace(landing, ids=(0, 2)),))
    cup = replace(cup, changes=(Change(time, "alpha", 0.0),))
    halves = _puddle(words["colour2"], x, soil, side, wet, SPREADING * steps)
    events = (landing, Event(time, "break", (0, 2, 3)), Event(wet, "spill", (0, 4, 5)))
    return canvas.scene(rng, cup, earth, *_shards(cup, ground, time), *halves, events=events)


def _shown_from(time: float) -> tuple[Change, Change]:
    return Change(0, "alpha", 0.0), Change(time, "alpha", 1.0)


def _shards(cup: Entity, floor: float, time: float) -> list[Entity]:
    """The two triangles that a cup breaks into, lying on the floor on both sides of its place."""
    radius = SHARD * cup.radius
    x, y = cup.motion[0].x, floor - EXTENTS["triangle"][2] * radius
    return [
        replace(
            cup,
            id=number,
            shape="triangle",
            radius=radius,
            motion=still(x + way * SHARD_AT * cup.radius, y),
            role="shard",
            changes=_shown_from(time),
        )
        for number, way in ((2, -1), (3, 1))
    ]


def _puddle(
    colour: str, x: float, y: float, side: float, time: float, frames: float
) -> list[Entity]:
    """Two halves of a puddle that lie upon each other, and from a time on flow apart."""
    half = (PUDDLE[0] * side / 2, PUDDLE[1] * side)
    flows = [
        (Segment(0.0, x, y), Segment(time, x, y, way / frames), Segment(time + frames, x + way, y))
        for way in (-half[0], half[0])
    ]
    return [
        replace(
            _bar(number, "liquid", colour, x, y, *half),
            motion=motion,
            layer=2,
            changes=_shown_from(time),
        )
        for number, motion in zip((4, 5), flows, strict=True)
    ]


@scorer
def spill(seen: Detection, cup: str, liquid: str = "", cushion: str = "") -> float:
    """The cup falls straight down; then it breaks where it lands, and only then liquid spreads
    there. Or it comes to rest on the cushion and never breaks. What has happened stays so."""
    fallen, other = seen.tracks.get(cup), seen.tracks.get(liquid or cushion)
    if fallen is None or other is None or not fallen.seen.all():
        return 0.0
    if liquid:
        return _breaks(seen, fallen) and _spreads(seen, fallen, other)
    return (fallen.blobs == 1).all() and _rests_on(seen, fallen, other)


def _falls(seen: Detection, cup: Track, until: int, to: float) -> bool:
    """From rest straight down in the frames before `until`, by a visible way, to the height `to`.

    It keeps its size, and at the acceleration that it shows it would get there within two frames.
    """
    x, y = cup.x[:until], cup.y[:until]
    if np.ptp(np.log(cup.area[:until])) > SAME_AREA:
        return False
    down = (np.diff(y) > -0.03 * seen.side).all() and (abs(x - x[0]) < STRAIGHT * seen.side).all()
    shown = y[-1] - y[0]
    if not down or to - y[0] < DROP * seen.side or shown < 0.03 * seen.side:
        return False
    return (until - 1) * np.sqrt((to - y[0]) / shown) <= until + 2


def _breaks(seen: Detection, cup: Track) -> bool:
    """One piece until it has fallen, at least two from then on, lying still."""
    broken = cup.blobs > 1
    at = int(np.argmax(broken))
    if at == 0 or not broken[at:].all():
        return False
    level = float(np.median(cup.y[at:]))
    still = abs(cup.y[at:] - level) < 0.05 * seen.side
    return bool(still.all()) and _falls(seen, cup, at, level)


def _spreads(seen: Detection, cup: Track, liquid: Track) -> bool:
    """Not there before the cup is broken; then one puddle that grows, where the pieces lie."""
    wet = liquid.seen
    at = int(np.argmax(wet))
    if at < np.argmax(cup.blobs > 1) or not wet[at:].all() or (liquid.blobs > 1).any():
        return False
    under = liquid.y[at:] - cup.y[at:]
    beside = abs(liquid.x[at:] - cup.x[0])
    grows = liquid.area[-1] > SPREAD * liquid.area[at]
    near = (abs(under) < LEVEL * seen.side) & (beside < STRAIGHT * seen.side)
    return bool(grows and near.all())


def _rests_on(seen: Detection, cup: Track, cushion: Track) -> bool:
    """The cup falls, and is at rest just above the middle of a cushion in the last third."""
    if not (cushion.blobs == 1).all() or not _falls(seen, cup, seen.num_frames, cup.y[-1]):
        return False
    last = slice(-max(seen.num_frames // 3, 1), None)
    above, beside = cushion.y[last] - cup.y[last], abs(cushion.x[last] - cup.x[last])
    at_rest = abs(cup.y[last] - cup.y[-1]) < 0.03 * seen.side
    near = (above > 0) & (above < LEVEL * seen.side) & (beside < STRAIGHT * seen.side)
    return bool((at_rest & near).all())


def _changed(clip: WorldClip, changes: Mapping[int, tuple[Change, ...]]) -> np.ndarray | None:
    """Frames of a cup that breaks, with other changes in some of its entities."""
    if clip.form != "breaks":
        return None

    def edit(scene: Scene) -> Scene:
        for index, new in changes.items():
            scene = with_entity(scene, index, replace(scene.entities[index], changes=new))
        return scene

    return redrawn(clip, edit)


NEVER = (Change(0, "alpha", 0.0),)
CUP, SHARDS, LIQUID = 0, (2, 3), (4, 5)  # places in the scene of a cup that breaks


def _unbroken(clip: WorldClip) -> np.ndarray | None:
    """Liquid spreads from a whole cup."""
    return _changed(clip, {CUP: (), **dict.fromkeys(SHARDS, NEVER)})


def _dry(clip: WorldClip) -> np.ndarray | None:
    """Broken, but nothing spills."""
    return _changed(clip, dict.fromkeys(LIQUID, NEVER))


def _spilt_before_it_breaks(clip: WorldClip) -> np.ndarray | None:
    """Liquid is on the ground while the cup still falls."""
    early = _shown_from(0.3 * clip.scene.events[0].time)
    return _changed(clip, dict.fromkeys(LIQUID, early))


def _whole_again(clip: WorldClip) -> np.ndarray | None:
    """In the end the cup is as it was."""
    time, last = clip.scene.events[0].time, clip.scene.frames - 1
    back = Change(last, "alpha", 1.0)
    gone = (*_shown_from(time), Change(last, "alpha", 0.0))
    whole = (Change(time, "alpha", 0.0), back)
    return _changed(clip, {CUP: whole, **dict.fromkeys(SHARDS, gone)})


def _broken_in_the_air(clip: WorldClip) -> np.ndarray | None:
    """The cup breaks half way down, and its pieces stay there."""
    if clip.form != "breaks":
        return None
    scene, time = clip.scene, clip.scene.events[0].time / 2
    cup = scene.entities[CUP]
    (height,) = positions(cup.motion, np.array([time]))[1]
    scene = with_entity(scene, CUP, replace(cup, changes=(Change(time, "alpha", 0.0),)))
    for index, shard in zip(SHARDS, _shards(cup, height, time), strict=True):
        scene = with_entity(scene, index, shard)
    return render(scene).frames


def _gone_when_whole(clip: WorldClip) -> np.ndarray | None:
    """On the cushion, the cup is not there any more."""
    return half_gone(clip) if clip.form == "whole" else None


def _in_two_when_whole(clip: WorldClip) -> np.ndarray | None:
    """A cup that falls on a cushion splits."""
    return split_in_two(clip) if clip.form == "whole" else None


register(
    Family(
        "spill",
        failure="events out of order",
        forms=FORMS,
        draw=draw,
        build=build,
        min_frames=8,  # three states, each to survive a shift by a frame
        nudge=delayed,
        undone=("looks",),  # the vessel's, once it is in pieces
        faults={
            "colour": (recoloured,),
            "looks": (reshaped,),
            **STATIC_FAULTS,
            "spill": (
                _unbroken,
                _dry,
                _spilt_before_it_breaks,
                _whole_again,
                _broken_in_the_air,
                _gone_when_whole,
                _in_two_when_whole,
                at_rest,
                reversed_in_time,
                flickering,
            ),
        },
    )
)
