"""The diffusion transformer's task: rectified flow on given-masked latents with captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise

import torch
from torch import Tensor

from longtake.data.config import shape_name
from longtake.data.loader import Batch, Clip
from longtake.data.plan import PlannedSample
from longtake.data.randomness import uniform
from longtake.models.conditioning import noise_levels, num_noisy_tokens
from longtake.models.cost import forward_flops
from longtake.models.flow import (
    Prediction,
    add_noise,
    flow_loss,
    min_snr_weight,
    sample_timesteps,
)
from longtake.models.image_condition import with_channels
from longtake.models.numbers import Told
from longtake.models.tokens import Segment, Video
from longtake.models.transfer import to_device
from longtake.train.caption_rows import CaptionRows
from longtake.train.codec import Codec
from longtake.train.dit_drawing import draw_samples
from longtake.train.engine import Engine
from longtake.train.given import Conditions, Drawn, at_step, masks_of
from longtake.train.painter import Painter
from longtake.train.report_matrix import level_name
from longtake.train.runs import LoadedDiT, RunPlace
from longtake.train.schema import DiTRun
from longtake.train.tasks import Drawing, Grouped, LossSum, Means, normal_draws
from longtake.train.text_to_video import TextToVideo

NUM_BINS = 5  # of noise levels, in the training loss


@dataclass(frozen=True)
class Noised:
    """Samples of one size at the noise levels they drew."""

    clean: Tensor  # (B, C, T, H, W)
    noise: Tensor
    noisy: Tensor  # what is given at a level of its own
    t: Tensor  # (B,)
    given: Tensor  # (B, T, H, W) bool
    levels: Tensor | None  # of the tokens, as the DiT takes them
    level_index: Tensor | None
    known: Tensor  # (B,) level of what is given
    segments: Sequence[Sequence[Segment]]  # of each sample, beside its latents
    channels: Tensor | None  # (B, C', T, H, W) behind the noisy latents

    @property
    def seen(self) -> Tensor:
        """What the DiT is called with."""
        return with_channels(self.noisy, self.channels)

    def videos(self) -> list[Video]:
        """The samples as the DiT takes those of a pack."""
        index = [None] * len(self.t) if self.level_index is None else self.level_index
        return [Video(*one) for one in zip(self.seen, index, self.segments, strict=True)]


class DiTTask:
    """Predict the velocity noise − clean of the noisy tokens (arXiv 2209.03003)."""

    def __init__(self, config: DiTRun, device: torch.device, codec: Codec) -> None:
        self.config = config
        self.device = device
        self.codec = codec
        self.adversary = None
        self.captions = CaptionRows(config, device)
        self.conditions = Conditions(config, codec)
        self.in_packs = config.data.pack or self.conditions.has_segments
        # Compiled graphs serve all packs that are padded alike.
        pads = config.data.pack and config.speed.compile and not self.conditions.has_segments
        self.budget = config.data.cost.max_tokens if pads else None
        self.module = TextToVideo.from_config(config)
        self.module.dit.set_checkpointing(config.speed.checkpointing)
        if config.speed.compile:
            self.module.dit.compile_blocks()
        self.patch_size = config.model.patch_size
        self.prediction: Prediction = "clean" if config.prediction == "clean" else "velocity"

    def weight(self, batch: Batch) -> float:
        """Noisy tokens of the samples under the tasks they draw; 1 each with
        loss.weighting=sample."""
        if self.config.loss.weighting == "sample":
            return float(len(batch.clips))
        return float(sum(self._num_noisy(batch)))

    def tokens(self, batch: Batch) -> int:
        """All tokens, given ones and those of segments included."""
        return sum(self._num_all_tokens(batch))

    def flops(self, batch: Batch) -> float:
        """Of a training step; the text's own projections, less than a percent, are left out."""
        model, text_keys = self.config.model, self.config.text.max_length
        return 3.0 * sum(
            forward_flops(model, n, text_rows=0, text_keys=text_keys)
            for n in self._num_all_tokens(batch)
        )

    def loss(self, engine: Engine, batch: Batch) -> LossSum:
        t = self._draw_levels(batch.samples, batch.step)
        drawn = [self.conditions.draw(sample, batch.step) for sample in batch.samples]
        noised = self._noise(batch, t, drawn)
        text, are_cut = self.captions.training(batch.clips)
        errors = self._errors(engine, noised, text)
        counts = torch.tensor(self._num_noisy(batch), device=self.device)
        sums = errors / counts if self.config.loss.weighting == "sample" else errors
        if self.config.loss.min_snr_gamma is not None:
            sums = sums * min_snr_weight(to_device(t, self.device), self.config.loss.min_snr_gamma)
        cut = torch.tensor(are_cut, device=self.device).float()
        first = torch.zeros(len(cut), dtype=torch.long)
        share = Grouped.of(["captions_cut"], first, cut, torch.ones_like(cut))
        return LossSum(sums.sum(), groups=(*self._groups(drawn, t, errors.detach(), counts), share))

    def changes_loss(self, step: int) -> bool:
        return False  # a curriculum goes from step to step

    def _groups(
        self, drawn: Sequence[Drawn], t: Tensor, errors: Tensor, counts: Tensor
    ) -> list[Grouped]:
        """Loss of a noisy token by noise level and by task."""
        tasks = self.config.trained_tasks
        edges = [number / NUM_BINS for number in range(NUM_BINS + 1)]
        names = [f"loss/t{low:.1f}-{high:.1f}" for low, high in pairwise(edges)]
        bins = (t * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        groups = [Grouped.of(names, bins, errors, counts)]
        if len(tasks) > 1:
            of_tasks = torch.tensor([tasks.index(one.task) for one in drawn])
            groups.append(Grouped.of([f"loss/{name}" for name in tasks], of_tasks, errors, counts))
        return groups

    @torch.no_grad()
    def validate(self, engine: Engine, batches: Iterable[Batch]) -> Means:
        """Flow loss on fixed noise, at the levels of validation.noise_levels, for every bucket and
        task of the run: `loss/t0.50/9x16x16/i2v` is one cell of this matrix.

        `loss` is the mean over clips and levels, each clip under the first task that it can serve
        (t2v or t2i where they are trained), so are `loss/t0.50` of one level and `loss/9x16x16` of
        one bucket; `loss/i2v` is that of a task.
        """
        means, tasks = Means(), self.config.trained_tasks
        for batch in batches:
            text = self.captions.whole(batch.clips)
            served = [(task, self._losses(engine, batch, text, task)) for task in tasks]
            served = [(task, losses) for task, losses in served if losses]
            for place, (task, losses) in enumerate(served):
                for level, loss in losses.items():
                    shape = shape_name(batch.clips[0].sample.shape)
                    at = f"loss/t{level_name(level)}"
                    names = [f"{at}/{shape}/{task}", f"loss/{task}"]
                    if place == 0:
                        names += ["loss", at, f"loss/{shape}"]
                    for name in names if batch.counted else ():  # else it keeps ranks in step
                        means.add(name, loss, len(batch.clips))
        return means

    def _losses(
        self, engine: Engine, batch: Batch, text: Sequence[Tensor | Told], task: str
    ) -> dict[float, float]:
        """Level → sum over the clips of the loss of a noisy token; empty for clips unfit."""
        length = self.conditions.latent_shape(batch.samples[0])[0]
        if self.conditions.unfit(task, length):
            return {}
        losses, drawn = {}, [self.conditions.fixed(task, length)] * len(batch.clips)
        for level in self.config.validation.noise_levels:
            t = torch.full((len(batch.clips),), level)
            noised = self._noise(batch, t, drawn, purpose=f"validation-{level}")
            sums = self._errors(engine, noised, text)
            tokens = num_noisy_tokens(noised[0].given[0], self.patch_size)
            losses[level] = sums.double().sum().item() / tokens
        return losses

    def draw(self, engine: Engine, batches: Sequence[Batch]) -> list[Drawing]:
        """See `draw_samples`."""
        return draw_samples(self, engine, batches)

    def painter(self, place: RunPlace) -> Painter:
        """What draws with the weights now in the module, as `longtake sample` does."""
        text = self.module.text or self.captions.frozen
        run = LoadedDiT(place, self.config, "ema", self.module.dit, text, self.module.numbers)
        sampler = self.config.samples.sampler
        return Painter(run, self.codec, sampler, precision=self.config.engine.precision)

    def clean(self, batch: Batch) -> Tensor:
        """Latents (B, C, T, H, W) of the clips: cached ones, or normalised pixels."""
        if self.config.codec == "identity":
            return self.codec.encode(to_device(batch.stack_video(), self.device))
        return to_device(batch.stack_latents(), self.device)

    def segments(self, clip: Clip, drawn: Drawn) -> list[Segment]:
        """What the clip is given beside its latents."""
        stored = self.conditions.segments(clip, drawn)
        return [
            replace(segment, latents=to_device(segment.latents, self.device)) for segment in stored
        ]

    def channels(self, batch: Batch, drawn: Sequence[Drawn]) -> Tensor | None:
        """What the clips are given as channels (B, C', T, H, W); None for models without."""
        if not self.codec.has_channels:
            return None
        if self.config.codec == "identity":
            clips = to_device(batch.stack_video(), self.device)
            return self.codec.encode_channels(clips, [one.frames for one in drawn])
        return to_device(self.conditions.channels(batch.clips, drawn), self.device)

    def _errors(
        self, engine: Engine, parts: Sequence[Noised], text: Sequence[Tensor | Told]
    ) -> Tensor:
        """Sums over the noisy tokens of each sample (B,)."""
        outputs = self._predict(engine, parts, text)
        return torch.cat(
            [
                flow_loss(
                    *(output, part.clean, part.noise, part.t, part.given),
                    prediction=self.prediction,
                    patch_size=self.patch_size,
                )
                for output, part in zip(outputs, parts, strict=True)
            ]
        )

    def _predict(
        self, engine: Engine, parts: Sequence[Noised], text: Sequence[Tensor | Told]
    ) -> list[Tensor]:
        """Of each part, in one forward whatever they are: ranks must run the same modules."""
        if not self.in_packs:
            (only,) = parts
            return [engine(only.seen, only.t, text, only.levels, only.level_index)]
        t, known = (torch.cat([getattr(p, name) for p in parts]) for name in ("t", "known"))
        videos = [video for part in parts for video in part.videos()]
        levels = torch.stack((t, known), 1)
        found = iter(engine(videos, t, text, levels, extra_t=known, budget=self.budget))
        return [torch.stack(list(islice(found, len(part.t)))) for part in parts]

    def _noise(
        self, batch: Batch, t: Tensor, drawn: Sequence[Drawn], *, purpose: str = "noise"
    ) -> list[Noised]:
        """The samples at levels t (B,), which are on the CPU as all draws are: all together, or
        each for itself where sizes differ."""
        if len({sample.shape for sample in batch.samples}) == 1:
            return [self._noise_alike(batch, t, drawn, purpose)]
        alone = [replace(batch, clips=[clip]) for clip in batch.clips]
        each = zip(alone, t.split(1), drawn, strict=True)
        return [self._noise_alike(one, level, [what], purpose) for one, level, what in each]

    def _noise_alike(self, batch: Batch, t: Tensor, drawn: Sequence[Drawn], purpose: str) -> Noised:
        clean = self.clean(batch)
        noise = normal_draws(batch.samples, tuple(clean.shape[1:]), purpose)
        noise = to_device(noise, self.device)
        masks = masks_of(drawn, self.conditions.latent_shape(batch.samples[0]))  # on the CPU
        known = torch.tensor([one.level for one in drawn])
        levels, index = noise_levels(t, masks, self.patch_size, known)
        segments = [self.segments(*one) for one in zip(batch.clips, drawn, strict=True)]
        t, known, given = (to_device(x, self.device) for x in (t, known, masks))
        levels, index = (None if x is None else to_device(x, self.device) for x in (levels, index))
        shown = add_noise(clean, noise, known)
        noisy = torch.where(given[:, None], shown, add_noise(clean, noise, t))
        channels = self.channels(batch, drawn)
        return Noised(clean, noise, noisy, t, given, levels, index, known, segments, channels)

    def _draw_levels(self, samples: Sequence[PlannedSample], step: int) -> Tensor:
        flat = torch.tensor([uniform(s.seed, "timestep") for s in samples])
        share = torch.tensor([uniform(s.seed, "timestep.normal") for s in samples])
        normal = torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6))
        tokens = torch.tensor([self.conditions.num_tokens(s) for s in samples])
        shift = at_step(self.config.shift_stages, step)
        return sample_timesteps(flat, normal, replace(self.config.timesteps, shift=shift), tokens)

    def _num_all_tokens(self, batch: Batch) -> list[int]:
        return [self.conditions.num_all_tokens(sample, batch.step) for sample in batch.samples]

    def _num_noisy(self, batch: Batch) -> list[int]:
        return [self.conditions.num_noisy(sample, batch.step) for sample in batch.samples]
