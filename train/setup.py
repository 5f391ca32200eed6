"""Everything a run needs before its first step.

`check` costs nothing but reading: config, folder, catalogues and plan, on every rank from equal
inputs, so that mistakes are found before a process group or a weight exists. `build` joins the
ranks, makes the weights and reads the last good checkpoint.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longtake.data.latents import (
    read_empty_text,
    read_manifest,
    refuse_missing_segments,
    refuse_other_stats,
    refuse_other_vae,
)
from longtake.data.plan import Plan, rank_slots
from longtake.data.plan.val_plan import ValPlan
from longtake.train import checkpoint
from longtake.train.attempts import Attempts
from longtake.train.caption_rows import check_scores
from longtake.train.checkpoint_copy import CheckpointCopies, copy_url
from longtake.train.checkpoint_writer import BackgroundWriter
from longtake.train.checks import require
from longtake.train.codec import check_text, keep_manifest, load_codec, time_stride
from longtake.train.config import (
    check_world_size,
    load_config,
    to_tree,
    training_changes,
    write_config,
)
from longtake.train.console import RunConsole
from longtake.train.dit_task import DiTTask
from longtake.train.ema import Ema
from longtake.train.engine import Engine, Ranks, init_distributed
from longtake.train.given import needed_segments
from longtake.train.health import Quarantine, Spikes, StopSignal
from longtake.train.heap import keep_freed_memory
from longtake.train.init_from import start_from
from longtake.train.lora import add_adapters
from longtake.train.metrics import WeightedMean
from longtake.train.provenance import write_provenance
from longtake.train.run_folder import (
    CHECKPOINTS,
    CONFIG,
    QUARANTINE,
    RUNNING,
    FolderInUse,
    FolderLock,
    mark,
    read_marker,
)
from longtake.train.runs import RunPlace, pick_device, read_run_config
from longtake.train.schema import DiTRun, VAERun
from longtake.train.step_times import StepTimes
from longtake.train.tasks import Opponent, Task
from longtake.train.tracking import Tracker
from longtake.train.trainer import Training
from longtake.train.vae_task import VAETask
from longtake.train.validation import Validation
from longtake.train.world_evaluation import WorldEvaluation, prompts_of

FRESH: dict[str, Any] = {
    "step": 0,
    "samples_seen": 0,
    "data_hash": "",
    "exclusions": [],
    "losses": {"ranks": [], "weight": 0.0},
    "spikes": {"losses": [], "norms": [0, 0.0, 0.0, 0.0], "skips": 0, "rewinds": 0},
    "useful_seconds": 0.0,
    "rounds": {},
}


@dataclass(frozen=True)
class Prepared:
    """A config that passed every check that needs no process group and no weights."""

    config: VAERun | DiTRun
    folder: Path
    plan: Plan
    validation: ValPlan | None


def check(config: VAERun | DiTRun) -> Prepared:
    """Read what the run will need; ValueError, alike on every rank, for what cannot work."""
    require(bool(config.output_dir.strip()), "output_dir is empty: name a folder")
    folder = Path(config.output_dir).absolute()
    require(not folder.exists() or folder.is_dir(), f"output_dir={folder} is not a folder")
    if config.train.checkpoint_copy is not None:
        copy_url(config.train.checkpoint_copy, folder)
    check_world_size(config, int(os.environ.get("WORLD_SIZE", "1")))
    _check_folder(config, folder)
    _check_latents(config)
    _check_packs(config)
    plan = Plan.from_config(config.data, config.seed)
    validation = _validation(config, plan)
    _check_kinds(config, plan, validation)
    if isinstance(config, DiTRun):
        check_scores(config)
        if config.evaluation.every:
            prompts_of(config, time_stride(config))
    return Prepared(config, folder, plan, validation)


def _check_folder(config: VAERun | DiTRun, folder: Path) -> None:
    if not (folder / CONFIG).exists():
        return
    if config.resume == "never":
        raise ValueError(
            f"resume=never, but {folder} already holds a run "
            f"({read_marker(folder) or 'never started'}); choose another output_dir or resume=auto"
        )
    if config.resume == "force" or not checkpoint.list_steps(folder / CHECKPOINTS):
        return  # nothing that another config would contradict
    _refuse_changes(load_config(folder / CONFIG), config, folder)


def _refuse_changes(old: VAERun | DiTRun, new: VAERun | DiTRun, where: Path) -> None:
    changes = training_changes(to_tree(old), to_tree(new))
    if changes:
        listed = "\n  ".join(changes)
        raise ValueError(
            f"{where} was started with another config; these keys would change the training:\n"
            f"  {listed}\nset them back, use resume=force to go on all the same, or give another "
            "output_dir"
        )


def _check_latents(config: VAERun | DiTRun) -> None:
    """Cached latents and text must be of the kind and size the model takes."""
    if isinstance(config, VAERun) or config.codec == "identity":
        return
    place = config.data.train[0].path
    first = read_manifest(place)
    for name, datasets in (("train", config.data.train), ("val", config.data.val)):
        for index, dataset in enumerate(datasets):
            manifest = read_manifest(dataset.path)
            refuse_other_vae(manifest, first.vae_hash)
            refuse_other_stats(first, manifest, (place, dataset.path))
            check_text(manifest, config, Path(dataset.path))
            refuse_missing_segments(manifest, needed_segments(config, manifest), dataset.path)
            model, made = config.model, manifest.z_dim
            taken = 2 * made + manifest.strides[0] if config.has_channels else made
            require(
                (model.in_channels, model.out_channels) == (taken, made),
                f"model.in_channels={model.in_channels} and out_channels={model.out_channels} must "
                f"be {taken} and {made} for the latents in data.{name}.{index}.path={dataset.path}",
            )
    if not config.text.is_trained:
        width = read_empty_text(place).shape[1]
        require(
            config.model.text_dim == width,
            f"model.text_dim={config.model.text_dim} must be {width}, the width of the cached text "
            f"in data.train.0.path={place} (and text.d_model with it)",
        )


def _check_packs(config: VAERun | DiTRun) -> None:
    """What the plan counts as a token must be one of the model: it bounds the packs."""
    if not config.data.pack or not isinstance(config, DiTRun):
        return
    is_identity = config.codec == "identity"
    strides = (1, 1, 1) if is_identity else read_manifest(config.data.train[0].path).strides
    token = [s * p for s, p in zip(strides, config.model.patch_size, strict=True)]
    require(
        list(config.data.cost.token) == token,
        f"data.cost.token={list(config.data.cost.token)} must be {token} with data.pack=true: what "
        "one token of the model covers, in frames and pixels",
    )


def _validation(config: VAERun | DiTRun, plan: Plan) -> ValPlan | None:
    if not config.data.val:
        return None
    num_samples = config.validation.num_samples
    return ValPlan.from_config(config.data, config.seed, num_samples, plan.closed)


def _check_kinds(config: VAERun | DiTRun, plan: Plan, validation: ValPlan | None) -> None:
    """A DiT on a VAE's latents takes shards of latents, everything else shards of clips."""
    wants_latents = isinstance(config, DiTRun) and config.codec != "identity"
    tables = {"train": plan.tables, "val": validation.tables if validation else []}
    for name, listed in tables.items():
        for index, table in enumerate(listed):
            require(
                table.info.holds_latents == wants_latents,
                f"data.{name}.{index}.path={table.root} holds "
                f"{'latents' if table.info.holds_latents else 'clips'}, this stage takes "
                f"{'latents of longtake encode' if wants_latents else 'clips'}",
            )


