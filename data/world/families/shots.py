"""One thing in several shots, from wide to close: does it stay the same across the cuts?"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from longtake.data.world.detect import Detection, Track
from longtake.data.world.families.registry import (
    Ask,
    Canvas,
    Family,
    Form,
    draw_look,
    pick,
    register,
    roomiest,
    still,
)
from longtake.data.world.faults import (
    NEXT_SHAPE,
    flickering,
    missing,
    redrawn,
    reshaped_midway,
    with_changes,
)
from longtake.data.world.language import NUMBERS, STATIC_CAMERA, STATIC_CAMERA_ZH, ZH_NUMBERS, Words
from longtake.data.world.render import mean_grey
from longtake.data.world.scene import (
    COLOURS,
    Change,
    Entity,
    Event,
    Scene,
    Shot,
)
from longtake.data.world.scorers import keeps_size, scorer

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

TEXTURE = 0.16  # strong enough for two places to differ
CONTRAST = 0.1  # of their mean grey: more than flicker may be
ZOOM = {"closer": 1.4, "much closer": 2.0}  # of the last shot, where the first has 1
MOST_CUTS = 5
CUTS = {word: (word, zh) for word, zh in zip(NUMBERS[1:6], ZH_NUMBERS[1:6], strict=True)}
OWN = {
    "cuts": CUTS,
    "moment": {"early": ("early", "较早"), "late": ("late", "较晚")},
    "zoom": {"closer": ("closer", "更近"), "much closer": ("much closer", "近得多")},
}


def _form(dense: str, short: str, zh: str, cuts: str, moment: str) -> Form:
    zoom = {"zoom": "{zoom}"}
    return Form(
        dense=f"A small {{colour}} {{shape}} stays still on a textured grey background, first in a "
        f"wide shot, then {dense}. {STATIC_CAMERA}",
        short=f"a wide shot of a {{colour}} {{shape}}, {short}",
        vague="a few views of one thing",
        zh=f"灰色纹理背景上一个静止的小的{{colour}}{{shape}}，先是远景，{zh}。{STATIC_CAMERA_ZH}",
        asks=(
            Ask("identity", {"colour": "{colour}", "shape": "{shape}"}, _identity_chance),
            Ask("cuts", {"cuts": cuts, "moment": moment}, _cuts_chance),
            Ask("close_up", zoom, 1 / 2),
        ),
        flips=("colour", "shape", "zoom"),
        words=OWN,
        choices={"cuts": NUMBERS[2 : MOST_CUTS + 1]},
    )


def _numbers(canvas: Canvas) -> tuple[int, ...]:
    """How many cuts there can be; more than ever out of distribution."""
    if canvas.frames < 8:
        return (2,) if canvas.split == "ood" else (1,)
    if canvas.split == "ood":
        return (4, 5) if canvas.frames >= 12 else (4,)
    return (1, 2, 3)


def _cuts_chance(canvas: Canvas) -> float:
    numbers = _numbers(canvas)
    is_timed = 1 in numbers and canvas.frames >= 8  # a single cut is early or late
    return (1 - 0.5 * is_timed / len(numbers)) / len(numbers)


def _identity_chance(canvas: Canvas) -> float:
    looks = len(COLOURS) * len(canvas.shapes)
    if canvas.split == "combo":  # one look in nine, others for every number of cuts
        return 9 / looks / len(_numbers(canvas))
    return 9 / 8 / looks


FORMS = {
    "one": _form("one cut to a {zoom} shot", "one cut to {zoom}", "然后切到一个{zoom}的镜头",
                 "one", "even"),
    "timed": _form("{moment} in the clip one cut to a {zoom} shot", "{moment} cut to {zoom}",
                   "{moment}切到一个{zoom}的镜头", "one", "{moment}"),
    "several": _form("{cuts} cuts at equal times, the last to a {zoom} shot",
                     "{cuts} cuts to {zoom}", "然后等间隔切换{cuts}次，最后是{zoom}的镜头",
                     "{cuts}", "even"),
}  # fmt: skip


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    """The look, how often it is cut, and how close the last shot is."""
    numbers = _numbers(canvas)
    number = numbers[rng.integers(len(numbers))]
    colour, shape = draw_look(rng, canvas, min(number, 3))
    words = {"colour": colour, "shape": shape, "zoom": pick(rng, tuple(OWN["zoom"]))}
    if number > 1:
        return "several", {**words, "cuts": NUMBERS[number]}
    if canvas.frames < 8:
        return "one", words
    return "timed", {**words, "moment": pick(rng, tuple(OWN["moment"]))}


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """The thing rests in the world; every shot has its own ground and shows it elsewhere."""
    number = NUMBERS.index(words.get("cuts", "one"))
    starts = [round(canvas.frames * k / (number + 1)) for k in range(number + 1)]
    if form == "timed":
        early = max(2, int(0.3 * canvas.frames))
        starts[1] = early if words["moment"] == "early" else canvas.frames - early
    radius = canvas.radius("small")
    zooms = np.linspace(0, np.log(ZOOM[words["zoom"]]), number + 1)
    places = rng.random((MOST_CUTS + 1, 2))
    grounds = _grounds(rng, number + 1)
    x, y = canvas.centre
    shots = []
    for k, (start, zoom) in enumerate(zip(starts, np.exp(zooms).tolist(), strict=True)):
        side, top, bottom = roomiest(canvas.shapes, radius * zoom)
        at_x = side + places[k, 0] * (canvas.width - 2 * side)
        at_y = top + places[k, 1] * (canvas.height - top - bottom)
        centre = (x - (at_x - x) / zoom, y - (at_y - y) / zoom)
        shots.append(Shot(start, *centre, background=grounds[k], zoom=zoom))
    entity = Entity(0, words["shape"], words["colour"], radius, still(x, y))
    events = tuple(Event(start, "cut", ()) for start in starts[1:])
    return canvas.scene(rng, entity, shots=tuple(shots), events=events, texture=TEXTURE)


def _grounds(rng: np.random.Generator, number: int) -> list[int]:
    """Backgrounds of which no two in a row are equally bright: a cut is always seen as one."""
    found = [int(rng.integers(2**31))]
    while len(found) < number:
        other = int(rng.integers(2**31))
        if abs(mean_grey(other) - mean_grey(found[-1])) > CONTRAST:
            found.append(other)
    return found


def _by_shot(seen: Detection) -> list[Track]:
    """The largest track cut into shots; empty unless there are at least two."""
    cuts = seen.ground.cuts
    if seen.main is None or not cuts:
        return []
    frames = np.arange(seen.num_frames)
    found = []
    for start, stop in pairwise([0, *cuts, seen.num_frames]):
        here = (frames >= start) & (frames < stop)
        track = seen.main
        found.append(replace(track, area=track.area * here, blobs=track.blobs * here))
    return found


@scorer
def identity(seen: Detection, colour: str, shape: str) -> float:
    """There are several shots, and the same one thing, of the asked look, is in all of them.

    Within a shot it keeps its size.
    """
    shots = _by_shot(seen)
    if not shots or set(seen.tracks) != {colour} or (seen.tracks[colour].blobs != 1).any():
        return 0.0
    return all(seen.shapes_of(track) == {shape} and keeps_size(track) for track in shots)


@scorer
def cuts(seen: Detection, cuts: str, moment: str) -> float:
    """As many cuts as asked, at equal times or in the asked half of the clip."""
    found = np.array(seen.ground.cuts)
    if len(found) != NUMBERS.index(cuts):
        return 0.0
    if moment != "even":
        return (2 * found[0] < seen.num_frames) == (moment == "early")
    asked = seen.num_frames * np.arange(1, len(found) + 1) / (len(found) + 1)
    return bool((abs(found - asked) < 1.3 + 0.05 * seen.num_frames).all())


@scorer
def close_up(seen: Detection, zoom: str) -> float:
    """No shot is wider than the one before, and the last as much closer than the first as asked."""
    radii = np.array([np.sqrt(track.full_area) for track in _by_shot(seen)])
    if not len(radii) or not radii.all() or (radii[1:] < 0.93 * radii[:-1]).any():
        return 0.0
    low, limit, high = 1.15, np.sqrt(ZOOM["closer"] * ZOOM["much closer"]), 3.0
    ratio = radii[-1] / radii[0]
    return limit < ratio < high if zoom == "much closer" else low < ratio < limit


def _after_last_cut(clip: WorldClip, attribute: str, value: str) -> np.ndarray:
    return with_changes(clip, 0, Change(clip.scene.shots[-1].start, attribute, value))


def other_colour(clip: WorldClip) -> np.ndarray:
    """It has another colour after the last cut."""
    colour = COLOURS[(COLOURS.index(clip.words["colour"]) + 1) % len(COLOURS)]
    return _after_last_cut(clip, "colour", colour)


def other_shape(clip: WorldClip) -> np.ndarray:
    """It has another shape after the last cut."""
    return _after_last_cut(clip, "shape", NEXT_SHAPE[clip.words["shape"]])


def _reshot(clip: WorldClip, shots: list[Shot]) -> np.ndarray:
    return redrawn(clip, lambda scene: replace(scene, shots=tuple(shots)))


def uncut(clip: WorldClip) -> np.ndarray:
    """The first shot lasts."""
    return _reshot(clip, [clip.scene.shots[0]])


def cut_too_often(clip: WorldClip) -> np.ndarray:
    """Another cut within the longest shot."""
    shots = list(clip.scene.shots)
    starts = [shot.start for shot in shots] + [clip.scene.frames]
    longest = int(np.argmax(np.diff(starts)))
    middle = (starts[longest] + starts[longest + 1]) // 2
    more = replace(shots[longest], start=middle, background=shots[longest].background ^ 1)
    return _reshot(clip, [*shots[: longest + 1], more, *shots[longest + 1 :]])


def cut_at_other_times(clip: WorldClip) -> np.ndarray | None:
    """The cuts crowd at the beginning or the end; an early one is late."""
    shots, frames = clip.scene.shots, clip.scene.frames
    if clip.form == "one" or frames < 8:
        return None if frames >= 8 else uncut(clip)
    if clip.form == "timed":
        return _reshot(clip, [shots[0], replace(shots[1], start=frames - shots[1].start)])
    return _reshot(clip, [replace(shot, start=k) for k, shot in enumerate(shots)])


def _rezoomed(clip: WorldClip, zooms: list[float]) -> np.ndarray:
    """The shots at other zooms, with the thing in the middle."""
    x, y = clip.scene.width / 2, clip.scene.height / 2
    shots = zip(clip.scene.shots, zooms, strict=True)
    return _reshot(clip, [replace(shot, x=x, y=y, zoom=zoom) for shot, zoom in shots])


def never_closer(clip: WorldClip) -> np.ndarray:
    """All shots are wide."""
    return _rezoomed(clip, [1.0] * len(clip.scene.shots))


def wider(clip: WorldClip) -> np.ndarray:
    """From close to wide."""
    return _rezoomed(clip, [shot.zoom for shot in clip.scene.shots][::-1])


register(
    Family(
        "shots",
        failure="a thing is another one after a cut",
        forms=FORMS,
        draw=draw,
        build=build,
        faults={
            "identity": (other_colour, other_shape, missing, flickering, reshaped_midway),
            "cuts": (uncut, cut_too_often, cut_at_other_times),
            "close_up": (never_closer, wider, uncut),
        },
    )
)
