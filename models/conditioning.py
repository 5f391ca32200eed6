"""What is given: a task names latent frames, a mask (T, H, W) says it to loss and sampler.

True is given: known, without loss, at a noise level of its own (0 is clean). The masks may vary in
space as well: nothing but the tasks below assumes whole frames. Frames come in units of
`patch_size[0]`, so that no token is given in part.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

Draw = Callable[[str], float]
"""A draw in [0, 1) by its purpose: a sample's own in training, `middle` where it must be fixed."""

_GOLDEN = (5**0.5 - 1) / 2  # multiples of it, mod 1, spread evenly: an order for equal draws


def middle(purpose: str) -> float:
    """The draw of validation, evaluation and sampling: lengths halfway between their bounds."""
    return 0.5


@dataclass(frozen=True)
class Task:
    """`units(count, least, draw)` are those given of a clip of `count` units, of which `least`
    show a motion; `fewest(least)` are the units that a clip must have."""

    units: Callable[[int, int, Draw], Iterable[int]]
    fewest: Callable[[int], int]
    is_prefix: bool = False  # gives nothing but the beginning of a clip
    is_image: bool = False  # makes clips of one frame only
    is_frame: bool = False  # gives exactly one latent frame, so the patch must be one frame long
    is_stills: bool = False  # gives frames that need no neighbours: images
    is_scattered: bool = False  # gives more than the two ends of a clip


def _between(least: int, most: int, u: float) -> int:
    return least + int(u * (most - least + 1))