def join(prepared: Prepared) -> tuple[Ranks, FolderLock | None]:
    """Join the ranks and claim the folder; FolderInUse, on all ranks, when it is taken."""
    config = prepared.config
    _prepare_torch(config)
    device, degree = pick_device(config.train.device).type, config.engine.sequence_parallel
    if device == "cpu":
        keep_freed_memory()
    ranks = init_distributed(device, config.train.timeout, degree)
    return ranks, _claim(prepared.folder, ranks)


def build(prepared: Prepared, ranks: Ranks) -> Training:
    """Build the weights, read the last good checkpoint; ready for the loop."""
    config, folder, plan = prepared.config, prepared.folder, prepared.plan
    torch.manual_seed(config.seed)  # the initial weights, alike on every rank
    task = _build_task(config, folder, ranks)
    if isinstance(task, VAETask) and task.distance is not None and prepared.validation is not None:
        task.distance.check_pass(prepared.validation)
    writer = _open_writer(config, folder, ranks)
    last = _find_last(config, writer, ranks)
    started = _start(task, config) if last is None else []
    if isinstance(config, DiTRun) and config.lora is not None:
        add_adapters(task.module, config.lora)
    engine = Engine(task.module, config.optim, config.engine, ranks)
    ema = Ema(engine, config.ema)
    state = FRESH if last is None else _resume(prepared, last, engine, ema, task.adversary)
    log = folder / QUARANTINE if ranks.is_main else None
    quarantine = Quarantine(log, config.data.max_bad_fraction, plan.num_samples)
    written = Quarantine.read_rows(folder / QUARANTINE) if ranks.is_main else None
    quarantine.load([*state["exclusions"], *ranks.broadcast(written)])
    attempts, tracker = _open_folder(prepared, ranks)
    console = RunConsole(config.stage, config.train.steps, state["step"], ranks.is_main)
    if state["step"] == 0:
        console.say("\n".join([*started, plan.summary()]))
    else:
        console.say(f"{folder}: goes on at step {state['step']}")
    if isinstance(task, VAETask):
        for gap in task.not_measured():
            console.say(f"validation does not measure {gap}")
    losses = WeightedMean()
    losses.load(state["losses"], ranks)
    times = StepTimes(ranks, 1e12 * config.train.peak_tflops)
    times.useful = state["useful_seconds"]
    optim = config.optim
    spikes = Spikes(config.train.loss_jump, optim.clip_sigmas, optim.max_grad_norm)
    spikes.load(state["spikes"])
    slots = rank_slots(config.data.micro_batches_per_step, ranks.data_rank, ranks.num_data_ranks)
    return Training(
        config=config,
        folder=folder,
        ranks=ranks,
        task=task,
        engine=engine,
        ema=ema,
        plan=plan,
        slots=slots,
        validation=Validation(prepared.validation, config, ranks),
        quarantine=quarantine,
        spikes=spikes,
        writer=writer,
        attempts=attempts,
        attempt=ranks.broadcast(attempts.number if attempts else None),
        tracker=tracker,
        times=times,
        console=console,
        signals=StopSignal(),
        world=_world(config, task, folder, ranks, state["rounds"]),
        losses=losses,
        step=state["step"],
        samples_seen=state["samples_seen"],
        data_hash=state["data_hash"],
    )


