"""`longtake export`: a run as a stock diffusers WanPipeline folder, verified by drawing with it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from longtake.data.catalogue import load_catalogue
from longtake.data.config import BucketConfig
from longtake.models.interop import (
    dit_layer_names,
    dit_to_diffusers,
    unipc_scheduler,
    vae_to_diffusers,
)
from longtake.models.sampler import SamplerConfig
from longtake.models.text import Tokenizer
from longtake.train.codec import Codec, load_codec
from longtake.train.config import IMAGE_PATCH, check_exportable, draws_from_image, to_tree
from longtake.train.export_card import model_card
from longtake.train.given import fitting_buckets
from longtake.train.lora import split_adapters
from longtake.train.painter import GivenClips, Painter, noise_for, sampler_of
from longtake.train.run_folder import CONFIG, check_replaceable, written_whole
from longtake.train.runs import LoadedDiT, find_run, load_dit, read_run_config, read_tensors
from longtake.train.schema import DiTRun

if TYPE_CHECKING:
    from diffusers import WanImageToVideoPipeline, WanPipeline

ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # where `load_lora_weights` looks
TOLERANCE = 1e-3  # of pixels in [0, 1]
VERIFY_PROMPTS = ("a red circle moves left", "")
VERIFY_STEPS = 4


@dataclass(frozen=True)
class ExportReport:
    """Where the pipeline lies and how far its pixels in [0, 1] are from ours, at most."""

    out: Path
    worst: dict[str, float]  # task → largest difference
    notes: tuple[str, ...]

    def __str__(self) -> str:
        found = ", ".join(f"{task} {value:.1e}" for task, value in self.worst.items())
        lines = [f"{self.out}: equals our sampler through diffusers alone (largest: {found})"]
        return "\n".join([*lines, *self.notes])


def export_run(
    path: Path,
    out: Path,
    *,
    weights: str = "ema",
    vae: Path | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write OUT; it appears only when drawing with it gave our own videos.

    ValueError with the reason for what a stock pipeline cannot do, for an OUT that exists, and
    when the verification fails.
    """
    check_free(out, "model_index.json", overwrite)
    run = load_dit(path, weights)
    check_exportable(run.config)
    codec = load_codec(run.config, folder=run.place.folder, vae=vae)
    notes = losses_of(run.config)
    keep_quiet()
    with written_whole(out) as scratch:
        build_pipeline(run, codec).save_pretrained(scratch)
        data = data_manifest(run.config)
        (scratch / "data_manifest.json").write_text(json.dumps(data, indent=1) + "\n")
        (scratch / CONFIG).write_text(json.dumps(to_tree(run.config), indent=1) + "\n")
        tasks = exported_tasks(run.config)
        bucket = fitting_buckets(run.config, tasks, codec.strides[0])[0]
        card = model_card(run, codec, data, tasks, bucket)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        worst = verify(scratch, run, codec, tasks, bucket)
    return ExportReport(out, worst, notes)


def export_adapters(
    path: Path, out: Path, *, weights: str = "ema", overwrite: bool = False
) -> Path:
    """Write a LoRA run's adapters as `load_lora_weights(OUT)` of the stock pipelines reads them.

    Where one of our layers is several of theirs, each gets its rows of the adapter. ValueError for
    a run without adapters, one that has no stock pipeline, and an OUT that exists.
    """
    check_free(out, ADAPTER_FILE, overwrite)
    place = find_run(path)
    config = read_run_config(place)
    if not isinstance(config, DiTRun) or config.lora is None:
        raise ValueError(f"{path}: was not trained with lora: export it without --adapters")
    check_exportable(config)
    tensors = {}
    for name, adapter in split_adapters(read_tensors(place, weights), config.lora)[1].items():
        layers = dit_layer_names(name.removeprefix("dit."))
        for layer, up in zip(layers, adapter.up.chunk(len(layers)), strict=True):
            tensors[f"transformer.{layer}.lora_A.weight"] = adapter.down.clone()
            tensors[f"transformer.{layer}.lora_B.weight"] = up.contiguous()
    with written_whole(out) as scratch:
        save_file(tensors, scratch / ADAPTER_FILE, metadata={"format": "pt"})
    return out / ADAPTER_FILE


def check_free(out: Path, proof: str, overwrite: bool) -> None:
    """ValueError unless OUT is not there, or is an older result that may be replaced."""
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: exists; choose another folder or give --overwrite")
    check_replaceable(out, proof)


def exported_tasks(config: DiTRun) -> list[str]:
    """What the stock pipeline draws: given frames as channels, it always has an image."""
    if config.has_channels:
        return ["i2v", "first_last"] if "first_last" in config.trained_tasks else ["i2v"]
    return ["t2v", "i2v"] if draws_from_image(config) else ["t2v"]


def losses_of(config: DiTRun) -> tuple[str, ...]:
    """What the user loses, if anything."""
    notes = []
    if embedded := config.numbers.embedded:
        notes.append(
            f"without the embeddings of {', '.join(embedded)} (numbers.form=embedding): stock "
            "pipelines draw as where these are dropped"
        )
    if "i2v" in config.trained_tasks and not draws_from_image(config):
        patch = tuple(config.model.patch_size)
        notes.append(
            f"text to video only: drawing from an image needs model.patch_size={IMAGE_PATCH} in "
            f"stock pipelines, this run has {patch}"
        )
    return tuple(notes)


