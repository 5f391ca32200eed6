"""The camera pans, tilts, zooms, follows or rests: is the asked path taken, and no other?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from longtake.data.world.detect import Detection
from longtake.data.world.families.registry import (
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
    CONSTANCY_FAULTS,
    blinking,
    half_gone,
    missing,
    recoloured,
    recoloured_midway,
    redrawn,
    reshaped,
    reversed_in_time,
    with_motion,
)
from longtake.data.world.language import Words
from longtake.data.world.scene import DIRECTIONS, Entity, Scene, Shot, camera_path
from longtake.data.world.scorers import scorer

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

CAMERA = {
    "static": ("is static", "静止"),
    "pan left": ("pans left", "向左摇"),
    "pan right": ("pans right", "向右摇"),
    "tilt up": ("tilts up", "向上摇"),
    "tilt down": ("tilts down", "向下摇"),
    "zoom in": ("zooms in", "推近"),
    "zoom out": ("zooms out", "拉远"),
}
TEXTURE = 0.16  # stronger than elsewhere, so that there is something to see moving
TRAVEL = (0.3, 0.42)  # of a pan, in the frame's size along it; slower out of distribution
OOD_TRAVEL = (0.2, 0.25)
ZOOM, OOD_ZOOM = 1.6, 1.35
MIN_SHIFT, MIN_ZOOM = 0.1, 0.15  # what counts as moving: share of the frame, log factor


CHANCE = 7 / 8**2 + 1 / 4 / 8**2  # seven words, or following in the same direction
CONSTANT = 1 - 2 / 8 * 6 / 8  # two of eight zoom, where six ask that nothing grows
LOOKS = (
    Ask("colour", {"colours": ["{colour}"]}, 1 / 6),
    Ask("shape", {"shape": "{shape}"}, alike(1, colours=False)),
    Ask("count_constancy", {}, 1.0),
)


def _path(word: str) -> tuple[Ask, Ask]:
    return (
        Ask("camera_word", {"word": word}, CHANCE),
        Ask("camera_steady", {"word": word}, CHANCE),
    )


FORMS = {
    "still": Form(
        dense="A small {colour} {shape} stays still on a textured grey background. "
        "The camera {camera}.",
        short="a {colour} {shape}, the camera {camera}",
        vague="something, and the camera",
        zh="一个小的{colour}{shape}静止在灰色纹理背景上。镜头{camera}。",
        asks=(*LOOKS, *_path("{camera}"), Ask("consistency", {"camera": "{camera}"}, CONSTANT)),
        flips=("colour", "camera"),
        words={"camera": CAMERA},
    ),
    "follow": Form(
        dense="A small {colour} {shape} moves {direction} over a textured grey background. "
        "The camera follows it and keeps it in the middle.",
        short="a {colour} {shape} moves {direction}, the camera follows it",
        vague="something moves, and the camera too",
        zh="一个小的{colour}{shape}在灰色纹理背景上向{direction}移动。镜头跟随它，使它保持在中间。",
        asks=(*LOOKS, *_path("follow {direction}"), Ask("consistency", {}, CONSTANT)),
        flips=("colour", "direction"),
    ),
}


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    index = int(rng.integers(len(CAMERA) + 1))
    colour, shape = draw_look(rng, canvas, index % 4)
    words = {"colour": colour, "shape": shape}
    if index == len(CAMERA):
        return "follow", {**words, "direction": pick(rng, tuple(DIRECTIONS))}
    return "still", {**words, "camera": tuple(CAMERA)[index]}


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """Pan left: the camera turns left, so the picture shifts right. Paths have constant rates."""
    radius = canvas.radius("small")
    side, top, bottom = margins(words["shape"], radius)
    low, size = np.array([side, top]), np.array([canvas.width, canvas.height], float)
    free = size - np.array([side, bottom]) - low
    is_ood = canvas.split == "ood"
    share = rng.uniform(*(OOD_TRAVEL if is_ood else TRAVEL))
    place = rng.random(2)
    heading = words.get("direction") or words["camera"].split()[-1]
    shift = np.minimum(share * size, 0.9 * free) * DIRECTIONS.get(heading, (0, 0))
    growth = {"in": 1, "out": -1}.get(heading, 0) * np.log(OOD_ZOOM if is_ood else ZOOM)
    if form == "follow" or growth:  # in the middle, where it stays seen at any zoom
        at = size / 2 + (place - 0.5) * 0.1 * size
    else:
        at = low + place * (free - abs(shift)) + np.maximum(shift, 0)
    vx, vy = (shift / (canvas.frames - 1)).tolist()
    motion = still(*at.tolist())
    if form == "follow":
        motion = (replace(motion[0], vx=vx, vy=vy),)
    shot = Shot(
        0,
        *canvas.centre,
        background=int(rng.integers(2**31)),
        zoom=float(np.exp(max(-growth, 0.0))),
        vx=vx,
        vy=vy,
        zoom_rate=float(growth / (canvas.frames - 1)),
    )
    entity = Entity(0, words["shape"], words["colour"], radius, motion)
    return canvas.scene(rng, entity, shots=(shot,), texture=TEXTURE)


def path_word(seen: Detection) -> str:
    """The word for the camera's path and what it does to the subject: `zoom in`, `follow up`, ...

    Empty where the subject keeps its place neither on the ground nor in the picture.
    """
    path = seen.camera
    shift = np.stack([path.x, path.y])  # (2, T)
    axis = int(np.argmax(abs(shift[:, -1])))
    way = (("right", "left"), ("down", "up"))[axis][int(shift[axis, -1] > 0)]
    word = f"{('pan', 'tilt')[axis]} {way}"
    if abs(path.log_zoom[-1]) > MIN_ZOOM:
        word = "zoom in" if path.log_zoom[-1] > 0 else "zoom out"
    elif abs(shift[axis, -1]) < MIN_SHIFT * (seen.width, seen.height)[axis]:
        word = "static"
    if seen.main is None:
        return word
    centre = [[seen.width / 2], [seen.height / 2]]
    place = np.stack([seen.main.x, seen.main.y]) - centre
    ground = (place - shift) * np.exp(-path.log_zoom)
    on_ground, in_picture = (np.ptp(p[:, seen.main.seen], axis=1).max() for p in (ground, place))
    if on_ground < 0.12 * seen.side:
        return word
    is_followed = in_picture < 0.12 * seen.side and word.startswith(("pan", "tilt"))
    return f"follow {way}" if is_followed else ""


@scorer
def camera_word(seen: Detection, word: str) -> float:
    """The background moves as the asked camera would make it: pan left shifts the picture right.

    The subject keeps its place on the ground, or in the picture where it is followed.
    """
    return path_word(seen) == word


@scorer
def camera_steady(seen: Detection, word: str) -> float:
    """The camera takes the asked path in one take, straight, at a steady rate, and no other."""
    path, steps = seen.camera, seen.num_frames - 1
    if not path.is_one_take or steps < 1:
        return 0.0
    # in px, a zoom as what it does at the border
    moved = np.stack([-path.x, -path.y, path.log_zoom * seen.side / 2])
    limit = 0.02 * seen.side + 0.6
    if word != "static":
        verb, way = word.split()
        axis = 2 if verb == "zoom" else int(way in ("up", "down"))
        asked = moved[axis] * (1 if way in ("in", "right", "down") else -1)
        amount = asked[-1]
        if amount < (MIN_ZOOM / 2 if axis == 2 else MIN_SHIFT) * seen.side:
            return 0.0
        if (abs(np.diff(asked) - amount / steps) > amount / steps + limit).any():
            return 0.0
        times = np.arange(steps + 1)
        limit += 0.1 * amount
        moved[axis] = asked - np.polyval(np.polyfit(times, asked, 1), times)
    return bool((abs(moved) < limit).all())


def _filmed(clip: WorldClip, x: Any = 0.0, y: Any = 0.0, log_zoom: Any = 0.0) -> np.ndarray:
    """Frames under the clip's camera path plus something, each a number or (T,), px at zoom 1."""
    cam_x, cam_y, zoom = camera_path(clip.scene)
    background = clip.scene.shots[0].background
    path = np.stack(np.broadcast_arrays(cam_x + x, cam_y + y, zoom * np.exp(log_zoom)), 1)
    shots = [Shot(t, u, v, background, z) for t, (u, v, z) in enumerate(path.tolist())]
    return redrawn(clip, lambda scene: replace(scene, shots=tuple(shots)))


