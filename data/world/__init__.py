"""The procedural world: captioned video with exact truth, and scores that need no judge model."""

from longtake.data.world.clips import WorldClip, make_clip
from longtake.data.world.families import FAMILIES

__all__ = ["FAMILIES", "WorldClip", "make_clip"]
