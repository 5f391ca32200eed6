"""The training loop: log, validate, save and stop at the top, one optimizer step at the bottom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.data.loader import Batch, Loader, chain_digests
from longtake.data.plan import Exclusion, Plan
from longtake.models.transfer import HostCopy
from longtake.train import checkpoint
from longtake.train.attempts import Attempts
from longtake.train.card import card_row
from longtake.train.checkpoint_writer import BackgroundWriter
from longtake.train.config import to_tree
from longtake.train.console import RunConsole
from longtake.train.ema import Ema
from longtake.train.engine import Engine, Ranks, StepResult
from longtake.train.health import MIN_WATCHED, Quarantine, Spikes, StopSignal
from longtake.train.metrics import WeightedMean
from longtake.train.optim import lr_at
from longtake.train.playback import write_drawings
from longtake.train.read_once import read_once
from longtake.train.recovery import Taken, examine
from longtake.train.report_matrix import show_matrix
from longtake.train.run_folder import FINISHED, PREEMPTED, SAMPLES, mark
from longtake.train.schema import DiTRun, VAERun
from longtake.train.step_times import StepTimes, Work
from longtake.train.tasks import Means, Task
from longtake.train.tracking import Tracker
from longtake.train.validation import Validation
from longtake.train.watchdog import Watchdog
from longtake.train.world_evaluation import WorldEvaluation


@dataclass(frozen=True)
class Agreed:
    """What all ranks know about a step once each has loaded its slots."""

    weight: float  # denominator of the loss
    work: Work
    stop: bool


@dataclass
class Training:
    """A run in progress: what the loop reads, advances and asks for."""

    config: VAERun | DiTRun
    folder: Path
    ranks: Ranks
    task: Task
    engine: Engine
    ema: Ema
    plan: Plan
    slots: range  # of this rank
    validation: Validation
    quarantine: Quarantine
    spikes: Spikes
    writer: BackgroundWriter
    attempts: Attempts | None  # on rank 0
    attempt: int  # number of the present one
    tracker: Tracker | None
    times: StepTimes
    console: RunConsole
    signals: StopSignal
    world: WorldEvaluation | None
    losses: WeightedMean  # since the last log row
    step: int
    samples_seen: int
    data_hash: str  # of every batch so far, in order: the same at any number of ranks

    def __post_init__(self) -> None:
        self._taken: Taken | None = None  # the last step, until it is settled
        self.load_from(self.step)
        self._told: set[int] = set()  # validation samples that are known to be left out
        self.resumed_at = self.step if self.step > 0 else -1
        self.watchdog = Watchdog(
            self.folder,
            self.attempt,
            self.ranks,
            self.config.train,
            lambda: self._loader.describe(),
        )

    def load_from(self, step: int) -> None:
        """Load `step` next, without what was found to be bad."""
        self.next_load = step
        bad = self.quarantine.exclusions
        self._loader = Loader(self.plan, self.slots, start_step=step, exclusions=bad)
        self._batches = iter(self._loader)

    def pauses_at(self, step: int) -> bool:
        """Whether something other than the next step is due before it."""
        config = self.config.train
        every = config.val_every, config.sample_every, self.evaluate_every
        pauses = step == config.steps or self.saves_at(step)
        return pauses or any(is_due(step, each, False) for each in every)

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due before `step`. The first is due no later than where jumps
        of the loss begin to be judged, so that there is one to go back to."""
        config = self.config.train
        if self.spikes.losses.factor and step == MIN_WATCHED < config.checkpoint_every:
            return True
        return step > 0 and is_due(step, config.checkpoint_every, step == config.steps)

    @property
    def evaluate_every(self) -> int:
        """Steps between world evaluations; 0 without one."""
        return self.config.evaluation.every if isinstance(self.config, DiTRun) else 0

    def begin_step(self) -> None:
        """The present step begins: whoever watches may know."""
        self.watchdog.begin(self.step)
        if self.attempts is not None:
            self.attempts.beat(self.step)

    def load(self) -> list[Batch]:
        """This rank's batches of the present step."""
        self.next_load = self.step + 1
        mine = next(self._batches) if self.ranks.is_reader else ()
        return list(read_once(mine, len(self.slots), self.ranks))

    def agree(self, batches: list[Batch]) -> Agreed:
        """Share what this rank found: its part of the denominator, bad samples, a stop signal.

        Exclusions are durable in quarantine.jsonl when it returns, before the optimizer steps.
        """
        mine = batches if self.ranks.is_reader else []  # what a group shares counts once
        report = {
            "weight": sum(map(self.task.weight, mine)),
            "work": asdict(self._work(mine)),
            "stop": self.signals.received,
            "unwritten": self.writer.problem(),
            "data": [batch.digest for batch in mine],
            "bad": [asdict(exclusion) for batch in mine for exclusion in batch.excluded],
        }
        reports = self.ranks.gather(report)
        unwritten = [r["unwritten"] for r in reports if r["unwritten"]]
        if unwritten:
            raise checkpoint.CheckpointError(unwritten[0])
        new = self.exclude([report["bad"] for report in reports])
        if new:
            for exclusion in new:
                self.console.say(f"left out from here on: {exclusion.reason}")
            self.quarantine.check(self.samples_seen)
            self.load_from(self.next_load)
        self.data_hash = chain_digests(self.data_hash, (d for r in reports for d in r["data"]))
        work = Work()
        for each in reports:
            work.add(Work(**each["work"]))
        stops = [r["stop"] for r in reports if r["stop"]]
        if stops:
            self.console.say(f"{stops[0]}: saving after this step")
        return Agreed(sum(r["weight"] for r in reports), work, bool(stops))

    def _work(self, batches: list[Batch]) -> Work:
        samples = [sample for batch in batches for sample in batch.samples]
        return Work(
            samples=len(samples),
            frames=sum(sample.shape[0] for sample in samples),
            tokens=sum(map(self.task.tokens, batches)),
            flops=sum(map(self.task.flops, batches)) if self.times.peak_flops else 0.0,
        )

    def exclude(self, found: list[list[dict[str, Any]]]) -> list[Exclusion]:
        """Exclusions as every rank found them, agreed on and durable; returns what is new."""
        new = self.quarantine.agree([[Exclusion(**each) for each in mine] for mine in found])
        if new:
            self.ranks.barrier()  # rank 0 has written them down
        return new

    def taken(
        self, batches: list[Batch], shares: list[Tensor], weight: float, result: StepResult
    ) -> None:
        """Remember the step just taken, to be settled."""
        critic = self.task.adversary.last_result if self.task.adversary else None
        copies = HostCopy(torch.stack(shares))
        self._taken = Taken(self.step, batches, copies, weight, result, critic)

    def settle(self) -> None:
        """Act on the last step, of which the device has told by now; once."""
        taken, self._taken = self._taken, None
        if taken is not None:
            if not taken.result.skipped:
                self.ema.update(taken.step)
            examine(self, taken)

    def validate(self) -> None:
        """Validation of the raw and of the EMA weights; a row of `val/…` and `val/…_ema`."""
        if self.validation.plan is None:
            return
        raw = self._means(self.task.validate(self.engine, self.validation.batches()))
        with self.ema.swapped(self.engine):
            mean = self._means(self.task.validate(self.engine, self.validation.batches()))
        row = {f"val/{name}": value for name, value in raw.items()}
        left_out = self._left_out()
        if left_out:
            row["val/left_out"] = float(left_out)
        row |= {f"val/{name}_ema": value for name, value in mean.items()}
        self.log(row)
        if self.tracker is not None:
            show_matrix(row, self.folder, self.step, self.tracker)

    def _left_out(self) -> int:
        """How many samples of the pass no rank could read; each is named once."""
        reports = self.ranks.gather([[i, why] for i, why in self.validation.left_out.items()])
        found = {number: why for report in reports for number, why in report}
        for number in found.keys() - self._told:
            self.console.say(f"validation goes without: {found[number]}")
        self._told |= found.keys()
        return len(found)

    def _means(self, means: Means) -> dict[str, float]:
        return means.merged(self.ranks.gather_data(dict(means.sums)))

    def draw(self) -> None:
        """Let the EMA weights draw into samples/step-…, and show the files to the tracker."""
        with self.ema.swapped(self.engine):
            drawings = self.task.draw(self.engine, self.validation.head())
        if self.tracker is not None and drawings:
            files = write_drawings(self.folder / SAMPLES / f"step-{self.step:08d}", drawings)
            self.tracker.log_videos(self.step, files)

    def evaluate(self) -> None:
        """Draw and score world prompts with the EMA weights; a row of `card.mean` and `eval/…`."""
        if self.world is not None:
            with self.ema.swapped(self.engine):
                card = self.world.run()
            self.log(card_row(card))

    def save(self) -> None:
        """Begin to write a checkpoint; all ranks together."""
        state = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "data_hash": self.data_hash,
            "losses": self.losses.state(self.ranks),
            "exclusions": self.quarantine.state(),
            "spikes": self.spikes.state(),
            "adversary": self.task.adversary.state() if self.task.adversary else None,
            "plan": self.plan.fingerprint,
            "useful_seconds": self.times.useful,
            "rounds": self.world.rounds if self.world else {},
        }
        adversary, config = self.task.adversary, to_tree(self.config)
        self.writer.start(self.step, self.engine, self.ema, adversary, state, config)

    def log_step(self, row: Mapping[str, float | str]) -> None:
        """A row of what training itself does; all ranks together, and a host sync."""
        times, by_rank = self.times.read()
        full = {**row, "samples_seen": self.samples_seen, **self.losses.read(self.ranks), **times}
        full["quarantined"] = self.quarantine.num_samples
        if self.writer.copies is not None:
            full["copy_failures"] = self.writer.copies.failures
        if self.attempts is not None:
            seconds = self.attempts.seconds()
            full["goodput"] = self.times.useful / self.attempts.since_first_start()
            if self.config.train.cost_per_hour:
                full["cost"] = self.config.train.cost_per_hour * seconds / 3600
        if self.tracker is not None and self.ranks.world_size > 1:
            self.tracker.log_ranks(self.step, by_rank)
        self.log({**full, "data_hash": self.data_hash})

    def log(self, row: Mapping[str, float | str]) -> None:
        """A row of metrics at the present step, on rank 0."""
        if self.tracker is not None:
            self.tracker.log(self.step, row)
        self.console.show(self.step, row)

    def mark(self, marker: str) -> None:
        """Leave the marker of how the run stands."""
        if self.ranks.is_main:
            mark(self.folder, marker, step=self.step)

    def close(self, exit_code: int) -> None:
        """Give back the terminal, the signals and the tracker."""
        self.watchdog.close()
        self.writer.close(failed=exit_code not in (0, 75))
        self.console.close()
        self.signals.restore()
        if self.tracker is not None:
            self.tracker.finish(exit_code)
        if self.attempts is not None:
            self.attempts.close()


