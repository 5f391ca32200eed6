"""The procedural world: captioned video with exact truth, and scores that need no judge model."""

from longtake.data.world.clips import WorldClip, make_clip
from longtake.data.world.families import FAMILIES
from longtake.data.world.scorers import BLIND, CHANCE, chance_of, score_clip, wilson
from longtake.data.world.sheet import contact_sheet
from longtake.data.world.write import WorldReport, write_world

__all__ = [
    "BLIND",
    "CHANCE",
    "FAMILIES",
    "WorldClip",
    "WorldReport",
    "chance_of",
    "contact_sheet",
    "make_clip",
    "score_clip",
    "wilson",
    "write_world",
]
