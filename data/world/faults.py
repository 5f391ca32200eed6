"""Planted faults that several families share: what a generator may get wrong, drawn on purpose.

A fault takes a clip and returns frames that look like it and are wrong in one respect. Most edit
the scene and draw it again. Faults of one family live in its module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from longtake.data.world.render import render
from longtake.data.world.scene import SIZES, Change, Entity, Scene, Segment, positions

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

NEXT_SHAPE = {
    "circle": "square",
    "square": "triangle",
    "triangle": "circle",
    "ring": "square",
    "cross": "circle",
}


def redrawn(clip: WorldClip, edit: Callable[[Scene], Scene]) -> np.ndarray:
    """Frames of the edited scene."""
    return render(edit(clip.scene)).frames


def with_entity(scene: Scene, index: int, entity: Entity) -> Scene:
    """The scene with one entity replaced."""
    entities = list(scene.entities)
    entities[index] = entity
    return replace(scene, entities=tuple(entities))


def with_changes(clip: WorldClip, index: int, *changes: Change) -> np.ndarray:
    """Frames in which one entity undergoes exactly these changes."""
    entity = clip.scene.entities[index]
    return redrawn(clip, lambda s: with_entity(s, index, replace(entity, changes=changes)))


def with_motion(clip: WorldClip, index: int, *motion: Segment) -> np.ndarray:
    """Frames in which one entity moves like this."""
    entity = clip.scene.entities[index]
    return redrawn(clip, lambda s: with_entity(s, index, replace(entity, motion=motion)))


def mirrored(clip: WorldClip) -> np.ndarray:
    """Flipped along the axis of motion."""
    word = clip.words["direction"]
    return clip.frames[:, :, ::-1] if word in ("left", "right") else clip.frames[:, ::-1]


def flipped(clip: WorldClip) -> np.ndarray:
    """Left and right exchanged."""
    return clip.frames[:, :, ::-1]


def reversed_in_time(clip: WorldClip) -> np.ndarray:
    """Played backwards."""
    return clip.frames[::-1]


def recoloured(clip: WorldClip) -> np.ndarray:
    """Every colour is another one, from the first frame on."""
    return np.roll(clip.frames, 1, axis=-1)


def reshaped(clip: WorldClip) -> np.ndarray:
    """The first entity has another shape."""
    return with_changes(clip, 0, Change(0, "shape", NEXT_SHAPE[clip.scene.entities[0].shape]))


def resized(clip: WorldClip) -> np.ndarray:
    """The first entity is small where large was asked for, and the other way round."""
    factor = SIZES["large"] / SIZES["small"]
    factor = factor if clip.scene.entities[0].size == "small" else 1 / factor
    return with_changes(clip, 0, Change(0, "radius", factor))


def at_rest(clip: WorldClip) -> np.ndarray:
    """The first entity does not move."""
    first = clip.scene.entities[0].motion[0]
    return with_motion(clip, 0, Segment(0.0, first.x, first.y))


def missing(clip: WorldClip) -> np.ndarray:
    """The first entity is not there."""
    return with_changes(clip, 0, Change(0, "alpha", 0.0))


def half_gone(clip: WorldClip) -> np.ndarray:
    """The first entity vanishes in the middle of the clip."""
    return with_changes(clip, 0, Change(clip.scene.frames // 2, "alpha", 0.0))


def blinking(clip: WorldClip) -> np.ndarray:
    """The first entity is not there for one frame."""
    middle = clip.scene.frames // 2
    return with_changes(clip, 0, Change(middle, "alpha", 0.0), Change(middle + 1, "alpha", 1.0))


def recoloured_midway(clip: WorldClip) -> np.ndarray:
    """The first entity takes a colour that nothing else has, in the middle of the clip."""
    taken = {e.colour for e in clip.scene.entities}
    colour = next(c for c in ("red", "cyan", "green", "blue", "purple") if c not in taken)
    return with_changes(clip, 0, Change(clip.scene.frames // 2, "colour", colour))


def coloured_back(clip: WorldClip, index: int) -> np.ndarray:
    """An entity that took another colour has its old one again in the end."""
    entity = clip.scene.entities[index]
    back = Change(clip.scene.frames - 1, "colour", entity.colour)
    return with_changes(clip, index, *entity.changes, back)


def split_in_two(clip: WorldClip) -> np.ndarray | None:
    """A smaller copy of the first entity parts from it and goes where nothing else ever is.

    None where the frame has no such place: a twin that touches the first is one blob with it.
    """
    scene, first = clip.scene, clip.scene.entities[0]
    side = min(scene.width, scene.height)
    twin_radius = 0.12 * side
    times = np.arange(scene.frames, dtype=float)
    paths = [np.stack(positions(e.motion, times), 1) for e in scene.entities]
    spots = np.random.default_rng(0).uniform(0.17 * side, 0.83 * side, (400, 2))
    room = [
        min(
            np.hypot(*(path - spot).T).min() - 1.3 * (entity.radius + twin_radius)
            for path, entity in zip(paths, scene.entities, strict=True)
        )
        for spot in spots
    ]
    if max(room) < 1:
        return None
    x, y = spots[int(np.argmax(room))].tolist()
    start_x, start_y = paths[0][0].tolist()
    parting = Segment(0.0, start_x, start_y, (x - start_x) / 2, (y - start_y) / 2)
    twin = replace(first, id=99, radius=twin_radius, motion=(parting, Segment(2.0, x, y)), layer=50)
    return render(replace(scene, entities=(*scene.entities, twin))).frames
