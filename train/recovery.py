"""What a run does about a step that went wrong: samples left out, a way back to a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from longtake.data.loader import Batch
from longtake.data.plan import Exclusion
from longtake.models.transfer import HostCopy
from longtake.train import checkpoint
from longtake.train.run_folder import CHECKPOINTS
from longtake.train.strategy import StepResult

if TYPE_CHECKING:
    from longtake.train.trainer import Training


@dataclass(frozen=True)
class Taken:
    """An optimizer step of which the device has yet to tell what came of it."""

    step: int  # how many steps there are with it
    batches: Sequence[Batch]  # of this rank
    shares: HostCopy  # (len(batches),) of the loss, to be divided by `weight`
    weight: float
    result: StepResult
    critic: StepResult | None  # of the adversary's lesson, if there was one


def examine(run: Training, taken: Taken) -> None:
    """Look at a step; all ranks together.

    Where it was skipped (something was not finite, of the model or of its adversary) its
    micro-batches of such a loss are left out, or all of them where none has: from the next step on
    that no rank can have loaded yet. After train.max_skips in a row the run goes back to the last
    good checkpoint, and without them from there on. It goes back where the loss jumped, too.
    RuntimeError after train.max_rewinds such returns.
    """
    spikes = run.spikes
    critic_skipped = taken.critic is not None and taken.critic.skipped
    if taken.result.skipped or critic_skipped:
        bad = [not math.isfinite(share) for share in taken.shares.read().tolist()]
        whose = "" if taken.result.skipped else " of the discriminator"
        reason = f"loss or gradient{whose} not finite at step {taken.step}"
        _leave_out(run, taken.batches, bad, taken.step + 1, reason)
        spikes.skips += 1
        if spikes.skips == run.config.train.max_skips:
            _rewind(run, f"{spikes.skips} steps in a row were skipped")
        return
    spikes.skips = 0
    spikes.norms.add(taken.result.grad_norm)
    if spikes.losses.factor:
        _examine_loss(run, taken)


def _examine_loss(run: Training, taken: Taken) -> None:
    watch, shares = run.spikes.losses, taken.shares.read().tolist()
    total = sum(run.ranks.gather_data(sum(shares))) / taken.weight
    if run.task.changes_loss(taken.step - 1):
        watch.recent = []
    if watch.jumped(total):
        counts = map(run.task.weight, taken.batches)
        bad = [watch.is_high(share / n) for share, n in zip(shares, counts, strict=True)]
        reason = f"loss jumped to {total:.4g} at step {taken.step}"
        _leave_out(run, taken.batches, bad, taken.step - 1, reason)  # done again, without them
        _rewind(run, reason)


def _leave_out(
    run: Training, batches: Sequence[Batch], bad: list[bool], from_step: int, reason: str
) -> None:
    """Exclude the samples of the bad micro-batches of all ranks; of all where none is bad."""
    everything = not any(run.ranks.gather(any(bad)))
    samples = [
        sample
        for batch, is_bad in zip(batches, bad, strict=True)
        if is_bad or everything
        for sample in batch.samples
    ]
    mine = [Exclusion(s.sample_id, from_step, f"{s.key}: {reason}") for s in samples]
    new = run.exclude(run.ranks.gather([asdict(exclusion) for exclusion in mine]))
    run.console.say(f"{reason}: {len(new)} samples are left out from here on")
    run.quarantine.check(run.samples_seen)
    run.load_from(run.next_load)


def _rewind(run: Training, reason: str) -> None:
    """Back to the last good checkpoint, if there is one; samples that were left out since are left
    out from there on."""
    spikes, limit = run.spikes, run.config.train.max_rewinds
    spikes.rewinds += 1
    spikes.skips = 0
    if spikes.rewinds > limit:
        raise RuntimeError(
            f"{reason}; so it was {limit} times before: train.max_rewinds={limit}. "
            "Lower optim.lr, or look at quarantine.jsonl"
        )
    run.watchdog.rest()
    run.writer.finish()
    path = checkpoint.find_last_good(run.folder / CHECKPOINTS, run.ranks)
    if path is None:
        run.console.say("there is no checkpoint to go back to: the run goes on as it is")
        return
    state = checkpoint.load_into(path, run.engine, run.ema, run.task.adversary)
    run.step, run.samples_seen = state["step"], state["samples_seen"]
    run.data_hash = state["data_hash"]
    run.losses.load(state["losses"], run.ranks)
    spikes.load(state["spikes"])
    run.times.useful = state["useful_seconds"]
    late = [e for e in run.quarantine.exclusions if e.from_step > run.step]
    run.quarantine.agree([[replace(each, from_step=run.step) for each in late]])
    run.ranks.barrier()  # rank 0 has written them down
    run.resumed_at = run.step
    run.load_from(run.step)
    run.console.say(f"{reason}: back at step {run.step}")
