"""Mean and spread of a VAE's latents over its own training data: one normalisation per VAE.

Every folder that a VAE encodes, train or val, this dataset or that, must be normalised alike, or
mixtures and validation losses compare different things. So the statistics belong to the VAE: they
are taken once, over clips in the order its own training saw them, and kept in its run folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from longtake.data.latents import ChannelStats, read_manifest
from longtake.data.plan import Plan, PlannedSample
from longtake.data.reader import BadSample, SampleReader
from longtake.data.transforms import to_float
from longtake.models.vae_bounded import encode_bounded
from longtake.train.checks import require
from longtake.train.run_folder import write_json
from longtake.train.runs import LoadedVAE

NUM_CLIPS = 1024
MIN_SHARE = 0.5  # of the clips wanted: fewer are no fair sample of the VAE's training data
BATCH_SIZE = 16


@dataclass(frozen=True)
class LatentStats:
    """Per channel mean and standard deviation of the latents of one VAE, over `num_clips` clips."""

    vae_hash: str
    mean: list[float]
    std: list[float]
    num_clips: int


def latent_stats(loaded: LoadedVAE, vae_hash: str, num_clips: int = NUM_CLIPS) -> LatentStats:
    """Read from the VAE's run folder, or take and keep them there.

    ValueError when they are not there and the VAE's training data, or too much of it, cannot be
    read any more.
    """
    path = loaded.place.folder / f"latent_stats-{vae_hash[:16]}.json"
    if path.is_file():
        kept = LatentStats(**json.loads(path.read_text(encoding="utf-8")))
        if kept.num_clips:  # of none, as releases before kept them, they say nothing
            return kept
    try:
        plan = Plan.from_config(loaded.config.data, loaded.config.seed)
    except ValueError as error:
        raise ValueError(
            f"{error}\nThe mean and std of the latents come from the VAE's own training data; "
            "without it give --stats-from, a folder of latents of the same VAE"
        ) from error
    stats = ChannelStats(loaded.vae.config.z_dim)
    num_clips = min(num_clips, plan.num_samples)
    seen = 0
    batches = clip_batches(plan, num_clips)
    total = -(-num_clips // BATCH_SIZE)
    for video in track(batches, description="latent statistics", total=total):
        for latents in _encode(loaded, video):
            if latents.isfinite().all():
                stats.update(latents)
                seen += 1
    require(
        seen >= MIN_SHARE * num_clips,
        f"{loaded.place.folder}: the mean and std of the latents are taken over {num_clips} clips "
        f"of the VAE's training data, of which only {seen} can be read and encoded, fewer than "
        f"{MIN_SHARE:.0%}: see `longtake verify`, or give --stats-from, a folder of latents of the "
        "same VAE",
    )
    found = LatentStats(vae_hash, stats.mean, stats.std, seen)
    write_json(path, asdict(found))
    return found


def stats_of_latents(folder: Path, vae_hash: str) -> LatentStats:
    """The statistics of latents that exist; ValueError when another VAE made them."""
    manifest = read_manifest(folder)
    if manifest.vae_hash != vae_hash:
        raise ValueError(
            f"--stats-from {folder}: was made by VAE {manifest.vae_hash[:16]}, this one is "
            f"{vae_hash[:16]}; the statistics of one do not fit the other"
        )
    return LatentStats(vae_hash, manifest.mean, manifest.std, manifest.stats_clips)


def clip_batches(plan: Plan, num_clips: int) -> Iterator[Tensor]:
    """The first `num_clips` clips of the plan as (B, 3, T, H, W) in [-1, 1], B ≤ 16."""
    reader = SampleReader(plan.tables, plan.config)
    left = num_clips
    for step in count():
        for micro_batch in plan.step(step):
            samples = micro_batch.samples[:left]
            left -= len(samples)
            for start in range(0, len(samples), BATCH_SIZE):
                videos = _read(reader, samples[start : start + BATCH_SIZE])
                if videos:
                    yield to_float(torch.stack(videos))
        if left <= 0:
            return


def _read(reader: SampleReader, samples: list[PlannedSample]) -> list[Tensor]:
    videos = []
    for sample in samples:
        try:
            video = reader.read(sample).video
        except BadSample:
            continue  # training and `longtake encode` report it; `latent_stats` counts the others
        if video is not None:
            videos.append(video)
    return videos


@torch.no_grad()
def _encode(loaded: LoadedVAE, video: Tensor) -> Tensor:
    device = next(loaded.vae.parameters()).device
    with torch.autocast(
        device.type, torch.bfloat16, enabled=loaded.config.engine.precision == "bf16"
    ):
        return encode_bounded(loaded.vae, video.to(device)).mean
