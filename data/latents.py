"""Cached latents and text: ordinary shards whose payload is key.safetensors.

A sample holds "latents", the raw posterior mean (C, T, H, W) in bf16, and "text.<kind>" for each
caption kind: token ids int32 (L,) or embeddings bf16 (L, D); by choice "logvar" as well, and
"segment.<name>" with "places.<name>" for pieces encoded alone. latents.json, written last, says
which VAE made them and how to normalise them.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from longtake.data.samples import LATENT_EXTENSION, SampleError, parse_meta
from longtake.data.segments import Segment
from longtake.data.shards import ShardWriter
from longtake.data.shards.storage import join, parse_root, read_file

MANIFEST = "latents.json"
VAE_HASH = "vae_hash"  # in each key.json: tars are moved between folders
EMPTY_TEXT = "empty_text.safetensors"
TEXT_CACHES = ("tokens", "embeddings")


@dataclass(frozen=True)
class TextCache:
    """What "text.<kind>" holds, the hash of the encoder or tokenizer, and its length limit."""

    kind: str
    hash: str
    max_length: int


@dataclass(frozen=True)
class LatentManifest:
    """How a folder of latents was made. `mean` and `std` per channel, over `stats_clips` clips of
    the VAE's training data (0: not recorded); strides (T, H, W).

    Every clip that is long enough has the `segments`. `versions` names programs, and as
    "vae_run" the way from the folder to the run of the VAE.
    """

    vae_hash: str
    z_dim: int
    mean: list[float]
    std: list[float]
    strides: tuple[int, int, int]
    text: TextCache
    num_samples: int = 0
    segments: tuple[str, ...] = ()
    logvar: bool = False
    variants: int = 1
    stats_clips: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip (T, H, W) in pixels."""
        frames, height, width = shape
        times, rows, columns = self.strides
        return self.z_dim, 1 + (frames - 1) // times, height // rows, width // columns


@dataclass(frozen=True)
class LatentSample:
    """`latents` (C, T, H, W), raw, as are `logvar` and `segments`; `text` by caption kind: token
    ids (L,) or embeddings (L, D)."""

    latents: Tensor
    text: dict[str, Tensor]
    logvar: Tensor | None = None
    segments: dict[str, Segment] = field(default_factory=dict)


class ChannelStats:
    """Running mean and standard deviation for each channel, in float64; ValueError for those of
    nothing."""

    def __init__(self, num_channels: int) -> None:
        self.count = 0
        self._sum = torch.zeros(num_channels, dtype=torch.float64)
        self._squares = torch.zeros(num_channels, dtype=torch.float64)

    def update(self, latents: Tensor) -> None:
        """Count latents (C, T, H, W)."""
        values = latents.detach().to("cpu", torch.float64).flatten(1)  # (C, T*H*W)
        self.count += values.shape[1]
        self._sum += values.sum(1)
        self._squares += values.square().sum(1)

    @property
    def mean(self) -> list[float]:
        """(C,) means."""
        return self._mean_of(self._sum).tolist()

    @property
    def std(self) -> list[float]:
        """(C,) standard deviations, at least 1e-6."""
        variance = self._mean_of(self._squares) - self._mean_of(self._sum).square()
        return variance.clamp_min(1e-12).sqrt().tolist()

    def _mean_of(self, total: Tensor) -> Tensor:
        if not self.count:
            raise ValueError("no latents were counted: they have no mean and std")
        return total / self.count


class LatentWriter:
    """Writes encoded samples into one tar, which gets its name when it is whole.

    What else a folder of latents needs, `write_manifest` and the catalogue, comes after its tars.
    """

    def __init__(self, path: Path, manifest: LatentManifest) -> None:
        self.path, self.manifest = path, manifest
        self.num_samples = 0
        self._scratch = path.with_name(f"{path.name}.partial")
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._shard = ShardWriter(self._scratch, max_samples=2**62, max_bytes=2**62)

    def write(self, key: str, sample: LatentSample, meta: Mapping[str, Any]) -> None:
        """Add a sample; its members and errors as of `latent_members`."""
        self._shard.write(key, latent_members(self.manifest, sample, meta))
        self.num_samples += 1

    def close(self) -> None:
        """Finish the tar; one without samples is none."""
        self._shard.close()
        for whole in self._shard.paths:
            os.replace(whole, self.path)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._shard.__exit__(kind, error, trace)