def _side(clip: WorldClip) -> int:
    return min(clip.scene.height, clip.scene.width)


def _share(clip: WorldClip) -> np.ndarray:
    """Share of the clip that is over, (T,)."""
    return np.linspace(0.0, 1.0, clip.scene.frames)


def shaky(clip: WorldClip) -> np.ndarray:
    """The camera trembles on its way."""
    tremble = 0.06 * _side(clip) * (-1.0) ** np.arange(clip.scene.frames)
    return _filmed(clip, tremble, -tremble)


def jumping(clip: WorldClip) -> np.ndarray:
    """The camera is at the end of its path at once, midway; a static one elsewhere."""
    is_late = _share(clip) >= 0.5
    if clip.words.get("camera") == "static":
        return _filmed(clip, 0.3 * _side(clip) * is_late)
    path = np.stack(camera_path(clip.scene))
    jump = np.where(is_late, path[:, -1:], path[:, :1])
    return _filmed(clip, jump[0] - path[0], jump[1] - path[1], np.log(jump[2] / path[2]))


def drifting(clip: WorldClip) -> np.ndarray:
    """The camera glides off at right angles to its path."""
    drift = 0.3 * _side(clip) * _share(clip)
    is_sideways = clip.scene.shots[0].vx != 0
    return _filmed(clip, y=drift) if is_sideways else _filmed(clip, drift)


