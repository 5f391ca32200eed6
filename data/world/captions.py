"""The words of the world: one vocabulary for all families, so that a word always means the same.

Kinds: `dense` (everything there is to see, <= 250 characters), `short` (as a user types, <= 64),
`vague` (hypernyms only), `wrong` (dense with one attribute flipped) and `zh` (dense, in Chinese).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from longtake.data.world.scene import COLOURS, Entity

MAX_DENSE = 250
MAX_SHORT = 64
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
ZH = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色",
    "cyan": "青色", "small": "小", "large": "大", "circle": "圆形", "square": "正方形",
    "triangle": "三角形", "ring": "圆环", "cross": "十字", "left": "左", "right": "右",
    "up": "上", "down": "下", "slowly": "缓慢", "quickly": "快速",
}  # fmt: skip
ZH_NUMBERS = ("零", "一", "两", "三", "四", "五", "六")
STATIC_CAMERA = "The camera is static."
STATIC_CAMERA_ZH = "镜头静止。"


@dataclass(frozen=True, slots=True)
class Words:
    """The captions of one scene as its family words them."""

    dense: str
    short: str
    vague: str
    zh: str


def plain_noun(entity: Entity) -> str:
    """`red circle`"""
    return f"{entity.colour} {entity.shape}"


def full_noun(entity: Entity) -> str:
    """`small red circle`"""
    return f"{entity.size} {plain_noun(entity)}"


def zh_noun(entity: Entity) -> str:
    """`小的红色圆形`"""
    return f"{ZH[entity.size]}的{ZH[entity.colour]}{ZH[entity.shape]}"


def join(phrases: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`"""
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def region(x: float, y: float, width: int, height: int) -> str:
    """The part of the frame a screen point lies in, in thirds: `top left`, `centre`, ..."""
    column = ("left", "", "right")[min(int(3 * x / width), 2)]
    row = ("top", "", "bottom")[min(int(3 * y / height), 2)]
    return f"{row} {column}".strip() or "centre"


def other_colour(colour: str, taken: Sequence[str]) -> str:
    """The next colour of the palette that is not in `taken`: how `wrong` captions flip a colour."""
    start = COLOURS.index(colour)
    ring = [COLOURS[(start + step) % len(COLOURS)] for step in range(1, len(COLOURS))]
    return next(c for c in ring if c not in taken)
