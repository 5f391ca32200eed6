"""What is given: every task is a mask over the latent (T, H, W); True is given, clean, no loss.

Given latents stay in place with noise level 0; the others carry the sample's level. The masks may
vary in space as well: nothing below assumes whole frames.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

# Latent frames given at the front, by task. A latent frame 0 is one pixel frame, so i2v gives
# exactly one image.
GIVEN_PREFIX = {"t2v": 0, "i2v": 1}
TASKS = tuple(GIVEN_PREFIX)


def check_tasks(weights: Mapping[str, float]) -> None:
    """ValueError for an unknown task, a negative weight or weights that sum to zero."""
    for task, weight in weights.items():
        if task not in GIVEN_PREFIX:
            raise ValueError(f"tasks.{task}: unknown task, choose from {', '.join(TASKS)}")
        if weight < 0:
            raise ValueError(f"tasks.{task}={weight} must not be negative")
    if sum(weights.values()) <= 0:
        raise ValueError(f"tasks={dict(weights)}: at least one weight must be positive")


def draw_task(u: float, weights: Mapping[str, float]) -> str:
    """Task at quantile u in [0, 1) of the weights, in their order."""
    check_tasks(weights)
    edge = u * sum(weights.values())
    chosen = ""
    for task, weight in weights.items():
        if weight > 0:
            chosen = task
            edge -= weight
            if edge < 0:
                break
    return chosen


def given_mask(task: str, shape: tuple[int, int, int]) -> Tensor:
    """Mask (T, H, W) bool of a task. ValueError where it would leave nothing to generate."""
    check_tasks({task: 1.0})
    prefix = GIVEN_PREFIX[task]
    if prefix >= shape[0]:
        raise ValueError(
            f"task {task} gives {prefix} latent frames of {shape[0]}: use longer clips or t2v"
        )
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:prefix] = True
    return mask


def given_tokens(mask: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Mask (..., T, H, W) of latents → (..., N) of tokens, in the order of the DiT.

    ValueError where a token would be given in part: the mask must follow the patch grid.
    """
    pt, ph, pw = patch_size
    frames, height, width = mask.shape[-3:]
    if frames % pt or height % ph or width % pw:
        raise ValueError(
            f"mask of (T, H, W) = {(frames, height, width)} must be divisible by "
            f"model.patch_size={tuple(patch_size)}"
        )
    lead = mask.shape[:-3]
    tokens = mask.reshape(*lead, frames // pt, pt, height // ph, ph, width // pw, pw)
    whole, some = tokens.amin((-5, -3, -1)), tokens.amax((-5, -3, -1))
    if not torch.equal(whole, some):
        raise ValueError(
            f"given frames must cover whole patches: model.patch_size={tuple(patch_size)} cuts "
            "through the given region; use patch_size[0]=1 or leave the task out"
        )
    return whole.flatten(-3)


def num_noisy_tokens(mask: Tensor, patch_size: tuple[int, int, int]) -> int:
    """Tokens of (T, H, W) that are generated and bear loss."""
    return int((~given_tokens(mask, patch_size)).sum())


def noise_levels(
    t: Tensor, masks: Tensor, patch_size: tuple[int, int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """`levels` (B, 2) and `level_index` (B, N) for the DiT from t (B,) and masks (B, T, H, W).

    Level 0 of a sample is its t, level 1 is 0 for what is given. (None, None) where nothing is:
    plain t is cheaper.
    """
    if not bool(masks.any()):
        return None, None
    levels = torch.stack((t, torch.zeros_like(t)), dim=1)
    return levels, given_tokens(masks, patch_size).long().to(t.device)
