"""Making and scoring clips of the world:
`OMP_NUM_THREADS=1 python -m tests.bench.bench_world [--clips N] [FAMILY ...]`.

CPU time for clips of 17x32x32 with captions and truth, and for scoring them, family by family. Bar:
500 clips a second and core, mean over all families (each as many clips).
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

from longtake.data.world import FAMILIES, make_clip, score_clip

BAR = 500  # clips a second and core
REPEATS = 3  # the best of them counts: other work on the machine only ever adds time


def main() -> None:
    """Print clips a second and milliseconds of scoring for every family, and the mean."""
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", default=sorted(FAMILIES))
    parser.add_argument("--clips", type=int, default=100, help="of each family")
    args = parser.parse_args()
    made = {name: measure(name, args.clips) for name in args.families}
    for name, (making, scoring) in made.items():
        print(f"{name:12} {1 / making:6.0f} clips/s, scored in {1000 * scoring:5.1f} ms")
    making, scoring = (sum(times) / len(made) for times in zip(*made.values(), strict=True))
    print(f"{'mean':12} {1 / making:6.0f} clips/s (bar {BAR}), scored in {1000 * scoring:5.1f} ms")


def measure(family: str, num_clips: int) -> tuple[float, float]:
    """Seconds of one core that it takes to make and to score a clip of 17x32x32."""

    def make(index: int) -> Any:
        return make_clip(0, "train", index, families=[family])

    clips = [make(index) for index in range(num_clips)]
    return (
        best(make, range(num_clips)),
        best(lambda clip: score_clip(clip.frames, clip.truth), clips),
    )


def best(work: Callable[[Any], Any], items: Sequence[Any]) -> float:
    """CPU seconds an item, in the best of some rounds."""
    seconds = []
    for _ in range(REPEATS):
        started = time.process_time()
        for item in items:
            work(item)
        seconds.append((time.process_time() - started) / len(items))
    return min(seconds)


if __name__ == "__main__":
    main()
