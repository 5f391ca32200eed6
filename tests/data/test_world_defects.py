"""Planted defects are to be seen in the pixels, are written down, and claim no score they broke."""

from dataclasses import replace

import numpy as np
import pytest

from longtake.data.world import WorldClip, make_clip, read_caption, score_clip
from longtake.data.world.defects import DEFECTS, plant

CLIPS = 6
FIT_IMAGES = ("overlay_text", "noise", "duplicate_of", "wrong_caption")


def clip_of(index: int, frames: int = 9) -> WorldClip:
    return make_clip(0, "train", index, families=["move"], frames=frames)


def planted(kind: str, index: int, frames: int = 9) -> tuple[WorldClip, WorldClip]:
    """A clean clip and the same with a defect."""
    clean = clip_of(index, frames)
    rng = np.random.default_rng(index)
    spoilt = DEFECTS[kind](clean, rng, clip_of(index + 100, frames))
    assert spoilt is not None
    return clean, spoilt


def change(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Mean absolute difference of each frame (T,), of 255."""
    return np.abs(one.astype(float) - two).mean((1, 2, 3))


@pytest.mark.parametrize("kind", DEFECTS)
def test_defects_are_written_down_and_nothing_else_of_the_truth_changes(kind: str) -> None:
    for index in range(CLIPS):
        clean, spoilt = planted(kind, index)
        (defect,) = spoilt.truth["defects"]
        assert defect["type"] == kind
        assert spoilt.record()["scores"]["defect"] == 1.0
        assert spoilt.record()["scores"][f"defect_{kind}"] == 1.0
        described = clip_of(index + 100) if kind == "duplicate_of" else clean
        assert {**spoilt.truth, "defects": []} == described.truth
        assert spoilt.key == clean.key and spoilt.frames.dtype == np.uint8
        assert spoilt.frames.shape == clean.frames.shape


def test_a_hard_cut_shows_another_scene_from_the_middle_on() -> None:
    for index in range(CLIPS):
        clean, spoilt = planted("hard_cut", index)
        at = spoilt.truth["defects"][0]["frame"]
        assert at == 5
        assert np.array_equal(spoilt.frames[:at], clean.frames[:at])
        assert change(spoilt.frames[at:], clean.frames[at:]).min() > 4
        steps = change(spoilt.frames[1:], spoilt.frames[:-1])
        assert steps[at - 1] > 2 * np.delete(steps, at - 1).max()


def test_a_freeze_stands_still_and_is_missed_where_nothing_moves() -> None:
    for index in range(CLIPS):
        clean, spoilt = planted("freeze", index)
        at = spoilt.truth["defects"][0]["frame"]
        assert 2 <= at <= 4
        assert np.array_equal(spoilt.frames[:at], clean.frames[:at])
        assert (spoilt.frames[at:] == spoilt.frames[at]).all()
        assert change(spoilt.frames, clean.frames)[-1] > 1
    still = replace(clean, frames=clean.frames[:1].repeat(9, 0))
    assert DEFECTS["freeze"](still, np.random.default_rng(0), None) is None


def test_jitter_shakes_every_frame_by_whole_pixels() -> None:
    for index in range(CLIPS):
        clean, spoilt = planted("jitter", index)
        reach = spoilt.truth["defects"][0]["pixels"]
        inner = slice(reach, -reach)
        shifts = range(-reach, reach + 1)
        found = []
        for now, then in zip(spoilt.frames, clean.frames, strict=True):
            fits = [
                (dy, dx)
                for dy in shifts
                for dx in shifts
                if np.array_equal(
                    now[inner, inner], np.roll(then, (-dy, -dx), (0, 1))[inner, inner]
                )
            ]
            assert len(fits) == 1 and 0 not in fits[0]
            found += fits
        assert len(set(found)) > 2


def test_overlay_text_burns_in_black_and_white_letters() -> None:
    for index in range(CLIPS):
        clean, spoilt = planted("overlay_text", index)
        touched = (spoilt.frames != clean.frames).any((0, 3))
        assert 0.02 < touched.mean() < 0.4
        letters = spoilt.frames[:, touched]
        assert letters.min() < 60 and letters.max() > 200
        assert (np.ptp(letters.astype(int), axis=0)[letters.max(0) > 200] == 0).any()
        assert len(spoilt.truth["defects"][0]["text"]) == 2


def test_noise_is_as_strong_as_it_says() -> None:
    for index in range(CLIPS):
        clean, spoilt = planted("noise", index)
        error = (spoilt.frames.astype(float) - clean.frames)[clean.frames.max(-1) < 180]
        assert error.std() == pytest.approx(spoilt.truth["defects"][0]["sigma"], rel=0.1)


def test_a_duplicate_is_near_its_original_and_not_equal() -> None:
    for index in range(CLIPS):
        clean, spoilt = planted("duplicate_of", index)
        original = clip_of(index + 100)
        assert spoilt.truth["defects"] == [{"type": "duplicate_of", "of": original.key}]
        near, far = change(spoilt.frames, original.frames), change(spoilt.frames, clean.frames)
        assert 1 < near.max() < 8 < far.min()
        assert spoilt.captions == original.captions
        assert min(score_clip(spoilt.frames, spoilt.truth).values()) == 1
    assert DEFECTS["duplicate_of"](clean, np.random.default_rng(0), None) is None


def test_a_wrong_caption_says_one_thing_that_the_frames_do_not_show() -> None:
    for index in range(CLIPS):
        clean, spoilt = planted("wrong_caption", index)
        assert np.array_equal(spoilt.frames, clean.frames)
        defect = spoilt.truth["defects"][0]
        for kind in ("dense", "short", "zh"):
            said = read_caption(spoilt.captions[kind]).words
            assert said[defect["slot"]] == defect["value"] != clean.words[defect["slot"]]
        asked = read_caption(spoilt.captions["dense"])
        assert min(score_clip(clean.frames, {"expect": asked.expect}).values()) == 0


def test_scores_are_those_of_the_frames_and_the_rest_is_a_function_of_the_draws() -> None:
    kinds = set()
    for index in range(24):
        clean, original = clip_of(index), clip_of(index + 100)
        one, two = (plant(clean, np.random.default_rng(index), original) for _ in range(2))
        assert np.array_equal(one.frames, two.frames) and one.record() == two.record()
        assert one.scores == score_clip(one.frames, one.truth)
        kinds.add(one.truth["defects"][0]["type"])
    assert kinds == set(DEFECTS)


def test_images_get_the_defects_that_images_can_have() -> None:
    found = {
        plant(clip_of(i, 1), np.random.default_rng(i), clip_of(i + 100, 1)).truth["defects"][0][
            "type"
        ]
        for i in range(24)
    }
    assert found == set(FIT_IMAGES)
