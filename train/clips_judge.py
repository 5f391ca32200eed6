"""Draw the clips of a batch anew, task by task, and measure what was drawn beside them."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.data.decode import encode_image, encode_video
from longtake.data.loader import Batch, Clip
from longtake.data.randomness import derive_seed
from longtake.data.transforms import to_float, to_uint8
from longtake.data.world.given import held_frames
from longtake.models.conditioning import given_mask, noise_levels, num_noisy_tokens, unfit
from longtake.models.flow import Prediction, add_noise, flow_loss
from longtake.models.image_condition import with_channels
from longtake.train.caption_rows import known_numbers
from longtake.train.codec import Codec
from longtake.train.fidelity import ClipScorer, VideoDetector, flicker, psnr, ssim
from longtake.train.painter import GivenClips, Painter, noise_for
from longtake.train.playback import to_frames
from longtake.train.tasks import normal_draws
from longtake.train.world_prompts import given_of


@dataclass(frozen=True)
class Point:
    """Latents (D,) of a clip, and the rows that want to know what lies nearest to them."""

    latents: Tensor
    rows: list[dict[str, Any]]
    ending: str  # of the columns: "" for what was drawn, "_truth" for the true clip


@dataclass
class Findings:
    """What an evaluation gathers, batch by batch."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # of clips.parquet
    # By (T, H, W) in pixels: distances hold between latents of one shape.
    points: defaultdict[tuple[int, int, int], list[Point]] = field(
        default_factory=lambda: defaultdict(list)
    )
    # By task: detector features (B, D) of the true clips and of what was drawn for them.
    features: defaultdict[str, list[tuple[Tensor, Tensor]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    left_out: Counter[str] = field(default_factory=Counter)  # what and why → clips
    num_clips: int = 0


@dataclass(frozen=True)
class View:
    """Clips as every measure takes them, true and drawn ones alike."""

    clips: Tensor  # (B, 3, T, H, W) in [0, 1], whole grey levels
    latents: Tensor  # (B, C, T', H', W'), normalised
    clip_score: list[float] | None
    features: Tensor | None  # (B, D) of the detector


class Judge:
    """Draws the clips of a batch for each task, and measures them into `found`."""

    def __init__(
        self,
        painter: Painter,
        codec: Codec,
        detector: VideoDetector | None,
        scorer: ClipScorer | None,
        seed: int,
        folder: Path,
        num_shown: int,
    ) -> None:
        """`seed` is that of the noise; videos of the first `num_shown` clips go to `folder`."""
        self.painter, self.codec, self.detector, self.scorer = painter, codec, detector, scorer
        self.run, self.device = painter.run, painter.device
        self.seed, self.folder, self.num_shown = seed, folder, num_shown
        self.found = Findings()

    @torch.no_grad()
    def measure(self, batch: Batch, tasks: Sequence[str]) -> None:
        """Add a row for each clip and task."""
        found, shape = self.found, batch.clips[0].sample.shape
        captions = [clip.caption for clip in batch.clips]
        for excluded in batch.excluded:
            found.left_out[excluded.reason] += 1
        if not batch.counted:  # it lost all its clips, and another one stands in
            return
        self._count_cut(captions)
        truth = self._view(batch.stack_video(), captions)
        with self._autocast():
            codec = to_uint8(self.codec.decode(truth.latents)).float() / 255
        self._show(batch, {"truth": truth.clips, "codec": codec})
        of_clips: list[list[dict[str, Any]]] = [[] for _ in captions]
        for task in tasks:
            patch = self.run.config.model.patch_size[0]
            if reason := unfit(task, truth.latents.shape[2], patch):
                found.left_out[f"task {task}: {reason}"] += len(captions)
                continue
            drawn = self._view(self._draw(task, truth, batch), captions)
            self._show(batch, {task: drawn.clips})
            values = self._compare(task, drawn, truth, codec)
            if self.run.config.validation.noise_levels:
                values["loss"] = self._losses(task, truth, batch)
            for index, clip in enumerate(batch.clips):
                row = describe(clip, task, {name: float(v[index]) for name, v in values.items()})
                of_clips[index].append(row)
                found.points[shape].append(Point(drawn.latents[index].flatten().cpu(), [row], ""))
            if truth.features is not None and drawn.features is not None:
                found.features[task].append((truth.features, drawn.features))
        for latents, rows in zip(truth.latents, of_clips, strict=True):
            found.rows += rows
            found.points[shape].append(Point(latents.flatten().cpu(), rows, "_truth"))
        found.num_clips += len(captions)

    def _count_cut(self, captions: Sequence[str]) -> None:
        """Nothing sees the end of a caption that is longer than a text encoder reads."""
        limit, ids = self.run.config.text.max_length, self.painter.tokenizer(captions)
        cut = {f"text.max_length={limit}": sum(len(row) >= limit for row in ids)}
        if self.scorer is not None:
            cut[f"token {self.scorer.max_tokens} in the CLIP score"] = self.scorer.num_cut(captions)
        for end, count in cut.items():
            if count:
                self.found.left_out[f"captions behind {end}"] += count

    def _view(self, pixels: Tensor, captions: Sequence[str]) -> View:
        """Pixels (B, 3, T, H, W) in [-1, 1], rounded to grey levels as a file would."""
        levels = to_uint8(pixels.to(self.device))
        clips = levels.float() / 255
        with self._autocast():
            latents = self.codec.encode(to_float(levels)).float()
        score = None if self.scorer is None else self.scorer(clips, captions)
        return View(clips, latents, score, None if self.detector is None else self.detector(clips))

    def _draw(self, task: str, truth: View, batch: Batch) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1]; noise from (seed, key) alone."""
        frames = given_of(self.painter, task, truth.clips.shape[2])
        seeds = [derive_seed(self.seed, clip.sample.key) for clip in batch.clips]
        noise = torch.stack([noise_for(seed, truth.latents.shape[1:]) for seed in seeds])
        given = GivenClips(truth.clips * 2 - 1, frames) if frames.runs else None
        captions = [clip.caption for clip in batch.clips]
        return self.painter.draw(captions, noise, given, numbers=self._numbers(batch))

    def _compare(
        self, task: str, drawn: View, truth: View, codec: Tensor
    ) -> dict[str, Tensor | list[float]]:
        """Columns of clips.parquet → a value for each clip; PSNR and SSIM of drawn frames only."""
        values: dict[str, Tensor | list[float]] = {
            "flicker": flicker(drawn.clips),
            "flicker_truth": flicker(truth.clips),
            "flicker_codec": flicker(codec),
        }
        if drawn.clip_score is not None and truth.clip_score is not None:
            values |= {"clip_score": drawn.clip_score, "clip_score_truth": truth.clip_score}
        count = truth.clips.shape[2]
        given = self.codec.pixel_frames(given_of(self.painter, task, count))
        if not given:
            return values
        made, still = sorted(set(range(count)) - set(given)), held_frames(given, count)
        rest, held = truth.clips[:, :, made], truth.clips[:, :, [still[i] for i in made]]
        rivals = {"": drawn.clips[:, :, made], "_held": held, "_codec": codec[:, :, made]}
        for ending, clips in rivals.items():
            values |= {f"psnr{ending}": psnr(clips, rest), f"ssim{ending}": ssim(clips, rest)}
        return values

    def _losses(self, task: str, truth: View, batch: Batch) -> Tensor:
        """(B,) flow loss under the task, the mean over validation.noise_levels: that of training's
        validation pass where the task is t2v."""
        config, samples, clean = self.run.config, batch.samples, truth.latents
        patch = config.model.patch_size
        frames = self.codec.given(task, clean.shape[2], patch[0])
        mask = given_mask(frames, (clean.shape[2], clean.shape[3], clean.shape[4])).to(self.device)
        given = mask.expand(len(clean), *mask.shape)
        with self._autocast():
            clips = truth.clips * 2 - 1
            segments = self.codec.encode_segments(clips, frames)
            channels = self.codec.encode_channels(clips, [frames] * len(clips))
        captions = [clip.caption for clip in batch.clips]
        text = self.painter.encode(captions, self._numbers(batch))
        prediction: Prediction = "clean" if config.prediction == "clean" else "velocity"
        losses = []
        for level in config.validation.noise_levels:
            t = torch.full((len(clean),), level, device=self.device)
            noise = normal_draws(samples, tuple(clean.shape[1:]), f"validation-{level}").to(clean)
            noisy = torch.where(given[:, None], clean, add_noise(clean, noise, t))
            levels, index = noise_levels(t, given, patch)
            with self._autocast():
                output = self.run.dit(
                    *(with_channels(noisy, channels), t, text.embeds, text.lens),
                    levels=levels,
                    level_index=index,
                    extra=segments,
                )
            losses.append(
                flow_loss(output, clean, noise, t, given, prediction=prediction, patch_size=patch)
            )
        return torch.stack(losses).mean(0) / num_noisy_tokens(mask, patch)

    def _numbers(self, batch: Batch) -> list[dict[str, float]]:
        """What is told behind the captions, as in validation: all that is known of each clip."""
        return [known_numbers(self.run.config, clip.fps, clip.scores) for clip in batch.clips]

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        bf16 = self.run.config.engine.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def _show(self, batch: Batch, views: Mapping[str, Tensor]) -> None:
        """Keep NUMBER.LABEL.mp4 (4:4:4; png for images) of clips that are among the first."""
        free = self.num_shown - self.found.num_clips
        for index, clip in enumerate(batch.clips[: max(free, 0)]):
            stem = f"{self.found.num_clips + index:03d}"
            for label, clips in views.items():
                frames = to_frames(clips[index] * 2 - 1)
                is_image = len(frames) == 1
                data = encode_image(frames[0]) if is_image else encode_video(frames, clip.fps)
                name = f"{stem}.{label}.{'png' if is_image else 'mp4'}"
                (self.folder / name).write_bytes(data)


def describe(clip: Clip, task: str, values: Mapping[str, float]) -> dict[str, Any]:
    """A row of clips.parquet; what is not defined for the clip is null."""
    frames, height, width = clip.sample.shape
    return {
        "key": clip.sample.key,
        "sample_id": clip.sample.sample_id,
        "task": task,
        "caption": clip.caption,
        "frames": frames,
        "height": height,
        "width": width,
        "fps": clip.fps,
        **{name: value if np.isfinite(value) else None for name, value in values.items()},
    }
