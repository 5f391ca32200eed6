"""Fidelity: known values, a copy among the training clips, and every mistake by its name."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtake.data.plan.planned import PlannedSample
from longtake.train.fidelity import (
    PSNR_CAP,
    ClipScorer,
    NearestNeighbours,
    VideoDetector,
    check_enough_clips,
    flicker,
    frechet_distance,
    psnr,
    ssim,
)

from .metric_weights import save_clip_model, save_detector


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clips(count: int = 2, frames: int = 5) -> Tensor:
    """(B, 3, T, 16, 16) in [0, 1], well away from both ends."""
    return 0.5 + 0.05 * noise(0, count, 3, frames, 16, 16)


def test_equal_clips_are_perfect() -> None:
    truth = clips()
    assert psnr(truth, truth).tolist() == [PSNR_CAP, PSNR_CAP]
    assert ssim(truth, truth).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_known_noise_has_known_psnr() -> None:
    truth = clips()
    assert psnr(truth + 0.1, truth).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    noisy = truth + 0.05 * noise(1, *truth.shape)
    assert psnr(noisy, truth).tolist() == pytest.approx([26.02, 26.02], abs=0.3)  # −20 lg 0.05
    values = [float(ssim(truth + s * noise(1, *truth.shape), truth)[0]) for s in (0.01, 0.05, 0.2)]
    assert values == sorted(values, reverse=True) and values[0] < 1


def test_each_clip_has_its_own_figure() -> None:
    truth = clips()
    drawn = truth.clone()
    drawn[1] += 0.1
    assert psnr(drawn, truth).tolist() == pytest.approx([PSNR_CAP, 20.0], abs=1e-3)
    assert float(ssim(drawn, truth)[0]) > float(ssim(drawn, truth)[1])


def test_ssim_names_frames_below_its_window() -> None:
    with pytest.raises(ValueError, match="11 pixels or more, got 8x16"):
        ssim(torch.zeros(1, 3, 2, 8, 16), torch.zeros(1, 3, 2, 8, 16))


def test_flicker() -> None:
    still = clips(1, 1).expand(1, 3, 6, 16, 16)
    blinking = still.clone()
    blinking[:, :, ::2] += 10 / 255
    fading = still + torch.linspace(0, 0.2, 6).view(1, 1, 6, 1, 1)
    assert float(flicker(still)) == pytest.approx(0, abs=1e-4)
    assert float(flicker(blinking)) == pytest.approx(10.0, abs=1e-3)  # grey levels
    assert float(flicker(fading)) == pytest.approx(0, abs=1e-3)  # steady, however fast
    assert flicker(still[:, :, :2]).isnan().all()


def planned(index: int) -> PlannedSample:
    return PlannedSample(
        *(0, index, 2**63 + index, f"clip-{index}", 0, (5, 16, 16), (0.0,), 8.0, (0.5, 0.5)),
        *(False, "short", index, 0, (0, 0)),
    )


def test_a_copy_in_the_stream_is_found() -> None:
    points, queries = noise(0, 300, 64), noise(1, 40, 64)
    queries[7] = points[211]
    queries[8] = points[30] + 0.01
    search = NearestNeighbours(queries)
    for start in range(0, 300, 100):
        batch = points[start : start + 100]
        search.update(batch, [planned(start + i) for i in range(len(batch))])
    assert float(search.distance[7]) == 0.0  # exact, though found among thousands of products
    assert float(search.distance[8]) == pytest.approx(0.01, rel=1e-3)
    names = [sample.key for sample in search.nearest if sample is not None]
    assert names[7:9] == ["clip-211", "clip-30"]
    true = (queries[:, None] - points[None]).square().mean(2).sqrt().amin(1)
    torch.testing.assert_close(search.distance, true)
    assert float(search.distance[9:].min()) > 0.5


def test_without_points_nothing_is_near() -> None:
    search = NearestNeighbours(noise(0, 3, 8))
    assert search.distance.isinf().all() and search.nearest == [None] * 3


def test_frechet_distance_of_known_gaussians() -> None:
    features = noise(0, 400, 4)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 3) == pytest.approx(4 * 9, rel=1e-6)
    # Equal means, deviations s and 2 s: the distance is the sum of s².
    centred = features - features.mean(0)
    expected = float(centred.var(0).sum())
    assert frechet_distance(centred, 2 * centred) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_wants_more_clips_than_features() -> None:
    check_enough_clips(401, 400)
    with pytest.raises(ValueError, match="FVD of 400 clips: the detector has 400 features"):
        check_enough_clips(400, 400)
    with pytest.raises(ValueError, match="needs more than 4 clips"):
        frechet_distance(noise(0, 400, 4), noise(0, 4, 4))


def test_detector_is_called_as_i3d_is(tmp_path: Path) -> None:
    detector = VideoDetector(save_detector(tmp_path / "i3d.pt"))
    assert detector.arguments == {"rescale": False, "return_features": True}  # it has no resize
    video = clips()
    torch.testing.assert_close(detector(video), (video * 2 - 1).mean((2, 3, 4)))


def test_detector_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--fvd-weights .*absent.pt: no such file"):
        VideoDetector(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("no module")
    with pytest.raises(ValueError, match=r"text.pt: no TorchScript module"):
        VideoDetector(tmp_path / "text.pt")
    detector = VideoDetector(save_detector(tmp_path / "i3d.pt"))
    with pytest.raises(ValueError, match=r"fails on clips of 3x16x16: .*too short"):
        detector(clips(frames=3))
    flat = VideoDetector(save_detector(tmp_path / "flat.pt", flat=True))
    with pytest.raises(ValueError, match=r"must return features \(B, D\)"):
        flat(clips())


def test_clip_score_follows_the_model(tmp_path: Path) -> None:
    scorer = ClipScorer(save_clip_model(tmp_path / "clip"))
    video = torch.rand(3, 3, 5, 20, 24, generator=torch.Generator().manual_seed(0))
    captions = ["a b", "b a c", "c " * 30]
    scores = scorer(video, captions)
    assert len(scores) == 3 and all(0 <= score <= 100 for score in scores)
    assert scorer(video[1:2], captions[1:2]) == pytest.approx(scores[1:2], abs=1e-3)
    assert scorer(video[:1], ["c c b"]) != pytest.approx(scores[:1], abs=1e-3)
    assert scorer.num_cut(captions) == 1
    single = [scorer(video[:1, :, t : t + 1], captions[:1])[0] for t in (0, 1, 3, 4)]
    assert scores[0] == pytest.approx(sum(single) / 4, abs=1e-3)


def test_clip_model_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--clip-model .*absent: no such folder"):
        ClipScorer(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds no whole CLIP"):
        ClipScorer(tmp_path / "empty")
    folder = save_clip_model(tmp_path / "clip")
    weights = folder / "model.safetensors"
    weights.rename(folder / "pytorch_model.bin")  # pickled weights are not read
    with pytest.raises(ValueError, match="holds no whole CLIP"):
        ClipScorer(folder)
