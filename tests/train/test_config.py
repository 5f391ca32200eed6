"""Every file of conf/ composes and parses; mistakes are refused by the name of their key."""

from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException

import longtake.conf
from longtake.train.config import (
    check_world_size,
    load_config,
    parse_config,
    to_tree,
    training_changes,
    write_config,
)
from longtake.train.schema import DiTRun, VAERun
from tests.train.tiny_runs import tree

CONF = Path(longtake.conf.__file__).parent
FILES = sorted(p.relative_to(CONF).with_suffix("").as_posix() for p in CONF.rglob("*.yaml"))
# What goes together with a file that does not fit the default experiment.
COMPANIONS = {
    **{
        f"model/{name}": ["text=umt5_xxl"]
        for name in ("dit_s", "dit_b", "dit_l", "wan_1_3b", "wan_5b", "wan_14b", "wan_14b_i2v")
    },
    "text/umt5_xxl": ["model=wan_1_3b"],
    "model/nano_identity": ["codec=identity", "tasks.i2v=0"],
    "vae/tiny": ["stage=vae"],
    "vae/small": ["stage=vae"],
    "vae/base": ["stage=vae"],
    "vae/wan22": ["stage=vae"],
}


@pytest.mark.parametrize("name", [name for name in FILES if "/" in name])
def test_every_file_composes_and_parses(name: str) -> None:
    group, choice = name.split("/")
    config = parse_config(tree([*COMPANIONS.get(name, []), f"{group}={choice}"]))
    assert config.stage in ("vae", "dit")


def test_the_root_alone_parses() -> None:
    config = parse_config(tree([]))
    assert isinstance(config, DiTRun)
    assert config.resume == "auto"


def test_types_are_those_of_the_schema() -> None:
    vae = parse_config(tree(["experiment=demo_vae"]))
    assert isinstance(vae, VAERun)
    assert vae.optim.betas == (0.9, 0.95)
    assert vae.vae.dim_mult == (1, 2)
    assert vae.data.buckets[0].batch_size
    dit = parse_config(tree(["experiment=demo_dit", "data.train.0.path=elsewhere"]))
    assert isinstance(dit, DiTRun)
    assert dit.data.train[0].path == "elsewhere"
    assert dit.export.required


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+train.stepz=3"], ["train.stepz", "unknown", "train.steps"]),
        (["+nonsense=1"], ["nonsense", "unknown"]),
        (["+data.train.0.wheer=x"], ["data.train.0.wheer", "data.train.0.where"]),
        (["train.steps=many"], ["train.steps", "many"]),
        (["train.steps=0"], ["train.steps=0", "> 0"]),
        (["train.log_every=0"], ["train.log_every=0"]),
        (["optim.betas=[0.9]"], ["optim.betas"]),
        (["optim.lr=-1"], ["optim.lr=-1"]),
        (["optim.lr=null"], ["optim.lr"]),
        (["model.hidden_size=130"], ["model.hidden_size=130", "model.num_heads=4"]),
        (["model.patch_size=[1,2]"], ["model.patch_size", "3"]),
        (["model.text_dim=64"], ["model.text_dim=64", "text.d_model=128"]),
        (["model.out_channels=4"], ["model.out_channels=4"]),
        (["text.kind=chars"], ["text.kind=chars", "bytes"]),
        (["codec=jpeg"], ["codec=jpeg", "identity"]),
        (["codec=identity"], ["model.in_channels=8", "codec=identity"]),
        (["prediction=noise"], ["prediction=noise", "velocity"]),
        (["tasks.t2v=0", "tasks.i2v=0"], ["tasks"]),
        (["+tasks.v2v=1"], ["tasks.v2v"]),
        (["model.patch_size=[2,2,2]"], ["model.patch_size[0]=2", "tasks.i2v"]),
        (["caption_dropout=1.5"], ["caption_dropout=1.5"]),
        (["loss.weighting=frame"], ["loss.weighting=frame", "token"]),
        (["timesteps.shift=0"], ["timesteps.shift=0"]),
        (["speed.checkpointing=some"], ["speed.checkpointing=some", "selective"]),
        (["samples.guidance_scale=0.5"], ["guidance_scale=0.5"]),
        (["validation.noise_levels=[0]"], ["validation.noise_levels"]),
        (["validation.noise_levels=[0.5,0.3,0.5]"], ["[0.5, 0.3, 0.5] must differ"]),
        (["ema.decay=1"], ["ema.decay=1"]),
        (["resume=maybe"], ["resume=maybe", "auto"]),
        (["engine.zero_stage=2"], ["engine.zero_stage=2", "deepspeed"]),
        (["engine.precision=fp8"], ["engine.precision=fp8"]),
        (["tracking.mode=loud"], ["tracking.mode=loud", "offline"]),
        (["data.crop=left"], ["data.crop", "left"]),
        (["data.train=[]"], ["data.train", "empty"]),
        (["data.train.0.path=null"], ["data.train.0.path"]),
        (["data.buckets=[]"], ["data.buckets"]),
        (["stage=vae", "vae.temporal_downsample=[]"], ["vae.temporal_downsample"]),
        (["stage=vae", "vae.in_channels=4"], ["vae.in_channels=4 must be 3 (RGB)"]),
        (["stage=vae", "vae.out_channels=1"], ["vae.out_channels=1 must be 3 (RGB)"]),
        (["stage=vae", "+model.depth=3"], ["model", "unknown"]),
        (["stage=vae", "export.required=true"], ["export.required"]),
        (["export.required=true", "text.kind=words"], ["text.kind=words", "bytes"]),
        (["export.required=true", "prediction=clean"], ["prediction=clean", "velocity"]),
        (["export.required=true", "model.patch_size=[1,1,1]"], ["model.patch_size", "(1, 2, 2)"]),
        (["export.required=true", "data.buckets.0.height=24"], ["24", "divisible by 16"]),
    ],
)
def test_mistakes_name_their_key(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        parse_config(tree(overrides))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("override", ["train.stepz=3", "optim.learning_rate=1", "experiment=nope"])
def test_hydra_refuses_what_it_does_not_know(override: str) -> None:
    with pytest.raises(ConfigCompositionException) as caught:
        tree([override])
    assert override.split("=")[0].split(".")[-1] in str(caught.value)


def test_missing_values_are_named() -> None:
    broken = {"stage": "vae", "seed": 0}
    with pytest.raises(ValueError, match=r"output_dir.*train.*missing"):
        parse_config(broken)
    with pytest.raises(ValueError, match="stage"):
        parse_config({"seed": 0})


@pytest.mark.parametrize(
    "experiment", ["demo_vae", "demo_dit", "nano_identity", "vae_wan", "vae_wan_decoder"]
)
def test_config_yaml_reads_back_the_same(experiment: str, tmp_path: Path) -> None:
    config = parse_config(tree([f"experiment={experiment}"]))
    write_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]
    with pytest.raises(ValueError, match="no such file"):
        load_config(tmp_path / "other.yaml")


