"""The words of the world: every caption is said, and read again, by one grammar.

A template is a sentence with slots: `A {size} {colour} {shape} moves {direction}.` A slot is called
like its vocabulary, digits behind tell slots of one vocabulary apart (`{colour2}`). What a caption
says of a clip are the values of its slots, so a sentence of any program can be turned back into
what it asks for.

Kinds: `dense` (everything there is to see), `short` (as a user types), `vague` (hypernyms only) and
`zh` (dense, in Chinese); `wrong` is `dense` of a description with one slot changed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from longtake.data.world.scene import ALL_SHAPES, COLOURS, DIRECTIONS, SIZES

Words = Mapping[str, str]
"""Value of every slot."""
Vocabulary = Mapping[str, tuple[str, str]]
"""Value -> how it is said in English and in Chinese."""

MAX_DENSE = 250  # characters
MAX_SHORT = 64
KINDS = ("dense", "short", "vague", "zh")
ASKING = ("dense", "short", "zh")  # a vague caption is met by anything
_SLOT = re.compile(r"\{(\w+)\}")


def _paired(values: tuple[str, ...], chinese: str) -> Vocabulary:
    return {value: (value, said) for value, said in zip(values, chinese.split(), strict=True)}


PLACES: Vocabulary = {
    "centre": ("centre", "中央"),
    "left": ("left", "左边"),
    "right": ("right", "右边"),
    "top": ("top", "上边"),
    "bottom": ("bottom", "下边"),
    "top left": ("top left", "左上角"),
    "top right": ("top right", "右上角"),
    "bottom left": ("bottom left", "左下角"),
    "bottom right": ("bottom right", "右下角"),
}
VOCABULARIES: dict[str, Vocabulary] = {
    "colour": _paired(COLOURS, "红色 绿色 蓝色 黄色 紫色 青色"),
    "shape": _paired(ALL_SHAPES, "圆形 正方形 三角形 圆环 十字"),
    "size": _paired(tuple(SIZES), "小 大"),
    "direction": _paired(tuple(DIRECTIONS), "左 右 上 下"),
    "pace": _paired(("slowly", "quickly"), "缓慢 快速"),
    "place": PLACES,
    "row": _paired(("top", "middle", "bottom"), "上部 中部 下部"),
    "column": _paired(("left", "middle", "right"), "左侧 中间 右侧"),
    "stance": _paired(("static",), "静止"),
}
"""What the families share; a form may bring vocabularies of its own."""
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
ZH_NUMBERS = ("零", "一", "两", "三", "四", "五", "六")
STATIC_CAMERA = "The camera is {stance}."
STATIC_CAMERA_ZH = "镜头{stance}。"


def vocabulary_of(slot: str, own: Mapping[str, Vocabulary]) -> Vocabulary:
    """The vocabulary of a slot; a form's own come first."""
    name = slot.rstrip("0123456789")
    return own[name] if name in own else VOCABULARIES[name]


def slots_of(template: str) -> tuple[str, ...]:
    """Slots of a template in the order of the sentence, each once."""
    return tuple(dict.fromkeys(_SLOT.findall(template)))


def say(template: str, words: Words, own: Mapping[str, Vocabulary], kind: str = "dense") -> str:
    """The sentence of a template; KeyError for a slot without a value."""
    language = int(kind == "zh")
    return _SLOT.sub(lambda m: vocabulary_of(m[1], own)[words[m[1]]][language], template)


@dataclass(frozen=True, slots=True)
class Sentence:
    """A template ready to be recognised: the pattern, and per slot said word -> value."""

    pattern: re.Pattern[str]
    values: Mapping[str, Mapping[str, str]]

    def read(self, text: str) -> dict[str, str] | None:
        """Values of the slots in a caption; None when it is another sentence."""
        found = self.pattern.fullmatch(plain(text))
        if found is None:
            return None
        return {slot: self.values[slot][said] for slot, said in found.groupdict().items()}


def plain(text: str) -> str:
    """Case, repeated blanks, quotes around it and how it ends do not matter."""
    return " ".join(text.split()).strip(" \"'“”.。!！").lower()


def sentence(
    template: str,
    own: Mapping[str, Vocabulary],
    choices: Mapping[str, tuple[str, ...]],
    kind: str,
) -> Sentence:
    """Compile a template; a slot that comes twice must be said alike both times."""
    language = int(kind == "zh")
    values = {
        slot: {
            said[language].lower(): value
            for value, said in vocabulary_of(slot, own).items()
            if value in choices.get(slot, (value,))
        }
        for slot in slots_of(template)
    }
    pattern, end, known = "", 0, set()
    text = plain(template)
    for match in _SLOT.finditer(text):
        slot = match[1]
        pattern += re.escape(text[end : match.start()])
        choices = "|".join(map(re.escape, sorted(values[slot], key=len, reverse=True)))
        pattern += f"(?P={slot})" if slot in known else f"(?P<{slot}>{choices})"
        known.add(slot)
        end = match.end()
    return Sentence(re.compile(pattern + re.escape(text[end:])), values)


def within(word: str, low: float, high: float, share: float) -> float:
    """A point of the third of [low, high] that a row, a column or a place names, at share [0, 1).

    Thirds of where a thing can be rather than of the frame: every place is possible for any size.
    """
    third = 0 if word in ("top", "left") else 2 if word in ("bottom", "right") else 1
    return low + (third + share) / 3 * max(high - low, 0.0)