def latent_members(
    manifest: LatentManifest, sample: LatentSample, meta: Mapping[str, Any]
) -> dict[str, bytes]:
    """The members of a sample in its tar, by extension.

    `meta` becomes the json: captions and the clip's pixel frames, height, width and fps are
    required; split, family, truth, source_id and variant are passed on. Captions whose kind has no
    text are left out, so that no plan can ask for them.

    Raises:
        ValueError: a shape that is not (z_dim, T, H, W).
        SampleError: meta that is incomplete, values that are not finite.
    """
    captions = {k: caption for k, caption in meta["captions"].items() if k in sample.text}
    made_by = {VAE_HASH: manifest.vae_hash}
    encoded = json.dumps({**meta, "captions": captions, **made_by}).encode()
    parsed = parse_meta("json", encoded)
    for name in ("frames", "height", "width", "fps"):
        parsed.number(name)
    tensors = {"latents": sample.latents}
    if sample.logvar is not None:
        tensors["logvar"] = sample.logvar
    tensors |= {f"segment.{name}": each.latents for name, each in sample.segments.items()}
    for name, tensor in tensors.items():
        if tensor.ndim != 4 or tensor.shape[0] != manifest.z_dim:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} must be ({manifest.z_dim}, T, H, W)"
            )
    dtypes = dict.fromkeys(tensors, torch.bfloat16)
    text_dtype = torch.int32 if manifest.text.kind == "tokens" else torch.bfloat16
    for kind, row in sample.text.items():
        tensors[f"text.{kind}"], dtypes[f"text.{kind}"] = row, text_dtype
    stored = {n: t.detach().to("cpu", dtypes[n]).contiguous() for n, t in tensors.items()}
    for name, tensor in stored.items():
        if not tensor.isfinite().all():
            raise SampleError(f"{name} has values that are not finite")
    for name, each in sample.segments.items():
        stored[f"places.{name}"] = torch.tensor(each.places, dtype=torch.int32)
    return {LATENT_EXTENSION: save(stored), "json": encoded}


def write_manifest(
    folder: Path, manifest: LatentManifest, empty_text: Tensor | None = None
) -> None:
    """Say how the latents of a folder were made. `empty_text` (L, D), the encoding of "" for
    caption dropout, is needed with embeddings, and ValueError without it."""
    if manifest.text.kind not in TEXT_CACHES:
        raise ValueError(
            f"text.kind={manifest.text.kind!r} must be one of {', '.join(TEXT_CACHES)}"
        )
    if manifest.text.kind == "embeddings":
        if empty_text is None:
            raise ValueError('text.kind=embeddings needs empty_text, the encoding of ""')
        (folder / EMPTY_TEXT).write_bytes(save({"text": empty_text.contiguous()}))
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)


