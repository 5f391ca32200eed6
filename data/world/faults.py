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
from longtake.data.world.scene import (
    PALETTE,
    SIZES,
    Change,
    Entity,
    Scene,
    Segment,
    Shot,
    positions,
)

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
    first = clip.scene.entities[0]
    return with_changes(clip, 0, Change(0, "shape", NEXT_SHAPE[first.shape]), *first.changes)


def _first(clip: WorldClip) -> Entity:
    """The first entity that has a colour, in a panel if there are any."""
    return next(entity for entity in clip.scene.everything if entity.colour in PALETTE)


def _of_first_colour(clip: WorldClip, *changes: Change) -> np.ndarray:
    """Frames in which all that is coloured as the first entity undergoes these changes, too."""

    def changed(scene: Scene, entity: Entity) -> Entity:
        if entity.colour != _first(clip).colour:
            return entity
        return replace(entity, changes=(*entity.changes, *changes))

    def edit(scene: Scene) -> Scene:
        panels = tuple(replace(p, scene=edit(p.scene)) for p in scene.panels)
        entities = tuple(changed(scene, e) for e in scene.entities)
        return replace(scene, entities=entities, panels=panels)

    return redrawn(clip, edit)


def flickering(clip: WorldClip) -> np.ndarray:
    """The first entity is a third larger in every second frame."""
    return _of_first_colour(clip, *pulses(clip.scene.frames))


def pulses(frames: int) -> list[Change]:
    """Of a thing that is a third larger in every second frame."""
    return [Change(t, "radius", (1.0, 1.35)[t % 2]) for t in range(frames)]


def reshaped_midway(clip: WorldClip) -> np.ndarray:
    """The first entity takes another shape in the middle of the clip."""
    return _reshaped_from(clip, clip.scene.frames // 2)


def reshaped_late(clip: WorldClip) -> np.ndarray:
    """The first entity has another shape in the last two frames."""
    return _reshaped_from(clip, clip.scene.frames - 2)


def _reshaped_from(clip: WorldClip, start: int) -> np.ndarray:
    return _of_first_colour(clip, Change(start, "shape", NEXT_SHAPE[_first(clip).shape]))


def _filmed(clip: WorldClip, edit: Callable[[Scene], tuple[Shot, ...]]) -> np.ndarray:
    """Frames in which the scene, and that of every panel, has other shots."""

    def refilmed(scene: Scene) -> Scene:
        panels = tuple(replace(p, scene=refilmed(p.scene)) for p in scene.panels)
        return replace(scene, shots=edit(scene), panels=panels)

    return redrawn(clip, refilmed)


def cut_midway(clip: WorldClip) -> np.ndarray:
    """The background is another one from the middle of the clip on."""

    def edit(scene: Scene) -> tuple[Shot, ...]:
        last = scene.shots[-1]
        other = replace(last, start=scene.frames // 2, background=last.background ^ 1)
        return (*scene.shots, other)

    return _filmed(clip, edit)


def panned(clip: WorldClip) -> np.ndarray:
    """The camera glides along where it should rest, a quarter of the shorter side a shot."""

    def edit(scene: Scene) -> tuple[Shot, ...]:
        stops = [shot.start for shot in scene.shots[1:]] + [scene.frames]
        way = 0.25 * min(scene.width, scene.height)
        return tuple(
            replace(shot, vx=way / max(stop - shot.start - 1, 1))
            for shot, stop in zip(scene.shots, stops, strict=True)
        )

    return _filmed(clip, edit)


CONSTANCY_FAULTS = {"consistency": (flickering, reshaped_midway)}
STATIC_FAULTS = {"static_camera": (cut_midway, panned)}
"""Of the scores that most families have: those that ask `CONSTANT` and `STATIC` of the registry."""


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
