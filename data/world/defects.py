"""Planted defects: what real footage suffers from, put into a clip on purpose and written down.

A corpus with defects shows whether filters, deduplication and health rules find them. The truth
record keeps describing the clean clip: entities, events, camera, `expect` and `asked` are what the
scene was made from. What a defect leaves true of the frames is said at each of them; `scores` are
measured again, so a score that no longer holds is not claimed. `truth.defects` says what was done,
and the catalogue's column `scores` carries `defect` (0 or 1) and `defect_<type>`, so that
`scores['defect'] = 0` keeps the clean clips and `scores['defect_freeze'] = 1` finds the frozen.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longtake.data.world.clips import WorldClip
from longtake.data.world.families import FAMILIES, Canvas
from longtake.data.world.render import render
from longtake.data.world.scorers import score_clip

NOISE = 28.0  # standard deviation, of 255; the scorers bear 8
COPY_NOISE = 2.0
COPY_GAIN = 0.97
LETTERS = "AEHKMNRSTVXZ"
VISIBLE = 64  # of 255: something must differ by that much


def plant(clip: WorldClip, rng: np.random.Generator, original: WorldClip | None) -> WorldClip:
    """The clip with one defect, of a kind drawn evenly among those it has room for.

    An image cannot freeze, and what stands still cannot either. `original` is an earlier clip to
    be a copy of, None where there is none.
    """
    for kind in rng.permutation(list(DEFECTS)):
        planted = DEFECTS[kind](clip, rng, original)
        if planted is not None:
            return replace(planted, scores=score_clip(planted.frames, planted.truth))
    raise AssertionError("noise fits every clip")


def hard_cut(
    clip: WorldClip, rng: np.random.Generator, original: WorldClip | None
) -> WorldClip | None:
    """Another scene of the family from the middle on. The truth holds before `frame`."""
    count, height, width = clip.frames.shape[:3]
    if count == 1:
        return None
    canvas = Canvas(count, height, width, clip.fps, clip.split)
    family = FAMILIES[clip.family]
    other = render(family.build(rng, canvas, *family.draw(rng, canvas))).frames
    frame = (count + 1) // 2
    frames = np.concatenate([clip.frames[:frame], other[frame:]])
    return _with_frames(clip, frames, type="hard_cut", frame=frame)


def freeze(
    clip: WorldClip, rng: np.random.Generator, original: WorldClip | None
) -> WorldClip | None:
    """The picture stands still from `frame` on; the truth holds before it. None if it did so."""
    count = len(clip.frames)
    frame = int(rng.integers(count // 4, count // 2 + 1))
    frames = clip.frames[np.minimum(np.arange(count), frame)]
    if np.abs(frames.astype(int) - clip.frames).max() < VISIBLE:
        return None
    return _with_frames(clip, frames, type="freeze", frame=frame)


def jitter(
    clip: WorldClip, rng: np.random.Generator, original: WorldClip | None
) -> WorldClip | None:
    """Every frame is shaken by up to `pixels`. Places are right to so much; the rest holds."""
    count, height, width = clip.frames.shape[:3]
    if count == 1:
        return None
    reach = max(1, round(min(height, width) / 12))
    shifts = rng.integers(1, reach + 1, (count, 2)) * rng.choice((-1, 1), (count, 2))
    rows = np.clip(np.arange(height) + shifts[:, :1], 0, height - 1)  # (T, H)
    cols = np.clip(np.arange(width) + shifts[:, 1:], 0, width - 1)  # (T, W)
    frames = clip.frames[np.arange(count)[:, None, None], rows[:, :, None], cols[:, None]]
    return _with_frames(clip, frames, type="jitter", pixels=reach)


def overlay_text(
    clip: WorldClip, rng: np.random.Generator, original: WorldClip | None
) -> WorldClip:
    """White letters `text` are burnt into every frame. They hide what is behind; the rest holds."""
    height, width = clip.frames.shape[1:3]
    text = "".join(rng.choice(list(LETTERS), 2))
    font = ImageFont.load_default(max(8, min(height, width) // 3))
    layer = Image.new("RGBA", (width, height))
    pen = ImageDraw.Draw(layer)
    left, top, right, bottom = pen.textbbox((0, 0), text, font, stroke_width=1)
    x = int(rng.integers(max(1, width - (right - left) + 1)))
    y = int(rng.choice((0, height - (bottom - top))))
    pen.text((x - left, y - top), text, "white", font, stroke_width=1, stroke_fill="black")
    drawn = np.asarray(layer, dtype=np.float32)  # (H, W, 4)
    alpha = drawn[..., 3:] / 255
    frames = clip.frames * (1 - alpha) + drawn[..., :3] * alpha
    return _with_frames(clip, frames, type="overlay_text", text=text)


def noise(clip: WorldClip, rng: np.random.Generator, original: WorldClip | None) -> WorldClip:
    """Grain of standard deviation `sigma` (of 255) in every pixel and frame; all else holds."""
    frames = clip.frames + rng.normal(0.0, NOISE, clip.frames.shape)
    return _with_frames(clip, frames, type="noise", sigma=NOISE)


def duplicate_of(
    clip: WorldClip, rng: np.random.Generator, original: WorldClip | None
) -> WorldClip | None:
    """The clip `of` once more, a little darker and grainy, under a key and source of its own.

    Captions and truth are those of the original, and hold.
    """
    if original is None:
        return None
    frames = COPY_GAIN * original.frames + rng.normal(0.0, COPY_NOISE, original.frames.shape)
    copy = _with_frames(original, frames, type="duplicate_of", of=original.key)
    return replace(copy, key=clip.key)


def wrong_caption(
    clip: WorldClip, rng: np.random.Generator, original: WorldClip | None
) -> WorldClip:
    """All captions say `value` in one `slot`, which is wrong. The truth of the frames holds."""
    form, wrong = FAMILIES[clip.family].forms[clip.form], clip.truth["wrong"]
    captions = form.captions({**clip.words, wrong["slot"]: wrong["value"]})
    truth = {**clip.truth, "defects": [{"type": "wrong_caption", **wrong}]}
    return replace(clip, captions={**captions, "wrong": captions["dense"]}, truth=truth)


Defect = Callable[[WorldClip, np.random.Generator, WorldClip | None], WorldClip | None]
DEFECTS: dict[str, Defect] = {
    defect.__name__: defect
    for defect in (hard_cut, freeze, jitter, overlay_text, noise, duplicate_of, wrong_caption)
}


def _with_frames(clip: WorldClip, frames: np.ndarray, **defect: Any) -> WorldClip:
    pixels = frames.round().clip(0, 255).astype(np.uint8)
    return replace(clip, frames=pixels, truth={**clip.truth, "defects": [defect]})
