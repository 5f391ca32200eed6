"""The procedural world: captioned video with exact truth, and scores that need no judge model."""

from longtake.data.world.clips import Shapes, WorldClip, make_clip, make_pair
from longtake.data.world.describe import Reading, read_caption
from longtake.data.world.families import FAMILIES, SPLITS
from longtake.data.world.scorers import SCORERS, score_clip, score_frames
from longtake.data.world.sheet import contact_sheet
from longtake.data.world.write import WorldReport, write_world

__all__ = [
    "FAMILIES",
    "SCORERS",
    "SPLITS",
    "Reading",
    "Shapes",
    "WorldClip",
    "WorldReport",
    "contact_sheet",
    "make_clip",
    "make_pair",
    "read_caption",
    "score_clip",
    "score_frames",
    "write_world",
]