def read_manifest(folder: Path | str) -> LatentManifest:
    """How a folder, or URL, of latents was made.

    Raises:
        ValueError: the manifest is missing or damaged.
    """
    root = parse_root(folder)
    path = join(root, MANIFEST)
    try:
        text = read_file(root, MANIFEST)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; make latents with `longtake encode`") from None
    try:
        fields = json.loads(text)
        fields["text"] = TextCache(**fields["text"])
        for name in ("strides", "segments"):
            fields[name] = tuple(fields.get(name, ()))
        manifest = LatentManifest(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {error}; run `longtake encode` again") from error
    if len(manifest.mean) != manifest.z_dim or len(manifest.std) != manifest.z_dim:
        raise ValueError(f"{path}: damaged: mean and std must have z_dim={manifest.z_dim} values")
    return manifest


def read_empty_text(folder: Path | str) -> Tensor:
    """Embedding (L, D) of the empty prompt.

    Raises:
        ValueError: the folder holds none.
    """
    root = parse_root(folder)
    try:
        return load(read_file(root, EMPTY_TEXT))["text"]
    except FileNotFoundError:
        raise ValueError(
            f"{join(root, EMPTY_TEXT)}: missing; run `longtake encode` again"
        ) from None


def refuse_other_vae(manifest: LatentManifest, vae_hash: str) -> None:
    """Raises:
    ValueError: the latents were made by another VAE than the one of this hash.
    """
    if manifest.vae_hash != vae_hash:
        raise ValueError(
            f"the latents were made by VAE {manifest.vae_hash}, this run uses VAE {vae_hash}; "
            "run `longtake encode` with this VAE, or point the config at the other"
        )


def refuse_foreign_sample(
    manifest: LatentManifest, fields: Mapping[str, Any], where: Callable[[], str]
) -> None:
    """Samples of folders that were encoded before their json named the VAE pass.

    Raises:
        ValueError: the sample's json names another VAE than the manifest of its folder.
    """
    made_by = fields.get(VAE_HASH)
    if made_by is not None and made_by != manifest.vae_hash:
        raise ValueError(
            f"{where()}: its latents were made by VAE {made_by}, {MANIFEST} of its folder says VAE "
            f"{manifest.vae_hash}; keep the latents of each VAE in a folder of their own, as "
            "`longtake encode` writes them"
        )


def refuse_other_stats(
    first: LatentManifest, other: LatentManifest, folders: tuple[Path | str, Path | str]
) -> None:
    """Raises:
    ValueError: the latents of the two folders are not normalised alike.
    """
    for name in ("mean", "std"):
        for channel, (a, b) in enumerate(
            zip(getattr(first, name), getattr(other, name), strict=True)
        ):
            if a != b:
                places = [join(parse_root(folder), MANIFEST) for folder in folders]
                raise ValueError(
                    f"{places[0]} has {name}[{channel}]={a}, {places[1]} has {b}: latents of a run "
                    "must be normalised alike; run `longtake encode` for the second folder with "
                    f"--stats-from {folders[0]}"
                )


def refuse_missing_segments(
    manifest: LatentManifest, wanted: Iterable[str], folder: Path | str
) -> None:
    """Raises:
    ValueError: the latents of `folder` were encoded without a segment that a task needs.
    """
    missing = [name for name in wanted if name not in manifest.segments]
    if missing:
        everything = ",".join(dict.fromkeys((*manifest.segments, *missing)))
        raise ValueError(
            f"{join(parse_root(folder), MANIFEST)}: segments={list(manifest.segments)} lacks "
            f"{', '.join(missing)}; run `longtake encode … --segments {everything}`"
        )


def decode_sample(data: bytes) -> LatentSample:
    """Tensors of one key.safetensors.

    Raises:
        SampleError: damaged, without latents, or with a segment that does not fit them.
    """
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SampleError(f"the safetensors file is damaged: {error}") from None
    latents, logvar = tensors.get("latents"), tensors.get("logvar")
    if latents is None or latents.ndim != 4:
        raise SampleError("the safetensors file holds no tensor 'latents' of shape (C, T, H, W)")
    parts: dict[str, dict[str, Tensor]] = {"text": {}, "segment": {}, "places": {}}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition(".")
        if rest and prefix in parts:
            parts[prefix][rest] = tensor
    segments = {
        name: _segment(name, tensor, parts["places"].get(name), latents)
        for name, tensor in sorted(parts["segment"].items())  # safetensors has no order
    }
    return LatentSample(
        latents.float(), parts["text"], None if logvar is None else logvar.float(), segments
    )


def _segment(name: str, segment: Tensor, places: Tensor | None, latents: Tensor) -> Segment:
    channels, frames, *size = latents.shape
    at = () if places is None else tuple(places.flatten().tolist())
    if segment.shape != (channels, len(at), *size) or not all(0 <= p < frames for p in at):
        raise SampleError(
            f"segment {name} of shape {tuple(segment.shape)} at latent frames {list(at)} does not "
            f"fit latents {tuple(latents.shape)}: run `longtake encode` again"
        )
    return Segment(segment.float(), at)


def normalise(latents: Tensor, manifest: LatentManifest) -> Tensor:
    """Raw latents (C, T, H, W) to zero mean and unit variance in each channel."""
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (manifest.mean, manifest.std))
    return (latents - mean) / std
