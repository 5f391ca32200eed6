"""Mask algebra of the tasks."""

import pytest
import torch

from longtake.models.conditioning import (
    TASKS,
    check_tasks,
    draw_task,
    given_mask,
    given_tokens,
    noise_levels,
    num_noisy_tokens,
)


def test_masks() -> None:
    assert not given_mask("t2v", (3, 2, 2)).any()
    mask = given_mask("i2v", (3, 2, 2))
    assert mask[0].all() and not mask[1:].any()


@pytest.mark.parametrize("task", TASKS)
def test_given_and_noisy_tokens_add_up(task: str) -> None:
    mask = given_mask(task, (5, 8, 6))
    tokens = given_tokens(mask, (1, 2, 3))
    assert tokens.shape == (5 * 4 * 2,)
    assert num_noisy_tokens(mask, (1, 2, 3)) == 40 - int(tokens.sum())
    assert int(tokens.sum()) * 6 == int(mask.sum())


def test_tokens_keep_the_order_of_the_grid() -> None:
    """A region in space, which no task draws yet, reaches the right tokens."""
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[1, 2:, :2] = True
    assert given_tokens(mask, (1, 2, 2)).nonzero().flatten().tolist() == [6]
    batch = torch.stack((mask, ~mask))
    assert given_tokens(batch, (1, 2, 2)).sum(1).tolist() == [1, 7]


def test_mask_through_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="whole patches"):
        given_tokens(given_mask("i2v", (4, 4, 4)), (2, 2, 2))
    with pytest.raises(ValueError, match=r"model\.patch_size"):
        given_tokens(given_mask("i2v", (3, 4, 5)), (1, 2, 2))


def test_task_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="task i2v gives 1 latent frames of 1"):
        given_mask("i2v", (1, 4, 4))


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
    free = given_mask("t2v", (2, 2, 2))
    assert noise_levels(t, torch.stack((free, free)), (1, 1, 1)) == (None, None)
    masks = torch.stack((free, given_mask("i2v", (2, 2, 2))))
    levels, index = noise_levels(t, masks, (1, 1, 1))
    assert levels is not None and index is not None
    per_token = levels.gather(1, index)
    assert torch.equal(per_token[0], torch.full((8,), 0.3))
    assert torch.equal(per_token[1], torch.tensor([0.0] * 4 + [0.8] * 4))
