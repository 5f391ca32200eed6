"""What a family of scenes is, and the register of all of them.

A family is one module of this folder that says everything about it: the sentences that describe a
clip and what they ask for (`Form`), which words a clip gets (`draw`), the scene that these words
and chance determine (`build`), scorers of its own, and the faults that must score nothing.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from longtake.data.world.language import Vocabulary, Words, say, slots_of, vocabulary_of
from longtake.data.world.scene import (
    ALL_SHAPES,
    COLOURS,
    EXTENTS,
    SIZES,
    Entity,
    Scene,
    Segment,
    Shot,
    shapes_at,
)

if TYPE_CHECKING:
    from longtake.data.world.clips import WorldClip

SPLITS = ("train", "val", "combo", "ood")


@dataclass(frozen=True, slots=True)
class Canvas:
    """The clip to be filled: sizes in pixels, fps in frames per second."""

    frames: int
    height: int
    width: int
    fps: float
    split: str

    @property
    def short_side(self) -> int:
        return min(self.height, self.width)

    @property
    def centre(self) -> tuple[float, float]:
        return self.width / 2, self.height / 2

    @property
    def shapes(self) -> tuple[str, ...]:
        """Shapes that can be told apart at this size."""
        return shapes_at(self.short_side)

    def radius(self, size: str) -> float:
        """Radius in pixels of a size word; `ood` is outside what the other splits show."""
        if self.split == "ood":
            return {"small": 0.13, "large": 0.245}[size] * self.short_side
        return SIZES[size] * self.short_side

    def scene(self, rng: np.random.Generator, *entities: Entity, **rest: Any) -> Scene:
        """A scene of this size; one shot with the camera at rest unless `shots` are given."""
        if "shots" not in rest:
            rest["shots"] = (Shot(0, *self.centre, background=int(rng.integers(2**31))),)
        return Scene(self.frames, self.height, self.width, self.fps, entities, **rest)


@dataclass(frozen=True, slots=True)
class Ask:
    """A score that a caption asks for, wherever the caption says all slots named in `values`.

    `values` are the scorer's parameters, `{slot}` in any text standing for what the slot says.
    `chance` is what the score is worth for true clips under the captions of others of the family,
    `blind` what it is worth when all is drawn as asked except the attribute it measures.
    """

    score: str
    values: Mapping[str, Any]
    chance: float | Callable[[Canvas], float]
    blind: float | Callable[[Canvas], float] | None = None

    @property
    def slots(self) -> tuple[str, ...]:
        """What it asks about."""
        return slots_of(json.dumps(self.values))

    def levels(self, canvas: Canvas) -> tuple[float, float]:
        """Chance and blind level for clips of this kind."""
        chance = self.chance(canvas) if callable(self.chance) else self.chance
        blind = self.blind(canvas) if callable(self.blind) else self.blind
        return chance, chance if blind is None else blind


CONSTANT = Ask("consistency", {}, 1.0)
STATIC = Ask("static_camera", {"stance": "{stance}"}, 1.0)
"""Asks of most families: captions of others ask the same, so they stand beside the mean."""


@dataclass(frozen=True, slots=True)
class Form:
    """One way in which a clip of the family can be described: a template of every caption kind.

    `flips` are the slots, said in `dense` and `short`, whose change makes another possible clip
    of the same form: `wrong` captions and minimal pairs change one of them. `choices` limits the
    values they may take (the whole vocabulary otherwise). `min_frames` show what is said; 1: an
    image does.
    """

    dense: str
    short: str
    vague: str
    zh: str
    asks: tuple[Ask, ...]
    flips: tuple[str, ...]
    words: Mapping[str, Vocabulary] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    min_frames: int = 2
    fixed: Mapping[str, str] = field(init=False)
    """Slots whose vocabulary is one word: they are there to be asked about, not to be drawn."""

    def __post_init__(self) -> None:
        known = {slot: tuple(vocabulary_of(slot, self.words)) for slot in slots_of(self.dense)}
        fixed = {slot: values[0] for slot, values in known.items() if len(values) == 1}
        object.__setattr__(self, "fixed", fixed)

    def captions(self, words: Words) -> dict[str, str]:
        """The clip's captions by kind."""
        kinds = {"dense": self.dense, "short": self.short, "vague": self.vague, "zh": self.zh}
        return {kind: say(text, words, self.words, kind) for kind, text in kinds.items()}

    def flipped(self, rng: np.random.Generator, canvas: Canvas, words: Words, slot: str) -> Words:
        """The words with another value in one slot, one that no like slot has."""
        name = slot.rstrip("0123456789")
        allowed = canvas.shapes if name == "shape" else tuple(vocabulary_of(slot, self.words))
        allowed = self.choices.get(slot, allowed)
        like = {value for other, value in words.items() if other.rstrip("0123456789") == name}
        free = [v for v in allowed if v not in like] or [v for v in allowed if v != words[slot]]
        return {**words, slot: free[rng.integers(len(free))]}

    def said(self, kind: str, words: Words) -> Words:
        """Those of the words that captions of a kind say."""
        template = {"dense": self.dense, "short": self.short, "vague": self.vague, "zh": self.zh}
        return {slot: words[slot] for slot in slots_of(template[kind])}

    def asked(self, words: Words) -> dict[str, tuple[Ask, dict[str, Any]]]:
        """Scores that these words ask for, with their parameters; of two asks for one score the
        later counts. A sentence that says nothing of its own asks for nothing."""
        found = {}
        for ask in self.asks if words else ():
            try:
                found[ask.score] = ask, _fill(ask.values, words)
            except KeyError:
                continue
        return found

    def expect(self, words: Words) -> dict[str, dict[str, Any]]:
        """Scores with their parameters, as `score_frames` takes them."""
        return {score: values for score, (_, values) in self.asked(words).items()}


