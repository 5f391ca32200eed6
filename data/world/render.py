"""Scenes to frames in NumPy: analytic anti-aliased shapes over a grey texture without saturation.

Entities are composited front to back inside their bounding box, which also yields the visible share
of each. The background is value noise on a lattice fixed to the world; because the camera never
rolls, sampling it is separable: two small matrix products per frame.
"""

from dataclasses import dataclass

import numpy as np

from longtake.data.world.scene import Entity, EntityTrack, Scene, Shot, camera_path, track

_ROOT3 = float(np.sqrt(3.0))
_SQUARE = float(np.sqrt(np.pi) / 2)  # half-side of the square with the area of the unit circle
_TRIANGLE = float(np.sqrt(np.pi / (3 * _ROOT3)))  # inradius of the triangle of the same area
_CROSS = 1.1295  # half-length of the cross of the same area, arms 0.38 as wide as long


@dataclass(slots=True)
class Rendering:
    """Frames uint8 (T, H, W, 3), and one track per entity with its visible share (T,) filled in."""

    frames: np.ndarray
    tracks: list[EntityTrack]


def _edge(distance: np.ndarray) -> np.ndarray:
    """Coverage of a pixel by a half-plane-like edge at a signed distance in pixels (inside < 0)."""
    return np.clip(0.5 - distance, 0.0, 1.0)


