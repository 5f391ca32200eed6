"""A clip as a small declarative scene, from which frames, captions and truth all follow.

Units: time in frames, positions and radii in world pixels, x to the right, y down, pixel centres at
half-integers. With a camera at (W / 2, H / 2) and zoom 1, world and screen coordinates agree.
Every quantity is a closed form of time, so any frame can be asked for without the ones before it.
"""

from dataclasses import dataclass, field

import numpy as np

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (228, 38, 38),
    "green": (38, 196, 60),
    "blue": (48, 70, 238),
    "yellow": (236, 224, 44),
    "purple": (186, 50, 226),
    "cyan": (44, 216, 222),
}
BAR_GREY = (66, 66, 66)
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle")
BIG_CANVAS_SHAPES = ("ring", "cross")  # need about 64 px to be told apart from the filled ones
BIG_CANVAS = 64  # px of the shorter side from which on they occur
ALL_SHAPES = (*SHAPES, *BIG_CANVAS_SHAPES)
SIDEWAYS, UPRIGHT = ("left", "right"), ("up", "down")
SIZES = {"small": 0.15, "large": 0.22}  # radius as a share of the frame's shorter side
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
# half-extents (left/right, up, down) in radii; all shapes have the area of the circle
EXTENTS: dict[str, tuple[float, float, float]] = {
    "circle": (1.0, 1.0, 1.0),
    "square": (0.8862, 0.8862, 0.8862),
    "triangle": (1.3468, 1.5551, 0.7776),
    "ring": (1.195, 1.195, 1.195),
    "cross": (1.1295, 1.1295, 1.1295),
}


def shapes_at(short_side: int) -> tuple[str, ...]:
    """Shapes that can be told apart in frames of this shorter side (px)."""
    return ALL_SHAPES if short_side >= BIG_CANVAS else SHAPES


@dataclass(frozen=True, slots=True)
class Segment:
    """Motion from frame `start` until the next segment: p + v·dt + a·dt² / 2."""

    start: float
    x: float
    y: float
    vx: float = 0.0
    vy: float = 0.0
    ax: float = 0.0
    ay: float = 0.0


@dataclass(frozen=True, slots=True)
class Limb:
    """A stroke of a jointed figure, from the joint `parent` to the joint `name` at its far end.

    No `parent` is the entity's own place. `angle` is 0 downwards and grows towards the right; a
    change of the attribute `name` turns it. `width` of the stroke, `tip` radius of a disc at its
    end.
    """

    name: str
    parent: str | None
    length: float
    angle: float
    width: float
    tip: float = 0.0


@dataclass(frozen=True, slots=True)
class Change:
    """An attribute takes `value` from frame `start` on; `duration` frames later, where it can ramp.

    Attributes: shape, mark (text, at once), colour (blends) and radius, angle, alpha, brightness
    (numbers; radius is a factor of the entity's own), and the angle of a limb under its name.
    """

    start: float
    attribute: str
    value: str | float
    duration: float = 0.0


@dataclass(frozen=True, slots=True)
class Entity:
    """One thing in the world; `half` (half-width, half-height) turns it into a bar of that size.

    With `limbs`, a parent before its children, it is a figure of strokes.
    """

    id: int
    shape: str
    colour: str
    radius: float
    motion: tuple[Segment, ...]
    size: str = "small"
    role: str = "subject"
    layer: int = 0
    half: tuple[float, float] | None = None
    mark: str | None = None
    angle: float = 0.0
    changes: tuple[Change, ...] = ()
    limbs: tuple[Limb, ...] = ()


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens at a (fractional) frame time to the entities `ids`."""

    time: float
    type: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shot:
    """Frames from `start` to the next shot, seen by one camera before one background.

    (x, y) is the world point at the frame's centre when the shot starts, (vx, vy) its velocity in
    px/frame; zoom grows by the factor exp(zoom_rate) per frame.
    """

    start: int
    x: float
    y: float
    background: int
    zoom: float = 1.0
    vx: float = 0.0
    vy: float = 0.0
    zoom_rate: float = 0.0


@dataclass(frozen=True, slots=True)
class Panel:
    """A scene of its own in the box (top, left) of the frame; its size is the scene's."""

    top: int
    left: int
    scene: "Scene"


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything in a clip; `texture` is the background's peak deviation from its mean grey.

    `reference` is the frame that shows how a character looks before it acts.
    """

    frames: int
    height: int
    width: int
    fps: float
    entities: tuple[Entity, ...]
    shots: tuple[Shot, ...]
    events: tuple[Event, ...] = ()
    texture: float = 0.06
    panels: tuple[Panel, ...] = ()
    reference: int | None = None

    @property
    def everything(self) -> tuple[Entity, ...]:
        """Its own entities, then those of its panels; ids are unique among all of them."""
        return self.entities + tuple(e for p in self.panels for e in p.scene.everything)


@dataclass(slots=True)
class EntityTrack:
    """State of one entity at T frames; positions in screen pixels, radius after zoom."""

    x: np.ndarray  # (T,) float64
    y: np.ndarray
    radius: np.ndarray
    zoom: np.ndarray
    angle: np.ndarray
    alpha: np.ndarray
    colour: np.ndarray  # (T, 3) float32 in [0, 1]
    shape: list[str]
    mark: list[str | None]
    joints: dict[str, tuple[np.ndarray, np.ndarray]]  # x (T,), y (T,) of every limb's far end
    visible: np.ndarray = field(default_factory=lambda: np.zeros(0))  # set by the renderer


def positions(motion: tuple[Segment, ...], times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World coordinates x (T,), y (T,) of a piecewise motion at `times` (T,)."""
    if len(motion) == 1:  # as often: a fifth of the time
        (s,) = motion
        dt = times - s.start
        return s.x + dt * (s.vx + 0.5 * dt * s.ax), s.y + dt * (s.vy + 0.5 * dt * s.ay)
    index = np.searchsorted([s.start for s in motion], times, side="right") - 1
    table = np.array([(s.start, s.x, s.y, s.vx, s.vy, s.ax, s.ay) for s in motion])
    start, x, y, vx, vy, ax, ay = table[np.maximum(index, 0)].T
    dt = times - start
    return x + dt * (vx + 0.5 * dt * ax), y + dt * (vy + 0.5 * dt * ay)


