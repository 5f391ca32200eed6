"""The world itself: pure clips of every shape, honest truth records, the renderer, shards."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from longtake.data.decode import decode_clip, encode_video
from longtake.data.world import FAMILIES, SPLITS, Shapes, contact_sheet, make_clip
from longtake.data.world.clips import check_request, describe
from longtake.data.world.families.registry import is_held_out
from longtake.data.world.render import coverage, render
from longtake.data.world.scene import (
    BIG_CANVAS_SHAPES,
    COLOURS,
    SHAPES,
    Change,
    Entity,
    Event,
    Panel,
    Scene,
    Segment,
    Shot,
    track,
)

ALL = tuple(FAMILIES)
TINY = tuple(f.name for f in FAMILIES.values() if f.min_side <= 16 and f.min_frames <= 5)
SMALL = {"families": TINY, "frames": 5, "height": 16, "width": 16}
MIXED = Shapes(((32, 32), (64, 64), (48, 64)), (1, 5, 17), (4, 8, 16))


def scene_of(*entities: Entity, frames: int = 9, shots: tuple[Shot, ...] = ()) -> Scene:
    return Scene(frames, 32, 32, 8, entities, shots or (Shot(0, 16, 16, background=1),))


def circle(*changes: Change, motion: tuple[Segment, ...] = (Segment(0, 16, 16),)) -> Entity:
    return Entity(0, "circle", "red", 5.0, motion, changes=changes)


def test_the_families_of_this_corpus_are_there() -> None:
    assert set(FAMILIES) >= {
        *("move", "count", "leftright", "above", "behind", "occlusion", "collide", "candle"),
        *("bite", "spill", "support", "hoop", "heading", "camera", "order", "attribute", "shots"),
        *("pose", "grid", "mix"),
    }


def test_a_clip_is_a_function_of_its_arguments() -> None:
    one, two = (make_clip(5, "train", 11, families=ALL) for _ in range(2))
    assert np.array_equal(one.frames, two.frames)
    assert one.record() == two.record()
    others = [(6, "train", 11), (5, "val", 11), (5, "train", 17)]
    for seed, split, index in others:
        assert not np.array_equal(one.frames, make_clip(seed, split, index, families=ALL).frames)


@pytest.mark.parametrize("frames", [1, 5, 8, 33])
@pytest.mark.parametrize("size", [(16, 16), (18, 22), (32, 48), (48, 32), (128, 128)])
@pytest.mark.parametrize("split", ["combo", "ood"])
def test_every_size_can_be_drawn(frames: int, size: tuple[int, int], split: str) -> None:
    shapes = Shapes((size,), (frames,), (16,))
    fit = [f for f in ALL if shapes.allowed(f).sizes and shapes.allowed(f).frames]
    assert fit
    for index in range(len(fit)):
        height, width = size
        clip = make_clip(
            0, split, index, families=fit, frames=frames, height=height, width=width, fps=16
        )
        assert clip.frames.shape == (frames, height, width, 3)
        assert clip.frames.dtype == np.uint8
        assert all(len(entity["x"]) == frames for entity in clip.truth["entities"])


def test_shapes_are_drawn_evenly_from_the_index_and_the_family_s_own() -> None:
    plans = [describe(0, "train", i, ALL, MIXED) for i in range(60 * len(ALL))]
    assert plans == [describe(0, "train", i, ALL, MIXED) for i in range(60 * len(ALL))]
    for family in ALL:
        can = MIXED.allowed(family)
        mine = [plan.canvas for plan in plans if plan.family == family]
        assert len(mine) == 60
        assert {(c.height, c.width) for c in mine} == set(can.sizes)
        assert {c.frames for c in mine} == set(can.frames)
        assert {c.fps for c in mine} == set(MIXED.fps)
        assert all(sum(c.frames == n for c in mine) > 30 / len(can.frames) for n in can.frames)
    # neither other shapes nor other families change what a clip of one shape looks like
    plan = describe(0, "train", 3, ALL, MIXED)
    alone = Shapes(((plan.canvas.height, plan.canvas.width),), (plan.canvas.frames,), (8,))
    assert describe(0, "train", 3, [plan.family], alone).words == plan.words


@pytest.mark.parametrize("family", ALL)
def test_truth_is_consistent_and_json(family: str) -> None:
    side = max(32, FAMILIES[family].min_side)
    length = max(9, FAMILIES[family].min_frames)
    shape = {"frames": length, "height": side, "width": side}
    for index, split in enumerate(SPLITS * 4):
        clip = make_clip(3, split, index, families=[family], **shape)
        record = json.loads(json.dumps(clip.record()))
        assert record["scores"] == {**dict.fromkeys(clip.truth["expect"], 1.0), "defect": 0.0}
        truth = record["truth"]
        assert truth["defects"] == [] and truth["shots"][0]["start"] == 0
        assert truth["shots"][-1]["end"] == length
        levels = clip.description.reading().levels(clip.description.canvas)
        assert levels.keys() == truth["expect"].keys()
        subjects = [e for e in truth["entities"] if e["role"] == "subject"]
        assert subjects and truth["count"] == len(subjects)
        ids = [e["id"] for e in truth["entities"]]
        assert len(set(ids)) == len(ids)
        for event in truth["events"]:
            assert 0 <= event["frame"] <= length - 1 and set(event["ids"]) <= set(ids)
        for entity in subjects:
            visible = np.array(entity["visible"])
            assert visible.min() >= 0 and visible.max() <= 1
            assert max(len(entity[k]) for k in ("x", "y", "r")) == length


@pytest.mark.parametrize("family", ["move", "count", "leftright", "collide"])
def test_entities_stay_inside_the_frame(family: str) -> None:
    for index in range(15):
        clip = make_clip(3, "train", index, families=[family], frames=9)
        for entity in clip.truth["entities"]:
            assert min(entity["visible"]) > 0.4 and max(entity["visible"]) > 0.9
            radius = np.array(entity["r"])
            edge = np.array([entity["x"], entity["y"]])
            assert (edge > 0.7 * radius).all() and (edge < 32 - 0.7 * radius).all()


def test_occluded_entities_are_wholly_hidden_once_and_seen_at_both_ends() -> None:
    for frames, side in ((8, 16), (9, 16), (17, 32), (33, 64)):
        for index in range(30):
            clip = make_clip(
                4, "train", index, families=["occlusion"], frames=frames, height=side, width=side
            )
            visible = np.array(clip.truth["entities"][0]["visible"])
            hidden = np.nonzero(visible < 0.03)[0]
            assert len(hidden) and hidden[-1] - hidden[0] == len(hidden) - 1
            assert visible[0] > 0.7 and visible[-1] > 0.7
            start, stop = (e["frame"] for e in clip.truth["events"])
            assert start - 1 <= hidden[0] and hidden[-1] <= stop + 1


def test_collisions_conserve_momentum_and_touch_at_contact() -> None:
    for index in range(60):
        clip = make_clip(4, "train", index, families=["collide"])
        hitter, target = clip.scene.entities
        before, after = hitter.motion[0], target.motion[1]
        assert (before.vx, before.vy) == (after.vx, after.vy)
        assert hitter.motion[1].vx == hitter.motion[1].vy == 0
        gap = np.hypot(
            target.motion[0].x - hitter.motion[1].x, target.motion[0].y - hitter.motion[1].y
        )
        halves = [
            e.radius * (1 if e.shape == "circle" else np.sqrt(np.pi) / 2) for e in (hitter, target)
        ]
        assert gap == pytest.approx(sum(halves), rel=1e-4)


def test_combo_holds_triples_out() -> None:
    shapes = Shapes(((16, 16),), (5,))

    def triples(split: str) -> set[tuple[str, str, str]]:
        plans = (describe(0, split, i, ["move"], shapes) for i in range(1500))
        return {(p.words["colour"], p.words["shape"], p.words["direction"]) for p in plans}

    train, combo = triples("train"), triples("combo")
    assert not train & combo
    assert len(train) == 63 and len(combo) == 9
    for verb in range(4):
        assert any(is_held_out(c, s, verb) for c in COLOURS for s in SHAPES)


def test_ood_is_outside_what_training_shows() -> None:
    radii = {
        split: {
            round(make_clip(0, split, i, families=["move"], frames=5).scene.entities[0].radius, 3)
            for i in range(50)
        }
        for split in ("train", "ood")
    }
    assert min(radii["ood"]) < min(radii["train"]) < max(radii["train"]) < max(radii["ood"])
    counts = {
        split: {make_clip(0, split, i, families=["count"]).truth["count"] for i in range(60)}
        for split in ("train", "ood")
    }
    assert counts == {"train": {1, 2, 3, 4}, "ood": {5, 6}}


def test_background_is_grey_and_still() -> None:
    clip = make_clip(0, "train", 0, families=["move"], frames=5)
    corner = clip.frames[:, :2, :2]
    empty = render(replace(clip.scene, entities=())).frames
    assert (empty[..., 0] == empty[..., 1]).all() and (empty[..., 1] == empty[..., 2]).all()
    assert (empty == empty[:1]).all() and np.ptp(empty) > 5
    assert corner.shape[-1] == 3


@pytest.mark.parametrize("shape", [*SHAPES, *BIG_CANVAS_SHAPES])
@pytest.mark.parametrize("radius", [2.4, 5.0, 14.0])
def test_shapes_have_the_area_of_the_circle_and_their_centroid(shape: str, radius: float) -> None:
    dy = np.arange(64, dtype=float)[None, :, None] + 0.5 - 31.3
    dx = np.arange(64, dtype=float)[None, None, :] + 0.5 - 32.2
    alpha = coverage(shape, dx, dy, np.full((1, 1, 1), radius))
    assert alpha.sum() == pytest.approx(np.pi * radius**2, rel=0.06)
    assert (alpha * dx).sum() / alpha.sum() == pytest.approx(0, abs=0.12)
    assert (alpha * dy).sum() / alpha.sum() == pytest.approx(0, abs=0.12)


def test_entities_can_change_and_turn() -> None:
    scene = scene_of(
        circle(
            Change(3, "colour", "green"),
            Change(5, "alpha", 0.0),
            Change(7, "alpha", 1.0),
            Change(7, "shape", "square"),
        )
    )
    frames = render(scene).frames
    assert tuple(frames[2, 16, 16]) == (228, 38, 38)
    assert tuple(frames[4, 16, 16]) == (38, 196, 60)
    assert np.ptp(frames[5, 16, 16]) == 0
    assert tuple(frames[8, 16, 16]) == (38, 196, 60)
    ramp = track(scene, circle(Change(2, "radius", 2.0, duration=4)))
    assert ramp.radius[[0, 2, 4, 8]] == pytest.approx([5, 5, 7.5, 10])
    pointed = replace(circle(), shape="triangle")
    up, down = (render(scene_of(replace(pointed, angle=a))).frames for a in (0.0, np.pi))
    assert np.abs(up[0].astype(int) - up[0, ::-1]).max() > 50
    saturated = [np.ptp(f[0], axis=-1) > 60 for f in (up, down)]
    assert np.array_equal(saturated[0][::-1, ::-1], saturated[1])


def test_marks_layers_and_gravity() -> None:
    marked = render(scene_of(replace(circle(), mark="dot"))).frames
    assert (
        marked[0, 10:22, 10:22].astype(int).sum()
        < render(scene_of(circle())).frames[0, 10:22, 10:22].astype(int).sum()
    )
    bar = Entity(1, "bar", "grey", 4, (Segment(0, 16, 16),), role="occluder", layer=1, half=(6, 20))
    assert render(scene_of(circle(), bar)).tracks[0].visible.max() == 0
    assert render(scene_of(circle(), replace(bar, layer=-1))).tracks[0].visible.min() > 0.98
    fall = track(scene_of(), circle(motion=(Segment(0, 16, 4, ay=0.5), Segment(6, 16, 13))))
    assert fall.y[[0, 2, 4, 6, 8]] == pytest.approx([4, 5, 8, 13, 13])


def test_shots_cut_and_cameras_move() -> None:
    shots = (
        Shot(0, 16, 16, background=1),
        Shot(4, 16, 16, background=2, zoom=2.0, vx=1.0),
    )
    drawn = render(scene_of(circle(), shots=shots))
    assert drawn.tracks[0].radius.tolist() == [5.0] * 4 + [10.0] * 5
    assert drawn.tracks[0].x[[3, 4, 6]] == pytest.approx([16, 16, 12])
    corner = drawn.frames[:, 0, 0, 0].astype(int)
    assert len(set(corner[:4])) == 1 and len(set(corner[4:])) > 1


def test_panels_hold_scenes_of_their_own() -> None:
    inner = Scene(
        9, 16, 16, 8, (replace(circle(), motion=(Segment(0, 8, 8),)),), (Shot(0, 8, 8, 3),)
    )
    frames = render(replace(scene_of(), panels=(Panel(0, 16, inner),))).frames
    assert np.array_equal(frames[:, :16, 16:], render(inner).frames)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"families": ["mvoe"]}, "mvoe.*use above"),
        ({"families": []}, "families is empty"),
        ({"split": "test"}, "split='test'"),
        ({"frames": 0}, "frames=0"),
        ({"frames": 1, "families": ["move", "collide"]}, r"collide \(frames >= 5.*families move"),
        ({"height": 8}, "8x32"),
        ({"width": 33}, "32x33"),
        ({"fps": 0}, "fps=0"),
    ],
)
def test_wrong_requests_name_the_rule(change: dict, message: str) -> None:
    request: dict = {"families": ["move"], "split": "train", **change}
    with pytest.raises(ValueError, match=message):
        make_clip(0, request.pop("split"), 0, **request)


def test_families_that_no_shape_will_do_for_are_named() -> None:
    check_request(["move", "collide"], "train", Shapes(((16, 16),), (1, 5)))
    for shapes in (Shapes(frames=(1, 2)), Shapes(frames=(3,))):
        with pytest.raises(ValueError, match=r"frames .* will do for collide .*families move"):
            check_request(["move", "collide"], "train", shapes)
    with pytest.raises(ValueError, match="at least one value"):
        check_request(["move"], "train", Shapes(sizes=()))


def test_encoding_is_the_same_every_time() -> None:
    """x264's macroblock tree once made the bytes of tiny frames depend on earlier calls."""
    made = [
        make_clip(0, "train", i, families=TINY, frames=9, height=16, width=16) for i in range(60)
    ]
    first = [encode_video(c.frames, 8) for c in made]
    for clip, video in zip(made, first, strict=True):
        decode_clip(video, [0.0])
        assert encode_video(clip.frames, 8) == video


def test_contact_sheet_is_a_picture(tmp_path: Path) -> None:
    path = contact_sheet(tmp_path / "sheet.png", families=TINY[:4], frames=9, height=16, width=32)
    assert path.read_bytes().startswith(b"\x89PNG")
    image = contact_sheet(tmp_path / "image.png", families=["move"], frames=1)
    assert image.stat().st_size > 2000
    with pytest.raises(ValueError, match="unknown"):
        contact_sheet(tmp_path / "other.png", families=["nothing"])
    assert not (tmp_path / "other.png").exists()
    with pytest.raises(ValueError, match=r"sheet\.jpg: the sheet is a \.png"):
        contact_sheet(tmp_path / "sheet.jpg", families=["move"])


def test_events_are_part_of_the_record() -> None:
    clip = make_clip(0, "train", 0, families=["collide"])
    (event,) = clip.scene.events
    assert isinstance(event, Event)
    assert clip.truth["events"] == [
        {"frame": round(event.time, 2), "type": "contact", "ids": [0, 1]}
    ]