def _front(count: int, least: int, draw: Draw) -> Iterable[int]:
    return range(_between(least, max(least, count // 2), draw("given.front")))


def _back(count: int, least: int, draw: Draw) -> Iterable[int]:
    return range(count - _between(least, max(least, count // 2), draw("given.back")), count)


def _every_kth(count: int, least: int, draw: Draw) -> Iterable[int]:
    return range(0, count, _between(2, min(4, count - 1), draw("given.every")))


def _both_ends(count: int, least: int, draw: Draw) -> Iterable[int]:
    most = (count - 1) // 2
    front, back = (_between(least, most, draw(name)) for name in ("given.front", "given.back"))
    return (*range(front), *range(count - back, count))


def _random(count: int, least: int, draw: Draw) -> Iterable[int]:
    keys = [(draw(f"given.{unit}") + unit * _GOLDEN) % 1 for unit in range(count)]
    order = sorted(range(count), key=keys.__getitem__)
    return order[: _between(1, count - 1, draw("given.number"))]


TASKS = {
    "t2v": Task(lambda count, least, draw: (), lambda least: 1, is_prefix=True),
    "t2i": Task(lambda count, least, draw: (), lambda least: 1, is_prefix=True, is_image=True),
    # a latent frame 0 is one pixel frame, so i2v gives exactly one image
    "i2v": Task(lambda count, least, draw: (0,), lambda least: 2, is_prefix=True, is_frame=True),
    "extend_forward": Task(_front, lambda least: least + 1, is_prefix=True),
    "extend_backward": Task(_back, lambda least: least + 1),
    "first_last": Task(lambda count, least, draw: (0, count - 1), lambda least: 3, is_stills=True),
    "in_between": Task(_every_kth, lambda least: 3, is_stills=True, is_scattered=True),
    "join": Task(_both_ends, lambda least: 2 * least + 1),
    "random_frames": Task(_random, lambda least: 2, is_stills=True, is_scattered=True),
}
GIVES_NOTHING = frozenset(("t2v", "t2i"))


@dataclass(frozen=True)
class GivenFrames:
    """Runs of latent frames that are given, in order.

    Those `in_place` replace the noise. `segments` are encoded alone and appended as tokens with the
    places of these frames: a causal codec's latents behind the first run have seen what comes
    before, which is to be generated. There the clip's own latents are noisy, and bear loss.

    Frame f of a clip stands at latent frame f / s, s being the codec's stride in time, also where
    it is encoded alone. So the segment of latent frames a … b shows the frames a·s … b·s; its first
    latent is the first of these, an image.

    A model that sees what is given as `channels` behind the noisy latents (`image_condition`)
    generates all frames, and all bear loss.
    """

    in_place: tuple[range, ...] = ()
    segments: tuple[range, ...] = ()
    channels: tuple[range, ...] = ()

    @classmethod
    def of(cls, runs: Sequence[range], is_causal: bool, has_channels: bool = False) -> Self:
        """These runs; where latents depend on those before them, only the beginning in place. With
        `has_channels` all are channels."""
        if has_channels:
            return cls(channels=tuple(runs))
        first = len(runs)
        if is_causal:
            first = 1 if runs and runs[0].start == 0 else 0
        return cls(tuple(runs[:first]), tuple(runs[first:]))

    @property
    def runs(self) -> tuple[range, ...]:
        """All of them, in order."""
        return self.in_place + self.segments + self.channels

    def keep(self, is_kept: Callable[[int], bool]) -> "GivenFrames":
        """Without the runs whose number (0 is the first) is not kept."""
        kept = [run for number, run in enumerate(self.runs) if is_kept(number)]
        return replace(
            self,
            in_place=tuple(run for run in self.in_place if run in kept),
            segments=tuple(run for run in self.segments if run in kept),
            channels=tuple(run for run in self.channels if run in kept),
        )


def given_frames(
    task: str,
    num_frames: int,
    *,
    patch: int = 1,
    is_causal: bool = False,
    has_channels: bool = False,
    draw: Draw = middle,
) -> GivenFrames:
    """What a task gives of a clip of `num_frames` latent frames, `patch` of which share a token.

    `is_causal` says that latents depend on those before them, as a VAE's do: then only the
    beginning stays in place; of other runs a cache must hold every length, so they are cut to the
    last 2^i units, and stills are given one by one. With `has_channels` all is told as channels,
    and the beginning cut to its first 2^i units for the same reason. ValueError for a clip that is
    too short, or too long for an image.
    """
    if reason := unfit(task, num_frames, patch):
        raise ValueError(f"task {task}: {reason}")
    count, least = num_frames // patch, -(-2 // patch)
    units = sorted(TASKS[task].units(count, least, draw))
    runs = _runs(units, patch)
    if is_causal and TASKS[task].is_stills:
        runs = tuple(range(unit * patch, (unit + 1) * patch) for unit in units)
    if is_causal:
        runs = tuple(run if run.start == 0 else run[-_stored_length(run, patch) :] for run in runs)
    if is_causal and has_channels:
        runs = tuple(run[: _stored_length(run, patch)] for run in runs)
    return GivenFrames.of(runs, is_causal, has_channels)


def unfit(task: str, num_frames: int, patch: int = 1) -> str:
    """Why clips of `num_frames` latent frames cannot serve a task; "" where they can."""
    rule = TASKS[task]
    if rule.is_frame and patch > 1:
        return f"it gives one latent frame: model.patch_size[0]={patch} must be 1"
    if rule.is_image and num_frames > 1:
        return f"it makes images, this clip has {num_frames} latent frames"
    fewest = rule.fewest(-(-2 // patch)) * patch
    if not rule.is_image and num_frames < fewest:
        return f"it needs {fewest} latent frames, this clip has {num_frames}"
    return ""


def _stored_length(run: range, patch: int) -> int:
    """Frames of 2^i units, as many as the run has."""
    return patch * 2 ** ((len(run) // patch).bit_length() - 1)


def _runs(units: Iterable[int], patch: int) -> tuple[range, ...]:
    """Latent frames of the units, neighbours joined."""
    runs: list[range] = []
    for unit in units:
        frames = range(unit * patch, (unit + 1) * patch)
        if runs and runs[-1].stop == frames.start:
            frames = range(runs.pop().start, frames.stop)
        runs.append(frames)
    return tuple(runs)


def check_tasks(weights: Mapping[str, float], key: str = "tasks") -> None:
    """ValueError for an unknown task, a negative weight or weights that sum to zero."""
    for task, weight in weights.items():
        if task not in TASKS:
            raise ValueError(f"{key}.{task}: unknown task, choose from {', '.join(TASKS)}")
        if weight < 0:
            raise ValueError(f"{key}.{task}={weight} must not be negative")
    if sum(weights.values()) <= 0:
        raise ValueError(f"{key}={dict(weights)}: at least one weight must be positive")


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


def given_mask(given: GivenFrames, shape: tuple[int, int, int]) -> Tensor:
    """Mask (T, H, W) bool of what is given in place."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for run in given.in_place:
        mask[run.start : run.stop] = True
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
    t: Tensor,
    masks: Tensor,
    patch_size: tuple[int, int, int],
    given_level: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """`levels` (B, 2) and `level_index` (B, N) for the DiT from t (B,) and masks (B, T, H, W).

    Level 0 of a sample is its t, level 1 is `given_level` (B,), None for clean, where latents are
    given. (None, None) where nothing is: plain t is cheaper.
    """
    if not bool(masks.any()):
        return None, None
    levels = torch.stack((t, torch.zeros_like(t) if given_level is None else given_level), dim=1)
    return levels, given_tokens(masks, patch_size).long().to(t.device)
