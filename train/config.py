"""From a composed tree to checked dataclasses and back: the only place that knows OmegaConf.

Every unknown key, wrong type or impossible combination is a ValueError that names the key, before
any process group or weight exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from longtake.data.config import DataConfig, check_data_config
from longtake.data.plan.costs import resolve_buckets
from longtake.models.conditioning import TASKS
from longtake.train.checks import choice, require
from longtake.train.engine import native_precision
from longtake.train.schema import STAGES, DiTRun, RunConfig, VAERun

MULTIPLE = 16  # of height and width: what the stock pipeline insists on
IMAGE_PATCH = (1, 2, 2)  # its TI2V form reads every second latent of its mask
# Keys that may differ on resume: where things lie, how they are watched, how work is split.
FREE_KEYS = (
    *("output_dir", "resume", "vae_run", "tracking", "export", "samples", "validation"),
    "evaluation",
    *("engine.strategy", "engine.zero_stage", "engine.offload"),
    *("engine.offload_path", "engine.sequence_parallel"),
    *("train.log_every", "train.val_every", "train.checkpoint_every", "train.sample_every"),
    *("train.loss_jump", "train.max_rewinds", "train.max_skips", "train.max_same_step"),
    *("train.keep_last", "train.keep_every", "train.checkpoint_copy"),
    *("train.cost_per_hour", "train.peak_tflops", "train.hang_factor", "train.hang_seconds"),
    *("train.num_threads", "train.device", "train.timeout"),
    *("train.deterministic", "data.num_workers", "data.prefetch_factor", "data.decoder"),
    *("vae.checkpoint_blocks", "speed", "text.too_long"),
    *("data.decode_timeout", "data.decode_memory", "data.cache"),
    *("data.val", "data.max_bad_fraction", "data.train.*.path", "data.train.*.catalogue"),
)


def parse_config(cfg: Any) -> VAERun | DiTRun:
    """The composed tree (a DictConfig or plain mapping) as checked dataclasses.

    Raises ValueError naming the key for unknown keys, wrong types and impossible combinations.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.create(cfg), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or 'config'}: {_first_line(error)}") from error
    assert isinstance(tree, dict)
    _locate(tree)
    _resolve_precision(tree)
    stage = tree.get("stage")
    choice("stage", stage, STAGES, "pick an experiment=... or a stage=...")
    config = _build(VAERun if stage == "vae" else DiTRun, tree, "")
    _check_run(config)
    return dataclasses.replace(config, data=resolve_buckets(config.data))


