"""The language of the world: what is said can be read back, in every family, form and split."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from longtake.data.world import (
    FAMILIES,
    SPLITS,
    Shapes,
    WorldClip,
    make_pair,
    read_caption,
    score_clip,
    score_frames,
)
from longtake.data.world.clips import Description, describe, draw_clip
from longtake.data.world.language import KINDS, MAX_DENSE, MAX_SHORT
from longtake.data.world.scene import (
    BIG_CANVAS_SHAPES,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Entity,
    Scene,
)

ALL = tuple(FAMILIES)
SHAPED = Shapes(((32, 32), (64, 64)), (1, 5, 17))
NUM = 24  # clips of a family and split
MOVES_CAMERA = {"camera", "shots", "mix", "grid"}  # where a word may be about the camera or a cut
each_family = pytest.mark.parametrize("family", ALL)


def plans(family: str, split: str, number: int = NUM) -> list[Description]:
    return [describe(1, split, index, [family], SHAPED) for index in range(number)]


@each_family
def test_captions_are_short_and_of_their_kind(family: str) -> None:
    for split in SPLITS:
        for plan in plans(family, split):
            captions = plan.wording.captions(plan.words)
            assert set(captions) == set(KINDS)
            assert len(captions["dense"]) <= MAX_DENSE and len(captions["short"]) <= MAX_SHORT
            for kind in ("dense", "short", "vague"):
                assert captions[kind].isascii() and captions[kind].strip() == captions[kind]
            vague = set(re.findall(r"\w+", captions["vague"].lower()))
            assert not vague & {*COLOURS, *SHAPES, *BIG_CANVAS_SHAPES, *DIRECTIONS}
            assert any("一" <= letter <= "鿿" for letter in captions["zh"])
            assert not re.search(r"[A-Za-z]", captions["zh"])


@each_family
def test_every_form_is_described(family: str) -> None:
    seen = {plan.form for split in SPLITS for plan in plans(family, split, 100)}
    assert seen == set(FAMILIES[family].forms)


@each_family
@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_read_back_as_what_they_ask_for(family: str, kind: str) -> None:
    for split in SPLITS:
        for plan in plans(family, split):
            said = plan.wording.captions(plan.words)[kind]
            expect = plan.reading(kind).expect
            for reading in (read_caption(said, family), read_caption(said.upper() + "  ")):
                assert reading.expect == expect, said
            assert bool(expect) == (kind != "vague"), said


def test_sentences_outside_the_grammar_name_the_nearest_one() -> None:
    for text in ("a pink circle moves up", "a red circle moves", "a red circle moves up twice", ""):
        with pytest.raises(ValueError, match="not a sentence of the world; the nearest is"):
            read_caption(text)


def test_one_caption_never_asks_for_two_things() -> None:
    asked: dict[tuple[str, str], tuple[str, str]] = {}
    for family in ALL:
        for split in SPLITS:
            for plan in plans(family, split):
                for kind in ("dense", "short", "zh"):
                    text = json.dumps(plan.reading(kind).expect, sort_keys=True)
                    caption = plan.wording.captions(plan.words)[kind]
                    known, other = asked.setdefault((kind, caption), (text, family))
                    assert known == text, f"{caption!r} of {family} and {other}"


@each_family
def test_wrong_captions_say_one_thing_otherwise(family: str) -> None:
    for split in SPLITS:
        for plan in plans(family, split):
            slot, wrong = plan.flipped("wrong")
            differing = {name for name in plan.words if plan.words[name] != wrong.words[name]}
            assert differing == {slot}
            for kind in ("dense", "short", "zh"):
                true, false = (p.wording.captions(p.words)[kind] for p in (plan, wrong))
                assert true != false
            assert (
                read_caption(plan.wording.captions(wrong.words)["dense"], family).words[slot]
                == (wrong.words[slot])
            )


@each_family
@pytest.mark.parametrize("split", ["val", "ood"])
def test_pairs_differ_in_one_word_and_in_what_it_says(family: str, split: str) -> None:
    need = FAMILIES[family]
    side = max(32, need.min_side)
    for index in range(8):
        clip, twin = make_pair(
            *(3, split, index),
            families=[family],
            frames=max(9, need.min_frames),
            height=side,
            width=side,
        )
        assert clip.captions["short"] != twin.captions["short"]
        slots = [name for name in clip.words if clip.words[name] != twin.words[name]]
        assert len(slots) == 1 and twin.key == f"{clip.key}-{slots[0]}"
        assert min(score_clip(twin.frames, twin.truth).values()) == 1, twin.captions["dense"]
        assert min(score_frames(twin.frames, clip.reading("short").expect).values()) == 0, slots
        if clip.scene.shots == twin.scene.shots and not clip.scene.panels:
            both = set(clip.scene.entities) & set(twin.scene.entities)
            rest = ~(near_others(clip, both) | near_others(twin, both))
            assert rest.any() and np.array_equal(clip.frames[rest], twin.frames[rest])
            if slots[0].startswith("colour"):
                assert colourless(clip.scene) == colourless(twin.scene)
        else:
            assert family in MOVES_CAMERA


@pytest.mark.parametrize("family", ["move", "support", "bounce", "hoop"])
def test_another_shape_takes_the_same_way(family: str) -> None:
    """But for where it rests or turns: things of other shapes reach less or more far."""
    for index in range(12):
        plan = describe(5, "val", index, [family], Shapes())
        other = next(s for s in ("circle", "square") if s != plan.words["shape"])
        twin = draw_clip(replace(plan, words={**plan.words, "shape": other}))
        (first, *_), (second, *_) = (c.scene.entities for c in (draw_clip(plan), twin))
        if family != "support" or plan.form == "falls":
            assert first.motion[0] == second.motion[0]
        else:
            assert first.motion[0].x == second.motion[0].x


def near_others(clip: WorldClip, entities: set[Entity]) -> np.ndarray:
    """Mask (T, H, W) of boxes around all entities but these, with their joints."""
    mask = np.zeros(clip.frames.shape[:3], bool)
    rows, cols = np.indices(mask.shape[1:])[:, None] + 0.5  # (1, H, W)
    for entity, truth in zip(clip.scene.entities, clip.truth["entities"], strict=True):
        if entity not in entities:
            points = np.array([(p["x"], p["y"]) for p in (truth, *truth["joints"].values())])
            (left, top), (right, bottom) = points.min(0), points.max(0)  # each (T,)
            reach = 0.4 * entity.radius if entity.limbs else 1.6 * np.array(truth["r"])
            half_x, half_y = (
                np.broadcast_to(h, left.shape) + 2 for h in entity.half or (reach,) * 2
            )
            mask |= (
                (cols > (left - half_x)[:, None, None])
                & (cols < (right + half_x)[:, None, None])
                & (rows > (top - half_y)[:, None, None])
                & (rows < (bottom + half_y)[:, None, None])
            )
    return mask


def colourless(scene: Scene) -> Scene:
    """The scene without the colours of its entities."""
    return replace(
        scene,
        entities=tuple(
            replace(
                e,
                colour="",
                changes=tuple(c for c in e.changes if c.attribute != "colour"),
            )
            for e in scene.entities
        ),
    )
