"""`longtake encode`: pixel shards → latent shards with text, by any number of processes.

Everything is gathered in OUT.partial and renamed to OUT at the end; OUT is whole or absent. A
killed run goes on with the shards that are not done.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from longtake.data.catalogue import build_catalogue
from longtake.data.latents import EMPTY_TEXT, LatentManifest, read_manifest, write_manifest
from longtake.train.encode_claims import JOB, Claims
from longtake.train.encode_forecast import EncodeProgress, Forecast, forecast
from longtake.train.encode_plan import EncodeOptions, EncodePlan, plan_encode, text_cache
from longtake.train.encode_shard import EncodedText, ShardEncoder
from longtake.train.latent_stats import LatentStats, latent_stats, stats_of_latents
from longtake.train.runs import LoadedVAE, load_vae, pick_device

SKIPPED = "skipped.jsonl"
_INDEXERS = 8  # processes that read the finished shards once more for the catalogue


@dataclass(frozen=True)
class EncodeReport:
    """What OUT holds: samples, and how many could not be read or encoded; `own_shards` are those
    that this call encoded."""

    out: Path
    num_samples: int
    num_skipped: int
    num_shards: int
    own_shards: int

    def __str__(self) -> str:
        text = f"{self.out}: {self.num_samples} samples in {self.num_shards} shards"
        if self.own_shards < self.num_shards:
            text += f", {self.own_shards} of them by this process"
        return text + (f"; {self.num_skipped} skipped, see {SKIPPED}" if self.num_skipped else "")


def encode_shards(
    vae: Path,
    shards: Path,
    out: Path,
    options: EncodeOptions,
    *,
    rank: int = 0,
    num_ranks: int = 1,
) -> EncodeReport:
    """Encode every sample that fits a bucket of the VAE; the same call goes on after a kill.

    Processes that make the same call share the work and all return when OUT is there; `rank` and
    `num_ranks` only say who tells what. ValueError when OUT exists and holds something else,
    nothing fits, or statistics are missing.
    """
    device = pick_device(options.device)
    if device.type == "cuda":
        number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        device = torch.device("cuda", number)
    loaded = load_vae(vae, options.weights, device)
    plan = plan_encode(loaded, shards, options)
    if holds_something(out):
        return report_of(out, plan.job)
    with Claims(out) as claims:
        with claims.alone():
            if holds_something(out):
                return report_of(out, plan.job)
            if out.exists():
                out.rmdir()
            stats = take_stats(loaded, plan, options)
            claims.open_staging(plan.job)
        manifest = manifest_of(loaded, plan, options, stats)
        if rank == 0:
            print("\n".join((*plan.table.drops(), str(forecast(plan, manifest, options.text)))))
        text = EncodedText.load(options.text, device)
        own = encode_claimed(
            claims,
            plan,
            ShardEncoder(loaded, plan, manifest, text),
            EncodeProgress(len(plan.cuts), rank, num_ranks),
        )
        with claims.everything():
            if not out.exists():
                finish(claims, plan, manifest, text, vae)
    return replace(report_of(out, plan.job), own_shards=own)


def encode_claimed(
    claims: Claims, plan: EncodePlan, encoder: ShardEncoder, progress: EncodeProgress
) -> int:
    """Encode shards until all are done, by whomever; how many this process did."""
    own, names = 0, list(plan.shards)
    with progress:
        progress.update(claims.records(names).values())
        for name in claims.deal(names):
            record = encoder.write(claims.staging / name, plan.shards[name], progress)
            claims.record(name, record)
            progress.update(claims.records(names).values())
            own += 1
    return own


def forecast_encode(vae: Path, shards: Path, options: EncodeOptions) -> Forecast:
    """What `encode_shards` would write, and the errors it would raise; nothing is encoded."""
    loaded = load_vae(vae, options.weights)
    plan = plan_encode(loaded, shards, options)
    return forecast(plan, manifest_of(loaded, plan, options, None), options.text)


def take_stats(loaded: LoadedVAE, plan: EncodePlan, options: EncodeOptions) -> LatentStats:
    """Mean and spread of this VAE's latents, from other latents or its own run folder."""
    if options.stats_from is not None:
        return stats_of_latents(options.stats_from, plan.vae_hash)
    return latent_stats(loaded, plan.vae_hash)


def manifest_of(
    loaded: LoadedVAE, plan: EncodePlan, options: EncodeOptions, stats: LatentStats | None
) -> LatentManifest:
    """latents.json but for the number of samples and the versions, which come at the end."""
    return LatentManifest(
        vae_hash=plan.vae_hash,
        z_dim=loaded.vae.config.z_dim,
        mean=stats.mean if stats else [],
        std=stats.std if stats else [],
        strides=loaded.vae.strides,
        stats_clips=stats.num_clips if stats else 0,
        text=text_cache(options.text),
        segments=options.segments,
        logvar=options.logvar,
        variants=options.variants,
    )


def holds_something(out: Path) -> bool:
    """Whether OUT is there, and not an empty folder."""
    return out.exists() and not (out.is_dir() and not any(out.iterdir()))


def report_of(out: Path, job: dict[str, Any]) -> EncodeReport:
    """What a finished encode left; ValueError where it is not of this job."""
    if not (out / JOB).is_file() or json.loads((out / JOB).read_text()) != job:
        raise ValueError(
            f"{out}: exists and holds something else than this encode would write; "
            "remove it or choose another folder"
        )
    num_shards = len(list(out.glob("*.tar")))
    skipped = (out / SKIPPED).read_text(encoding="utf-8") if (out / SKIPPED).is_file() else ""
    num_samples = read_manifest(out).num_samples
    return EncodeReport(out, num_samples, len(skipped.splitlines()), num_shards, 0)


def finish(
    claims: Claims, plan: EncodePlan, manifest: LatentManifest, text: EncodedText, vae: Path
) -> None:
    """Catalogue and manifest over all shards, then the rename that makes OUT exist."""
    staging, records = claims.staging, claims.records(list(plan.shards))
    skipped = [entry for record in records.values() for entry in record.skipped]
    if skipped:
        lines = [json.dumps(entry) + "\n" for entry in skipped]
        (staging / SKIPPED).write_text("".join(lines), encoding="utf-8")
    if not any(record.samples for record in records.values()):
        raise ValueError(
            f"{staging}: not one sample could be encoded, see its {SKIPPED}; remove the folder to "
            "try again"
        )
    catalogue = build_catalogue(
        staging, dataset=plan.table.info.dataset, num_workers=_INDEXERS, progress=False
    )
    versions = {
        "torch": torch.__version__,
        "longtake": version("longtake"),
        "vae_run": os.path.relpath(vae.resolve(), claims.out.resolve()),
    }
    empty = text([""])[0] if text.encoder is not None else None
    manifest = replace(manifest, num_samples=len(catalogue), versions=versions)
    write_manifest(staging, manifest, empty)
    claims.forget_records(list(plan.shards))
    keep_only(staging, {JOB, SKIPPED, "latents.json", EMPTY_TEXT, "catalogue", *records})
    os.replace(staging, claims.out)


def keep_only(folder: Path, names: set[str]) -> None:
    """Remove what a process that was killed left half written."""
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
