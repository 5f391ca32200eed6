"""Decoded frames to RGB as a player shows them: upright, square pixels, asked size."""

import threading
from dataclasses import dataclass

import numpy as np
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from longtake.data.decode.containers import DecodeError
from longtake.data.decode.source import HeaderLimits

RESIZES = ("fast", "antialias")
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
FAST = Interpolation.BILINEAR | _EXACT
_FINE = Interpolation.LANCZOS | _EXACT | Interpolation.FULL_CHR_H_INP


@dataclass(frozen=True)
class Turn:
    """How a stored picture becomes upright: first transposed, then mirrored."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @property
    def is_mirrored(self) -> bool:
        """Whether no rotation alone does it."""
        return self.transpose ^ self.flip_x ^ self.flip_y

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) from stored to upright, and back."""
        return (width, height) if self.transpose else (height, width)

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """A view of (..., H, W)."""
        if self.transpose:
            picture = picture.swapaxes(-2, -1)
        return picture[..., :: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


# Values of the EXIF tag Orientation (EXIF 2.32, 4.6.4 A).
_EXIF_TURNS = {
    2: Turn(flip_x=True),
    3: Turn(flip_x=True, flip_y=True),
    4: Turn(flip_y=True),
    5: Turn(transpose=True),
    6: Turn(transpose=True, flip_x=True),
    7: Turn(transpose=True, flip_x=True, flip_y=True),
    8: Turn(transpose=True, flip_y=True),
}


def exif_turn(orientation: int) -> Turn:
    """The turn that an EXIF orientation asks for; unknown values ask for none."""
    return _EXIF_TURNS.get(orientation, Turn())


def display_turn(frame: VideoFrame) -> Turn:
    """The turn of a frame's display matrix (ISO 14496-12, 6.2.2)."""
    try:
        side = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError:  # side data that PyAV has no name for hides the rest; mirroring is lost
        return {90: _EXIF_TURNS[8], -90: _EXIF_TURNS[6], 180: _EXIF_TURNS[3]}.get(
            round(frame.rotation / 90) * 90 if frame.rotation > -135 else 180, Turn()
        )
    if side is None:
        return Turn()
    a, b, _, c, d = np.frombuffer(bytes(side), np.int32)[:5].tolist()
    return matrix_turn(a, b, c, d)


def matrix_turn(a: int, b: int, c: int, d: int) -> Turn:
    """The turn nearest to what a display matrix does: (x, y) to (a x + c y, b x + d y)."""
    if abs(b) > abs(a):
        return Turn(transpose=True, flip_x=c < 0, flip_y=b < 0)
    return Turn(flip_x=a < 0, flip_y=d < 0)


class PictureMaker:
    """Turns the frames of one clip into RGB pictures of one size.

    `size` = (height, width) as displayed; None keeps the clip's own, which must be `expected` where
    that is given. `turn` None stands for the one
    that the first frame asks for. `fast` scales and converts in one step with a triangle filter;
    `antialias` converts to RGB at full size and then scales with Lanczos (3 lobes, widened to the
    scale): 55 dB and more against doing both in floating point.
    """

    def __init__(
        self,
        size: tuple[int, int] | None,
        resize: str,
        limits: HeaderLimits,
        turn: Turn | None,
        expected: tuple[int, int] | None = None,
    ) -> None:
        self._size, self._resize, self.limits, self._turn = size, resize, limits, turn
        self._expected = expected
        self._stored: tuple[int, int] | None = None

    def shown_size(self, frame: VideoFrame, aspect: float) -> tuple[int, int]:
        """(height, width) of the clip as displayed; a pixel is `aspect` times as wide as high.

        Raises:
            DecodeError: over the limits.
        """
        self.limits.check_size(frame.width, frame.height)
        width = round(frame.width * aspect)
        self.limits.check_size(width, frame.height)
        if self._turn is None:
            self._turn = display_turn(frame)
        return self._turn.size(frame.height, width)

    def __call__(self, frame: VideoFrame, aspect: float) -> np.ndarray:
        """RGB uint8 (3, H, W), a view of the frame made for it.

        Untagged video is taken for BT.601, as players and decord do.

        Raises:
            DecodeError: a frame that is damaged, over the limits or of another size than the first.
        """
        stored = frame.width, frame.height
        if frame.is_corrupt:
            raise DecodeError("damaged frame")
        if self._stored is None:
            shown = self.shown_size(frame, aspect)
            check_shown(shown, self._expected)
            self._stored, self._target = stored, self._turn.size(*(self._size or shown))
        elif stored != self._stored:
            raise DecodeError("the frame size changes inside the clip")
        return self._turn.apply(_scaled(frame, *self._target, self._resize))


def check_shown(shown: tuple[int, int], expected: tuple[int, int] | None) -> None:
    """Raises DecodeError unless a clip's (height, width) on display is the `expected` one."""
    if expected is not None and shown != tuple(expected):
        raise DecodeError(
            f"frames are {shown[1]}x{shown[0]} on display, the header promised "
            f"{expected[1]}x{expected[0]}: index the shard with --probe full"
        )


def scale_pictures(pictures: np.ndarray, size: tuple[int, int], resize: str) -> np.ndarray:
    """RGB uint8 (T, H, W, 3) to `size` = (height, width)."""
    if pictures.shape[1:3] == size:
        return pictures
    frames = [VideoFrame.from_ndarray(picture, format="rgb24") for picture in pictures]
    planes = np.stack([_scaled(frame, *size, resize) for frame in frames])  # (T, 3, H, W)
    return planes.transpose(0, 2, 3, 1)


def _scaled(frame: VideoFrame, height: int, width: int, resize: str) -> np.ndarray:
    """RGB uint8 (3, H, W)."""
    # FFmpeg writes planes twice as fast as pixels, and equal ones, except from palettes and RGB.
    is_yuv = frame.format.name.startswith("yuv")
    interpolation = FAST
    if (height, width) == (frame.height, frame.width):
        form = "gbrp" if is_yuv else "rgb24"
    else:
        form = "gbrp"
        if resize == "antialias":
            middle = "gbrp" if is_yuv else "rgb24"
            frame = _TOOLS.colour.reformat(frame, format=middle, interpolation=FAST, threads=1)
            interpolation = _FINE
    rgb = _TOOLS.scale.reformat(
        frame, width, height, format=form, interpolation=interpolation, threads=1
    )
    rows = [np.frombuffer(plane, np.uint8).reshape(height, plane.line_size) for plane in rgb.planes]
    if form == "rgb24":
        return rows[0][:, : 3 * width].reshape(height, width, 3).transpose(2, 0, 1)
    green, blue, red = (plane[:, :width] for plane in rows)
    return np.stack([red, green, blue])


class _Tools(threading.local):
    """Scalers, one set for each thread of the process: building their tables costs 1 ms."""

    def __init__(self) -> None:
        self.colour, self.scale = VideoReformatter(), VideoReformatter()


_TOOLS = _Tools()
