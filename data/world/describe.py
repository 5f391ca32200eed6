"""From a caption back to what it describes: the reading half of the world's language."""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from longtake.data.world.families import FAMILIES, Canvas
from longtake.data.world.language import (
    KINDS,
    Sentence,
    Words,
    say,
    sentence,
    slots_of,
    vocabulary_of,
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a caption says: the family and form it is worded by, and its slots' values."""

    family: str
    form: str
    words: Words

    @property
    def expect(self) -> dict[str, dict[str, Any]]:
        """The scores that it asks for, with their parameters."""
        return FAMILIES[self.family].forms[self.form].expect(self.words)

    def slots(self) -> dict[str, tuple[str, ...]]:
        """What each of those scores asks about."""
        asked = FAMILIES[self.family].forms[self.form].asked(self.words)
        return {score: ask.slots for score, (ask, _) in asked.items()}

    def levels(self, canvas: Canvas) -> dict[str, tuple[float, float]]:
        """Chance and blind level of those scores for clips of this kind."""
        asked = FAMILIES[self.family].forms[self.form].asked(self.words)
        return {score: ask.levels(canvas) for score, (ask, _) in asked.items()}


@cache
def _sentences() -> tuple[tuple[str, str, Sentence], ...]:
    """Family, form and sentence of every template."""
    return tuple(
        (family.name, name, sentence(getattr(form, kind), form.words, form.choices, kind))
        for family in FAMILIES.values()
        for name, form in family.forms.items()
        for kind in KINDS
    )


@cache
def _examples() -> tuple[str, ...]:
    """A sentence of every template, with the first word of each slot."""
    found = []
    for family in FAMILIES.values():
        for form in family.forms.values():
            for kind in KINDS:
                template = getattr(form, kind)
                words = {
                    slot: form.choices.get(slot, tuple(vocabulary_of(slot, form.words)))[0]
                    for slot in slots_of(template)
                }
                found.append(say(template, words, form.words, kind))
    return tuple(found)


def read_caption(text: str, family: str | None = None) -> Reading:
    """What a caption of the world asks for; the first reading where several families agree.

    ValueError for a sentence outside the grammar; it quotes the nearest sentence that is inside.
    """
    for name, form, known in _sentences():
        if family in (None, name) and (words := known.read(text)) is not None:
            return Reading(name, form, words)
    (near,) = get_close_matches(text, _examples(), 1, cutoff=0.0)
    raise ValueError(f"caption {text!r} is not a sentence of the world; the nearest is {near!r}")
