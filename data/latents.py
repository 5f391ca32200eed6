"""Cached latents and text: ordinary shards whose payload is key.safetensors.

A sample holds "latents", the raw posterior mean (C, T, H, W) in bf16, and "text.<kind>" for each
caption kind: token ids int32 (L,) or embeddings bf16 (L, D). latents.json, written last, says which
VAE made them and how to normalise them.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from longtake.data.catalogue import Catalogue, build_catalogue
from longtake.data.samples import LATENT_EXTENSION, SampleError, parse_meta
from longtake.data.shards import ShardWriter
from longtake.data.shards.storage import join, parse_root, read_file

MANIFEST = "latents.json"
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
    """How a folder of latents was made. `mean` and `std` per channel; strides (T, H, W)."""

    vae_hash: str
    z_dim: int
    mean: list[float]
    std: list[float]
    strides: tuple[int, int, int]
    text: TextCache
    num_samples: int
    versions: dict[str, str] = field(default_factory=dict)

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip (T, H, W) in pixels."""
        frames, height, width = shape
        times, rows, columns = self.strides
        return self.z_dim, 1 + (frames - 1) // times, height // rows, width // columns


@dataclass(frozen=True)
class LatentSample:
    """`latents` float32 (C, T, H, W), raw; `text` by caption kind."""

    latents: Tensor
    text: dict[str, Tensor]


class ChannelStats:
    """Running mean and standard deviation for each channel, in float64."""

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
        return (self._sum / max(self.count, 1)).tolist()

    @property
    def std(self) -> list[float]:
        """(C,) standard deviations, at least 1e-6."""
        mean = self._sum / max(self.count, 1)
        variance = self._squares / max(self.count, 1) - mean.square()
        return variance.clamp_min(1e-12).sqrt().tolist()


class LatentWriter:
    """Writes encoded samples into shards; closing writes latents.json and the catalogue.

    Statistics for normalisation are gathered while writing, unless `mean` and `std` are given.
    """

    def __init__(
        self,
        out: Path | str,
        *,
        vae_hash: str,
        z_dim: int,
        strides: tuple[int, int, int],
        text: TextCache,
        empty_text: Tensor | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        dataset: str | None = None,
        max_samples: int = 500,
        max_bytes: int = 2**28,
    ) -> None:
        """`empty_text` is the encoding of "" for caption dropout, needed with embeddings."""
        if text.kind not in TEXT_CACHES:
            raise ValueError(f"text.kind={text.kind!r} must be one of {', '.join(TEXT_CACHES)}")
        if text.kind == "embeddings" and empty_text is None:
            raise ValueError('text.kind=embeddings needs empty_text, the encoding of ""')
        self.out = Path(out)
        if self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"{self.out}: is not empty; latents go to a folder of their own")
        self._vae_hash, self._z_dim, self._strides = vae_hash, z_dim, strides
        self._text, self._empty_text = text, empty_text
        self._mean, self._std, self._dataset = mean, std, dataset
        self._shards = ShardWriter(self.out, max_samples=max_samples, max_bytes=max_bytes)
        self._stats = ChannelStats(z_dim)
        self._num_samples = 0

    def write(
        self, key: str, latents: Tensor, text: Mapping[str, Tensor], meta: Mapping[str, Any]
    ) -> None:
        """Add a sample. `meta` becomes key.json: captions and the clip's pixel frames, height,
        width and fps are required; split, family, truth, source_id and variant are passed on.
        Captions whose kind is not in `text` are left out, so that no plan can ask for them.

        Raises:
            ValueError: a shape that is not (z_dim, T, H, W), or meta that is incomplete.
        """
        if latents.ndim != 4 or latents.shape[0] != self._z_dim:
            raise ValueError(
                f"{key}: latents {tuple(latents.shape)} must be ({self._z_dim}, T, H, W)"
            )
        captions = {k: caption for k, caption in meta["captions"].items() if k in text}
        encoded = json.dumps({**meta, "captions": captions}).encode()
        parsed = parse_meta("json", encoded)
        for name in ("frames", "height", "width", "fps"):
            parsed.number(name)
        stored = latents.detach().to("cpu", torch.bfloat16).contiguous()
        self._stats.update(stored)
        dtype = torch.int32 if self._text.kind == "tokens" else torch.bfloat16
        tensors = {"latents": stored}
        for kind, tensor in text.items():
            tensors[f"text.{kind}"] = tensor.detach().to("cpu", dtype).contiguous()
        self._shards.write(key, {LATENT_EXTENSION: save(tensors), "json": encoded})
        self._num_samples += 1

    def close(self) -> Catalogue:
        """Finish the shards, then write latents.json and the catalogue."""
        self._shards.close()
        manifest = LatentManifest(
            vae_hash=self._vae_hash,
            z_dim=self._z_dim,
            mean=self._mean or self._stats.mean,
            std=self._std or self._stats.std,
            strides=self._strides,
            text=self._text,
            num_samples=self._num_samples,
            versions={"torch": torch.__version__, "longtake": version("longtake")},
        )
        if self._empty_text is not None:
            (self.out / EMPTY_TEXT).write_bytes(save({"text": self._empty_text.contiguous()}))
        temporary = self.out / f"{MANIFEST}.tmp"
        temporary.write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
        os.replace(temporary, self.out / MANIFEST)
        return build_catalogue(self.out, dataset=self._dataset, progress=False)

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
            self._shards.__exit__(kind, error, trace)


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
        fields["strides"] = tuple(fields["strides"])
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


def decode_sample(data: bytes) -> LatentSample:
    """Tensors of one key.safetensors.

    Raises:
        SampleError: damaged, or without latents.
    """
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SampleError(f"the safetensors file is damaged: {error}") from None
    latents = tensors.pop("latents", None)
    if latents is None or latents.ndim != 4:
        raise SampleError("the safetensors file holds no tensor 'latents' of shape (C, T, H, W)")
    text = {name.removeprefix("text."): tensor for name, tensor in tensors.items()}
    return LatentSample(latents.float(), text)


def normalise(latents: Tensor, manifest: LatentManifest) -> Tensor:
    """Raw latents (C, T, H, W) to zero mean and unit variance in each channel."""
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (manifest.mean, manifest.std))
    return (latents - mean) / std
