"""The permanent proof that the scorers measure what they claim: truth, faults, chance, codec."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from longtake.data.decode import decode_clip, encode_video
from longtake.data.world import (
    BLIND,
    CHANCE,
    FAMILIES,
    WorldClip,
    chance_of,
    make_clip,
    score_clip,
    wilson,
)
from longtake.data.world.detect import Detection
from longtake.data.world.render import render
from longtake.data.world.scene import Change, Entity, Scene, Segment, positions
from longtake.data.world.scorers import SCORERS

SIZES = {"17x32x32": (17, 32, 32), "9x16x16": (9, 16, 16)}
FACING = {"left": "right", "right": "left", "up": "down", "down": "up"}


def clips(family: str, size: str, number: int, split: str = "val") -> list[WorldClip]:
    frames, height, width = SIZES[size]
    return [
        make_clip(7, split, i, families=[family], frames=frames, height=height, width=width)
        for i in range(number)
    ]


def mean_scores(pairs: list[tuple[np.ndarray, dict]]) -> dict[str, float]:
    rows = [score_clip(frames, truth) for frames, truth in pairs]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("split", ["val", "combo", "ood"])
@pytest.mark.parametrize("family", FAMILIES)
def test_truth_is_right(family: str, split: str, size: str) -> None:
    scores = mean_scores([(c.frames, c.truth) for c in clips(family, size, 128, split)])
    assert min(scores.values()) >= 0.99, scores


@pytest.mark.parametrize(
    "shape", [(5, 16, 16), (8, 16, 16), (33, 32, 48), (17, 48, 32), (9, 64, 64)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_truth_is_right_at_other_sizes(family: str, shape: tuple[int, int, int]) -> None:
    frames, height, width = shape
    made = [
        make_clip(3, "train", i, families=[family], frames=frames, height=height, width=width)
        for i in range(24)
    ]
    scores = mean_scores([(c.frames, c.truth) for c in made])
    assert min(scores.values()) >= 0.95, scores


@pytest.mark.parametrize("family", [f.name for f in FAMILIES.values() if f.min_frames == 1])
def test_images_have_scores_too(family: str) -> None:
    made = [make_clip(0, "val", i, families=[family], frames=1) for i in range(24)]
    scores = mean_scores([(c.frames, c.truth) for c in made])
    assert not {"direction", "count_constancy"} & set(scores)
    assert min(scores.values()) >= 0.95, scores


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_shuffled_captions_score_at_chance(family: str, size: str) -> None:
    number = 256
    made = clips(family, size, number)
    order = np.random.default_rng(0).permutation(number)
    scores = mean_scores([(made[i].frames, made[j].truth) for i, j in enumerate(order)])
    for name, score in scores.items():
        level = chance_of(family, name)
        assert abs(score - level) <= 4 * np.sqrt(level * (1 - level) / number) + 0.02, name
        assert level <= CHANCE[name] and level <= FAMILIES[family].blind[name] + 0.01


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_h264_changes_nothing(family: str, size: str) -> None:
    pairs = []
    for clip in clips(family, size, 48):
        times = [t / clip.fps for t in range(len(clip.frames))]
        pairs.append((decode_clip(encode_video(clip.frames, clip.fps), times), clip.truth))
    scores = mean_scores(pairs)
    # of shapes at 16x16, made of some 18 pixels, one in fifty may flip
    floor = {name: 0.95 if name == "shape" else 0.99 for name in scores}
    assert all(scores[name] >= floor[name] for name in scores), scores


# --- planted faults: the scene is edited and drawn again -----------------------------------------


def redrawn(clip: WorldClip, edit: Callable[[Scene], Scene]) -> np.ndarray:
    return render(edit(clip.scene)).frames


def with_entity(scene: Scene, index: int, entity: Entity) -> Scene:
    entities = list(scene.entities)
    entities[index] = entity
    return replace(scene, entities=tuple(entities))


def with_changes(clip: WorldClip, index: int, *changes: Change) -> np.ndarray:
    entity = clip.scene.entities[index]
    return redrawn(clip, lambda s: with_entity(s, index, replace(entity, changes=changes)))


def with_motion(clip: WorldClip, index: int, *motion: Segment) -> np.ndarray:
    entity = clip.scene.entities[index]
    return redrawn(clip, lambda s: with_entity(s, index, replace(entity, motion=motion)))


def mirrored(clip: WorldClip) -> np.ndarray:
    """Flipped along the axis of motion."""
    word = next(e["word"] for e in clip.truth["expect"].values() if "word" in e)
    return clip.frames[:, :, ::-1] if word in ("left", "right") else clip.frames[:, ::-1]


def recoloured(clip: WorldClip) -> np.ndarray:
    return np.roll(clip.frames, 1, axis=-1)


def reshaped(clip: WorldClip) -> np.ndarray:
    other = {"circle": "square", "square": "triangle", "triangle": "circle"}
    return with_changes(clip, 0, Change(0, "shape", other[clip.scene.entities[0].shape]))


def resized(clip: WorldClip) -> np.ndarray:
    factor = 0.22 / 0.15
    factor = factor if clip.scene.entities[0].size == "small" else 1 / factor
    return with_changes(clip, 0, Change(0, "radius", factor))


def at_rest(clip: WorldClip) -> np.ndarray:
    first = clip.scene.entities[0].motion[0]
    return with_motion(clip, 0, Segment(0.0, first.x, first.y))


def half_gone(clip: WorldClip) -> np.ndarray:
    return with_changes(clip, 0, Change(clip.scene.frames // 2, "alpha", 0.0))


def missing(clip: WorldClip) -> np.ndarray:
    return with_changes(clip, 0, Change(0, "alpha", 0.0))


def blinking(clip: WorldClip) -> np.ndarray:
    middle = clip.scene.frames // 2
    return with_changes(clip, 0, Change(middle, "alpha", 0.0), Change(middle + 1, "alpha", 1.0))


def recoloured_midway(clip: WorldClip) -> np.ndarray:
    taken = {e.colour for e in clip.scene.entities}
    colour = next(c for c in ("red", "cyan", "green", "blue", "purple") if c not in taken)
    return with_changes(clip, 0, Change(clip.scene.frames // 2, "colour", colour))


def split(clip: WorldClip) -> np.ndarray | None:
    """A smaller copy of the first entity parts from it and goes where nothing else ever is.

    None where the frame has no such place: a twin that touches the first is one blob with it.
    """
    scene, first = clip.scene, clip.scene.entities[0]
    side = min(scene.width, scene.height)
    twin_radius = 0.12 * side
    times = np.arange(scene.frames, dtype=float)
    paths = [np.stack(positions(e.motion, times), 1) for e in scene.entities]
    spots = np.random.default_rng(0).uniform(0.17 * side, 0.83 * side, (400, 2))
    room = [
        min(
            np.hypot(*(path - spot).T).min() - 1.3 * (entity.radius + twin_radius)
            for path, entity in zip(paths, scene.entities, strict=True)
        )
        for spot in spots
    ]
    if max(room) < 1:
        return None
    x, y = spots[int(np.argmax(room))].tolist()
    start_x, start_y = paths[0][0].tolist()
    parting = Segment(0.0, start_x, start_y, (x - start_x) / 2, (y - start_y) / 2)
    twin = replace(first, id=99, radius=twin_radius, motion=(parting, Segment(2.0, x, y)), layer=50)
    return render(replace(scene, entities=(*scene.entities, twin))).frames


def vanished_behind(clip: WorldClip) -> np.ndarray:
    return with_changes(clip, 0, Change(clip.scene.events[0].time, "alpha", 0.0))


def changed_behind(clip: WorldClip) -> np.ndarray:
    middle = (clip.scene.events[0].time + clip.scene.events[1].time) / 2
    colour = "red" if clip.scene.entities[0].colour != "red" else "blue"
    return with_changes(clip, 0, Change(middle, "colour", colour))


def in_the_open(clip: WorldClip) -> np.ndarray:
    """No bar at all, yet the entity is gone while it would be behind it."""
    hidden, shown = (e.time for e in clip.scene.events)
    entity = clip.scene.entities[0]
    changes = Change(hidden, "alpha", 0.0), Change(shown + 1, "alpha", 1.0)
    return redrawn(clip, lambda s: replace(s, entities=(replace(entity, changes=changes),)))


def in_front(clip: WorldClip) -> np.ndarray:
    entity = clip.scene.entities[0]
    return redrawn(clip, lambda s: with_entity(s, 0, replace(entity, layer=99)))


def turned_back(clip: WorldClip) -> np.ndarray:
    middle = sum(e.time for e in clip.scene.events) / 2
    first = clip.scene.entities[0].motion[0]
    x, y = (float(v[0]) for v in positions((first,), np.array([middle])))
    return with_motion(clip, 0, first, Segment(middle, x, y, -first.vx, -first.vy))


def no_effect(clip: WorldClip) -> np.ndarray:
    return with_motion(clip, 1, clip.scene.entities[1].motion[0])


def no_cause(clip: WorldClip) -> np.ndarray:
    return at_rest(clip)


def effect_first(clip: WorldClip) -> np.ndarray:
    """The target moves off from the start, at the pace that brings it to the same end."""
    entity = clip.scene.entities[1]
    steps = clip.scene.frames - 1
    (x, end_x), (y, end_y) = (v.tolist() for v in positions(entity.motion, np.array([0, steps])))
    return with_motion(clip, 1, Segment(0.0, x, y, (end_x - x) / steps, (end_y - y) / steps))


def pushed_along(clip: WorldClip) -> np.ndarray:
    """The hitter does not stop."""
    return with_motion(clip, 0, clip.scene.entities[0].motion[0])


def run_through(clip: WorldClip) -> np.ndarray:
    """The hitter does not stop and the target stays."""
    scene = with_entity(
        clip.scene, 0, replace(clip.scene.entities[0], motion=clip.scene.entities[0].motion[:1])
    )
    still = replace(clip.scene.entities[1], motion=clip.scene.entities[1].motion[:1])
    return render(with_entity(scene, 1, still)).frames


def other_camera(clip: WorldClip) -> np.ndarray:
    """Played backwards, every path but `static` is the opposite one; that one is made to pan."""
    if clip.truth["expect"]["camera_word"]["word"] != "static":
        return clip.frames[::-1]
    pan = 0.35 * clip.scene.width / (clip.scene.frames - 1)
    return redrawn(clip, lambda s: replace(s, shots=(replace(s.shots[0], vx=pan),)))


def camera_at_rest(clip: WorldClip) -> np.ndarray:
    """Only the entity moves on the screen, as if the camera moved."""
    if clip.truth["expect"]["camera_word"]["word"] == "static":
        return other_camera(clip)
    shot = replace(clip.scene.shots[0], vx=0.0, vy=0.0, zoom_rate=0.0)
    return redrawn(clip, lambda s: replace(s, shots=(shot,)))


Fault = Callable[[WorldClip], np.ndarray | None]
FAULTS: list[tuple[str, str, Fault]] = [
    ("move", "colour", recoloured),
    ("move", "colour", missing),
    ("move", "shape", reshaped),
    ("move", "size", resized),
    ("move", "direction", mirrored),
    ("move", "direction", at_rest),
    ("leftright", "colour", recoloured),
    ("leftright", "left_right", lambda clip: clip.frames[:, :, ::-1]),
    ("leftright", "left_right", missing),
    ("leftright", "count_constancy", half_gone),
    ("count", "count", missing),
    ("count", "count", split),
    ("count", "count_constancy", blinking),
    ("count", "count_constancy", half_gone),
    ("count", "count_constancy", recoloured_midway),
    ("count", "count_constancy", split),
    ("occlusion", "direction", mirrored),
    ("occlusion", "permanence", mirrored),
    ("occlusion", "permanence", vanished_behind),
    ("occlusion", "permanence", changed_behind),
    ("occlusion", "permanence", in_the_open),
    ("occlusion", "permanence", in_front),
    ("occlusion", "permanence", turned_back),
    ("collide", "causal", mirrored),
    ("collide", "causal", no_effect),
    ("collide", "causal", no_cause),
    ("collide", "causal", effect_first),
    ("collide", "causal", pushed_along),
    ("collide", "causal", run_through),
    ("collide", "count_constancy", half_gone),
    ("camera", "camera_word", other_camera),
    ("camera", "camera_word", camera_at_rest),
    ("camera", "colour", recoloured),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("family", "score", "fault"), FAULTS)
def test_planted_faults_score_nothing(family: str, score: str, fault: Fault, size: str) -> None:
    made = clips(family, size, 64)
    drawn = [(fault(clip), clip.truth) for clip in made]
    scores = [score_clip(frames, truth)[score] for frames, truth in drawn if frames is not None]
    assert len(scores) >= 24 and np.mean(scores) <= 0.05


def test_every_score_has_a_planted_fault_and_a_chance() -> None:
    defined = {name for family in FAMILIES.values() for name in family.chance}
    assert defined == set(SCORERS) == set(CHANCE) == set(BLIND)
    assert defined == {score for _, score, _ in FAULTS}


def test_nothing_to_be_seen_scores_nothing() -> None:
    for family in FAMILIES:
        for clip in clips(family, "9x16x16", 8):
            scores = score_clip(np.full_like(clip.frames, 150), clip.truth)
            scores.pop("camera_word", None)  # a grey wall is a fine static shot
            assert not any(scores.values()), scores


def test_scores_can_be_limited_to_what_a_caption_asks() -> None:
    clip = clips("move", "9x16x16", 1)[0]
    assert "size" in score_clip(clip.frames, clip.truth, "dense")
    assert "size" not in score_clip(clip.frames, clip.truth, "short")


def test_frames_of_another_kind_are_refused() -> None:
    clip = clips("move", "9x16x16", 1)[0]
    with pytest.raises(ValueError, match="uint8"):
        score_clip(clip.frames.astype(np.float32), clip.truth)


def test_detection_finds_places_and_areas() -> None:
    for clip in clips("move", "17x32x32", 32):
        track = Detection(clip.frames).tracks[clip.scene.entities[0].colour]
        entity = clip.truth["entities"][0]
        assert np.abs(track.x - entity["x"]).max() < 0.35
        assert np.abs(track.y - entity["y"]).max() < 0.35
        radius = np.sqrt(track.area / np.pi)
        assert np.abs(radius / entity["r"] - 1).max() < 0.08


def test_camera_flow_measures_the_path() -> None:
    for clip in clips("camera", "17x32x32", 48):
        motion, path = Detection(clip.frames).camera, clip.truth["camera"]
        zoomed = np.log(path["zoom"][-1] / path["zoom"][0])
        assert abs(motion.log_zoom - zoomed) < 0.08
        if not zoomed:
            assert abs(motion.shift_x + path["cx"][-1] - path["cx"][0]) < 1.5
            assert abs(motion.shift_y + path["cy"][-1] - path["cy"][0]) < 1.5


def test_wilson_interval() -> None:
    low, high = wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    assert wilson(1.0, 256)[0] == pytest.approx(0.985, abs=1e-3)
    assert wilson(0.0, 10)[0] == 0.0
    with pytest.raises(ValueError, match="n=0"):
        wilson(0.5, 0)
