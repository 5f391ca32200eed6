"""The permanent proof that the scorers measure what they claim: truth, faults, chance, codec."""

from dataclasses import replace

import numpy as np
import pytest

from longtake.data.world import FAMILIES, SCORERS, Shapes, make_clip, score_clip
from longtake.data.world.detect import Detection
from longtake.data.world.faults import flickering
from longtake.data.world.given import appearance, appearance_at_end
from longtake.data.world.language import KINDS
from longtake.data.world.render import render
from longtake.data.world.validity import UNMOVED, measure

QUICK = 20  # clips; the slow run takes enough of them to tell 0.99 from 0.97


def assert_valid(family: str, floor: float, **clips: int | str) -> None:
    problems = [text for row in measure(family, **clips) for text in row.problems(floor)]  # pyright: ignore[reportArgumentType]
    assert not problems, "\n".join(problems)


def possible(*shapes: tuple[int, int, int]) -> list[tuple[str, tuple[int, int, int]]]:
    """Each family with those of the shapes (T, H, W) that it can be drawn at."""
    return [
        (family, shape)
        for family in FAMILIES
        for shape in shapes
        if Shapes((shape[1:],), shape[:1]).fits(family)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_valid(family: str) -> None:
    assert_valid(family, 0.9, num_clips=QUICK)


def rotated(*shapes: tuple[int, int, int]) -> list[tuple[str, tuple[int, int, int], str]]:
    """Each family at all the shapes that it can be drawn at, each in another split: together they
    see every pair of shape and split, and each family sees every split, at a third of the cost."""
    places = {family: number for number, family in enumerate(FAMILIES)}
    turn = {shape: number for number, shape in enumerate(shapes)}
    return [
        (family, shape, ("val", "combo", "ood")[(places[family] + turn[shape]) % 3])
        for family, shape in possible(*shapes)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "shape", "split"), rotated((17, 32, 32), (9, 16, 16), (9, 64, 64))
)
def test_scores_are_valid_over_many_clips(
    family: str, shape: tuple[int, int, int], split: str
) -> None:
    frames, height, width = shape
    clips = {"frames": frames, "height": height, "width": width, "split": split}
    assert_valid(family, UNMOVED, num_clips=128, **clips)


@pytest.mark.parametrize("split", ["train", "combo", "ood"])
@pytest.mark.parametrize(
    ("family", "shape"),
    possible(
        *((5, 16, 16), (8, 16, 16), (9, 16, 16), (33, 32, 48), (17, 48, 32), (9, 64, 64)),
        *((17, 48, 16), (8, 16, 48)),
    ),
)
def test_truth_is_right_at_other_sizes(
    family: str, shape: tuple[int, int, int], split: str
) -> None:
    frames, height, width = shape
    made = [
        make_clip(3, split, i, families=[family], frames=frames, height=height, width=width)
        for i in range(8)
    ]
    rows = [score_clip(c.frames, c.truth) for c in made]
    wrong = [(i, row) for i, row in enumerate(rows) if min(row.values()) < 1]
    assert not wrong


@pytest.mark.parametrize("family", [f.name for f in FAMILIES.values() if f.min_frames == 1])
def test_images_have_scores_too(family: str) -> None:
    made = [make_clip(0, "val", i, families=[family], frames=1) for i in range(24)]
    rows = [score_clip(c.frames, c.truth) for c in made]
    assert not {"direction", "count_constancy"} & set(rows[0])
    assert all(min(row.values()) == 1 for row in rows)


def test_every_score_is_asked_for_and_has_a_planted_fault() -> None:
    asked = {a.score for f in FAMILIES.values() for form in f.forms.values() for a in form.asks}
    assert asked == set(SCORERS)
    for family in FAMILIES.values():
        own = {ask.score for form in family.forms.values() for ask in form.asks}
        assert own == set(family.faults), family.name


@pytest.mark.parametrize("family", FAMILIES)
def test_how_things_look_lasts_unless_the_clip_drifts(family: str) -> None:
    for index in range(4):
        clip = make_clip(5, "val", index, families=[family], frames=33)
        asked = appearance(family, clip.truth["expect"])
        if not asked:
            continue
        assert appearance_at_end(clip.frames, asked, 17) == 1
        drifting = np.roll(flickering(clip), 1, axis=-1)  # in other colours, too
        assert appearance_at_end(np.append(clip.frames[:16], drifting[16:], 0), asked, 17) < 1


def test_nothing_to_be_seen_scores_nothing() -> None:
    for family in FAMILIES:
        for index in range(4):
            clip = make_clip(7, "val", index, families=[family])
            scores = score_clip(np.full_like(clip.frames, 150), clip.truth)
            for name in ("camera_word", "camera_steady", "static_camera"):
                scores.pop(name, None)  # a grey wall is a fine static shot
            assert not any(scores.values()), (family, scores)


def test_flicker_of_the_light_is_no_cut() -> None:
    for index in range(16):
        clip = make_clip(5, "val", index, families=["shots", "move"])
        light = 1 + 0.03 * (-1.0) ** np.arange(len(clip.frames))
        lit = (clip.frames * light[:, None, None, None]).clip(0, 255).astype(np.uint8)
        assert min(score_clip(lit, clip.truth).values()) == 1, clip.key


@pytest.mark.parametrize(("last", "share"), [(True, 0.3), (True, 0.7), (False, 0.3), (False, 0.7)])
def test_a_frame_of_two_shots_is_no_shot(last: bool, share: float) -> None:
    for index in range(16):
        clip = make_clip(5, "val", index, families=["shots"])
        frames = clip.frames.astype(np.float32)
        for shot in clip.scene.shots[1:]:
            at = shot.start - last
            frames[at] = (1 - share) * frames[shot.start - 1] + share * frames[shot.start]
        mixed = frames.round().astype(np.uint8)
        assert len(Detection(mixed).ground.cuts) == len(clip.scene.shots) - 1, clip.key
        assert score_clip(mixed, clip.truth)["cuts"] == 1, clip.key


def test_a_wobble_of_the_picture_is_no_effect() -> None:
    for index in range(16):
        clip = make_clip(5, "val", index, families=["collide", "billiard"])
        (shot,), times = clip.scene.shots, range(clip.scene.frames)
        by = [0.35 * (-1) ** t for t in times]
        shots = (replace(shot, start=t, x=shot.x + by[t], y=shot.y + by[t]) for t in times)
        wobbling = render(replace(clip.scene, shots=tuple(shots))).frames
        assert min(score_clip(wobbling, clip.truth).values()) == 1, clip.key


def test_only_captions_that_say_so_ask_for_a_static_camera() -> None:
    clip = make_clip(7, "val", 0, families=["move"])
    asked = {kind: "static_camera" in clip.reading(kind).expect for kind in KINDS}
    assert asked == {"dense": True, "zh": True, "short": False, "vague": False}


def test_frames_of_another_kind_are_refused() -> None:
    clip = make_clip(7, "val", 0, families=["move"])
    with pytest.raises(ValueError, match="uint8"):
        score_clip(clip.frames.astype(np.float32), clip.truth)


def test_detection_finds_places_and_areas() -> None:
    for index in range(32):
        clip = make_clip(7, "val", index, families=["move"])
        track = Detection(clip.frames).tracks[clip.scene.entities[0].colour]
        entity = clip.truth["entities"][0]
        assert np.abs(track.x - entity["x"]).max() < 0.35
        assert np.abs(track.y - entity["y"]).max() < 0.35
        radius = np.sqrt(track.area / np.pi)
        assert np.abs(radius / entity["r"] - 1).max() < 0.08