def train(run: Training) -> bool:
    """Run to train.steps, or until a signal. True when finished, False when it should go on later.

    One step: every rank loads its slots, all agree on samples that could not be used and on
    stopping and sum up the denominator, each slot adds its gradient, one AdamW step.
    """
    config, engine, task = run.config.train, run.engine, run.task
    times, losses = run.times, run.losses
    times.start()
    stop = False
    while True:
        if stop or run.pauses_at(run.step):
            run.settle()
        step = run.step
        is_last = step == config.steps
        with times.pausing():
            # What a resumed run did at this step before it was saved is not done twice.
            if step != run.resumed_at:
                if is_due(step, config.val_every, is_last):
                    run.validate()
                if is_due(step, config.sample_every, is_last):
                    run.draw()
                if is_due(step, run.evaluate_every, is_last) and not stop:
                    run.evaluate()
                if stop or run.saves_at(step):
                    run.save()
        if is_last or stop:
            run.writer.finish()
            run.mark(FINISHED if is_last else PREEMPTED)
            return is_last

        run.begin_step()
        with times.waiting_for_data():
            batches = run.load()
        with times.waiting_for_others():
            agreed = run.agree(batches)
        stop = agreed.stop
        shares = []
        for index, batch in enumerate(batches):
            is_end = index == len(batches) - 1
            with times.working():
                loss = task.loss(engine, batch)
            if index == 0:
                run.settle()  # the device has had this forward to do meanwhile
                if run.step != step:
                    break
            shares.append(loss.total.detach())
            if is_end:  # ends with talking to the other ranks
                engine.backward(loss.total / agreed.weight, last=True)
            else:
                with times.working():
                    engine.backward(loss.total / agreed.weight, last=False)
            if task.adversary and loss.critic is not None:
                task.adversary.engine.backward(loss.critic / agreed.weight, last=is_end)
            losses.add(loss)
        if run.step != step:
            continue  # back at a checkpoint
        losses.add_weight(agreed.weight)
        lr, clip_at = lr_at(run.config.optim, step, config.steps), run.spikes.norms.limit
        result = engine.clip_and_step(lr, clip_at)
        if task.adversary:
            task.adversary.finish_step(step, agreed.weight)
        run.step = step + 1
        run.taken(batches, shares, agreed.weight, result)
        run.samples_seen += agreed.work.samples
        times.count(agreed.work)
        if run.step % config.log_every == 0 or run.step == config.steps:
            played = task.adversary.row() if task.adversary else {}
            run.log_step({"lr": lr, "grad_norm": result.grad_norm, "clip_at": clip_at, **played})
        run.console.advance(run.step)
        run.watchdog.end()


def is_due(step: int, every: int, is_last: bool) -> bool:
    """Whether something done every so many steps is due before step `step`; at the end always."""
    return every > 0 and (step % every == 0 or is_last)
