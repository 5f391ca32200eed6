"""The training loop: log, validate, save and stop at the top, one optimizer step at the bottom."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from longtake.data.loader import Batch, Loader, chain_digests
from longtake.data.plan import Exclusion, Plan
from longtake.train import checkpoint
from longtake.train.attempts import Attempts
from longtake.train.card import card_row
from longtake.train.checkpoint_writer import BackgroundWriter
from longtake.train.config import to_tree
from longtake.train.console import RunConsole
from longtake.train.ema import Ema
from longtake.train.engine import Engine, Ranks, StepResult
from longtake.train.health import Quarantine, Spikes, StopSignal
from longtake.train.metrics import WeightedMean
from longtake.train.optim import lr_at
from longtake.train.playback import write_drawings
from longtake.train.read_once import read_once
from longtake.train.report_matrix import show_matrix
from longtake.train.run_folder import CHECKPOINTS, FINISHED, PREEMPTED, SAMPLES, mark
from longtake.train.schema import DiTRun, VAERun
from longtake.train.step_times import StepTimes, Work
from longtake.train.tasks import LossSum, Means, Task
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
        self._load_from(self.step)
        self._told: set[int] = set()  # validation samples that are known to be left out
        self.resumed_at = self.step if self.step > 0 else -1
        self.watchdog = Watchdog(
            self.folder,
            self.attempt,
            self.ranks,
            self.config.train,
            lambda: self._loader.describe(),
        )

    def _load_from(self, step: int) -> None:
        bad = self.quarantine.exclusions
        self._loader = Loader(self.plan, self.slots, start_step=step, exclusions=bad)
        self._batches = iter(self._loader)

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
        new = self._exclude([report["bad"] for report in reports])
        if new:
            for exclusion in new:
                self.console.say(f"left out from here on: {exclusion.reason}")
            self.quarantine.check(self.samples_seen)
            self._load_from(self.step + 1)
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
            flops=sum(map(self.task.flops, batches)),
        )

    def _exclude(self, found: list[list[dict[str, Any]]]) -> list[Exclusion]:
        """Exclusions as every rank found them, agreed on and durable; returns what is new."""
        new = self.quarantine.agree([[Exclusion(**each) for each in mine] for mine in found])
        if new:
            self.ranks.barrier()  # rank 0 has written them down
        return new

    def examine(
        self, batches: list[Batch], losses: list[LossSum], weight: float, result: StepResult
    ) -> None:
        """Look at the step just taken, of which `weight` is the denominator.

        Where it was skipped (something was not finite) its micro-batches of such a loss are left
        out from here on, or all of them where none has; after train.max_skips in a row the run goes
        back to the last good checkpoint, and without them from there on. It goes back where the
        loss jumped, too. RuntimeError after train.max_rewinds such returns.
        """
        if result.skipped:
            bad = [not math.isfinite(loss.total.item()) for loss in losses]
            reason = f"loss or gradient not finite at step {self.step}"
            self._leave_out(batches, bad, self.step, reason)  # done again, it is skipped again
            self.spikes.skips += 1
            if self.spikes.skips == self.config.train.max_skips:
                self.rewind(f"{self.spikes.skips} steps in a row were skipped")
            return
        self.spikes.skips = 0
        self.spikes.norms.add(result.grad_norm)
        if self.spikes.losses.factor:
            self._examine_loss(batches, [loss.total.item() for loss in losses], weight)

    def _examine_loss(self, batches: list[Batch], shares: list[float], weight: float) -> None:
        watch = self.spikes.losses
        total = sum(self.ranks.gather_data(sum(shares))) / weight
        if watch.jumped(total):
            counts = map(self.task.weight, batches)
            bad = [watch.is_high(share / n) for share, n in zip(shares, counts, strict=True)]
            reason = f"loss jumped to {total:.4g} at step {self.step}"
            self._leave_out(batches, bad, self.step - 1, reason)  # done again, without them
            self.rewind(reason)

    def _leave_out(
        self, batches: list[Batch], bad: list[bool], from_step: int, reason: str
    ) -> None:
        """Exclude the samples of the bad micro-batches of all ranks; of all where none is bad."""
        everything = not any(self.ranks.gather(any(bad)))
        samples = [
            sample
            for batch, is_bad in zip(batches, bad, strict=True)
            if is_bad or everything
            for sample in batch.samples
        ]
        mine = [Exclusion(s.sample_id, from_step, f"{s.key}: {reason}") for s in samples]
        new = self._exclude(self.ranks.gather([asdict(exclusion) for exclusion in mine]))
        self.console.say(f"{reason}: {len(new)} samples are left out from here on")
        self.quarantine.check(self.samples_seen)
        self._load_from(self.step)

    def rewind(self, reason: str) -> None:
        """Back to the last good checkpoint, if there is one; samples that were left out since are
        left out from there on."""
        spikes, limit = self.spikes, self.config.train.max_rewinds
        spikes.rewinds += 1
        spikes.skips = 0
        if spikes.rewinds > limit:
            raise RuntimeError(
                f"{reason}; the run went back {limit} times before: train.max_rewinds={limit}. "
                "Lower optim.lr, or look at quarantine.jsonl"
            )
        self.writer.finish()
        path = checkpoint.find_last_good(self.folder / CHECKPOINTS, self.ranks)
        if path is None:
            self.console.say("there is no checkpoint to go back to: the run goes on as it is")
            return
        state = checkpoint.load_into(path, self.engine, self.ema, self.task.adversary)
        self.step, self.samples_seen = state["step"], state["samples_seen"]
        self.data_hash = state["data_hash"]
        self.losses.load(state["losses"], self.ranks)
        spikes.load(state["spikes"])
        self.times.useful = state["useful_seconds"]
        late = [e for e in self.quarantine.exclusions if e.from_step > self.step]
        self.quarantine.agree([[replace(each, from_step=self.step) for each in late]])
        self.ranks.barrier()  # rank 0 has written them down
        self.resumed_at = self.step
        self._load_from(self.step)
        self.console.say(f"{reason}: back at step {self.step}")

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
                if stop or (step > 0 and is_due(step, config.checkpoint_every, is_last)):
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
        taken = []
        for index, batch in enumerate(batches):
            is_end = index == len(batches) - 1
            with times.working():
                loss = task.loss(engine, batch)
                taken.append(loss)
                if not is_end:
                    engine.backward(loss.total / agreed.weight, last=False)
            if is_end:
                engine.backward(loss.total / agreed.weight, last=True)
            if task.adversary and loss.critic is not None:
                task.adversary.engine.backward(loss.critic / agreed.weight, last=is_end)
            losses.add(loss)
        losses.add_weight(agreed.weight)
        lr, clip_at = lr_at(run.config.optim, step, config.steps), run.spikes.norms.limit
        result = engine.clip_and_step(lr, clip_at)
        played = task.adversary.finish_step(step, agreed.weight) if task.adversary else {}
        run.step = step + 1
        if not result.skipped:
            run.ema.update(run.step)
        run.samples_seen += agreed.work.samples
        times.count(agreed.work)
        if run.step % config.log_every == 0 or run.step == config.steps:
            run.log_step({"lr": lr, "grad_norm": result.grad_norm, "clip_at": clip_at, **played})
        run.console.advance(run.step)
        run.watchdog.end()
        run.examine(batches, taken, agreed.weight, result)


def is_due(step: int, every: int, is_last: bool) -> bool:
    """Whether something done every so many steps is due before step `step`; at the end always."""
    return every > 0 and (step % every == 0 or is_last)