def _open_writer(config: VAERun | DiTRun, folder: Path, ranks: Ranks) -> BackgroundWriter:
    train, checkpoints = config.train, folder / CHECKPOINTS
    keep, copies = checkpoint.Keep(train.keep_last, train.keep_every), None
    if train.checkpoint_copy is not None:
        url = copy_url(train.checkpoint_copy, folder)
        copies = CheckpointCopies(checkpoints, url, ranks, keep, config.data.cache)
    return BackgroundWriter(checkpoints, ranks, keep, copies)


def _find_last(config: VAERun | DiTRun, writer: BackgroundWriter, ranks: Ranks) -> Path | None:
    """The last good checkpoint of the run folder, or of its copies where these go further."""
    here = checkpoint.find_last_good(writer.folder, ranks)
    if writer.copies is None:
        return here
    if config.resume == "never" and writer.copies.whole_steps():
        raise ValueError(
            f"resume=never, but {writer.copies.url} already holds checkpoints: choose another "
            "train.checkpoint_copy, or resume=auto"
        )
    return writer.copies.fetch_newer(here)


def _world(
    config: VAERun | DiTRun, task: Task, folder: Path, ranks: Ranks, rounds: dict[str, int]
) -> WorldEvaluation | None:
    if not isinstance(task, DiTTask) or not isinstance(config, DiTRun):
        return None
    place = RunPlace(folder, folder, 0)
    return WorldEvaluation(config, task, place, ranks, rounds) if config.evaluation.every else None


