"""Two or four panels in one frame, each with a clause of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from longtake.data.world.detect import Detection
from longtake.data.world.families.registry import (
    STATIC,
    Ask,
    Canvas,
    Family,
    Form,
    draw_look,
    margins,
    pick,
    register,
    still,
)
from longtake.data.world.faults import (
    NEXT_SHAPE,
    STATIC_FAULTS,
    flickering,
    recoloured,
    reshaped_midway,
)
from longtake.data.world.language import STATIC_CAMERA, STATIC_CAMERA_ZH, Words
from longtake.data.world.render import render
from longtake.data.world.scene import (
    DIRECTIONS,
    SHAPES,
    SIZES,
    Change,
    Entity,
    Panel,
    Scene,
    Segment,
)
from longtake.data.world.scorers import score_frames, scorer

if TYPE_CHECKING:
    from collections.abc import Callable

    from longtake.data.world.clips import WorldClip

MOTION = {
    "left": ("moves left", "向左移动"),
    "right": ("moves right", "向右移动"),
    "up": ("moves up", "向上移动"),
    "down": ("moves down", "向下移动"),
    "still": ("stays still", "静止不动"),
}
LAYOUTS = {"pair": (1, 2), "four": (2, 2)}  # rows, columns
SHARES, OOD_SHARES = (0.25, 0.45), (0.5, 0.6)  # of a way, in the panel's shorter side
DARKER = 0.7  # than what lies on both sides: the line between two panels


def _asks(form: str, motion: str, named: dict[str, dict[str, str]], chance: float) -> tuple:
    """Every panel obeys the rules of its own clause; `#` stands for the number of its slots."""
    rows, columns = LAYOUTS[form]

    def numbered(rules: Any) -> list:
        return [_numbered(rules, i) for i in range(rows * columns)]

    moves = {
        "colour": {"colours": ["{colour#}"]},
        "count": {"count": 1},
        "count_constancy": {},
        "consistency": {},
        "direction": {"word": motion},
    }
    layout = {"rows": rows, "columns": columns}
    return (
        Ask("grid", {**layout, "panels": numbered(moves)}, 0.001),
        Ask("panel_looks", {**layout, "panels": numbered(named)}, chance),
        replace(STATIC, values={**STATIC.values, **layout}),
    )


def _numbered(value: Any, panel: int) -> Any:
    if isinstance(value, str):
        return value.replace("#", str(panel + 1) if panel else "")
    if isinstance(value, Mapping):
        return {key: _numbered(part, panel) for key, part in value.items()}
    return [_numbered(part, panel) for part in value] if isinstance(value, list) else value


FORMS = {
    "pair": Form(
        dense="Two plain grey panels side by side. Left: a {size} {colour} {shape} {motion}. "
        f"Right: a {{size2}} {{colour2}} {{shape2}} {{motion2}}. {STATIC_CAMERA}",
        short="{colour} {shape} {motion} | {colour2} {shape2} {motion2}",
        vague="two things, side by side in two panels",
        zh="左右并排的两个灰色画面。左边：一个{size}的{colour}{shape}{motion}。"
        f"右边：一个{{size2}}的{{colour2}}{{shape2}}{{motion2}}。{STATIC_CAMERA_ZH}",
        asks=_asks(
            "pair",
            "{motion#}",
            {"shape": {"shape": "{shape#}"}, "size": {"size": "{size#}"}},
            1 / 36,
        ),
        flips=("colour", "motion", "colour2", "motion2"),
        words={"motion": MOTION},
        choices={"shape": SHAPES, "shape2": SHAPES},
    ),
    "four": Form(
        dense="Four plain grey panels. Top left: a small {colour} {shape} moves {direction}. "
        "Top right: a small {colour2} {shape2} moves {direction2}. "
        "Bottom left: a small {colour3} {shape3} moves {direction3}. "
        f"Bottom right: a small {{colour4}} {{shape4}} moves {{direction4}}. {STATIC_CAMERA}",
        short="2x2 grid: {colour} {direction}, {colour2} {direction2}, "
        "{colour3} {direction3}, {colour4} {direction4}",
        vague="four things in a grid of panels",
        zh="四个灰色画面。左上：一个小的{colour}{shape}向{direction}移动。"
        "右上：一个小的{colour2}{shape2}向{direction2}移动。"
        "左下：一个小的{colour3}{shape3}向{direction3}移动。"
        f"右下：一个小的{{colour4}}{{shape4}}向{{direction4}}移动。{STATIC_CAMERA_ZH}",
        asks=_asks("four", "{direction#}", {"shape": {"shape": "{shape#}"}}, 1 / 160),
        flips=("colour", "direction", "colour4", "direction4"),
        choices={f"shape{i}": SHAPES for i in ("", "2", "3", "4")},
    ),
}


def draw(rng: np.random.Generator, canvas: Canvas) -> tuple[str, dict[str, str]]:
    """Colours are all different: a panel that shows another one's clause is seen to do so."""
    form = pick(rng, tuple(LAYOUTS))
    words: dict[str, str] = {}
    motions = tuple(MOTION) if form == "pair" else tuple(DIRECTIONS)
    taken: list[str] = []
    for i in range(int(np.prod(LAYOUTS[form]))):
        n, verb = str(i + 1) if i else "", int(rng.integers(len(motions)))
        colour, shape = draw_look(rng, canvas, verb % 4, taken=taken, shapes=SHAPES)
        taken.append(colour)
        words |= {f"colour{n}": colour, f"shape{n}": shape}
        words |= {f"motion{n}" if form == "pair" else f"direction{n}": motions[verb]}
        if form == "pair":
            words[f"size{n}"] = pick(rng, tuple(SIZES))
    return form, words