def parse_data_config(base: DataConfig, overrides: Sequence[str]) -> DataConfig:
    """`base` changed by "data.key=value" words; ValueError as of `parse_config`."""
    try:
        changed = OmegaConf.merge({"data": _plain(base)}, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise ValueError(f"{' '.join(overrides)}: {_first_line(error)}") from error
    tree = OmegaConf.to_container(changed, resolve=True)
    assert isinstance(tree, dict)
    for key in tree:
        require(key == "data", f"{key}: only data.* can be changed here")
    config = _build(DataConfig, tree["data"], "data")
    check_data_config(config)
    return config


def load_config(path: Path) -> VAERun | DiTRun:
    """The config.yaml of a run folder; ValueError when it is missing or no longer valid."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the folder of a run, it holds config.yaml")
    try:
        return parse_config(OmegaConf.load(path))
    except (ValueError, YAMLError) as error:
        raise ValueError(
            f"{path}: {_first_line(error)} (resume=force goes on without reading it)"
        ) from error


def to_tree(config: RunConfig) -> dict[str, Any]:
    """Plain dicts, lists and scalars, as config.yaml and the checkpoint hold them."""
    return _plain(config)


def write_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config atomically; it is complete and can be read by `load_config`."""
    scratch = path.with_suffix(".yaml.tmp")
    scratch.write_text(OmegaConf.to_yaml(OmegaConf.create(to_tree(config))), encoding="utf-8")
    os.replace(scratch, path)


def training_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys that would change the training, as "key: old -> new"; both are `to_tree` results."""
    before, after = _flat(old), _flat(new)
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in dict.fromkeys((*before, *after))
        if before.get(key) != after.get(key) and not _is_free(key)
    ]


def check_world_size(config: RunConfig, world_size: int) -> None:
    """ValueError unless ranks divide into sequence groups, and the slots of a step over these."""
    slots, degree = config.data.micro_batches_per_step, config.engine.sequence_parallel
    require(
        world_size % degree == 0,
        f"engine.sequence_parallel={degree} must divide the number of ranks, {world_size}: start "
        "a multiple of it, or set it to 1",
    )
    whose = "ranks" if degree == 1 else "data-parallel ranks"
    require(
        slots % (world_size // degree) == 0,
        f"data.micro_batches_per_step={slots} must be divisible by the number of {whose}, "
        f"{world_size // degree}: set it to a multiple or start another number of processes",
    )


def _locate(tree: dict[str, Any]) -> None:
    """Make the folders that a config names absolute: a run is read from other directories too.

    What is no folder here (a hub id, a mistake) stays as it is.
    """
    data = tree.get("data")
    named = [data.get("train"), data.get("val")] if isinstance(data, dict) else []
    sets = [dataset for listed in named if isinstance(listed, list) for dataset in listed]
    for section, keys in [(tree, ("vae_run", "init_from")), (tree.get("text"), ("path",))] + [
        (dataset, ("path", "catalogue")) for dataset in sets
    ]:
        for key in keys if isinstance(section, dict) else ():
            value = section.get(key)
            if isinstance(value, str) and value and Path(value).is_dir():
                section[key] = str(Path(value).absolute())


def _resolve_precision(tree: dict[str, Any]) -> None:
    """`auto` becomes what this machine computes in, so that config.yaml says what was done."""
    engine, train = tree.get("engine"), tree.get("train")
    if isinstance(engine, dict) and engine.get("precision") == "auto":
        cuda = (
            torch.cuda.is_available() and isinstance(train, dict) and train.get("device") != "cpu"
        )
        engine["precision"] = native_precision(torch.device("cuda" if cuda else "cpu"))


def _check_run(config: VAERun | DiTRun) -> None:
    check_data_config(config.data)
    require(len(config.data.train) > 0, "data.train is empty: name at least one dataset")
    require(
        not config.optim.muon or config.engine.strategy == "ddp",
        f"optim.muon={config.optim.muon} needs whole matrices on every rank: engine.strategy=ddp, "
        f"not {config.engine.strategy}",
    )
    degree = config.engine.sequence_parallel
    if isinstance(config, VAERun):
        require(not config.export.required, "export.required=true holds for stage=dit only")
        require(not config.data.pack, "data.pack=true holds for stage=dit only: set it to false")
        require(degree == 1, f"engine.sequence_parallel={degree} must be 1: a VAE has no tokens")
        return
    model, text = config.model, config.text
    heads = model.num_heads
    require(
        heads % degree == 0,
        f"model.num_heads={heads} must be divisible by engine.sequence_parallel={degree}, whose "
        "ranks attend with as many heads each: set it to one of "
        f"{', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}",
    )
    require(
        model.text_dim == text.d_model,
        f"model.text_dim={model.text_dim} must equal text.d_model={text.d_model}",
    )
    _check_channels(config)
    _check_given(config)
    if config.export.required:
        _check_exportable(config)


def _check_channels(config: DiTRun) -> None:
    """Those of the model; with a VAE its stride and channels are checked when latents are read."""
    taken, made = config.model.in_channels, config.model.out_channels
    require(
        not config.has_channels or taken > 2 * made,
        f"model.out_channels={made} must equal model.in_channels={taken}, or leave room for given "
        "frames as channels: in_channels = 2·out_channels + the VAE's stride in time",
    )
    if config.codec == "identity":
        require(
            made == 3 and taken in (3, 7),
            f"model.in_channels={taken} must be 3 with codec=identity (RGB), or 7 for given frames "
            f"as channels; and model.out_channels={made} 3",
        )
    if config.has_channels:
        why = f"with model.in_channels={taken}, for given frames as channels"
        for task in config.trained_tasks:
            require(
                config.codec == "identity" or not TASKS[task].is_scattered,
                f"tasks.{task} must be 0 {why}: latents hold a clip's beginning and its end",
            )
        require(config.given.noise == 0, f"given.noise={config.given.noise} must be 0 {why}")


def _check_given(config: DiTRun) -> None:
    """What tasks and captions cannot be told with this codec, patch or text."""
    patch = config.model.patch_size[0]
    for task in config.trained_tasks:
        require(
            patch == 1 or not TASKS[task].is_frame,
            f"model.patch_size[0]={patch} must be 1 for tasks.{task} > 0: a given frame must fill "
            f"its tokens; or set tasks.{task}=0",
        )
        require(
            patch == 1 or config.codec == "identity" or not TASKS[task].is_stills,
            f"model.patch_size[0]={patch} must be 1 for tasks.{task} > 0 with codec=vae: a frame "
            f"that is encoded alone is one latent frame; or set tasks.{task}=0",
        )
    told, embedded = config.numbers.told, config.numbers.embedded
    require(
        not told or embedded or config.codec == "identity" or config.text.is_trained,
        f"numbers.form={config.numbers.form} must be embedding, or all of numbers.sources={told} "
        f"null: text.kind={config.text.kind} with codec=vae takes captions from the cache, to "
        "which no words can be added",
    )
    require(
        len(embedded) <= config.text.max_length,
        f"text.max_length={config.text.max_length} must be at least {len(embedded)}: with "
        "numbers.form=embedding each number has a row of the text",
    )


def _check_exportable(config: DiTRun) -> None:
    """With export.required, what the stock pipeline cannot do is refused at the start."""
    remedy = "set export.required=false and sample with `longtake sample`"
    check_exportable(config, remedy)
    patch = tuple(config.model.patch_size)
    require(
        "i2v" not in config.trained_tasks or draws_from_image(config),
        f"model.patch_size={patch} must be {IMAGE_PATCH} for i2v with export.required=true: "
        f"{remedy}",
    )


def draws_from_image(config: DiTRun) -> bool:
    """Whether a stock WanImageToVideoPipeline can draw with the run: by channels, or as TI2V."""
    is_known = config.has_channels or tuple(config.model.patch_size) == IMAGE_PATCH
    return "i2v" in config.trained_tasks and is_known


def check_exportable(config: DiTRun, remedy: str = "draw with `longtake sample` instead") -> None:
    """ValueError with the key, its value, the stock WanPipeline's limit, and a remedy."""
    positions = config.model.absolute_positions
    limits = {
        f"codec={config.codec} must be vae": config.codec == "vae",
        f"prediction={config.prediction} must be velocity, which the stock scheduler integrates": (
            config.prediction == "velocity"
        ),
        "text.kind=words must be bytes or pretrained, which have stock tokenizers": (
            config.text.kind != "words"
        ),
        f"model.absolute_positions={positions} must be 0, stock Wan has none": positions == 0,
        "numbers.dropout=0 must be > 0 with numbers.form=embedding, of which stock pipelines tell "
        "nothing": not config.numbers.embedded or config.numbers.dropout > 0,
        f"tasks.i2v=0 must be > 0 with model.in_channels={config.model.in_channels}, with which "
        "stock pipelines draw from an image": draws_from_image(config) or not config.has_channels,
    }
    for bucket in config.data.buckets:
        rule = f"data.buckets has {bucket.name}, height and width must be divisible by {MULTIPLE}"
        limits[rule] = bucket.height % MULTIPLE == 0 and bucket.width % MULTIPLE == 0
    for rule, holds in limits.items():
        require(holds, f"{rule}, to be exported: {remedy}")


def _build(cls: type, tree: Any, path: str) -> Any:
    """One dataclass from a mapping: nested dataclasses by recursion, leaves typed by OmegaConf."""
    require(isinstance(tree, dict), f"{path or 'config'}={tree!r} must be a mapping")
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls) if field.init}
    for key in tree:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f", did you mean {_join(path, close[0])}?" if close else ""
            raise ValueError(f"{_join(path, key)}: unknown key{hint} (known: {sorted(fields)})")
    nested = {key: _nested_class(hints[key]) for key in tree}
    values = _typed_leaves(hints, {key: tree[key] for key in tree if nested[key] is None}, path)
    for key, inner in nested.items():
        where, value = _join(path, key), tree[key]
        if inner is None:
            continue
        is_list = typing.get_origin(hints[key]) is list
        may_miss = type(None) in typing.get_args(hints[key])
        require(
            isinstance(value, list if is_list else dict) or (value is None and may_miss),
            f"{where}={'null' if value is None else value} must be a "
            f"{'list' if is_list else 'mapping'}",
        )
        if isinstance(value, list):
            values[key] = [_build(inner, v, f"{where}.{i}") for i, v in enumerate(value)]
        else:
            values[key] = None if value is None else _build(inner, value, where)
    missing = [_join(path, name) for name in _mandatory(cls) if name not in values]
    require(not missing, f"{', '.join(missing)}: missing, give a value")
    try:
        return cls(**values)
    except ValueError as error:
        text = str(error)
        raise ValueError(
            text if not path or text.startswith(path) else f"{path}: {text}"
        ) from error