def _fill(value: Any, words: Words) -> Any:
    """`value` with every `{slot}` replaced, at any depth; KeyError for a slot without a word."""
    if isinstance(value, str):
        return value.format_map(words) if "{" in value else value
    if isinstance(value, Mapping):
        return {key: _fill(part, words) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_fill(part, words) for part in value]
    return value


Fault = Callable[["WorldClip"], np.ndarray | None]
"""Frames of the clip with a fault planted; None where this clip has no room for it."""


@dataclass(frozen=True, slots=True)
class Family:
    """One family; `failure` is what it measures, for the reader of a table.

    `draw` returns the name of a form and a value for each of its slots. `build` makes the scene
    from them; what the words leave open comes from its generator, so a change of one word leaves
    the rest of a scene as it was. `faults` are the planted faults of every score. `nudge` moves an
    effect by some frames against its cause, where there is one. `undone` are scores of how things
    look that no longer hold after an event of the scene.
    """

    name: str
    failure: str
    forms: Mapping[str, Form]
    draw: Callable[[np.random.Generator, Canvas], tuple[str, dict[str, str]]]
    build: Callable[[np.random.Generator, Canvas, str, Words], Scene]
    faults: Mapping[str, tuple[Fault, ...]]
    min_frames: int = 5
    min_side: int = 16
    nudge: Callable[[Scene, float], Scene] | None = None
    undone: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Enter a family into the register.

    ValueError for a name that is taken, and for an ask about a slot that dense captions do not say:
    it would never be scored.
    """
    for name, form in family.forms.items():
        said = {slot: slot for slot in slots_of(form.dense)}
        for ask in form.asks:
            try:
                _fill(ask.values, said)
            except KeyError as error:
                raise ValueError(f"{family.name}.{name}: {ask.score} asks about {error}") from error
    if family.name in FAMILIES:
        raise ValueError(f"family {family.name!r} is defined twice: rename one of its modules")
    FAMILIES[family.name] = family


def is_held_out(colour: str, shape: str, verb: int) -> bool:
    """Whether a colour x shape x verb triple is kept for the `combo` split (one in nine).

    Every colour, shape, verb and every pair of them still occurs in training.
    """
    number = ALL_SHAPES.index(shape)
    return (COLOURS.index(colour) + 2 * number + 4 * verb) % 9 == 4


def draw_look(
    rng: np.random.Generator,
    canvas: Canvas,
    verb: int,
    *,
    taken: Sequence[str] = (),
    shapes: Sequence[str] | None = None,
) -> tuple[str, str]:
    """Colour (not one of `taken`) and shape of a subject, on the split's side of the hold-out.

    `shapes` are those of the canvas by default. In `combo` it is the first subject (nothing taken)
    whose triple is a held-out one.
    """
    is_free = canvas.split == "combo" and bool(taken)
    looks = _looks(verb, canvas.split == "combo", tuple(shapes or canvas.shapes), is_free)
    looks = [look for look in looks if look[0] not in taken]
    if not looks:
        raise ValueError(f"no colour and shape of {shapes} is held out for verb {verb}")
    return looks[int(rng.integers(len(looks)))]


@cache
def _looks(
    verb: int, is_combo: bool, shapes: tuple[str, ...], is_free: bool
) -> list[tuple[str, str]]:
    """Colours and shapes on one side of the hold-out, or on both where that does not matter."""
    every = [(colour, shape) for colour in COLOURS for shape in shapes]
    return [look for look in every if is_free or is_held_out(*look, verb) == is_combo]


def look(end: str = "", *, sized: bool = False, turned: str | None = None) -> dict[str, Any]:
    """A thing for the score `looks`: the slots of its colour and shape, and of its size, end in
    `end`; a thing that turns has the colour of slot `turned` afterwards."""
    colours = [f"{{colour{end}}}", *([f"{{{turned}}}"] if turned else [])]
    size = {"size": f"{{size{end}}}"} if sized else {}
    return {"shape": f"{{shape{end}}}", "colours": colours, **size}


def looks(*things: Mapping[str, Any], chance: float | Callable[[Canvas], float]) -> Ask:
    """The ask that all these things look as they are named."""
    number = len(things)
    return Ask("looks", {"looks": list(things)}, chance, lambda c: 1 / len(c.shapes) ** number)


def alike(
    number: int,
    verbs: Sequence[int] = range(4),
    shapes: Sequence[str] | None = None,
    *,
    colours: bool = True,
) -> Callable[[Canvas], float]:
    """Chance that two clips show `number` things of the same looks, or only of the same shapes.

    The things are drawn one after the other by `draw_look`, with colours that differ, for any of
    the verbs as likely.
    """
    return lambda canvas: _alike(
        number, tuple(verbs), tuple(shapes or canvas.shapes), canvas.split == "combo", colours
    )


@cache
def _alike(
    number: int, verbs: tuple[int, ...], shapes: tuple[str, ...], is_combo: bool, colours: bool
) -> float:
    odds: defaultdict[frozenset, float] = defaultdict(float)  # of every set of looks

    def draw(verb: int, drawn: tuple[tuple[str, str], ...], odd: float) -> None:
        if len(drawn) == number:
            odds[frozenset(drawn if colours else (shape for _, shape in drawn))] += odd
            return
        taken = {colour for colour, _ in drawn}
        free = _looks(verb, is_combo, shapes, is_combo and bool(taken))
        free = [one for one in free if one[0] not in taken]
        for one in free:
            draw(verb, (*drawn, one), odd / len(free))

    for verb in verbs:
        draw(verb, (), 1 / len(verbs))
    return sum(odd * odd for odd in odds.values())


def pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    """One of some words."""
    return values[int(rng.integers(len(values)))]


def margins(entity_shape: str, radius: float, gap: float = 0.5) -> tuple[float, float, float]:
    """Least distances (side, top, bottom) of a centre from the frame so that nothing is cut off."""
    side, up, down = EXTENTS[entity_shape]
    return side * radius + gap, up * radius + gap, down * radius + gap


def roomiest(shapes: Sequence[str], radius: float, gap: float = 0.5) -> tuple[float, float, float]:
    """Margins that do for any of these shapes, so that a thing's place does not tell its shape."""
    side, top, bottom = (
        max(ways) for ways in zip(*(margins(s, radius, gap) for s in shapes), strict=True)
    )
    return side, top, bottom


def still(x: float, y: float) -> tuple[Segment, ...]:
    return (Segment(0.0, x, y),)