def build(rng: np.random.Generator, canvas: Canvas, form: str, words: Words) -> Scene:
    """Scenes of their own, with dark lines between them."""
    rows, columns = LAYOUTS[form]
    line = _line(canvas.short_side)
    height, width = canvas.height // rows, canvas.width // columns
    cell = replace(canvas, height=height - line * (rows > 1), width=width - line)
    panels = []
    for i in range(rows * columns):
        row, column = divmod(i, columns)
        scene = _clause(rng, cell, i, words)
        panels.append(Panel(row * (height + line), column * (width + line), scene))
    x, y = canvas.centre
    halves = [(line, y)] * (columns > 1) + [(x, line)] * (rows > 1)
    lines = [
        Entity(len(panels) + i, "bar", "grey", line, still(x, y), role="line", half=half)
        for i, half in enumerate(halves)
    ]
    return canvas.scene(rng, *lines, panels=tuple(panels))


def _line(side: int) -> int:
    """Half the width of the line between panels, px."""
    return max(1, side // 32)


def _clause(rng: np.random.Generator, cell: Canvas, panel: int, words: Words) -> Scene:
    """What one clause says: constant velocity or rest, wholly inside the panel."""
    n = str(panel + 1) if panel else ""
    shape, size = words[f"shape{n}"], words.get(f"size{n}", "small")
    motion = words[f"motion{n}"] if f"motion{n}" in words else words[f"direction{n}"]
    radius = cell.radius(size)
    side, top, bottom = margins(shape, radius)
    low = np.array([side, top])
    free = np.array([cell.width - side, cell.height - bottom]) - low
    share = rng.uniform(*(OOD_SHARES if cell.split == "ood" else SHARES))
    way = np.minimum(share * cell.short_side, free) * DIRECTIONS.get(motion, (0, 0))
    start = low + rng.random(2) * (free - abs(way)) + np.maximum(-way, 0)
    path = Segment(0.0, *start.tolist(), *(way / (cell.frames - 1)).tolist())
    return cell.scene(rng, Entity(panel, shape, words[f"colour{n}"], radius, (path,), size))


@scorer
def grid(seen: Detection, rows: int, columns: int, panels: Sequence[Mapping[str, Any]]) -> float:
    """Lines part the frame into panels, and every panel obeys its own rules all the time."""
    return _is_ruled(seen.frames, rows, columns) and _obeyed(seen, rows, columns, panels)


@scorer
def panel_looks(
    seen: Detection, rows: int, columns: int, panels: Sequence[Mapping[str, Any]]
) -> float:
    """Every panel shows a thing of the shape and size that its clause names."""
    return _obeyed(seen, rows, columns, panels)


def _obeyed(seen: Detection, rows: int, columns: int, panels: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each part of the frame obeys its rules: scores with their parameters."""
    height, width = seen.height // rows, seen.width // columns
    for i, rules in enumerate(panels):
        row, column = divmod(i, columns)
        top, left = row * height, column * width
        part = seen.frames[:, top : top + height, left : left + width]
        if min(score_frames(part, rules).values()) < 1:
            return False
    return True


def _is_ruled(frames: np.ndarray, rows: int, columns: int) -> bool:
    """Whether a dark line runs between the halves of the frame, both ways for two rows."""
    grey = frames.mean(-1)  # (T, H, W)
    parted = [grey] * (columns > 1) + [grey.swapaxes(1, 2)] * (rows > 1)
    return all(_is_parted(g, _line(min(frames.shape[1:3]))) for g in parted)


def _is_parted(grey: np.ndarray, line: int) -> bool:
    """Whether the middle columns of (T, H, W) are darker than those to both sides of them."""
    middle = grey.shape[2] // 2
    spans = ((-line, line), (-4 * line, -2 * line), (2 * line, 4 * line))
    strips = [grey[:, :, middle + a : middle + b].mean(2) for a, b in spans]
    dark, left, right = (np.median(strip, axis=1) for strip in strips)  # (T,)
    return bool((dark < DARKER * np.minimum(left, right)).mean() >= 0.9)


def _with_panels(clip: WorldClip, edit: Callable[[int, Scene], Scene]) -> np.ndarray:
    """Frames in which the scene of every panel is edited; `edit` is given its number, too."""
    panels = [replace(p, scene=edit(i, p.scene)) for i, p in enumerate(clip.scene.panels)]
    return render(replace(clip.scene, panels=tuple(panels))).frames


def exchanged(clip: WorldClip) -> np.ndarray:
    """Every panel shows what another one should."""
    scenes = [panel.scene for panel in clip.scene.panels]
    return _with_panels(clip, lambda i, _: scenes[i - 1])


def one_empty(clip: WorldClip) -> np.ndarray:
    """Nothing is in the last panel."""
    last = len(clip.scene.panels) - 1
    return _with_panels(clip, lambda i, s: replace(s, entities=()) if i == last else s)


def same_everywhere(clip: WorldClip) -> np.ndarray:
    """All panels show what the first one should."""
    first = clip.scene.panels[0].scene
    return _with_panels(clip, lambda _, scene: first)


def one_video(clip: WorldClip) -> np.ndarray:
    """The first panel's video fills the frame."""
    first, scene = clip.scene.panels[0].scene, clip.scene
    rows, columns = (
        np.arange(n) * m // n for n, m in ((scene.height, first.height), (scene.width, first.width))
    )
    return render(first).frames[:, rows][:, :, columns]


def without_panels(clip: WorldClip) -> np.ndarray:
    """All things are in one video, each where its panel should be."""
    moved = []
    for panel in clip.scene.panels:
        for entity in panel.scene.entities:
            first = entity.motion[0]
            place = replace(first, x=first.x + panel.left, y=first.y + panel.top)
            moved.append(replace(entity, motion=(place,)))
    return render(replace(clip.scene, entities=tuple(moved), panels=())).frames


def one_at_rest(clip: WorldClip) -> np.ndarray | None:
    """The last thing that should move does not."""
    last = len(clip.scene.panels) - 1
    first = clip.scene.panels[last].scene.entities[0].motion[0]
    if not (first.vx or first.vy):
        return None

    def stop(panel: int, scene: Scene) -> Scene:
        rest = (replace(first, vx=0.0, vy=0.0),)
        return scene if panel < last else _with_first(scene, motion=rest)

    return _with_panels(clip, stop)


def one_reshaped(clip: WorldClip) -> np.ndarray:
    """The first panel's thing has another shape."""

    def reshape(panel: int, scene: Scene) -> Scene:
        change = Change(0, "shape", NEXT_SHAPE[scene.entities[0].shape])
        return scene if panel else _with_first(scene, changes=(change,))

    return _with_panels(clip, reshape)


def _with_first(scene: Scene, **changed: Any) -> Scene:
    return replace(scene, entities=(replace(scene.entities[0], **changed),))


register(
    Family(
        "grid",
        failure="several videos in one frame mix or miss their clauses",
        forms=FORMS,
        draw=draw,
        build=build,
        min_side=32,
        faults={
            "grid": (exchanged, one_empty, same_everywhere, one_video, without_panels)
            + (one_at_rest, recoloured, flickering, reshaped_midway),
            **STATIC_FAULTS,
            "panel_looks": (one_reshaped, one_empty),
        },
    )
)
