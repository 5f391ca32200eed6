"""Clips of the world: each a pure function of (seed, split, index), made again at will."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from zlib import crc32

import numpy as np

from longtake.data.world.captions import MAX_DENSE, MAX_SHORT
from longtake.data.world.families import FAMILIES, SPLITS, Canvas, Composition
from longtake.data.world.render import Rendering, render
from longtake.data.world.scene import Scene, camera_path

LICENCE = "CC0-1.0"
SOURCE = "longtake.world"


@dataclass(frozen=True, slots=True)
class WorldClip:
    """frames uint8 (T, H, W, 3); captions by kind; truth as WORLD.md's record, JSON-ready."""

    key: str
    family: str
    split: str
    frames: np.ndarray
    fps: float
    captions: dict[str, str]
    truth: dict[str, Any]
    scene: Scene

    def record(self) -> dict[str, Any]:
        """The content of the sample's `key.json`."""
        return {
            "captions": self.captions,
            "fps": self.fps,
            "licence": LICENCE,
            "source": SOURCE,
            "source_id": self.key,
            "split": self.split,
            "family": self.family,
            "truth": self.truth,
            "scores": dict.fromkeys(self.truth["expect"], 1.0),
        }


def check_request(
    families: Sequence[str], split: str, frames: int, height: int, width: int
) -> None:
    """ValueError for what cannot be drawn: unknown names, too few frames, too small a frame."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    if not families:
        raise ValueError(f"families is empty: name at least one of {', '.join(sorted(FAMILIES))}")
    if frames < 1:
        raise ValueError(f"frames={frames} must be at least 1 (1 is an image)")
    if min(height, width) < 16 or height % 2 or width % 2:
        raise ValueError(f"size {height}x{width} must be even and at least 16x16")
    for name in families:
        if name not in FAMILIES:
            raise ValueError(f"family {name!r} is unknown: use {', '.join(sorted(FAMILIES))}")
        if frames < FAMILIES[name].min_frames:
            raise ValueError(
                f"family {name!r} needs frames >= {FAMILIES[name].min_frames}, got {frames}: "
                "its events take time"
            )


def make_clip(
    seed: int,
    split: str,
    index: int,
    *,
    families: Sequence[str],
    frames: int = 17,
    height: int = 32,
    width: int = 32,
    fps: float = 8,
) -> WorldClip:
    """Clip `index` of a split; families take turns. Raises ValueError as `check_request` does."""
    check_request(families, split, frames, height, width)
    name = families[index % len(families)]
    rng = np.random.Generator(np.random.SFC64([seed, crc32(split.encode()), index]))
    canvas = Canvas(frames, height, width, fps, split)
    made = FAMILIES[name].compose(rng, canvas)
    words = made.words
    assert len(words.dense) <= MAX_DENSE and len(words.short) <= MAX_SHORT, words
    drawn = render(made.scene)
    return WorldClip(
        key=f"{split}-{index:08d}",
        family=name,
        split=split,
        frames=drawn.frames,
        fps=fps,
        captions={
            "dense": words.dense,
            "short": words.short,
            "vague": words.vague,
            "wrong": made.wrong,
            "zh": words.zh,
        },
        truth=truth_record(name, made, drawn),
        scene=made.scene,
    )


def truth_record(name: str, made: Composition, drawn: Rendering) -> dict[str, Any]:
    """Everything that is true of the clip, as plain JSON types."""
    scene = made.scene
    cam_x, cam_y, zoom = camera_path(scene)
    motion = [np.hypot(np.diff(t.x), np.diff(t.y)).mean() for t in drawn.tracks if len(t.x) > 1]
    starts = [s.start for s in scene.shots] + [scene.frames]
    return {
        "family": name,
        "frames": scene.frames,
        "height": scene.height,
        "width": scene.width,
        "entities": [
            {
                "id": e.id,
                "shape": e.shape,
                "colour": e.colour,
                "size": e.size,
                "mark": e.mark,
                "role": e.role,
                "z": e.layer,
                "x": _rounded(t.x),
                "y": _rounded(t.y),
                "r": _rounded(t.radius),
                "visible": _rounded(t.visible),
            }
            for e, t in zip(scene.entities, drawn.tracks, strict=True)
        ],
        "events": [
            {"frame": round(e.time, 2), "type": e.type, "ids": list(e.ids)} for e in scene.events
        ],
        "camera": {"cx": _rounded(cam_x), "cy": _rounded(cam_y), "zoom": _rounded(zoom, 4)},
        "shots": [{"start": a, "end": b} for a, b in pairwise(starts)],
        "count": sum(e.role == "subject" for e in scene.entities),
        "motion": round(float(np.mean(motion)), 3) if motion else 0.0,
        "defects": [],
        "expect": made.expect,
        "asked": made.asked,
    }


def _rounded(values: np.ndarray, digits: int = 2) -> list[float]:
    return np.round(values, digits).tolist()