def _mandatory(cls: type) -> list[str]:
    none = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.init and field.default is none and field.default_factory is none
    ]


def _nested_class(hint: Any) -> type | None:
    """The dataclass inside T, T | None or list[T]; None for leaves."""
    for inner in (hint, *typing.get_args(hint)):
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            return inner
    return None


def _typed_leaves(hints: dict[str, Any], leaves: dict[str, Any], path: str) -> dict[str, Any]:
    """Values checked and converted by OmegaConf's structured types; Literals and tuples by hand."""
    literals = {k: hints[k] for k in leaves if typing.get_origin(hints[k]) is typing.Literal}
    fields = [(key, str if key in literals else hints[key]) for key in leaves]
    schema = dataclasses.make_dataclass("Section", fields)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(schema), leaves)
    except OmegaConfBaseException as error:
        raise ValueError(f"{_join(path, error.full_key)}: {_first_line(error)}") from error
    plain = OmegaConf.to_container(typed)
    assert isinstance(plain, dict)
    values = {str(key): value for key, value in plain.items()}
    for key, hint in literals.items():
        choice(_join(path, key), values[key], typing.get_args(hint))
    for key, value in values.items():
        finite = all(math.isfinite(leaf) for leaf in _flat(value).values() if type(leaf) is float)
        require(finite, f"{_join(path, key)}={value} must be finite")
        if typing.get_origin(hints[key]) is tuple and value is not None:
            sizes = typing.get_args(hints[key])
            holds = Ellipsis in sizes or len(value) == len(sizes)
            require(holds, f"{_join(path, key)}={value} must have {len(sizes)} entries")
            values[key] = tuple(value)
    return values


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping | list) and len(tree) > 0:
        pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        return {k: v for key, inner in pairs for k, v in _flat(inner, _join(path, key)).items()}
    return {path: tree}


def _is_free(key: str) -> bool:
    parts = key.split(".")
    return any(
        len(free) <= len(parts) and all(f in ("*", p) for f, p in zip(free, parts, strict=False))
        for free in (pattern.split(".") for pattern in FREE_KEYS)
    )


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
