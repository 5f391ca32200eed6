"""How close drawn clips come to true ones where no truth record says what they show.

Clips are float (B, 3, T, H, W) in [0, 1]. Weights of learned metrics are files of the user's own:
nothing is fetched. torchmetrics is imported where it is used: it loads matplotlib, transformers and
half of scipy, as long as all else that a command imports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longtake.data.config import DataConfig, shape_name
from longtake.data.plan.draws import Draws
from longtake.data.plan.lanes import Place
from longtake.data.plan.planned import PlannedSample
from longtake.data.plan.tables import SampleTable
from longtake.data.randomness import derive_seed
from longtake.data.reader import BadSample, Clip, SampleReader
from longtake.data.transforms import to_float
from longtake.train.codec import Codec

PSNR_CAP = 100.0  # dB: equal clips have no finite PSNR, and one of them would spoil every mean
SSIM_WINDOW = 11  # pixels
FVD_OPTION = "--fvd-weights"  # what gives the detector's file, unless told otherwise
# How the I3D file in circulation is called; a detector without these arguments gets the clip alone.
DETECTOR_ARGUMENTS = {"rescale": False, "resize": True, "return_features": True}


def psnr(clips: Tensor, truth: Tensor) -> Tensor:
    """(B,) dB over all values of each clip, at most PSNR_CAP."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    values = peak_signal_noise_ratio(
        clips, truth, data_range=1.0, reduction="none", dim=(1, 2, 3, 4)
    )
    return values.clamp_max(PSNR_CAP)


def ssim(clips: Tensor, truth: Tensor) -> Tensor:
    """(B,) structural similarity of the frames, averaged over each clip (Wang et al. 2004).

    ValueError for frames smaller than its window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    height, width = clips.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of {SSIM_WINDOW} pixels or more, got {height}x{width}")
    frames, true_frames = (
        x.transpose(1, 2).flatten(0, 1) for x in (clips, truth)
    )  # (B T, 3, H, W)
    values = structural_similarity_index_measure(
        frames, true_frames, data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)
    return values.view(len(clips), -1).mean(1)


def flicker(clips: Tensor) -> Tensor:
    """(B,) temporal flicker in grey levels of 255; NaN for clips of fewer than three frames.

    The mean distance of a pixel from the mean of its two neighbours in time, |x_t − (x_{t−1} +
    x_{t+1}) / 2|: a second difference (as in SPIE 7744, 77440V, without its motion search), since a
    first one counts every steady motion and fade as flicker. What moves still counts a little:
    read it beside the same figure of true clips.
    """
    if clips.shape[2] < 3:
        return clips.new_full((len(clips),), torch.nan)
    middle = (clips[:, :, :-2] + clips[:, :, 2:]) / 2
    return 255 * (clips[:, :, 1:-1] - middle).abs().flatten(1).mean(1)


class NearestNeighbours:
    """The nearest of a stream of points for each query (Q, D), in memory of the queries' size.

    `distance` (Q,) is the root mean square difference per value, inf before the first point;
    `nearest` (Q,) is the sample it belongs to.
    """

    def __init__(self, queries: Tensor) -> None:
        self.queries = queries.float()
        self.distance = torch.full((len(queries),), torch.inf, device=queries.device)
        self.nearest: list[PlannedSample | None] = [None] * len(queries)
        self._power = self.queries.square().mean(1)  # (Q,)

    def update(self, points: Tensor, samples: Sequence[PlannedSample]) -> None:
        """Count the points (P, D) of these samples; of equally near ones the first stays."""
        points = points.to(self.queries)
        products = self.queries @ points.T / points.shape[1]
        squares = self._power[:, None] + points.square().mean(1) - 2 * products  # (Q, P)
        least, best = squares.min(1)
        # Products round too coarsely for near copies: what may be nearer is measured exactly.
        hopeful = (least < self.distance.square() + 1e-4 * self._power).nonzero()[:, 0]
        for query in hopeful.tolist():
            point = int(best[query])
            distance = (self.queries[query] - points[point]).square().mean().sqrt()
            if distance < self.distance[query]:
                self.distance[query] = distance
                self.nearest[query] = samples[point]


class TrainingClips:
    """The clips a run was trained on as normalised latents, read one batch after another.

    Cached latents are taken as they are; pixels are cut at the centre, in space and time, and
    encoded. `unreadable` names what could not be read.
    """

    def __init__(
        self,
        tables: Sequence[SampleTable],
        config: DataConfig,
        codec: Codec,
        device: torch.device | str = "cpu",
    ) -> None:
        """`tables` are those of `config.train`; the codec is on `device`."""
        self.tables, self.config, self.codec, self.device = tables, config, codec, device
        self.num_read = 0
        self.unreadable: list[str] = []
        self._draws = Draws(tables, config.train, config)
        self._reader = SampleReader(tables, config)

    def batches(
        self, shape: tuple[int, int, int], size: int
    ) -> Iterator[tuple[Tensor, list[PlannedSample]]]:
        """Points (P, D), P <= size, and samples of all clips of `shape` (T, H, W) in pixels."""
        coming = self._samples(shape)
        while planned := list(islice(coming, size)):
            self._reader.prefetch(planned)
            read, points = [], []
            for sample in planned:
                try:
                    points.append(self._latents(self._reader.read(sample)))
                except BadSample as error:
                    self.unreadable.append(f"{sample.key}: {error}")
                else:
                    read.append(sample)
            self.num_read += len(read)
            if read:
                yield torch.stack(points), read

    def _samples(self, shape: tuple[int, int, int]) -> Iterator[PlannedSample]:
        for bucket, found in enumerate(self.config.buckets):
            if (found.frames, found.height, found.width) != shape:
                continue
            for dataset, table in enumerate(self.tables):
                for row in map(int, np.flatnonzero(table.bucket == bucket)):
                    record, place = table.record(row), Place(row, 0, (0, 0))
                    seed = derive_seed("nearest", record.sample_id)
                    yield self._draws.sample(dataset, place, record, bucket, seed, augment=False)

    def _latents(self, clip: Clip) -> Tensor:
        if clip.latents is not None:
            return clip.latents.flatten()
        assert clip.video is not None
        return self.codec.encode(to_float(clip.video)[None].to(self.device)).flatten()


def load_torchscript(path: Path, option: str, device: torch.device | str) -> torch.jit.ScriptModule:
    """The module of a TorchScript file, in evaluation mode.

    Loading one runs what it holds, but nothing is unpickled. ValueError, naming the option or key
    that gave the path, for a missing file or one that is no TorchScript.
    """
    if not path.is_file():
        raise ValueError(f"{option} {path}: no such file")
    try:
        return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{option} {path}: no TorchScript module: {reason}") from error


class VideoDetector:
    """Features of clips by a TorchScript file, such as the I3D of the Fréchet video distance.

    It is called as `detector(video, rescale=False, resize=True, return_features=True)` with video
    (B, 3, T, H, W) in [-1, 1] and returns (B, D); arguments that its forward does not have are left
    out. A TorchScript file is a program: loading one runs what it holds, so give only a file whose
    maker you trust. It is never unpickled.
    """

    def __init__(
        self, path: Path, device: torch.device | str = "cpu", option: str = FVD_OPTION
    ) -> None:
        """`option` is what gave the path. ValueError for a missing file or no TorchScript."""
        self.path, self.device, self.option = path, device, option
        self.module = load_torchscript(path, option, device)
        known = {argument.name for argument in self.module.forward.schema.arguments}
        self.arguments = {k: v for k, v in DETECTOR_ARGUMENTS.items() if k in known}

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """(B, D) features on the CPU; ValueError where the module cannot take the clips."""
        shape = shape_name(clips.shape[2:])
        try:
            features = self.module(clips.to(self.device) * 2 - 1, **self.arguments)
        except (RuntimeError, torch.jit.Error) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"{self.option} {self.path}: fails on clips of {shape}: {reason}"
            ) from error
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(clips):
            raise ValueError(
                f"{self.option} {self.path}: must return features (B, D) of clips (B, 3, T, H, W)"
            )
        return features.float().cpu()


def check_enough_clips(num_clips: int, num_features: int, option: str = FVD_OPTION) -> None:
    """ValueError for fewer clips than make sense of a Fréchet distance.

    Up to as many clips as features the covariances are singular, and the distance says more of the
    number of clips than of their content.
    """
    if num_clips <= num_features:
        raise ValueError(
            f"FVD of {num_clips} clips: the detector has {num_features} features, so it needs more "
            f"than {num_features} clips; give more clips or leave out {option}"
        )


def frechet_distance(truth: Tensor, drawn: Tensor) -> float:
    """Fréchet distance of two sets of features (N, D), taken as Gaussians (FVD, arXiv 1812.01717).

    ValueError as of `check_enough_clips`. The estimate falls with N: compare at equal N only.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    check_enough_clips(min(len(truth), len(drawn)), truth.shape[1])
    metric = FrechetInceptionDistance(feature=_AsTheyAre(truth.shape[1]))
    metric.update(truth.double(), real=True)
    metric.update(drawn.double(), real=False)
    return max(float(metric.compute()), 0.0)  # rounding: it is a squared distance


