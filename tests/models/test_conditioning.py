"""Mask algebra of the tasks."""

import random
from itertools import pairwise

import pytest
import torch

from longtake.models.conditioning import (
    GIVES_NOTHING,
    TASKS,
    GivenFrames,
    check_tasks,
    draw_task,
    given_frames,
    given_mask,
    given_tokens,
    noise_levels,
    num_noisy_tokens,
    unfit,
)


def mask_of(task: str, shape: tuple[int, int, int]) -> torch.Tensor:
    return given_mask(given_frames(task, shape[0]), shape)


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("t2v", []),
        ("i2v", [0]),
        ("extend_forward", [0, 1, 2]),
        ("extend_backward", [6, 7, 8]),
        ("first_last", [0, 8]),
        ("in_between", [0, 3, 6]),
        ("join", [0, 1, 2, 6, 7, 8]),
        ("random_frames", [0, 1, 3, 6, 8]),
    ],
)
def test_what_a_task_gives_where_nothing_is_drawn(task: str, given: list[int]) -> None:
    frames = given_frames(task, 9)
    assert [i for run in frames.runs for i in run] == given
    assert mask_of(task, (9, 2, 2)).all((1, 2)).nonzero().flatten().tolist() == given


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_every_draw_leaves_whole_patches_given_and_some_to_generate(task: str, patch: int) -> None:
    """And what a task fits, it fits at every draw; too short a clip is refused with the reason."""
    rng, seen = random.Random(0), set()
    for length in range(1, 13):
        draw = lambda purpose: rng.random()  # noqa: E731
        if length % patch:
            continue
        if reason := unfit(task, length, patch):
            with pytest.raises(ValueError, match=f"task {task}: {reason[:9]}"):
                given_frames(task, length, patch=patch)
            continue
        for _ in range(8):
            runs = given_frames(task, length, patch=patch, draw=draw).runs
            mask = given_mask(GivenFrames(runs), (length, 8, 6))
            noisy = num_noisy_tokens(mask, (patch, 2, 3))
            assert 0 < noisy == (length - sum(map(len, runs))) // patch * 8
            assert bool(runs) != (task in GIVES_NOTHING)
            assert all(a.stop < b.start for a, b in pairwise(runs))
            seen.add(runs)
    assert seen or (task in ("t2i", "i2v") and patch == 2)


def test_behind_the_beginning_a_causal_codec_gives_segments() -> None:
    """Its latents there have seen the frames to be generated. Of ends there are few lengths, and
    stills stay apart, so that a cache can hold them all."""
    join = given_frames("join", 9, is_causal=True)
    assert join == GivenFrames((range(3),), (range(7, 9),))
    assert join.keep(lambda number: number == 1) == GivenFrames((), (range(7, 9),))
    for patch, lengths in ((1, {2, 4, 8}), (2, {2, 4, 8})):
        ends = [
            given_frames("extend_backward", 20, patch=patch, is_causal=True, draw=lambda _, u=u: u)
            for u in (i / 20 for i in range(20))
        ]
        assert {given.in_place for given in ends} == {()}
        assert {given.segments[0].stop for given in ends} == {20}
        assert {len(given.segments[0]) for given in ends} == lengths
    stills = given_frames("random_frames", 9, is_causal=True)
    assert stills == GivenFrames((range(1),), tuple(range(i, i + 1) for i in (1, 3, 6, 8)))
    assert num_noisy_tokens(given_mask(stills, (9, 1, 1)), (1, 1, 1)) == 8


def test_as_channels_everything_is_generated() -> None:
    """Of beginnings there are few lengths as well, where a cache must hold them."""
    starts = [
        given_frames(
            "extend_forward", 20, is_causal=True, has_channels=True, draw=lambda _, u=i / 20: u
        )
        for i in range(20)
    ]
    assert {given.channels[0].start for given in starts} == {0}
    assert {len(given.channels[0]) for given in starts} == {2, 4, 8}
    assert {(given.in_place, given.segments) for given in starts} == {((), ())}
    assert not given_mask(starts[0], (20, 1, 1)).any()
    assert starts[0].keep(lambda _: False) == GivenFrames()
    uncut = given_frames("extend_forward", 20, has_channels=True, draw=lambda _: 0.9)
    assert uncut == GivenFrames(channels=(range(10),))


def test_tokens_keep_the_order_of_the_grid() -> None:
    """A region in space, which no task draws yet, reaches the right tokens."""
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[1, 2:, :2] = True
    assert given_tokens(mask, (1, 2, 2)).nonzero().flatten().tolist() == [6]
    batch = torch.stack((mask, ~mask))
    assert given_tokens(batch, (1, 2, 2)).sum(1).tolist() == [1, 7]


def test_mask_through_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="whole patches"):
        given_tokens(mask_of("i2v", (4, 4, 4)), (2, 2, 2))
    with pytest.raises(ValueError, match=r"model\.patch_size"):
        given_tokens(mask_of("i2v", (3, 4, 5)), (1, 2, 2))


def test_draw_follows_the_weights() -> None:
    weights = {"t2v": 3.0, "i2v": 1.0}
    assert [draw_task(u, weights) for u in (0.0, 0.7499, 0.75, 0.999999)] == [
        "t2v", "t2v", "i2v", "i2v",
    ]  # fmt: skip
    assert draw_task(0.999999, {"t2v": 1.0, "i2v": 0.0}) == "t2v"
    assert draw_task(0.0, {"t2v": 0.0, "i2v": 1.0}) == "i2v"


@pytest.mark.parametrize(
    ("weights", "rule"),
    [({"v2t": 1.0}, "tasks.v2t"), ({"t2v": -1.0}, "tasks.t2v=-1"), ({"t2v": 0.0}, "at least one")],
)
def test_wrong_weights_are_refused(weights: dict[str, float], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        check_tasks(weights)


def test_levels() -> None:
    t = torch.tensor([0.3, 0.8])
    free = mask_of("t2v", (2, 2, 2))
    assert noise_levels(t, torch.stack((free, free)), (1, 1, 1)) == (None, None)
    masks = torch.stack((free, mask_of("i2v", (2, 2, 2))))
    for known, told in ((None, 0.0), (torch.tensor([0.0, 0.1]), 0.1)):
        levels, index = noise_levels(t, masks, (1, 1, 1), known)
        assert levels is not None and index is not None
        per_token = levels.gather(1, index)
        assert torch.equal(per_token[0], torch.full((8,), 0.3))
        assert torch.equal(per_token[1], torch.tensor([told] * 4 + [0.8] * 4))
