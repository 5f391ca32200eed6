"""Scenes to frames in NumPy: analytic anti-aliased shapes over a grey texture without saturation.

Entities are painted back to front, each only inside a window that goes with it: most of a frame is
background, so that is what makes a clip cheap. The background is value noise on a lattice fixed to
the world; because the camera never rolls, sampling it is separable: two small matrix products per
frame.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from longtake.data.world.scene import EXTENTS, Entity, EntityTrack, Scene, Shot, track

_ROOT3 = float(np.sqrt(3.0))
_SQUARE = float(np.sqrt(np.pi) / 2)  # half-side of the square with the area of the unit circle
_TRIANGLE = float(np.sqrt(np.pi / (3 * _ROOT3)))  # inradius of the triangle of the same area
_CROSS = 1.1295  # half-length of the cross of the same area, arms 0.38 as wide as long


@dataclass(slots=True)
class Rendering:
    """Frames uint8 (T, H, W, 3), and one track per entity with its visible share (T,) filled in.

    The tracks are those of `Scene.everything`, in pixels of the whole frame.
    """

    frames: np.ndarray
    tracks: list[EntityTrack]


def _edge(distance: np.ndarray) -> np.ndarray:
    """Coverage of a pixel by a half-plane-like edge at a signed distance in pixels (inside < 0)."""
    inside = 0.5 - distance
    np.maximum(inside, 0.0, out=inside)
    return np.minimum(inside, 1.0, out=inside)


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
    stops = [s.start for s in scene.shots[1:]] + [scene.frames]
    parts = []
    for shot, stop in zip(scene.shots, stops, strict=True):
        if stop > shot.start:
            part = _texture(scene, shot, stop - shot.start)
            is_one_of_many = len(part) == 1 and len(scene.shots) > 1
            parts.append(part.repeat(stop - shot.start, 0) if is_one_of_many else part)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _texture(scene: Scene, shot: Shot, frames: int) -> np.ndarray:
    """Cubic B-spline noise before one camera; period 64 lattice cells, (T, H, W), T = 1 at rest."""
    rng = np.random.Generator(np.random.SFC64(shot.background))
    level = _level(rng)
    lattice = rng.random((64, 64), dtype=np.float32) * 2 - 1
    cell = max(3.0, min(scene.height, scene.width) / 8)
    if shot.vx or shot.vy or shot.zoom_rate:
        since = np.arange(frames)
        zoom = shot.zoom * np.exp(shot.zoom_rate * since)
        weights_y = _spline_weights(shot.y + shot.vy * since, zoom, scene.height, cell)
        weights_x = _spline_weights(shot.x + shot.vx * since, zoom, scene.width, cell)
    else:
        weights_y = _weights_at_rest(shot.y, shot.zoom, scene.height, cell)  # (1, H, 64)
        weights_x = _weights_at_rest(shot.x, shot.zoom, scene.width, cell)  # (1, W, 64)
    noise = weights_y @ lattice @ weights_x.transpose(0, 2, 1)  # (T, H, W)
    return (level + noise * (1.6 * scene.texture)).clip(0.0, 1.0)  # 1.6: smoothing halves it


def mean_grey(background: int) -> float:
    """Grey level in [0, 1] around which the texture of a background lies."""
    return _level(np.random.Generator(np.random.SFC64(background)))


def _level(rng: np.random.Generator) -> float:
    return 0.55 + 0.2 * rng.random()


@lru_cache(maxsize=64)  # most cameras rest at the centre of one of few sizes
def _weights_at_rest(centre: float, zoom: float, size: int, cell: float) -> np.ndarray:
    return _spline_weights(np.array([centre]), np.array([zoom]), size, cell)


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


@dataclass(slots=True)
class _Window:
    """A box of one size that goes with a thing: its pixels, rows (T, h) and cols (T, w)."""

    rows: np.ndarray
    cols: np.ndarray

    @classmethod
    def around(
        cls, scene: Scene, x: np.ndarray, y: np.ndarray, half_x: np.ndarray, half_y: np.ndarray
    ) -> "_Window":
        """The window, inside the frame, of what reaches that far from its centre x (T,), y (T,)."""
        return cls(_span(y, half_y, scene.height), _span(x, half_x, scene.width))

    @property
    def offsets(self) -> tuple[np.ndarray, np.ndarray]:
        """Centres of the pixels in px: x (T, 1, w), y (T, h, 1)."""
        x, y = self.cols.astype(np.float32) + 0.5, self.rows.astype(np.float32) + 0.5
        return x[:, None, :], y[:, :, None]

    def index(self, scene: Scene) -> np.ndarray:
        """The pixels (T, h, w) in frames flattened to (T · H · W)."""
        rows = np.arange(scene.frames)[:, None] * scene.height + self.rows
        return (rows * scene.width)[:, :, None] + self.cols[:, None, :]


def _span(centre: np.ndarray, half: np.ndarray, size: int) -> np.ndarray:
    """Pixels (T, n) along one axis, all inside it and equally many at every time.

    They reach a pixel further than the thing: so far does the soft tip of a triangle.
    """
    reach = float(half.max())
    count = min(int(2 * reach) + 4, size)
    first = np.floor(centre - reach - 1.5).astype(np.int64).clip(0, size - count)
    return first[:, None] + np.arange(count)


def _column(values: np.ndarray) -> np.ndarray:
    """(T,) as float32 (T, 1, 1)."""
    return values.astype(np.float32)[:, None, None]


def _entity_cover(scene: Scene, entity: Entity, state: EntityTrack) -> tuple[np.ndarray, _Window]:
    """Coverage (T, h, w) of one entity and the window it was computed in."""
    turns = state.angle.any()
    if entity.half is not None:
        half_x, half_y = entity.half[0] * state.zoom, entity.half[1] * state.zoom
        if turns:
            half_x = half_y = np.hypot(half_x, half_y)
    else:
        reaches = [EXTENTS[shape] for shape in set(state.shape)]
        side, height = max(r[0] for r in reaches), max(max(r) for r in reaches)
        half_x, half_y = state.radius * (height if turns else side), state.radius * height
    window = _Window.around(scene, state.x, state.y, half_x, half_y)
    x, y = window.offsets
    dx, dy = x - _column(state.x), y - _column(state.y)
    if turns:
        cos, sin = _column(np.cos(state.angle)), _column(np.sin(state.angle))
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    r = _column(state.radius)
    if entity.half is not None:
        alpha = _box(
            dx, dy, _column(entity.half[0] * state.zoom), _column(entity.half[1] * state.zoom)
        )
    elif len(set(state.shape)) == 1:
        alpha = coverage(state.shape[0], dx, dy, r)
    else:
        alpha = np.zeros((scene.frames, y.shape[1], x.shape[2]), np.float32)
        for shape in set(state.shape):
            at = np.array([s == shape for s in state.shape])
            alpha[at] = coverage(shape, dx[at], dy[at], r[at])
    return alpha, window


def _limbs_cover(scene: Scene, entity: Entity, state: EntityTrack) -> tuple[np.ndarray, _Window]:
    """Coverage (T, h, w) of a figure's strokes and discs, and the window it was computed in."""
    ends = {None: (state.x, state.y), **state.joints}
    pad = max(limb.width / 2 + limb.tip for limb in entity.limbs) * state.zoom
    spans = []
    for axis in (0, 1):
        at = np.array([end[axis] for end in ends.values()])  # (J, T)
        low, high = at.min(0), at.max(0)
        spans.append(((low + high) / 2, (high - low) / 2 + pad))
    (middle_x, half_x), (middle_y, half_y) = spans
    window = _Window.around(scene, middle_x, middle_y, half_x, half_y)
    x, y = window.offsets
    zoom = _column(state.zoom)
    nearest = np.full((scene.frames, y.shape[1], x.shape[2]), np.inf, np.float32)
    for limb in entity.limbs:
        points = (*ends[limb.parent], *ends[limb.name])
        from_x, from_y, to_x, to_y = (_column(p) for p in points)
        dx, dy, way_x, way_y = x - from_x, y - from_y, to_x - from_x, to_y - from_y
        reach = (limb.length * zoom) ** 2
        along = (dx * (way_x / reach) + dy * (way_y / reach)).clip(0.0, 1.0)
        off_x, off_y = dx - along * way_x, dy - along * way_y
        distance = np.sqrt(off_x * off_x + off_y * off_y) - limb.width / 2 * zoom
        np.minimum(nearest, distance, out=nearest)
        if limb.tip:
            distance = np.sqrt((x - to_x) ** 2 + (y - to_y) ** 2) - limb.tip * zoom
            np.minimum(nearest, distance, out=nearest)
    return _edge(nearest), window