class _AsTheyAre(nn.Identity):
    """Stands for the network of a metric that gets its features ready-made."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class ClipScorer:
    """CLIP score: how well frames fit a caption, 100 · cosine, at least 0 (arXiv 2104.08718).

    Captions are cut at `max_tokens`, what the text encoder reads.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """`folder` as `CLIPModel.save_pretrained` and `CLIPProcessor.save_pretrained` write it.

        ValueError when it is missing, no CLIP, or holds its weights in another form than
        safetensors.
        """
        from transformers import CLIPModel, CLIPProcessor  # slow to import

        if not folder.is_dir():
            raise ValueError(f"--clip-model {folder}: no such folder")
        try:
            model: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            )
            self.processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"--clip-model {folder}: holds no whole CLIP (model.safetensors, tokenizer and "
                f"processor): {reason}"
            ) from error
        self.model = model.eval().to(device)
        self.device = device
        self.max_tokens = int(model.config.text_config.max_position_embeddings)

    def num_cut(self, captions: Sequence[str]) -> int:
        """How many captions are longer than `max_tokens`."""
        ids = self.processor.tokenizer(list(captions)).input_ids
        return sum(len(row) > self.max_tokens for row in ids)

    @torch.no_grad()
    def __call__(self, clips: Tensor, captions: Sequence[str], num_frames: int = 4) -> list[float]:
        """The mean score of evenly spaced frames, for each clip."""
        count = min(num_frames, clips.shape[2])
        chosen = torch.linspace(0, clips.shape[2] - 1, count).round().long()
        frames = clips[:, :, chosen].transpose(1, 2).flatten(0, 1)  # (B K, 3, H, W)
        text = self.processor.tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        pictures = (frames * 255).round().to(torch.uint8).cpu()
        pixels = self.processor.image_processor(list(pictures), return_tensors="pt").pixel_values
        found = self.model(
            input_ids=text.input_ids.to(self.device),
            attention_mask=text.attention_mask.to(self.device),
            pixel_values=pixels.to(self.device),
        )
        image = found.image_embeds.float().view(len(clips), count, -1)  # unit vectors, as is text
        cosine = (image * found.text_embeds.float()[:, None]).sum(-1)  # (B, K)
        return (100 * cosine).clamp_min(0).mean(1).tolist()
