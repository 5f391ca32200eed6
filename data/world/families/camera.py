"""The camera pans, tilts, zooms, follows or rests: is the asked camera path taken?"""

from dataclasses import replace

import numpy as np

from longtake.data.world.captions import (
    STATIC_CAMERA,
    STATIC_CAMERA_ZH,
    ZH,
    Words,
    full_noun,
    other_colour,
    plain_noun,
    zh_noun,
)
from longtake.data.world.families.registry import (
    Canvas,
    Composition,
    draw_look,
    family,
    margins,
)
from longtake.data.world.scene import DIRECTIONS, Entity, Scene, Segment, Shot

WORDS = (
    "static", "pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "follow",
)  # fmt: skip
TEXTURE = 0.16  # stronger than elsewhere, so that there is something to see moving
ZOOM = 1.6
TRAVEL = (0.3, 0.42)  # of a pan, in the frame's size along it
ZH_CAMERA = {
    "static": STATIC_CAMERA_ZH,
    "pan left": "镜头向左摇。",
    "pan right": "镜头向右摇。",
    "tilt up": "镜头向上摇。",
    "tilt down": "镜头向下摇。",
    "zoom in": "镜头推近。",
    "zoom out": "镜头拉远。",
}


def _words(entity: Entity, camera: str, heading: str) -> Words:
    noun, full = plain_noun(entity), full_noun(entity)
    verb, _, way = camera.partition(" ")
    still = f"A {full} stays still on a textured grey background."
    zh = f"一个{zh_noun(entity)}静止在灰色纹理背景上。"
    if camera == "static":
        return Words(
            f"{still} {STATIC_CAMERA}",
            f"a static shot of a {noun}",
            "a shot",
            zh + STATIC_CAMERA_ZH,
        )
    if camera == "follow":
        return Words(
            dense=f"A {full} moves {heading} over a textured grey background. The camera follows "
            f"it {heading}, keeping it in the middle.",
            short=f"the camera follows a {noun} moving {heading}",
            vague="the camera moves",
            zh=f"一个{zh_noun(entity)}在灰色纹理背景上向{ZH[heading]}移动，镜头跟随它。",
        )
    link = {"pan": "past", "tilt": "past", "zoom": "on" if way == "in" else "from"}[verb]
    return Words(
        dense=f"{still} The camera {verb}s {way}.",
        short=f"the camera {verb}s {way} {link} a {noun}",
        vague="the camera moves",
        zh=zh + ZH_CAMERA[camera],
    )


@family(
    "camera",
    min_frames=5,
    chance={"colour": 1 / 6, "camera_word": 1 / 8},
    blind={"colour": 1 / 6, "camera_word": 1 / 8},
)
def compose(rng: np.random.Generator, canvas: Canvas) -> Composition:
    """Pan left: the camera turns left, so the picture shifts right. Paths have constant rates."""
    index = int(rng.integers(len(WORDS)))
    camera, verb = WORDS[index], index % 4
    colour, shape = draw_look(rng, canvas, verb)
    radius = canvas.radius("small")
    steps = canvas.frames - 1
    heading = camera.split()[-1] if camera.split()[-1] in DIRECTIONS else "right"
    if camera == "follow":
        heading = list(DIRECTIONS)[rng.integers(4)]
    side, top, bottom = margins(shape, radius)
    low = np.array([side, top])
    size = np.array([canvas.width, canvas.height])
    free = size - np.array([side, bottom]) - low
    is_ood = canvas.split == "ood"
    share = rng.uniform(0.2, 0.25) if is_ood else rng.uniform(*TRAVEL)
    shift = np.zeros(2)  # of the camera during the clip, px
    if camera == "follow" or camera.split()[0] in ("pan", "tilt"):
        shift = np.minimum(share * size, 0.9 * free) * DIRECTIONS[heading]
    rate = {"zoom in": 1, "zoom out": -1}.get(camera, 0) * np.log(1.35 if is_ood else ZOOM)
    if camera == "follow" or rate:  # in the middle, where it stays seen at any zoom
        at = size / 2 + (rng.random(2) - 0.5) * 0.1 * size
    else:
        at = low + rng.random(2) * (free - abs(shift)) + np.maximum(shift, 0)
    own = shift / steps if camera == "follow" else np.zeros(2)
    entity = Entity(0, shape, colour, radius, (Segment(0.0, *at.tolist(), *own.tolist()),), "small")
    shot = Shot(
        0,
        *canvas.centre,
        background=int(rng.integers(2**31)),
        zoom=float(np.exp(max(-rate, 0.0))),
        vx=float(shift[0] / steps),
        vy=float(shift[1] / steps),
        zoom_rate=float(rate / steps),
    )
    scene = Scene(
        canvas.frames,
        canvas.height,
        canvas.width,
        canvas.fps,
        (entity,),
        (shot,),
        texture=TEXTURE,
    )
    flipped = replace(entity, colour=other_colour(colour, [colour]))
    expect = {
        "colour": {"colours": [colour]},
        "camera_word": {"word": f"follow {heading}" if camera == "follow" else camera},
    }
    return Composition(
        scene=scene,
        words=_words(entity, camera, heading),
        wrong=_words(flipped, camera, heading).dense,
        expect=expect,
        asked={"dense": list(expect), "short": list(expect)},
    )
