"""The diffusion transformer's task: rectified flow on given-masked latents with captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longtake.data.latents import read_empty_text
from longtake.data.loader import Batch, Clip
from longtake.data.plan import PlannedSample
from longtake.data.randomness import derive_seed, generator, uniform
from longtake.models.conditioning import (
    draw_task,
    given_mask,
    noise_levels,
    num_noisy_tokens,
)
from longtake.models.dit import DiT
from longtake.models.flow import Prediction, add_noise, flow_loss, sample_timesteps
from longtake.models.sampler import TextInput, sample
from longtake.models.text import TextEncoder, Tokenizer
from longtake.train.codec import Codec
from longtake.train.engine import Engine
from longtake.train.optim import freeze
from longtake.train.playback import to_frames
from longtake.train.runs import LoadedDiT, RunPlace
from longtake.train.sample import Painter
from longtake.train.schema import DiTRun
from longtake.train.tasks import Drawing, LossSum, Means, normal_draws


class TextToVideo(nn.Module):
    """DiT and, when it is trained along, the text encoder: one module for the engine.

    Text comes as a row per sample: token ids (L,) where the encoder is here, embeddings (L, D) of
    a frozen one where it is not.
    """

    def __init__(self, dit: DiT, text: TextEncoder | None, max_length: int) -> None:
        super().__init__()
        self.dit = dit
        self.text = text
        self.max_length = max_length

    def encode(self, rows: Sequence[Tensor]) -> TextInput:
        """Embeddings (B, max_length, D), zero after each row's end, and their lengths."""
        if self.text is not None:
            return TextInput(*self.text(rows))
        text = pad_embeddings([row.cpu() for row in rows], self.max_length)
        device = next(self.dit.parameters()).device
        return TextInput(text.embeds.to(device), text.lens)

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        rows: Sequence[Tensor],
        levels: Tensor | None = None,
        level_index: Tensor | None = None,
    ) -> Tensor:
        """latents (B, C, T, H, W), t (B,) -> prediction (B, C, T, H, W); levels as for the DiT."""
        text = self.encode(rows)
        embeds = text.embeds.to(latents.device)
        return self.dit(latents, t, embeds, text.lens, levels=levels, level_index=level_index)


@dataclass(frozen=True)
class Noised:
    """A batch at the noise levels its samples drew."""

    clean: Tensor  # (B, C, T, H, W)
    noise: Tensor
    noisy: Tensor  # clean where given
    t: Tensor  # (B,)
    given: Tensor  # (B, T, H, W) bool


