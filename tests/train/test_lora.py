"""LoRA: only adapters learn, runs resume and merge, and diffusers loads what is exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from longtake.launch.compose import compose_dit
from longtake.models.dit import DiT
from longtake.models.interop import dit_to_diffusers
from longtake.models.text import TextEncoder
from longtake.train import checkpoint
from longtake.train.export import export_adapters
from longtake.train.lora import add_adapters, split_adapters
from longtake.train.runs import find_run, load_dit, read_tensors
from longtake.train.schema import LoraConfig
from longtake.train.text_to_video import TextToVideo
from tests.train.forked import import_before_fork, run_ranks
from tests.train.small_runs import DIT_SIZES, shake, write_dit_run
from tests.train.tiny_runs import options, train_here, train_on_rank, write_splits

TARGETS = '["dit.blocks.*","dit.time_*","dit.head"]'
LORA = "init_from=elsewhere", f"lora={{rank:3,alpha:5,targets:{TARGETS}}}"


def inputs(dit: DiT) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, dit.config.in_channels, 2, 4, 6, generator=generator)
    text = torch.randn(2, 5, dit.config.text_dim, generator=generator)
    return latents, torch.tensor([0.2, 0.9]), text


@torch.no_grad()
def test_merged_and_exported_adapters_compute_the_same(tmp_path: Path) -> None:
    run = write_dit_run(tmp_path / "run", tmp_path / "latents", *LORA)
    merged = load_dit(run)
    assert merged.config.lora is not None
    plain, adapters = split_adapters(read_tensors(find_run(run)), merged.config.lora)
    assert len(adapters) == 2 * 7 + 4
    base, again = (load_plain(merged.config.model, plain) for _ in range(2))
    latents, t, text = inputs(base)
    expected = merged.dit(latents, t, text)
    assert (expected - base(latents, t, text)).abs().max() > 0.01

    adapted = TextToVideo(base, merged.text, 8)
    add_adapters(adapted, merged.config.lora)
    adapted.load_state_dict(read_tensors(find_run(run)))
    torch.testing.assert_close(base(latents, t, text), expected, atol=1e-5, rtol=0)

    file = export_adapters(run, tmp_path / "adapters")
    stock: Any = dit_to_diffusers(again)
    pipeline: Any = WanPipeline(
        *(None, None, None, FlowMatchEulerDiscreteScheduler()),  # pyright: ignore
        transformer=stock,
    )
    pipeline.load_lora_weights(file.parent)
    found = pipeline.transformer(latents, 1000 * t, text).sample
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="exists"):
        export_adapters(run, tmp_path / "adapters")


def load_plain(config: Any, tensors: dict[str, Tensor]) -> DiT:
    dit = DiT(config)
    dit.load_state_dict({n[4:]: t for n, t in tensors.items() if n.startswith("dit.")})
    return dit


@pytest.mark.dist
@pytest.mark.parametrize(
    ("engine", "world_size"), [("ddp", 1), ("fsdp2", 2), ("deepspeed_zero3", 2)]
)
def test_only_adapters_learn_and_the_run_resumes(
    tmp_path: Path, engine: str, world_size: int
) -> None:
    import_before_fork()
    write_splits(tmp_path, 16, 4)
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_here(options(tmp_path, first, "train.steps=3")) == 0  # until gates are open
    targets = '["dit.blocks.*","dit.head"]'
    lora = f"init_from={first}", f"lora={{rank:2,alpha:2,targets:{targets}}}", f"engine={engine}"
    for more in (("train.steps=2",), ("train.steps=4", "resume=force")):
        words = options(tmp_path, second, *lora, *more)
        assert run_ranks(world_size, train_on_rank, words) == [0] * world_size
    start = checkpoint.load_full(first / "checkpoints" / "step-00000003", "ema")
    found = checkpoint.load_full(second / "checkpoints" / "step-00000004", "param")
    for name, tensor in found.items():
        plain = name.replace(".base_layer.", ".")
        if "lora_" in name:
            assert tensor.abs().sum() > 0, name
        else:
            assert torch.equal(tensor, start[plain]), name
    assert sum("lora_B" in name for name in found) == 8
    assert not torch.equal(load_dit(second).dit.head.weight, start["dit.head.weight"])


def test_what_would_never_leave_its_initial_values_is_refused(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_here(options(shards, first, "train.steps=1")) == 0
    lora = f"init_from={first}", "lora={rank:2,alpha:2,targets:[dit.head]}", "train.steps=1"
    told = "numbers.form=embedding", "numbers.sources={fps: fps}"
    for names, more, stays in (
        ("[dit.*,text.*]", told, ["numbers.tokens.*.fc2.weight"]),
        ("[dit.*]", told, ["numbers.tokens.*.fc2.weight", "text."]),
        ("[text.*]", (), ["dit.patch_embed.weight"]),
    ):
        start = *lora, f"init_names={names}", *more
        assert train_here(options(shards, second, *start)) == 1
        said = capfd.readouterr().err
        assert "or first train them without lora" in said
        assert all(f"\n  {name}" in said for name in stays)
    assert train_here(options(shards, second, *lora, "init_names=[dit.*,text.*]")) == 0


def test_adapters_begin_without_a_change_and_wrong_targets_are_refused() -> None:
    config = compose_dit(["stage=dit", *DIT_SIZES])
    module = TextToVideo(DiT(config.model), TextEncoder(config.text), 8)
    shake(module)
    latents, t, text = inputs(module.dit)
    before = module.dit(latents, t, text)
    for target in ("dit.patch_embed", "dit.blocks.*.modulation", "text.*"):
        with pytest.raises(ValueError, match=r"lora\.targets has"):
            add_adapters(module, LoraConfig(2, 2, [target]))
    add_adapters(module, LoraConfig(2, 2, ["dit.blocks.1.*"]))
    torch.testing.assert_close(module.dit(latents, t, text), before, atol=1e-6, rtol=0)
    assert all("lora_" in n for n, p in module.named_parameters() if p.requires_grad)
    for wrong, rule in (
        (("lora={rank:2,alpha:2,targets:[x]}",), "lora needs init_from"),
        ((*LORA, "freeze=[x]"), "only adapters are trained"),
        (("init_from=x", "lora={rank:0,alpha:2,targets:[x]}"), "lora: rank=0"),
    ):
        with pytest.raises(ValueError, match=rule):
            compose_dit(["stage=dit", *wrong])