def _box(dx: np.ndarray, dy: np.ndarray, half_x: np.ndarray, half_y: np.ndarray) -> np.ndarray:
    return _edge(np.abs(dx) - half_x) * _edge(np.abs(dy) - half_y)


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Share of each pixel covered by a shape; dx (T, 1, W), dy (T, H, 1), r (T, 1, 1) -> (T, H, W).

    Every shape has the area of the circle of radius r and its centroid at the origin.
    """
    if shape == "circle":
        return _edge(np.sqrt(dx * dx + dy * dy) - r)
    if shape == "square":
        return _box(dx, dy, _SQUARE * r, _SQUARE * r)
    if shape == "triangle":
        inradius = _TRIANGLE * r
        sides = np.abs(dx) * (_ROOT3 / 2) - dy * 0.5
        return _edge(sides - inradius) * _edge(dy - inradius)
    if shape == "ring":
        return _edge(np.abs(np.sqrt(dx * dx + dy * dy) - 0.925 * r) - 0.27 * r)
    if shape == "cross":
        arm, width = _CROSS * r, _CROSS * 0.38 * r
        return np.maximum(_box(dx, dy, arm, width), _box(dx, dy, width, arm))
    raise ValueError(f"shape={shape!r} is not known to the renderer: see data/world/scene.py")


def background(scene: Scene) -> np.ndarray:
    """Grey texture, float32 (T, H, W) in [0, 1]; (1, H, W) where nothing moves it."""
    cam_x, cam_y, zoom = camera_path(scene)
    starts = [s.start for s in scene.shots] + [scene.frames]
    parts = []
    for shot, stop in zip(scene.shots, starts[1:], strict=True):
        if stop <= shot.start:
            continue
        moving = bool(shot.vx or shot.vy or shot.zoom_rate)
        at = np.arange(shot.start, stop if moving else shot.start + 1)
        part = _texture(scene, shot, cam_x[at], cam_y[at], zoom[at])
        if not moving and len(scene.shots) > 1:
            part = np.repeat(part, stop - shot.start, axis=0)
        parts.append(part)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _texture(
    scene: Scene, shot: Shot, cam_x: np.ndarray, cam_y: np.ndarray, zoom: np.ndarray
) -> np.ndarray:
    """Cubic B-spline noise under a moving camera; period 64 lattice cells, (T, H, W)."""
    rng = np.random.Generator(np.random.SFC64(shot.background))
    lattice = rng.random((64, 64), dtype=np.float32) * 2 - 1
    level = 0.55 + 0.2 * rng.random()
    cell = max(3.0, min(scene.height, scene.width) / 8)
    weights_y = _spline_weights(cam_y, zoom, scene.height, cell)  # (T, H, 64)
    weights_x = _spline_weights(cam_x, zoom, scene.width, cell)  # (T, W, 64)
    noise = weights_y @ lattice @ weights_x.transpose(0, 2, 1)  # (T, H, W)
    return np.clip(level + noise * (1.6 * scene.texture), 0.0, 1.0)  # 1.6: smoothing halves it


def _spline_weights(centre: np.ndarray, zoom: np.ndarray, size: int, cell: float) -> np.ndarray:
    """Cubic B-spline weights over the 64 lattice points of every screen row, (T, size, 64)."""
    screen = np.arange(size) + 0.5 - size / 2
    at = (centre[:, None] + screen / zoom[:, None]) / cell  # (T, size)
    base = np.floor(at)
    f = (at - base).astype(np.float32)
    g = 1 - f
    taps = (g**3, 4 - 6 * f**2 + 3 * f**3, 4 - 6 * g**2 + 3 * g**3, f**3)
    weights = np.zeros((*at.shape, 64), np.float32)
    rows = weights.reshape(-1, 64)
    flat = np.arange(rows.shape[0])
    first = base.astype(np.int64).ravel() - 1
    for offset, tap in enumerate(taps):
        rows[flat, (first + offset) % 64] = tap.ravel() / 6
    return weights


def _bounds(low: np.ndarray, high: np.ndarray, size: int) -> slice:
    start = int(np.floor(low.min())) - 1
    stop = int(np.ceil(high.max())) + 2
    return slice(min(max(start, 0), size), min(max(stop, 0), size))


def _entity_cover(
    scene: Scene, entity: Entity, state: EntityTrack
) -> tuple[np.ndarray, slice, slice]:
    """Coverage (T, h, w) of one entity and the box of the frame it was computed in."""
    if entity.half is not None:
        half_x, half_y = entity.half[0] * state.zoom, entity.half[1] * state.zoom
    else:
        half_x = half_y = state.radius * 1.6
    rows = _bounds(state.y - half_y, state.y + half_y, scene.height)
    cols = _bounds(state.x - half_x, state.x + half_x, scene.width)
    y = np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5
    x = np.arange(cols.start, cols.stop, dtype=np.float32) + 0.5
    dy = y[None, :, None] - state.y.astype(np.float32)[:, None, None]
    dx = x[None, None, :] - state.x.astype(np.float32)[:, None, None]
    if state.angle.any():
        cos, sin = (f(state.angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    r = state.radius.astype(np.float32)[:, None, None]
    if entity.half is not None:
        alpha = _box(
            dx, dy, half_x.astype(np.float32)[:, None, None], half_y[:, None, None].astype("f4")
        )
    elif len(set(state.shape)) == 1:
        alpha = coverage(state.shape[0], dx, dy, r)
    else:
        alpha = np.zeros((scene.frames, len(y), len(x)), np.float32)
        for shape in set(state.shape):
            at = np.array([s == shape for s in state.shape])
            alpha[at] = coverage(shape, dx[at], dy[at], r[at])
    if not (state.alpha == 1).all():
        alpha = alpha * state.alpha.astype(np.float32)[:, None, None]
    return alpha, rows, cols


def _mark(state: EntityTrack, rows: slice, cols: slice) -> np.ndarray:
    """Coverage (T, h, w) of a dark dot at the upper right of the entities that carry a mark."""
    y = np.arange(rows.start, rows.stop)[None, :, None] + 0.5
    x = np.arange(cols.start, cols.stop)[None, None, :] + 0.5
    r, cx, cy = (v[:, None, None] for v in (state.radius, state.x, state.y))
    dot = _edge(np.hypot(x - cx - 0.35 * r, y - cy + 0.1 * r) - 0.28 * r)
    return (dot * np.array([m is not None for m in state.mark])[:, None, None]).astype(np.float32)


def render(scene: Scene) -> Rendering:
    """Draw a scene. A bar, as any entity, hides what has a lower layer (equal layers: lower id)."""
    shape = (scene.frames, scene.height, scene.width)
    image = np.zeros((*shape, 3), np.float32)
    light = np.ones(shape, np.float32)  # what still shines through from behind
    tracks = [track(scene, e) for e in scene.entities]
    order = sorted(zip(scene.entities, tracks, strict=True), key=lambda p: (p[0].layer, p[0].id))
    for entity, state in reversed(order):
        alpha, rows, cols = _entity_cover(scene, entity, state)
        box = (slice(None), rows, cols)
        seen = alpha * light[box]
        if entity.half is None:
            full = np.pi * np.maximum(state.radius, 1e-6) ** 2
        else:
            full = 4 * entity.half[0] * entity.half[1] * state.zoom**2
        state.visible = np.minimum(seen.sum(axis=(1, 2), dtype=np.float64) / full, 1.0)
        paint = state.colour[:, None, None, :]
        if any(state.mark):
            paint = paint * (1 - 0.75 * _mark(state, rows, cols)[..., None])
        image[box] += seen[..., None] * paint
        light[box] -= seen
    image += (light * background(scene))[..., None]
    image *= 255.0
    image += 0.5
    frames = image.clip(0, 255).astype(np.uint8)
    for panel in scene.panels:
        inner = panel.scene
        box = (
            slice(panel.top, panel.top + inner.height),
            slice(panel.left, panel.left + inner.width),
        )
        frames[:, box[0], box[1]] = render(inner).frames
    return Rendering(frames, tracks)