def zooming(clip: WorldClip) -> np.ndarray | None:
    """The camera zooms on its way."""
    if clip.scene.shots[0].zoom_rate:
        return None
    return _filmed(clip, log_zoom=0.35 * _share(clip))


def turned_round(clip: WorldClip) -> np.ndarray:
    """The camera goes the other way; a static one pans."""
    if clip.words.get("camera") == "static":
        return drifting(clip)
    return reversed_in_time(clip)


def unmoved(clip: WorldClip) -> np.ndarray | None:
    """The camera rests where it should move."""
    path = np.stack(camera_path(clip.scene))
    if clip.words.get("camera") == "static":
        return None
    rest = path[:, :1] - path
    return _filmed(clip, rest[0], rest[1], np.log(path[2, 0] / path[2]))


def left_behind(clip: WorldClip) -> np.ndarray | None:
    """The subject moves where it should rest, and rests where it should be followed."""
    first = clip.scene.entities[0].motion[0]
    pace = 0.35 * _side(clip) / clip.scene.frames * (1 if first.x < clip.scene.width / 2 else -1)
    return with_motion(clip, 0, replace(first, vx=0.0 if clip.form == "follow" else pace, vy=0.0))


register(
    Family(
        "camera",
        failure="the camera path is not followed",
        forms=FORMS,
        draw=draw,
        build=build,
        faults={
            "colour": (recoloured, missing),
            "shape": (reshaped,),
            **CONSTANCY_FAULTS,
            "camera_word": (turned_round, unmoved, left_behind),
            "camera_steady": (shaky, jumping, drifting, zooming, turned_round, unmoved),
            "count_constancy": (blinking, half_gone, recoloured_midway),
        },
    )
)
