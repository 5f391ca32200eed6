"""What a DiT run starts from: another run or public weights, whole or by name, never in silence."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longtake.models.dit import DiT
from longtake.models.interop import dit_to_diffusers, vae_to_diffusers
from longtake.models.text import TextEncoder
from longtake.models.vae import VAE
from longtake.models.vae_config import VAEConfig
from longtake.train import checkpoint
from longtake.train.codec import Codec
from longtake.train.dit_task import DiTTask
from longtake.train.init_from import start_from
from longtake.train.runs import load_dit
from longtake.train.schema import DiTRun
from longtake.train.setup import _start
from longtake.train.text_to_video import TextToVideo
from tests.train.small_runs import shake, write_dit_run
from tests.train.tiny_runs import options, train_here

BLOCKS = ["dit.blocks.*"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init")
    return write_dit_run(folder / "run", folder / "latents")


@pytest.fixture(scope="module")
def config(run: Path) -> DiTRun:
    return load_dit(run).config


def make(config: DiTRun, **sizes: Any) -> TextToVideo:
    torch.manual_seed(7)
    dit = DiT(replace(config.model, **sizes))
    module = TextToVideo(dit, TextEncoder(config.text), config.text.max_length)
    shake(module)
    return module


def taken(module: TextToVideo, before: TextToVideo, given: dict[str, torch.Tensor]) -> set[str]:
    """Names that have the given values; the others must be as they were."""
    old, found = before.state_dict(), set()
    for name, tensor in module.state_dict().items():
        if name in given and torch.equal(tensor, given[name]):
            found.add(name)
        else:
            assert torch.equal(tensor, old[name]), name
    return found


def test_a_run_is_a_start_whole_or_in_part(run: Path, config: DiTRun) -> None:
    path = checkpoint.find_last_good(run / "checkpoints")
    assert path is not None
    given = checkpoint.load_full(path, "ema")
    module = make(config)
    report = start_from(module, str(run), BLOCKS)
    blocks = {name for name in given if name.startswith("dit.blocks.")}
    assert taken(module, make(config), given) == blocks
    assert f"{len(blocks)} of {len(given)} tensors" in report
    assert "stays as it was: dit.head.bias\n" in report
    assert "is not taken: dit.head.bias\n" in report
    report = start_from(module, str(path))
    assert taken(module, make(config), given) == set(given)
    assert "\n" not in report


@pytest.mark.parametrize("has_index", [True, False])
def test_a_pipeline_of_diffusers_is_a_start(
    config: DiTRun, tmp_path: Path, has_index: bool
) -> None:
    public = make(config).dit
    shake(public)
    dit_to_diffusers(public).save_pretrained(tmp_path / "transformer")
    if has_index:
        (tmp_path / "model_index.json").write_text("{}")
    module = make(config)
    with pytest.raises(ValueError, match=r"init_names=\[\]:\n  text\.\S+ is missing"):
        start_from(module, str(tmp_path))
    start_from(module, str(tmp_path), ["dit.*"])
    given = {f"dit.{name}": tensor for name, tensor in public.state_dict().items()}
    assert taken(module, make(config), given) == set(given)


@pytest.mark.parametrize("kind", ["transformer", "vae"])
def test_everything_is_listed_that_public_weights_lack_of_their_config(
    config: DiTRun, tmp_path: Path, kind: str
) -> None:
    module = make(config) if kind == "transformer" else VAE(VAEConfig(8, 4, (1, 2), (True,), 1))
    if isinstance(module, VAE):
        public = vae_to_diffusers(module, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    else:
        public = dit_to_diffusers(module.dit)
    public.save_pretrained(tmp_path / kind)
    (path,) = (tmp_path / kind).glob("*.safetensors")
    tensors = load_file(path)
    missing, reshaped = list(tensors)[:12], list(tensors)[12:16]
    lines = [f"{name} is missing" for name in missing]
    lines += [
        f"{name} is (3, 7), the config makes it {tuple(tensors[name].shape)}" for name in reshaped
    ]
    changed = {n: torch.zeros(3, 7) if n in reshaped else x for n, x in tensors.items()}
    for name in missing:
        del changed[name]
    save_file(changed | {"more": torch.zeros(1)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="weights do not fit their own config") as caught:
        start_from(module, str(tmp_path))
    assert str(caught.value).splitlines()[1:] == [
        f"  {line}" for line in (*sorted(lines[:12]), "more is unexpected", *lines[12:])
    ]


def test_what_does_not_fit_is_listed_and_nothing_taken(run: Path, config: DiTRun) -> None:
    module = make(config, depth=1, in_channels=6, out_channels=6)
    with pytest.raises(ValueError) as caught:
        start_from(module, str(run))
    for line in (
        "dit.blocks.1.self_attn.qkv.weight is unexpected",
        "dit.patch_embed.weight is (24, 16), the config makes it (24, 24)",
        "dit.head.bias is (16,), the config makes it (24,)",
    ):
        assert f"\n  {line}" in str(caught.value)
    with pytest.raises(ValueError, match=r"blocks\.2\.modulation is missing") as caught:
        start_from(make(config, depth=3), str(run), BLOCKS)
    assert "patch_embed" not in str(caught.value)
    same = make(config, depth=1, in_channels=6, out_channels=6)
    assert all(map(torch.equal, module.state_dict().values(), same.state_dict().values()))


@pytest.mark.parametrize(
    ("key", "there", "here", "part"),
    [
        ("num_heads", 2, 4, ["dit.blocks.*.mlp.*"]),
        ("eps", 1e-6, 1e-5, ["dit.patch_embed.*"]),
        ("absolute_positions", 0.0, 6.0, ["dit.head.*"]),
        ("patch_size", (1, 2, 2), (1, 1, 4), BLOCKS),
    ],
)
def test_what_would_compute_something_else_is_refused(
    run: Path, config: DiTRun, key: str, there: object, here: object, part: list[str]
) -> None:
    """Names and shapes are alike; a part that the key does not concern can be taken."""
    module = make(config, **{key: here})
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    line = f"model.{key} is {there} there, the config has {here}"
    with pytest.raises(ValueError, match=re.escape(line)):
        start_from(module, str(run))
    assert all(torch.equal(before[name], x) for name, x in module.state_dict().items())
    start_from(module, str(run), part)
    dit_to_diffusers(make(config).dit).save_pretrained(folder := run.parent / "public")
    with pytest.raises(ValueError, match=re.escape(line)):
        start_from(module, str(folder), ["dit.*"])


def test_another_prediction_takes_no_head(run: Path, config: DiTRun) -> None:
    module, line = make(config), "prediction is velocity there, the config has clean"
    with pytest.raises(ValueError, match=line):
        start_from(module, str(run), prediction="clean")
    start_from(module, str(run), BLOCKS, prediction="clean")
    started = replace(config, prediction="clean", init_from=str(run))
    task = DiTTask(started, torch.device("cpu"), Codec(4, (1, 1, 1), torch.zeros(4), torch.ones(4)))
    with pytest.raises(ValueError, match=line):
        _start(task, started)


def test_a_text_encoder_of_other_tokens_is_refused(run: Path, config: DiTRun) -> None:
    module = make(replace(config, text=replace(config.text, kind="words")))
    with pytest.raises(ValueError, match=r"text\.kind is bytes there, the config has words"):
        start_from(module, str(run))
    start_from(module, str(run), ["dit.*"])


@pytest.mark.parametrize(
    ("there", "here", "line"),
    [
        ({}, {"residual": True}, "vae.residual is False there, the config has True"),
        (
            {"in_channels": 12, "out_channels": 12},
            {"patch_size": 2},
            "vae.patch_size is 1 there, the config has 2",
        ),
        (
            {},
            {"temporal_downsample": (False, True)},
            "vae.temporal_downsample is (True, False) there, the config has (False, True)",
        ),
    ],
)
def test_a_vae_that_would_compute_something_else_is_refused(
    there: dict[str, Any], here: dict[str, Any], line: str, tmp_path: Path
) -> None:
    sizes = VAEConfig(8, 4, (1, 1, 1), (True, False), 1)
    theirs = VAE(replace(sizes, **there))
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae_to_diffusers(theirs, **statistics).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(line)):
        start_from(VAE(replace(sizes, **here)), str(tmp_path))


def test_wrong_patterns_and_stages_are_refused(run: Path, config: DiTRun) -> None:
    with pytest.raises(ValueError, match=r"init_names has dit\.block\.\*"):
        start_from(make(config), str(run), ["dit.block.*"])
    with pytest.raises(ValueError, match="stage=dit, this is stage=vae"):
        start_from(VAE(VAEConfig(8, 4, (1, 2), (True,), 1)), str(run))


def test_what_a_run_freezes_stays_as_it_started(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_here(options(shards, first, "train.steps=3")) == 0  # until gates are open
    start = f"init_from={first}", "train.steps=2"
    assert train_here(options(shards, second, *start, "freeze=[ditt.*]")) == 1
    assert "freeze has ditt.*: nothing is called so" in capfd.readouterr().err
    assert train_here(options(shards, second, *start, "freeze=[dit.*]")) == 0
    given = checkpoint.load_full(first / "checkpoints" / "step-00000003", "ema")
    found = checkpoint.load_full(second / "checkpoints" / "step-00000002", "param")
    assert found.keys() == given.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, given[name]) == name.startswith("dit."), name
