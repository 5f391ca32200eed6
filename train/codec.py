"""Between pixels and the latents a DiT works on: its VAE with the statistics of the latents."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from longtake.data.latents import LatentManifest, read_manifest
from longtake.models.conditioning import Draw, GivenFrames, given_frames, middle
from longtake.models.image_condition import image_condition
from longtake.models.tokens import Segment
from longtake.models.vae import VAE, vae_hash
from longtake.models.vae_bounded import decode_bounded, encode_bounded
from longtake.train.run_folder import write_json
from longtake.train.runs import LoadedVAE, load_vae
from longtake.train.schema import DiTRun
from longtake.train.text_identity import text_hash

KEPT_MANIFEST = "latents.json"  # copied into the run folder, so that a run outlives its latents


@dataclass(frozen=True)
class Codec:
    """Pixels (B, 3, T, H, W) in [-1, 1] ↔ normalised latents (B, C, T', H', W').

    Without a VAE (codec: identity) the pixels themselves are normalised: noise of unit variance
    would drown them. `loaded` says where the VAE came from. `has_channels`: what is given are
    channels behind the noisy latents, see `image_condition`.
    """

    channels: int
    strides: tuple[int, int, int]
    mean: Tensor  # (C, 1, 1, 1), or a scalar for pixels
    std: Tensor
    vae: VAE | None = None
    loaded: LoadedVAE | None = None
    has_channels: bool = False

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latent (C, T, H, W) of a clip; ValueError where the strides do not divide it."""
        if self.vae is None:
            return self.channels, frames, height, width
        return self.channels, *self.vae.config.latent_shape(frames, height, width)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip of so many."""
        return (frames - 1) // self.strides[0] + 1

    def pixel_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Pixel (T, H, W) of latents (T, H, W): the inverse of `latent_shape`."""
        time, rows, columns = self.strides
        return (shape[0] - 1) * time + 1, shape[1] * rows, shape[2] * columns

    def given(self, task: str, num_latents: int, patch: int, draw: Draw = middle) -> GivenFrames:
        """What a task gives of a clip of so many latent frames, `patch` of them to a token."""
        return given_frames(
            *(task, num_latents),
            patch=patch,
            is_causal=self.vae is not None,
            has_channels=self.has_channels,
            draw=draw,
        )

    def pixel_frames(self, given: GivenFrames) -> list[int]:
        """The pixel frames that are given, ascending; see `GivenFrames` for where they stand."""
        time = self.strides[0]
        return [i for run in given.runs for i in range(run[0] * time, run[-1] * time + 1)]

    def encode_given(self, clips: Tensor, given: GivenFrames) -> Tensor:
        """Normalised latents of clips (B, 3, T, H, W) in [-1, 1] where frames are given in place,
        from these frames alone; elsewhere they mean nothing."""
        if self.vae is None:
            return self.encode(clips)
        latents = clips.new_zeros(len(clips), *self.latent_shape(*clips.shape[2:]))
        for run in given.in_place:  # at most one, the beginning
            frames = self.pixel_shape((len(run), 1, 1))[0]
            latents[:, :, : len(run)] = self.encode(clips[:, :, :frames])
        return latents

    def encode_segments(self, clips: Tensor, given: GivenFrames) -> tuple[Segment, ...]:
        """What is given beside the latents of clips (B, 3, T, H, W): every such run encoded alone,
        as `longtake encode` stores it."""
        shown = [self.pixel_frames(GivenFrames((), (run,))) for run in given.segments]
        return tuple(
            Segment(self.encode(clips[:, :, frames]), run.start)
            for run, frames in zip(given.segments, shown, strict=True)
        )

    def shown(self, given: Sequence[GivenFrames], num_latents: int) -> Tensor:
        """Which pixel frames are given (B, F) of clips of so many latent frames."""
        mask = torch.zeros(len(given), self.pixel_shape((num_latents, 1, 1))[0], dtype=torch.bool)
        for row, one in zip(mask, given, strict=True):
            row[self.pixel_frames(one)] = True
        return mask

    def encode_channels(self, clips: Tensor, given: Sequence[GivenFrames]) -> Tensor | None:
        """What clips (B, 3, T, H, W) are given as channels (B, st + C, T', H', W'), from these
        frames alone; None for models without such channels."""
        if not self.has_channels:
            return None
        mask = self.shown(given, self.latent_frames(clips.shape[2])).to(clips.device)
        return image_condition(clips, mask, self.encode, self.strides[0])

    def no_channels(self, shape: tuple[int, int, int], count: int) -> Tensor | None:
        """The same for `count` videos of latents (T, H, W) of which nothing is given."""
        grey = self.mean.new_zeros(()).expand(1, 3, *self.pixel_shape(shape))
        channels = self.encode_channels(grey, [GivenFrames()])
        return None if channels is None else channels.expand(count, -1, -1, -1, -1)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Normalised posterior means, or pixels; of clips of any length in bounded memory."""
        latents = video if self.vae is None else encode_bounded(self.vae, video).mean
        return (latents - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, clamped to [-1, 1]; of any length in bounded memory, frames too large for it in
        tiles that blend where they meet."""
        latents = latents * self.std + self.mean
        return (latents if self.vae is None else decode_bounded(self.vae, latents)).clamp(-1, 1)


def load_codec(
    config: DiTRun,
    *,
    folder: Path | None = None,
    vae: Path | None = None,
    device: torch.device | str = "cpu",
) -> Codec:
    """The codec a DiT run trains on or was trained on.

    `folder` is the run folder (it keeps a copy of latents.json), `vae` a VAE run that stands in
    when the one named by config or latents has moved. ValueError when the VAE or the statistics
    cannot be found, or the VAE is another than the one that made the latents (both hashes).
    """
    if config.codec == "identity":
        mean, std = (
            torch.tensor(value, device=device) for value in (config.pixels.mean, config.pixels.std)
        )
        channels, has_channels = config.model.out_channels, config.has_channels
        return Codec(channels, (1, 1, 1), mean, std, has_channels=has_channels)
    manifest, where = find_manifest(config, folder)
    named = vae or (Path(config.vae_run) if config.vae_run else _named_vae(manifest, where))
    if named is None:
        raise ValueError("vae_run=null and the latents name no VAE run; set vae_run or --vae-run")
    loaded = load_vae_with_hash(named, manifest.vae_hash, device)
    mean, std = (
        torch.tensor(values, device=device).view(-1, 1, 1, 1)
        for values in (manifest.mean, manifest.std)
    )
    strides, vae = loaded.vae.strides, loaded.vae
    return Codec(manifest.z_dim, strides, mean, std, vae, loaded, config.has_channels)


def time_stride(config: DiTRun, folder: Path | None = None) -> int:
    """Frames of a clip per latent frame behind the first. Errors as `find_manifest`."""
    return 1 if config.codec == "identity" else find_manifest(config, folder)[0].strides[0]


def find_manifest(config: DiTRun, folder: Path | None) -> tuple[LatentManifest, Path]:
    """latents.json of a DiT run, from its folder or its first dataset, and where it was found."""
    data = Path(config.data.train[0].path)
    for place in (folder, data):
        if place is not None and (place / KEPT_MANIFEST).is_file():
            manifest = read_manifest(place)
            check_text(manifest, config, place)
            return manifest, place
    raise ValueError(
        f"{data}: holds no latents.json, and neither does the run folder; give data.train.0.path "
        "a folder that `longtake encode` wrote"
    )


def keep_manifest(config: DiTRun, folder: Path) -> None:
    """Copy latents.json into the run folder, with the way to the VAE as seen from there."""
    manifest, place = find_manifest(config, folder)
    if place.resolve() == folder.resolve():
        return
    tree = asdict(manifest)
    vae = _named_vae(manifest, place)
    if vae is not None:
        tree["versions"]["vae_run"] = os.path.relpath(vae, folder.resolve())
    write_json(folder / KEPT_MANIFEST, tree)


def _named_vae(manifest: LatentManifest, place: Path) -> Path | None:
    """The VAE run that the manifest in `place` names, None where it names none."""
    named = manifest.versions.get("vae_run")
    return None if named is None else Path(os.path.normpath(place.resolve() / named))


def check_text(manifest: LatentManifest, config: DiTRun, place: Path) -> None:
    """ValueError unless the latents' text was prepared as this run's config would."""
    cached = manifest.text
    remedy = "set the key, or run `longtake encode` with the DiT's own text overrides"
    if cached.hash != text_hash(config.text):
        raise ValueError(
            f"{place}/{KEPT_MANIFEST}: its captions were prepared for another text encoder than "
            f"text.kind={config.text.kind} text.path={config.text.path!r} (a folder is known by "
            f"its weights): {remedy}"
        )
    if cached.max_length != config.text.max_length:
        raise ValueError(
            f"text.max_length={config.text.max_length} must be the {cached.max_length} that the "
            f"captions of {place}/{KEPT_MANIFEST} were cut to: {remedy}"
        )


def load_vae_with_hash(path: Path, wanted: str, device: torch.device | str = "cpu") -> LoadedVAE:
    """The VAE run's EMA or raw weights, whichever made the latents; ValueError with both hashes."""
    found = []
    for weights in ("ema", "raw"):
        loaded = load_vae(path, weights)
        found.append(vae_hash(loaded.vae.state_dict(), loaded.vae.config))
        if found[-1] == wanted:
            loaded.vae.to(device)
            return loaded
    raise ValueError(
        f"{path}: its VAE has hash {found[0][:16]} (EMA) and {found[1][:16]} (raw), the latents "
        f"were made by {wanted[:16]}: encode again with this VAE, or name the one that made them"
    )
