"""One thing comes up to another and touches it, or misses it: the motion, and how to see it.

What a contact causes differs from family to family; when it may happen does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from longtake.data.world.detect import Detection, Track
from longtake.data.world.families.registry import Canvas, Fault
from longtake.data.world.faults import with_changes
from longtake.data.world.scene import DIRECTIONS, Change, Scene, Segment

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

GAP = 0.5  # px to the edge of the frame
MISSED_BY = (0.1, 0.14)  # of the shorter side: how far apart a miss leaves them
WAY, ARRIVAL = (0.85, 1.0), (0.56, 0.64)  # of the room there is; of the clip
OOD_WAY, OOD_ARRIVAL = (0.55, 0.62), (0.68, 0.74)  # shorter and later, so all is slower
# as seen, shares of the shorter side: at most this far apart is contact, at least this far a
# coming, and within this much of the closest is as close as they get
TOUCH, COMING, CLOSEST = 0.05, 0.05, 0.03


@dataclass(frozen=True, slots=True)
class Approach:
    """The mover's path, where the target is (px), and the frame time at which they touch."""

    motion: tuple[Segment, ...]
    target: tuple[float, float]
    time: float


def approach(
    rng: np.random.Generator,
    canvas: Canvas,
    word: str,
    *,
    touches: bool,
    extents: tuple[float, float],
    reach: float,
    across: float,
    aside: float,
) -> Approach:
    """The mover goes in direction `word` up to the target and stops there.

    `extents` are the half-lengths of mover and target along the way, `reach` their distance at
    contact, `across` where the target is on the other axis, all in px. A miss either stops short
    or passes `aside` of the target, both drawn whether they are needed or not.
    """
    ux, uy = DIRECTIONS[word]
    length = canvas.width if ux else canvas.height
    steps = canvas.frames - 1
    free = length - 2 * GAP - sum(extents) - reach
    is_ood = canvas.split == "ood"
    way = free * rng.uniform(*(OOD_WAY if is_ood else WAY))
    start = GAP + extents[0] + rng.random() * (free - way)
    time = steps * rng.uniform(*(OOD_ARRIVAL if is_ood else ARRIVAL))
    short = canvas.short_side * rng.uniform(*MISSED_BY)
    passes = rng.random() < 0.5
    target = start + way + reach

    def place(along: float, beside: float = 0.0) -> tuple[float, float]:
        along = along if ux + uy > 0 else length - along
        return (along, across + beside) if ux else (across + beside, along)

    def path(beside: float, speed: float) -> Segment:
        return Segment(0.0, *place(start, beside), ux * speed, uy * speed)

    if passes and not touches:
        room = length - GAP - extents[0] - start
        motion = (path(aside, min(way / time, room / steps)),)
    else:
        way -= 0.0 if touches else short
        motion = (path(0.0, way / time), Segment(time, *place(start + way)))
    return Approach(motion, place(target), time)


def gap_between(mover: Track, target: Track, reach: float) -> np.ndarray:
    """Room between two things in px, (T,); the target is where it is when all of it is seen.

    `reach` is their distance at contact in units of the sum of the radii of equal area.
    """
    whole = target.area > 0.9 * target.full_area
    x, y = target.x[whole].mean(), target.y[whole].mean()
    radii = np.sqrt(mover.full_area / np.pi) + np.sqrt(target.full_area / np.pi)
    return np.hypot(mover.x - x, mover.y - y) - reach * radii


def obeys_contact(seen: Detection, changed: np.ndarray, gap: np.ndarray, touches: bool) -> bool:
    """Whether `changed` (T,) is what one thing coming up to another at `gap` (T,) has to cause.

    Contact: it is so from then on (± 1 frame), for good, and never before. A miss: never.
    """
    nearest = gap.min()
    if gap[0] - nearest < COMING * seen.side or (nearest < TOUCH * seen.side) != touches:
        return False
    if not touches:
        return not changed.any()
    if not changed.any() or changed[0] or not changed[np.argmax(changed) :].all():
        return False
    effect = int(np.argmax(changed))
    close = max(nearest, -TOUCH * seen.side) + CLOSEST * seen.side
    contact = int(np.argmax(gap <= close))  # early by what CLOSEST allows at this pace
    pace = (gap[0] - gap[contact]) / max(contact, 1)
    return contact - 1 <= effect <= contact + 2 + CLOSEST * seen.side / max(pace, 1e-6)


def delayed(scene: Scene, by_frames: float) -> Scene:
    """The scene with every effect moved in time: how things look and what the first entity, the
    cause, sets going."""

    def moved(steps: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(replace(s, start=s.start + by_frames) if s.start else s for s in steps)

    cause, *others = (replace(e, changes=moved(e.changes)) for e in scene.entities)
    others = [replace(e, motion=moved(e.motion)) for e in others]
    return replace(scene, entities=(cause, *others))


def effect_faults(index: int, before: float, after: float) -> tuple[Fault, ...]:
    """What may be wrong with a contact that takes the alpha of one entity from one to another.

    They fit clips with a contact, the first event of their scene.
    """

    def planted(clip: WorldClip, *changes: tuple[float, float]) -> np.ndarray | None:
        """Frames with other changes at shares of the time until contact."""
        if not clip.scene.events:
            return None
        time = clip.scene.events[0].time
        return with_changes(clip, index, *(Change(at * time, "alpha", to) for at, to in changes))

    def no_effect(clip: WorldClip) -> np.ndarray | None:
        return planted(clip, (0.0, before))

    def effect_before_contact(clip: WorldClip) -> np.ndarray | None:
        return planted(clip, (0.0, before), (0.3, after))

    def effect_undone(clip: WorldClip) -> np.ndarray | None:
        return planted(clip, (0.0, before), (1.0, after), (1.35, before))

    def effect_from_the_start(clip: WorldClip) -> np.ndarray | None:
        return planted(clip, (0.0, after))

    return no_effect, effect_before_contact, effect_undone, effect_from_the_start