def _mark(state: EntityTrack, window: _Window) -> np.ndarray:
    """Coverage (T, h, w) of a dark dot at the upper right of the entities that carry a mark."""
    x, y = window.offsets
    r, cx, cy = (_column(v) for v in (state.radius, state.x, state.y))
    dot = _edge(np.hypot(x - cx - 0.35 * r, y - cy + 0.1 * r) - 0.28 * r)
    return dot * np.array([m is not None for m in state.mark], np.float32)[:, None, None]


def _area(entity: Entity, state: EntityTrack, alpha: np.ndarray) -> np.ndarray:
    """Area (T,) in px² of all of an entity, seen or not."""
    if entity.limbs:
        return np.maximum(alpha.sum((1, 2)), 1e-6)
    if entity.half is None:
        return np.pi * np.maximum(state.radius, 1e-6) ** 2
    return 4 * entity.half[0] * entity.half[1] * state.zoom**2


def render(scene: Scene) -> Rendering:
    """Draw a scene. A bar, as any entity, hides what has a lower layer (equal layers: lower id)."""
    # channels first while painting: NumPy is slow at a last axis of three
    planes = np.empty((3, scene.frames, scene.height, scene.width), np.uint8)
    planes[:] = (background(scene) * 255 + 0.5).astype(np.uint8)
    light = np.ones(planes[0].size, np.float32)  # what still shines through from behind
    tracks = [track(scene, e) for e in scene.entities]
    order = sorted(zip(scene.entities, tracks, strict=True), key=lambda p: (p[0].layer, p[0].id))
    layers = []
    for entity, state in reversed(order):
        alpha, window = (_limbs_cover if entity.limbs else _entity_cover)(scene, entity, state)
        full = _area(entity, state, alpha)
        alpha *= _column(state.alpha)
        at = np.flatnonzero(alpha)
        frame, index = at // alpha[0].size, window.index(scene).ravel()[at]
        alpha = alpha.ravel()[at]
        seen = alpha * light[index]
        light[index] -= seen
        seen_area = np.bincount(frame, seen, scene.frames)
        state.visible = np.minimum(seen_area / full, 1.0)
        paint = (np.minimum(state.colour, 1.0) * 255).T.take(frame, 1)  # (3, n)
        if any(state.mark):
            paint *= 1 - 0.75 * _mark(state, window).ravel()[at]
        layers.append((index, alpha, paint))
    flat = planes.reshape(3, -1)
    for index, alpha, paint in reversed(layers):
        behind = flat.take(index, 1)  # (3, n)
        flat[:, index] = (behind + alpha * (paint - behind) + 0.5).astype(np.uint8)
    frames = np.empty((*planes.shape[1:], 3), np.uint8)
    for channel, plane in enumerate(planes):
        frames[..., channel] = plane
    for panel in scene.panels:
        inner = render(panel.scene)
        height, width = inner.frames.shape[1:3]
        below, beside = panel.top + height, panel.left + width
        frames[:, panel.top : below, panel.left : beside] = inner.frames
        for state in inner.tracks:
            for x, y in ((state.x, state.y), *state.joints.values()):
                x += panel.left
                y += panel.top
        tracks += inner.tracks
    return Rendering(frames, tracks)