def keep_quiet() -> None:
    """No bars and advice of the libraries between ours."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def build_pipeline(run: LoadedDiT, codec: Codec) -> WanPipeline | WanImageToVideoPipeline:
    """The stock pipeline around the run's weights."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    assert codec.vae is not None
    has_channels = run.config.has_channels
    kind = WanImageToVideoPipeline if has_channels else WanPipeline
    return kind(
        tokenizer=Tokenizer(run.config.text).tokenizer,
        text_encoder=run.text.encoder,
        vae=vae_to_diffusers(
            codec.vae,
            latents_mean=codec.mean.flatten().tolist(),
            latents_std=codec.std.flatten().tolist(),
        ),
        scheduler=scheduler_of(run.config),
        transformer=dit_to_diffusers(run.dit),
        expand_timesteps=draws_from_image(run.config) and not has_channels,
    )


def scheduler_of(config: DiTRun) -> Any:
    """The stock scheduler of samples.solver."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    shift = config.samples.shift
    if config.samples.solver == "unipc":
        return unipc_scheduler(shift)
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def verify(
    folder: Path, run: LoadedDiT, codec: Codec, tasks: Sequence[str], bucket: BucketConfig
) -> dict[str, float]:
    """Draw with diffusers from the written folder and with our sampler, from the same noise.

    Returns the largest difference of pixels in [0, 1] per task; ValueError above 1e-3.
    """
    sampler = sampler_of(run.config, steps=min(VERIFY_STEPS, run.config.samples.steps))
    painter = Painter(run, codec, sampler)
    shape = codec.latent_shape(*bucket.shape)
    noise = torch.stack([noise_for(index, shape) for index, _ in enumerate(VERIFY_PROMPTS)])
    worst = {}
    for task in track(tasks, description="verify"):
        wanted = codec.given(task, shape[1], run.config.model.patch_size[0])
        frames, given = codec.pixel_frames(wanted), None
        seeded = torch.Generator().manual_seed(0)
        images = torch.rand((3, len(frames), bucket.height, bucket.width), generator=seeded)
        images = images.mul(255).round().div(255)  # survive the way through an image
        if frames:
            clip = torch.zeros(1, 3, *bucket.shape)
            clip[0, :, frames] = images * 2 - 1
            given = GivenClips(clip, wanted)
        ours = painter.draw(VERIFY_PROMPTS, noise, given).add(1).div(2)
        theirs = draw_with_diffusers(folder, run.config, bucket, sampler, noise, images)
        worst[task] = (ours - theirs).abs().max().item()
        if not worst[task] <= TOLERANCE:
            raise ValueError(
                f"the exported pipeline draws other pixels than our sampler for {task} (largest "
                f"difference {worst[task]:.1e}, at most {TOLERANCE}); nothing was written"
            )
    return worst


def draw_with_diffusers(
    folder: Path,
    config: DiTRun,
    bucket: BucketConfig,
    sampler: SamplerConfig,
    noise: Tensor,
    images: Tensor,
) -> Tensor:
    """Pixels (B, 3, T, H, W) in [0, 1] drawn from the folder by diffusers alone; `images` (3, N, H,
    W) in [0, 1] are the first frame, and the last one, where they are given."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    options: dict[str, Any] = {
        "height": bucket.height,
        "width": bucket.width,
        "num_frames": bucket.frames,
        "num_inference_steps": sampler.steps,
        "guidance_scale": sampler.guidance_scale,
        "negative_prompt": config.samples.negative_prompt,
        "max_sequence_length": config.text.max_length,
        "output_type": "pt",
    }
    names = ("image", "last_image")[: images.shape[1]]
    options |= {name: images[None, :, index] for index, name in enumerate(names)}
    kind = WanImageToVideoPipeline if names else WanPipeline
    pipeline: Any = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    videos = []
    for prompt, start in zip(VERIFY_PROMPTS, noise, strict=True):
        drawn = pipeline(prompt=prompt, latents=start[None].clone(), **options).frames
        videos.append(drawn[0].transpose(0, 1))  # (T, 3, H, W) → (3, T, H, W)
    return torch.stack(videos)


def data_manifest(config: DiTRun) -> list[dict[str, Any]]:
    """What the run was trained on: one entry per dataset, with licences where it can be read."""
    entries = []
    for dataset in config.data.train:
        entry: dict[str, Any] = {"share": asdict(dataset), "samples": None, "licences": None}
        try:
            known = load_catalogue(dataset.path, dataset.catalogue).filter(dataset.where).catalogue
        except ValueError as error:
            entry["unread"] = str(error)  # moved since the training: said, not hidden
        else:
            licences = Counter(known.table.column("licence").to_pylist())
            entry |= {
                "dataset": known.dataset,
                "fingerprint": known.fingerprint,
                "samples": len(known),
                "licences": {str(name or "not stated"): n for name, n in licences.most_common()},
            }
        entries.append(entry)
    return entries
