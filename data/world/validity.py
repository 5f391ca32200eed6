"""The proof of the scorers: truth, planted faults, other captions, and what must not matter.

A score that truth misses, or that a fault meets, measures the detector instead of the generator.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from longtake.data.decode import decode_clip, encode_video
from longtake.data.world.clips import WorldClip, make_clip
from longtake.data.world.detect import Detection
from longtake.data.world.families import FAMILIES
from longtake.data.world.families.registry import Fault
from longtake.data.world.render import render
from longtake.data.world.scorers import score_clip, score_frames
from longtake.data.world.write import CRF

NOISE = 8.0  # standard deviation, of 255
TRUTH, UNMOVED, FAULT = 0.99, 0.98, 0.05  # the rule: at least, at least, at most


@dataclass(frozen=True, slots=True)
class Validity:
    """One score of one family: means over `num_clips` clips, each in [0, 1].

    `unmoved` are true clips after H.264 at the corpus quality, under noise, and a frame early or
    late; `faults` wrong clips by the fault's name; `shuffled` true clips under the captions of
    others, which must equal `chance`.
    """

    family: str
    score: str
    num_clips: int
    truth: float
    faults: Mapping[str, float]
    shuffled: float
    chance: float
    blind: float
    unmoved: Mapping[str, float]

    def problems(self, floor: float = UNMOVED) -> list[str]:
        """What breaks the rule of WORLD.md, in words; `floor` is what unmoved clips must reach."""
        chance = self.chance
        slack = 4 * np.sqrt(max(chance * (1 - chance), 1e-3) / self.num_clips) + 0.02
        found = [] if self.truth >= TRUTH else [f"truth {self.truth:.3f}"]
        found += [f"{name} {value:.3f}" for name, value in self.unmoved.items() if value < floor]
        found += [
            f"fault {name} {value:.3f}" for name, value in self.faults.items() if value > FAULT
        ]
        if abs(self.shuffled - chance) > slack:
            found.append(f"shuffled {self.shuffled:.3f}, stated chance {chance:.3f}")
        if self.blind < chance:
            found.append(f"blind {self.blind:.3f} below chance {chance:.3f}")
        if not self.faults:
            found.append("no planted fault")
        return [f"{self.family}.{self.score}: {text}" for text in found]


def measure(
    family: str,
    *,
    split: str = "val",
    frames: int = 17,
    height: int = 32,
    width: int = 32,
    num_clips: int = 64,
    seed: int = 7,
) -> list[Validity]:
    """What every score of a family is worth on clips of this size.

    Raises ValueError as `make_clip` does.
    """
    clips = [
        make_clip(seed, split, i, families=[family], frames=frames, height=height, width=width)
        for i in range(num_clips)
    ]
    means: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for index, clip in enumerate(clips):
        seen = Detection(clip.frames)
        other = clips[(index + 1) % num_clips].truth
        for kind, truth in (("truth", clip.truth), ("shuffled", other)):
            for score, value in score_clip(seen, truth).items():
                means[kind, score].append(value)
        levels = clip.description.reading().levels(clip.description.canvas)
        for score, (chance, blind) in levels.items():
            means["chance", score].append(chance)
            means["blind", score].append(blind)
        for kind, frames_now in unmoved(clip, np.random.default_rng(index)):
            for score, value in score_clip(frames_now, clip.truth).items():
                means[kind, score].append(value)
    scores = sorted({score for kind, score in means if kind == "truth"})
    kinds = sorted({kind for kind, _ in means} - {"truth", "shuffled", "chance", "blind"})
    faults = _fault_scores(family, clips)

    def mean(kind: str, score: str) -> float:
        return float(np.mean(means[kind, score]))

    return [
        Validity(
            family,
            score,
            len(means["truth", score]),
            mean("truth", score),
            faults[score],
            mean("shuffled", score),
            mean("chance", score),
            mean("blind", score),
            {kind: mean(kind, score) for kind in kinds},
        )
        for score in scores
    ]


def unmoved(clip: WorldClip, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """The true clip in ways that must not change a score, each with its name."""
    noisy = clip.frames + rng.normal(0.0, NOISE, clip.frames.shape)
    yield "noise", noisy.round().clip(0, 255).astype(np.uint8)
    last = len(clip.frames) - 1
    if last == 0:
        return
    times = [t / clip.fps for t in range(last + 1)]
    yield "h264", decode_clip(encode_video(clip.frames, clip.fps, crf=CRF), times)
    for name, by in (("early", 1), ("late", -1)):
        yield name, clip.frames[np.clip(np.arange(last + 1) + by, 0, last)]
    nudge = FAMILIES[clip.family].nudge
    if nudge is not None:
        for name, by in (("effect early", -1.0), ("effect late", 1.0)):
            yield name, render(nudge(clip.scene, by)).frames


def _fault_scores(family: str, clips: list[WorldClip]) -> dict[str, dict[str, float]]:
    """Of every score the mean under each of its planted faults, over the clips that ask for the
    score and have room for the fault. What is drawn once is scored for all that it must break."""
    faults = FAMILIES[family].faults
    broken: defaultdict[Fault, list[str]] = defaultdict(list)
    for score, planted in faults.items():
        for fault in planted:
            broken[fault].append(score)
    asking = {score: sum(score in clip.truth["expect"] for clip in clips) for score in faults}
    found: dict[str, dict[str, float]] = {score: {} for score in faults}
    for fault, scores in broken.items():
        rows: defaultdict[str, list[float]] = defaultdict(list)
        for clip in clips:
            expect = {s: clip.truth["expect"][s] for s in scores if s in clip.truth["expect"]}
            frames = fault(clip) if expect else None
            for score, value in score_frames(frames, expect).items() if frames is not None else ():
                rows[score].append(value)
        for score in scores:
            if 4 * len(rows[score]) < asking[score]:
                raise RuntimeError(
                    f"{family}: fault {fault.__name__} of {score} fits {len(rows[score])} of "
                    f"{asking[score]} clips: give it room or let it go"
                )
            if rows[score]:
                found[score][fault.__name__] = float(np.mean(rows[score]))
    return found