def camera_path(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Camera centre x, y in world pixels and zoom, each (T,)."""
    times = np.arange(scene.frames, dtype=np.float64)
    if len(scene.shots) == 1:  # as nearly always: a tenth of the time
        shot = scene.shots[0]
        zoom = shot.zoom * np.exp(shot.zoom_rate * times)
        return shot.x + shot.vx * times, shot.y + shot.vy * times, zoom
    index = np.searchsorted([s.start for s in scene.shots], times, side="right") - 1
    table = np.array([(s.start, s.x, s.y, s.zoom, s.vx, s.vy, s.zoom_rate) for s in scene.shots])
    start, x, y, zoom, vx, vy, rate = table[index].T
    dt = times - start
    return x + vx * dt, y + vy * dt, zoom * np.exp(rate * dt)


def _paint(colour: str) -> np.ndarray:
    """RGB in [0, 1] of a colour's name; grey for what has none."""
    return np.array(PALETTE.get(colour, BAR_GREY), np.float32) / 255


def track(scene: Scene, entity: Entity) -> EntityTrack:
    """Where an entity is and how it looks in every frame, as the camera sees it."""
    times = np.arange(scene.frames, dtype=np.float64)
    x, y = positions(entity.motion, times)
    cam_x, cam_y, zoom = camera_path(scene)
    ones = np.ones(scene.frames)
    numbers = {"radius": ones, "alpha": ones, "brightness": ones, "angle": ones * entity.angle}
    numbers |= {limb.name: ones * limb.angle for limb in entity.limbs}
    rgb = _paint(entity.colour)  # (3,), and (T, 3) once it changes
    texts: dict[str, list] = {
        "shape": [entity.shape] * scene.frames,
        "mark": [entity.mark] * scene.frames,
    }
    for change in entity.changes:
        since = times - change.start
        share = np.clip(since / change.duration, 0, 1) if change.duration else since >= 0
        if change.attribute == "colour":
            rgb = rgb + (_paint(str(change.value)) - rgb) * share[:, None]
        elif isinstance(change.value, str):
            old = texts[change.attribute]
            texts[change.attribute] = [
                change.value if t >= change.start else o for t, o in enumerate(old)
            ]
        else:
            old = numbers[change.attribute]
            numbers[change.attribute] = old + (change.value - old) * share
    x = (x - cam_x) * zoom + scene.width / 2
    y = (y - cam_y) * zoom + scene.height / 2
    return EntityTrack(
        x=x,
        y=y,
        radius=entity.radius * numbers["radius"] * zoom,
        zoom=zoom,
        angle=numbers["angle"],
        alpha=numbers["alpha"],
        colour=(rgb * numbers["brightness"][:, None]).astype(np.float32),
        shape=texts["shape"],
        mark=texts["mark"],
        joints=_joints(entity, numbers, x, y, zoom),
    )


def _joints(
    entity: Entity, angles: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray, zoom: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Screen position of the far end of every limb of a figure that is at x (T,), y (T,)."""
    joints: dict[str | None, tuple[np.ndarray, np.ndarray]] = {None: (x, y)}
    for limb in entity.limbs:
        from_x, from_y = joints[limb.parent]
        reach, angle = limb.length * zoom, angles[limb.name]
        joints[limb.name] = (from_x + reach * np.sin(angle), from_y + reach * np.cos(angle))
    return {limb.name: joints[limb.name] for limb in entity.limbs}