class DiTTask:
    """Predict the velocity noise − clean of the noisy tokens (arXiv 2209.03003)."""

    def __init__(self, config: DiTRun, device: torch.device, codec: Codec) -> None:
        self.config = config
        self.device = device
        self.codec = codec
        self.adversary = None
        self.tokenizer = Tokenizer(config.text)
        self._frozen_text: TextEncoder | None = None
        text = TextEncoder(config.text) if config.text.kind == "bytes" else None
        self.module = TextToVideo(DiT(config.model), text, config.text.max_length)
        freeze(self.module, config.freeze)
        self.module.dit.set_checkpointing(config.speed.checkpointing)
        if config.speed.compile:
            self.module.dit.compile_blocks()
        self.patch_size = config.model.patch_size
        self.prediction: Prediction = "clean" if config.prediction == "clean" else "velocity"
        self._empty = self._empty_text()
        self._noisy_tokens: dict[tuple[str, tuple[int, int, int]], int] = {}

    def weight(self, sample: PlannedSample) -> float:
        """Noisy tokens of the sample under the task it draws; 1 with loss.weighting=sample."""
        if self.config.loss.weighting == "sample":
            return 1.0
        return float(self._num_noisy(sample))

    def tokens(self, sample: PlannedSample) -> int:
        """All video tokens, given ones included."""
        grid = self.config.model.grid(self._latent_shape(sample))
        return grid[0] * grid[1] * grid[2]

    def flops(self, sample: PlannedSample) -> float:
        return 0.0

    def loss(self, engine: Engine, batch: Batch) -> LossSum:
        samples = batch.samples
        noised = self._noise(batch, self._draw_levels(samples))
        text = [
            self._empty if self._drops_caption(clip.sample) else row
            for clip, row in zip(batch.clips, self._captions(batch.clips), strict=True)
        ]
        output = self._predict(engine, noised, text)
        sums = self._error(output, noised)  # (B,) over noisy tokens
        if self.config.loss.weighting == "sample":
            counts = [self._num_noisy(s) for s in samples]
            sums = sums / torch.tensor(counts, device=self.device)
        return LossSum(sums.sum())

    @torch.no_grad()
    def validate(self, engine: Engine, batches: Iterable[Batch]) -> Means:
        """Flow loss of t2v on fixed noise and the levels of validation.noise_levels.

        `loss` is the mean over clips and levels; `loss/t0.50` one level, `loss/9x16x16` one bucket.
        """
        means = Means()
        levels = self.config.validation.noise_levels
        for batch in batches:
            text = self._captions(batch.clips)
            for level in levels:
                t = torch.full((len(batch.clips),), level, device=self.device)
                noised = self._noise(batch, t, purpose=f"validation-{level}", task="t2v")
                sums = self._error(self._predict(engine, noised, text), noised)
                tokens = num_noisy_tokens(noised.given[0], self.patch_size)
                total = sums.double().sum().item() / tokens
                shape = "x".join(str(size) for size in batch.clips[0].sample.shape)
                if not batch.counted:  # keeps the ranks in step, belongs to nobody
                    continue
                for name in ("loss", f"loss/t{level:.2f}", f"loss/{shape}"):
                    means.add(name, total, len(batch.clips))
        return means

    @torch.no_grad()
    def draw(self, engine: Engine, batches: Sequence[Batch]) -> list[Drawing]:
        """Samples for samples.prompts, or for the captions of the first validation clips."""
        settings = self.config.samples
        clips = [clip for batch in batches for clip in batch.clips]
        if not clips:
            return []
        prompts = settings.prompts or [clip.caption for clip in clips]
        rows = self._encode(prompts) if settings.prompts else self._captions(clips)
        shape = (self.config.model.in_channels, *self._latent_shape(clips[0].sample))
        seeds = [derive_seed(settings.seed, index) for index in range(len(prompts))]
        noise = [torch.randn(shape, generator=generator(s, "noise")) for s in seeds]
        with engine.autocast():
            latents = sample(
                self.module.dit,
                torch.stack(noise).to(self.device),
                self.module.encode(rows),
                config=settings.sampler,
                prediction=self.prediction,
                negative=self.module.encode([self._empty] * len(prompts)),
            )
        video = self.codec.decode(latents)
        return [
            Drawing(f"sample-{index:02d}", to_frames(pixels), clips[0].fps, prompt)
            for index, (pixels, prompt) in enumerate(zip(video, prompts, strict=True))
        ]

    def painter(self, place: RunPlace) -> Painter:
        """What draws with the weights now in the module, as `longtake sample` does."""
        text = self.module.text or self._frozen()
        run = LoadedDiT(place, self.config, "ema", self.module.dit, text)
        sampler = self.config.samples.sampler
        return Painter(run, self.codec, sampler, precision=self.config.engine.precision)

    def _predict(self, engine: Engine, noised: Noised, text: Sequence[Tensor]) -> Tensor:
        levels, index = noise_levels(noised.t, noised.given, self.patch_size)
        return engine(noised.noisy, noised.t, text, levels, index)

    def _error(self, output: Tensor, noised: Noised) -> Tensor:
        return flow_loss(
            output,
            noised.clean,
            noised.noise,
            noised.t,
            noised.given,
            prediction=self.prediction,
            patch_size=self.patch_size,
        )

    def _noise(
        self, batch: Batch, t: Tensor, *, purpose: str = "noise", task: str | None = None
    ) -> Noised:
        clean = self._clean(batch)
        samples = batch.samples
        noise = normal_draws(samples, tuple(clean.shape[1:]), purpose).to(self.device)
        shape = (clean.shape[2], clean.shape[3], clean.shape[4])
        masks = [given_mask(task or self._task(s), shape) for s in samples]
        given = torch.stack(masks).to(self.device)  # (B, T, H, W)
        noisy = torch.where(given[:, None], clean, add_noise(clean, noise, t))
        return Noised(clean, noise, noisy, t, given)

    def _clean(self, batch: Batch) -> Tensor:
        if self.config.codec == "identity":
            return self.codec.encode(batch.stack_video().to(self.device))
        return batch.stack_latents().to(self.device)

    def _draw_levels(self, samples: Sequence[PlannedSample]) -> Tensor:
        flat = torch.tensor([uniform(s.seed, "timestep") for s in samples])
        share = torch.tensor([uniform(s.seed, "timestep.normal") for s in samples])
        normal = torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6))
        return sample_timesteps(flat, normal, self.config.timesteps).to(self.device)

    def _task(self, sample: PlannedSample) -> str:
        return draw_task(uniform(sample.seed, "task"), self.config.tasks)

    def _drops_caption(self, sample: PlannedSample) -> bool:
        return uniform(sample.seed, "drop_text") < self.config.caption_dropout

    def _num_noisy(self, sample: PlannedSample) -> int:
        key = self._task(sample), self._latent_shape(sample)
        if key not in self._noisy_tokens:
            self._noisy_tokens[key] = num_noisy_tokens(given_mask(*key), self.patch_size)
        return self._noisy_tokens[key]

    def _latent_shape(self, sample: PlannedSample) -> tuple[int, int, int]:
        """Latent (T, H, W): the plan speaks of pixels, also where latents are cached."""
        _, frames, height, width = self.codec.latent_shape(*sample.shape)
        return frames, height, width

    def _captions(self, clips: Sequence[Clip]) -> list[Tensor]:
        """Text rows of the clips: from the cache where it holds them, else encoded here."""
        missing = [index for index, clip in enumerate(clips) if clip.text is None]
        rows = {i: clip.text for i, clip in enumerate(clips) if clip.text is not None}
        encoded = self._encode([clips[index].caption for index in missing]) if missing else []
        rows.update(zip(missing, encoded, strict=True))
        return [rows[index] for index in range(len(clips))]

    def _empty_text(self) -> Tensor:
        """What a dropped caption is replaced by: the encoding of ""."""
        is_cached = self.config.text.kind == "pretrained" and self.config.codec == "vae"
        return (
            read_empty_text(self.config.data.train[0].path) if is_cached else self._encode([""])[0]
        )

    @torch.no_grad()
    def _encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Token ids (L,) of each caption, or embeddings (L, D) by the frozen encoder."""
        ids = self.tokenizer(captions)
        if self.config.text.kind == "bytes":
            return ids
        embeds, lens = self._frozen()(ids)
        return [row[: int(length)] for row, length in zip(embeds, lens, strict=True)]

    def _frozen(self) -> TextEncoder:
        """The pretrained text encoder, loaded when it is first needed: cached text needs none."""
        if self._frozen_text is None:
            self._frozen_text = TextEncoder(self.config.text).to(self.device)
        return self._frozen_text


def pad_embeddings(rows: Sequence[Tensor], length: int) -> TextInput:
    """Rows (L, D) -> embeddings (B, length, D), zero after each row's end, and lengths (B,)."""
    lens = torch.tensor([len(row) for row in rows])
    longest = int(lens.max())
    if longest > length:
        raise ValueError(f"text of {longest} tokens: text.max_length={length} is the limit")
    embeds = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return TextInput(nn.functional.pad(embeds, (0, 0, 0, length - longest)).float(), lens)
