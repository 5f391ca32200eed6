"""World scores inside training: prompts drawn from the EMA weights within a budget of seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from time import monotonic

from longtake.train.card import Card, ClipScores, build_card
from longtake.train.dit_task import DiTTask
from longtake.train.frame_rate import drawn_rates
from longtake.train.painter import Painter
from longtake.train.ranks import Ranks
from longtake.train.runs import RunPlace
from longtake.train.schema import DiTRun
from longtake.train.world_prompts import (
    Prompt,
    PromptSet,
    Scorer,
    prompts,
    prompts_for,
    shapes_for,
)


def prompts_of(config: DiTRun, stride: int) -> dict[str, PromptSet]:
    """What `evaluation` asks for, by task; `stride` is the codec's in time. ValueError for what
    world or buckets do not hold."""
    settings, rates = config.evaluation, drawn_rates(config)
    return {
        task: prompts_for(
            *(config, task, settings.families, settings.captions),
            *(shapes_for(config, task, stride), rates),
            splits=tuple(settings.splits),
            num_prompts=settings.num_prompts,
            num_pairs=settings.num_pairs,
            seed=settings.seed,
        )
        for task in config.trained_tasks
    }


class WorldEvaluation:
    """The evaluation of `longtake evaluate` on as many prompts as `evaluation.seconds` allow.

    Prompts come in rounds of one for every family in every split, always in the same order. The
    first evaluation finds out how many `rounds` the budget holds, at least one; later ones ask the
    same, also after a resume, so that the numbers of a run can be compared.
    """

    def __init__(
        self,
        config: DiTRun,
        task: DiTTask,
        place: RunPlace,
        ranks: Ranks,
        rounds: Mapping[str, int],
    ) -> None:
        """ValueError for families or splits that the run's buckets cannot hold."""
        self.config, self.task, self.place, self.ranks = config, task, place, ranks
        self.wanted = prompts_of(config, task.codec.strides[0])
        kind = next(iter(self.wanted.values())).kind
        self._scorer = Scorer(kind, config.evaluation.seed)
        self.rounds = dict(rounds)  # by task, once they are known

    def run(self) -> Card:
        """Draw with the weights now in the module; all ranks together, each its share."""
        painter = self.task.painter(self.place)
        seconds = self.config.evaluation.seconds / len(self.wanted)
        rows = [row for name in self.wanted for row in self._score_task(painter, name, seconds)]
        gathered = self.ranks.gather_data([asdict(row) for row in rows])
        return build_card([ClipScores(**row) for part in gathered for row in part], {})

    def _score_task(self, painter: Painter, task: str, seconds: float) -> list[ClipScores]:
        """Rows of this rank, round after round, until the number or the budget is reached."""
        wanted, started = self.wanted[task], monotonic()
        everything = prompts(wanted, task, painter.codec.strides[0])
        rows: list[ClipScores] = []
        for number in range(1, wanted.num_prompts + 1):
            begun = monotonic()
            rows += self._score_round(painter, task, list(islice(everything, wanted.round)))
            now = monotonic()
            spent = max(self.ranks.gather((now - started) + (now - begun)))  # with another round
            known = self.rounds.get(task)
            if number == known or (known is None and spent > seconds):
                break
        self.rounds.setdefault(task, number)
        return rows

    def _score_round(
        self, painter: Painter, task: str, items: Sequence[Prompt]
    ) -> list[ClipScores]:
        """This rank's rows of a round. Ranks draw equally often, as partitioned weights demand: one
        whose share is shorter draws a prompt once more, which does not count."""
        size, num_ranks = self.config.evaluation.batch_size, self.ranks.num_data_ranks
        mine = items[self.ranks.data_rank :: num_ranks]
        longest = -(-len(items) // num_ranks)
        rows: list[ClipScores] = []
        for start in range(0, longest, size):
            batch = mine[start : start + size]
            scored = self._scorer.batch(painter, batch or items[:1], task, "ema")
            rows += [one.row for one in scored] if batch else []
        return rows