def _claim(folder: Path, ranks: Ranks) -> FolderLock | None:
    """Rank 0 holds the folder; where it cannot, all ranks say so alike."""
    lock, problem = None, ""
    if ranks.is_main:
        try:
            lock = FolderLock(folder)
        except (FolderInUse, OSError) as error:
            problem = str(error)
    problem = ranks.broadcast(problem)
    if problem:
        raise FolderInUse(problem)
    return lock


def _prepare_torch(config: VAERun | DiTRun) -> None:
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def _build_task(config: VAERun | DiTRun, folder: Path, ranks: Ranks) -> VAETask | DiTTask:
    if isinstance(config, VAERun):
        return VAETask(config, ranks)
    codec = load_codec(config, folder=folder, device=ranks.device)
    for bucket in config.data.buckets:
        latents = codec.latent_shape(*bucket.shape)
        config.model.grid(latents[1:])
    task = DiTTask(config, ranks.device, codec)
    if ranks.sequence_group is not None:
        task.module.dit.share_tokens(ranks.sequence_group)
    return task


def _start(task: VAETask | DiTTask, config: VAERun | DiTRun) -> list[str]:
    """Weights of init_from, if any; what is to be said of it."""
    if config.init_from is None:
        return []
    more: dict[str, Any] = {}
    if isinstance(config, DiTRun):
        more = {"prediction": config.prediction, "rest_learns": config.lora is None}
    return [start_from(task.module, config.init_from, config.init_names, **more)]


def _resume(
    prepared: Prepared, path: Path, engine: Engine, ema: Ema, adversary: Opponent | None
) -> dict[str, Any]:
    """State of a good checkpoint, its tensors now in engine and EMA."""
    if prepared.config.resume != "force":  # one that was fetched knows more than the run folder
        place = RunPlace(prepared.folder, path, 0)
        _refuse_changes(read_run_config(place), prepared.config, path)
    state = checkpoint.load_into(path, engine, ema, adversary)
    steps = prepared.config.train.steps
    step = state["step"]
    require(step <= steps, f"train.steps={steps} lies before the {step} steps of {path}")
    is_same = state["plan"] == prepared.plan.fingerprint
    if not is_same and prepared.config.resume != "force":
        raise ValueError(
            f"data.train: the shards are not those that {path} was trained on (or were indexed "
            "anew with other content); put them back, use resume=force, or give another output_dir"
        )
    return FRESH | state


def _open_folder(prepared: Prepared, ranks: Ranks) -> tuple[Attempts | None, Tracker | None]:
    """Write what a run folder starts with; every rank has checked the old config before.

    RuntimeError, on all ranks, where one more attempt would be one too many.
    """
    config, folder = prepared.config, prepared.folder
    attempts, problem = None, ""
    if ranks.is_main:
        try:
            attempts = Attempts(
                folder, 0 if config.resume == "force" else config.train.max_same_step
            )
        except RuntimeError as error:
            problem = str(error)
    problem = ranks.broadcast(problem)
    if problem:
        raise RuntimeError(problem)
    if attempts is None:
        return None, None
    write_config(config, folder / CONFIG)
    if isinstance(config, DiTRun) and config.codec == "vae":
        keep_manifest(config, folder)
    mark(folder, RUNNING, pid=os.getpid(), world_size=ranks.world_size)
    tree = to_tree(config)
    write_provenance(folder, attempts.number, tree, prepared.plan, ranks)
    return attempts, Tracker(folder, config.tracking, tree, attempts.number)
