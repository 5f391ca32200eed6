import numpy as np
import pytest
import torch

from longtake.data.transforms import covering_size, crop_clip, to_float, to_uint8


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ((720, 1280), (64, 64), (64, 114)),
        ((1280, 720), (64, 64), (114, 64)),
        ((32, 32), (32, 32), (32, 32)),
        ((100, 177), (50, 88), (50, 88)),
    ],
)
def test_covering_size_keeps_the_aspect_ratio(
    source: tuple[int, int], target: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert covering_size(*source, *target) == expected


def test_crop_takes_the_place_it_is_told() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (2, 10, 12, 3), dtype=np.uint8)
    for at, (y, x) in {(0.0, 0.0): (0, 0), (0.5, 0.5): (2, 3), (0.99, 0.99): (4, 6)}.items():
        clip = crop_clip(frames, 6, 6, at)
        assert clip.shape == (3, 2, 6, 6) and clip.dtype == torch.uint8
        expected = frames[:, y : y + 6, x : x + 6].transpose(3, 0, 1, 2)
        assert np.array_equal(clip.numpy(), expected)
    with pytest.raises(ValueError, match="smaller than the crop"):
        crop_clip(frames, 11, 6, (0.5, 0.5))


def test_values_survive_the_float_round_trip() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    scaled = to_float(values)
    assert scaled.min() == -1 and scaled.max() == 1
    assert torch.equal(to_uint8(scaled), values)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