def test_only_changes_of_the_training_count() -> None:
    old = to_tree(parse_config(tree(["experiment=demo_dit"])))
    other = {"bf16": "fp32", "fp32": "bf16"}[old["engine"]["precision"]]

    def changes(*overrides: str) -> list[str]:
        return training_changes(
            old, to_tree(parse_config(tree(["experiment=demo_dit", *overrides])))
        )

    assert changes() == []
    assert (
        changes("output_dir=/x", "resume=force", "tracking=jsonl", "engine=deepspeed_zero2") == []
    )
    assert changes("data.num_workers=2", "data.train.0.path=/moved", "train.log_every=3") == []
    assert changes("optim.lr=0.5") == ["optim.lr: 0.0015 -> 0.5"]
    assert changes("seed=1", "data.micro_batches_per_step=4") == [
        "seed: 0 -> 1",
        "data.micro_batches_per_step: 2 -> 4",
    ]
    assert changes(f"engine.precision={other}") and changes("train.steps=9")
    assert changes("data.train.0.where='fps > 2'") and changes("tasks.i2v=0.5")


def test_slots_must_divide_over_the_ranks() -> None:
    config = parse_config(tree(["data.micro_batches_per_step=4"]))
    check_world_size(config, 2)
    with pytest.raises(ValueError, match=r"micro_batches_per_step=4 .* 3"):
        check_world_size(config, 3)


@pytest.mark.parametrize("native", ["bf16", "fp32"])
def test_auto_precision_is_what_the_machine_computes_in(
    native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longtake.train.config.native_precision", lambda device: native)
    overrides = ["experiment=nano_identity", "train.device=cpu"]
    assert parse_config(tree(overrides)).engine.precision == native
    assert parse_config(tree([*overrides, "engine.precision=bf16"])).engine.precision == "bf16"
