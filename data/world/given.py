"""Scores of what was given: frames that are kept, and a continuation that goes where truth went.

They compare with the true clip, so they hold for clips of any family.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from longtake.data.world.detect import Detection
from longtake.data.world.families import FAMILIES
from longtake.data.world.scorers import score_frames

KEPT_PSNR = 22.0  # dB; noise of 8/255 leaves 30, the frame of another clip less than 20
TOLERANCE = 3 / 16  # of the shorter side: 3 px at 16
APPEARANCE = ("colour", "shape", "size", "looks", "consistency", "count", "count_constancy")
"""Scores that hold for any stretch of a clip, but for those that a family's events undo."""

Value = TypeVar("Value")


def given_kept(drawn: np.ndarray, truth: np.ndarray, given: Sequence[int]) -> float:
    """1 when each given frame of uint8 (T, H, W, 3) is that of the truth, 0 otherwise."""
    index = list(given)
    error = drawn[index].astype(np.float64) - truth[index]
    mse = np.square(error).mean((1, 2, 3)) / 255**2  # (len(given),)
    return float((mse <= 10 ** (-KEPT_PSNR / 10)).all())


def held_frames(given: Sequence[int], count: int) -> list[int]:
    """For each of `count` frames the given one that is held there: the last before it, or the first
    of all."""
    known = sorted(given)
    return [max((i for i in known if i <= frame), default=known[0]) for frame in range(count)]


def position_error(drawn: np.ndarray, truth: np.ndarray, given: Sequence[int]) -> float:
    """Mean distance in px of the worst entity from its true place, over the frames drawn.

    Entities are told apart by colour; a frame without one counts the shorter side, and so does a
    clip in which others are than in the truth.
    """
    seen, true = Detection(drawn), Detection(truth)
    if set(seen.tracks) != set(true.tracks) or not true.tracks:
        return float(seen.side)
    is_drawn = np.ones(len(truth), bool)
    is_drawn[list(given)] = False
    worst = 0.0
    for colour, track in true.tracks.items():
        other = seen.tracks[colour]
        distance = np.hypot(other.x - track.x, other.y - track.y)
        distance = np.where(other.seen, distance, seen.side)[is_drawn & track.seen]
        worst = max(worst, float(distance.mean()) if len(distance) else 0.0)
    return worst


def continuation(drawn: np.ndarray, truth: np.ndarray, given: Sequence[int]) -> float:
    """1 when every entity goes on as in the truth: `position_error` within 3 px per 16 of side."""
    side = min(truth.shape[1:3])
    return float(position_error(drawn, truth, given) <= TOLERANCE * side)


def score_given(drawn: np.ndarray, truth: np.ndarray, given: Sequence[int]) -> dict[str, float]:
    """What frames given to a task ask of uint8 (T, H, W, 3); nothing where none was given.

    A single first frame leaves the motion to the caption, so it is only to be kept.
    """
    if not len(given):
        return {}
    scores = {"given_kept": given_kept(drawn, truth, given)}
    if list(given) != [0]:
        scores["continuation"] = continuation(drawn, truth, given)
    return scores


def appearance(family: str, known: Mapping[str, Value]) -> dict[str, Value]:
    """Of what is known by score, that of the scores which tell whether a long clip drifts."""
    undone = FAMILIES[family].undone
    return {name: known[name] for name in APPEARANCE if name in known and name not in undone}


def appearance_at_end(
    frames: np.ndarray, asked: Mapping[str, Mapping[str, Any]], window: int
) -> float:
    """Mean of the `appearance` scores that are asked for over the last `window` frames.

    Drift: a video longer than those of the training must still show what was asked for at its end.
    """
    return float(np.mean(list(score_frames(frames[-window:], asked).values())))
