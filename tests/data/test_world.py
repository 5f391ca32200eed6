"""The world itself: pure clips, honest truth records, unambiguous captions, shards."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from longtake.data.catalogue import load_catalogue
from longtake.data.decode import decode_clip, encode_video
from longtake.data.shards import ShardReader, list_shards, scan_shard
from longtake.data.world import FAMILIES, contact_sheet, make_clip, write, write_world
from longtake.data.world.captions import MAX_DENSE, MAX_SHORT
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
SPLITS = ("train", "val", "combo", "ood")
SMALL = {"families": ALL, "frames": 5, "height": 16, "width": 16}


def scene_of(*entities: Entity, frames: int = 9, shots: tuple[Shot, ...] = ()) -> Scene:
    return Scene(frames, 32, 32, 8, entities, shots or (Shot(0, 16, 16, background=1),))


def circle(*changes: Change, motion: tuple[Segment, ...] = (Segment(0, 16, 16),)) -> Entity:
    return Entity(0, "circle", "red", 5.0, motion, changes=changes)


def test_the_families_of_this_corpus_are_there() -> None:
    assert {"move", "count", "leftright", "occlusion", "collide", "camera"} <= set(FAMILIES)


def test_a_clip_is_a_function_of_its_arguments() -> None:
    one, two = (make_clip(5, "train", 11, families=ALL) for _ in range(2))
    assert np.array_equal(one.frames, two.frames)
    assert one.record() == two.record()
    others = [(6, "train", 11), (5, "val", 11), (5, "train", 17)]
    for seed, split, index in others:
        assert not np.array_equal(one.frames, make_clip(seed, split, index, families=ALL).frames)


@pytest.mark.parametrize("frames", [5, 8, 33])
@pytest.mark.parametrize("size", [(16, 16), (32, 48), (48, 32), (128, 128)])
@pytest.mark.parametrize("split", ["combo", "ood"])
def test_every_size_can_be_drawn(frames: int, size: tuple[int, int], split: str) -> None:
    for index in range(len(ALL)):
        height, width = size
        clip = make_clip(
            0, split, index, families=ALL, frames=frames, height=height, width=width, fps=16
        )
        assert clip.frames.shape == (frames, height, width, 3)
        assert clip.frames.dtype == np.uint8
        assert len(clip.truth["entities"][0]["x"]) == frames


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_short_ascii_and_distinct(split: str) -> None:
    for index in range(30 * len(ALL)):
        clip = make_clip(1, split, index, **SMALL)
        captions = clip.captions
        assert set(captions) == {"dense", "short", "vague", "wrong", "zh"}
        assert len(captions["dense"]) <= MAX_DENSE and len(captions["short"]) <= MAX_SHORT
        assert captions["dense"].isascii() and captions["short"].isascii()
        assert captions["wrong"] != captions["dense"]
        assert not set(captions["vague"].split()) & {*COLOURS, *SHAPES}
        assert any("一" <= letter <= "鿿" for letter in captions["zh"])


def test_captions_say_what_the_truth_says() -> None:
    for index in range(30 * len(ALL)):
        clip = make_clip(2, "train", index, **SMALL)
        dense, short = clip.captions["dense"], clip.captions["short"]
        for entity in clip.truth["entities"]:
            if entity["role"] == "subject":
                noun = f"{entity['size']} {entity['colour']} {entity['shape']}"
                assert noun in dense.lower() and entity["colour"] in short
        for name, expected in clip.truth["expect"].items():
            if name in ("direction", "permanence", "causal"):
                assert f"moves {expected['word']}" in dense and expected["word"] in short
    # two clips with one caption must not differ in what is asked
    asked: dict[str, str] = {}
    for index in range(30 * len(ALL)):
        clip = make_clip(2, "train", index, **SMALL)
        names = clip.truth["asked"]["short"]
        content = json.dumps({n: clip.truth["expect"][n] for n in names}, sort_keys=True)
        known = asked.setdefault(clip.captions["short"], content)
        assert known == content


def test_truth_is_consistent_and_json() -> None:
    for index in range(15 * len(ALL)):
        clip = make_clip(3, "train", index, families=ALL, frames=9)
        truth = json.loads(json.dumps(clip.record()))["truth"]
        subjects = [e for e in truth["entities"] if e["role"] == "subject"]
        assert truth["count"] == len(subjects)
        assert truth["defects"] == [] and truth["shots"] == [{"start": 0, "end": 9}]
        for entity in subjects:
            visible = np.array(entity["visible"])
            assert visible.max() > 0.9 and visible.max() <= 1
            if clip.family != "occlusion":
                assert visible.min() > 0.4
            radius = np.array(entity["r"])
            edge = np.array([entity["x"], entity["y"]])
            assert (edge > 0.7 * radius).all() and (edge < 32 - 0.7 * radius).all()


def test_occluded_entities_are_wholly_hidden_once_and_seen_at_both_ends() -> None:
    for frames, side in ((5, 16), (8, 16), (9, 16), (17, 32), (33, 64)):
        for index in range(60):
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
    def triples(split: str) -> set[tuple[str, str, str]]:
        made = [make_clip(0, split, i, families=["move"], frames=5) for i in range(1500)]
        return {
            (
                c.scene.entities[0].colour,
                c.scene.entities[0].shape,
                c.truth["expect"]["direction"]["word"],
            )
            for c in made
        }

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
        ({"families": ["mvoe"]}, "mvoe.*use camera"),
        ({"families": []}, "families is empty"),
        ({"split": "test"}, "split='test'"),
        ({"frames": 0}, "frames=0"),
        ({"frames": 1, "families": ["collide"]}, "'collide' needs frames >= 5"),
        ({"height": 8}, "8x32"),
        ({"width": 33}, "32x33"),
    ],
)
def test_wrong_requests_name_the_rule(change: dict, message: str) -> None:
    request: dict = {"families": ["move"], "split": "train", **change}
    with pytest.raises(ValueError, match=message):
        make_clip(0, request.pop("split"), 0, **request)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in list_shards(folder)}


def test_shards_have_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    for workers in (1, 2):
        report = write_world(
            tmp_path / str(workers),
            num_clips=50,
            shard_size=16,
            num_workers=workers,
            progress=False,
            **SMALL,
        )
        assert (report.num_clips, report.num_shards, report.new_shards) == (50, 4, 4)
    one, two = contents(tmp_path / "1"), contents(tmp_path / "2")
    assert one == two and len(one) == 4
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_stopped_run_goes_on_by_shard(tmp_path: Path) -> None:
    arguments = {"num_clips": 30, "shard_size": 10, "num_workers": 1, "progress": False, **SMALL}
    write_world(tmp_path, **arguments)
    before = contents(tmp_path)
    (tmp_path / "train-000001.tar").unlink()
    report = write_world(tmp_path, **arguments)
    assert report.new_shards == 1 and contents(tmp_path) == before
    assert write_world(tmp_path, **arguments).new_shards == 0
    with pytest.raises(ValueError, match=r"seed=1 \(was 0\)"):
        write_world(tmp_path, **{**arguments, "seed": 1})


def test_a_run_killed_before_its_catalogue_heals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"num_clips": 4, "num_workers": 1, "progress": False, **SMALL}
    write_world(tmp_path, **arguments)

    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(write, "build_catalogue", killed)
        with pytest.raises(KeyboardInterrupt):
            write_world(tmp_path, split="val", **arguments)
    assert write_world(tmp_path, split="val", **arguments).new_shards == 0
    assert len(load_catalogue(tmp_path)) == 8


def test_shards_carry_frames_captions_and_truth(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_world(tmp_path, num_clips=12, split=split, num_workers=1, progress=False, **SMALL)
    table = load_catalogue(tmp_path).table
    assert table.num_rows == 24
    assert set(table["split"].to_pylist()) == {"train", "val"}
    assert set(table["family"].to_pylist()) == set(ALL)
    assert set(zip(table["height"].to_pylist(), table["frames"].to_pylist(), strict=True)) == {
        (16, 5)
    }
    reader = ShardReader()
    shard = tmp_path / "val-000000.tar"
    for index, entry in enumerate(scan_shard(shard)):
        clip = make_clip(0, "val", index, **SMALL)
        assert entry.key == clip.key
        video = reader.read(shard, entry.members["mp4"])
        frames = decode_clip(video, [t / 8 for t in range(5)]).astype(float)
        assert 10 * np.log10(255**2 / np.mean((frames - clip.frames) ** 2)) > 40
        assert json.loads(reader.read(shard, entry.members["json"])) == json.loads(
            json.dumps(clip.record())
        )


def test_single_frames_become_images(tmp_path: Path) -> None:
    families = ("move", "leftright", "count")
    write_world(tmp_path, families=families, num_clips=6, frames=1, num_workers=1, progress=False)
    (entry, *_) = scan_shard(tmp_path / "train-000000.tar")
    assert set(entry.members) == {"png", "json"}
    assert load_catalogue(tmp_path).table["frames"].to_pylist() == [1] * 6


def test_encoding_is_the_same_every_time() -> None:
    """x264's macroblock tree once made the bytes of tiny frames depend on earlier calls."""
    made = [
        make_clip(0, "train", i, families=ALL, frames=9, height=16, width=16) for i in range(120)
    ]
    first = [encode_video(c.frames, 8) for c in made]
    for clip, video in zip(made, first, strict=True):
        decode_clip(video, [0.0])
        assert encode_video(clip.frames, 8) == video


def test_contact_sheet_is_a_picture(tmp_path: Path) -> None:
    path = contact_sheet(tmp_path / "sheet.png", families=ALL, frames=9, height=16, width=32)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="unknown"):
        contact_sheet(tmp_path / "other.png", families=["nothing"])
    assert not (tmp_path / "other.png").exists()


def test_events_are_part_of_the_record() -> None:
    clip = make_clip(0, "train", 0, families=["collide"])
    (event,) = clip.scene.events
    assert isinstance(event, Event)
    assert clip.truth["events"] == [
        {"frame": round(event.time, 2), "type": "contact", "ids": [0, 1]}
    ]
