"""Ranks that share the tokens of their samples train as one rank alone does."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longtake.data.batch_bytes import from_bytes, to_bytes
from longtake.data.loader import Batch, digest_clips
from longtake.data.plan import Exclusion, PlannedSample, rank_slots
from longtake.data.reader import Clip, SampleReader
from longtake.data.segments import Segment as EncodedAlone
from longtake.models.dit import DiT, DiTConfig
from longtake.models.text import TextConfig, TextEncoder
from longtake.models.tokens import Segment, Video
from longtake.train.config import check_world_size, parse_config
from longtake.train.engine import Engine, EngineConfig, Ranks, init_distributed, single_process
from longtake.train.text_to_video import TextToVideo
from tests.train import tiny
from tests.train.forked import import_before_fork, run_ranks
from tests.train.tiny_runs import (
    TINY_DIT,
    TINY_VAE,
    losses,
    options,
    train_here,
    train_on_rank,
    tree,
)

SIZES = DiTConfig(
    *(3, 3), hidden_size=48, num_heads=4, depth=2, ffn_dim=64, text_dim=16, absolute_positions=2.0
)
TEXT = TextConfig(max_length=12, d_model=16, num_layers=1, num_heads=2, d_ff=16)
GRIDS = ((3, 3, 5), (1, 1, 3), (2, 2, 5), (1, 3, 3))  # of the slots: 45, 3, 20 and 9 tokens
# And their checkpointing.
KINDS = {
    "plain": "none",
    "levels": "selective",
    "extra": "full",
    "pack": "none",
    "budget": "selective",
}


def text_to_video() -> TextToVideo:
    torch.manual_seed(0)
    module = TextToVideo(DiT(SIZES), TextEncoder(TEXT), TEXT.max_length)
    with torch.no_grad():  # nothing is zero, so that every gradient says something
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def slot_loss(module: Any, slot: int, kind: str) -> torch.Tensor:
    """Squared errors of two samples of the slot's grid."""
    frames, height, width = GRIDS[slot]
    size = (2, 3, frames, 2 * height, 2 * width)
    draw = torch.Generator().manual_seed(slot)
    latents, target = (torch.randn(size, generator=draw) for _ in range(2))
    rows = [torch.arange(3, 8), torch.arange(3, 6)]
    index = (torch.arange(frames * height * width) < height).long().expand(2, -1)
    levels = torch.tensor([[0.3, 0.0], [0.8, 0.1]])
    last = Segment(latents[:, :, :1, :4], frames - 1.0)  # of 2 · width tokens
    if kind == "plain":
        output = module(latents, torch.tensor([0.3, 0.8]), rows)
    elif kind in ("pack", "budget"):
        beside = replace(last, latents=last.latents[0])
        videos = [Video(latents[0], index[0], [beside]), Video(latents[1, :, :1])]
        first, second = module(
            *(videos, levels[:, 0], rows, levels),
            extra_t=levels[:, 1],
            budget=100 if kind == "budget" else None,
        )
        return (first - target[0]).square().sum() + (second - target[1, :, :1]).square().sum()
    else:
        extra = [last] if kind == "extra" else []
        text = module.encode(rows)
        output = module.dit(
            latents, None, text.embeds, text.lens, levels=levels, level_index=index, extra=extra
        )
    return (output - target).square().sum()


def gradients(group: Any = None, compiled: bool = False) -> dict[str, torch.Tensor]:
    """Loss by kind and gradients by kind and name; summed over the group."""
    found = {}
    for kind, checkpointing in KINDS.items():
        module = text_to_video()
        module.dit.set_checkpointing(checkpointing)
        if group is not None:
            module.dit.share_tokens(group)
        if compiled:
            is_pack = kind in ("pack", "budget")  # whose attention a CPU leaves out of the graphs
            module.dit.compile_blocks(backend="aot_eager", fullgraph=not is_pack)
        loss = slot_loss(module, 0, kind)
        loss.backward()
        found[kind] = loss.detach()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            if group is not None:
                dist.all_reduce(parameter.grad, group=group)
            assert parameter.grad.any(), name
            found[f"{kind} {name}"] = parameter.grad
    return found


def worst(ranks: Ranks, expected: dict[str, torch.Tensor], compiled: bool) -> list[Any]:
    """Largest difference to `expected`, in those of the largest entry of a tensor, and where."""
    found = gradients(dist.group.WORLD, compiled)
    assert found.keys() == expected.keys()
    return max(
        [((found[name] - value).abs().max() / value.abs().max()).item(), name]
        for name, value in expected.items()
    )


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_and_gradients_are_those_of_one_rank(world_size: int) -> None:
    """45 tokens, or 55 with a segment: the last share has one or three of padding. A pack has 70,
    55 and 15, or 30 of padding besides: some ranks hold nothing of a sample."""
    for difference, name in run_ranks(world_size, worst, gradients(), False):
        assert difference < 1e-5, name


@pytest.mark.slow
@pytest.mark.dist
def test_compiled_blocks_share_tokens_too() -> None:
    for difference, name in run_ranks(2, worst, gradients(), True):
        assert difference < 1e-5, name


def train_slots(ranks: Ranks, strategy: str, stage: int) -> tuple[list[float], Engine]:
    """Loss and gradient norm of two steps over all slots; the engine after them."""
    module = text_to_video()
    if ranks.sequence_group is not None:
        module.dit.share_tokens(ranks.sequence_group)
    engine = Engine(module, tiny.OPTIM, EngineConfig(strategy, stage, "fp32", "none"), ranks)
    slots = rank_slots(len(GRIDS), ranks.data_rank, ranks.num_data_ranks)
    history = []
    for _ in range(2):
        total = 0.0
        for slot in slots:
            loss = slot_loss(engine, slot, "plain")
            engine.backward(loss, last=slot == slots[-1])
            total += loss.item()
        result = engine.clip_and_step(1e-3, tiny.OPTIM.max_grad_norm)
        history += [sum(ranks.gather_data(total)), result.grad_norm]
    return history, engine


def train_in_pairs(
    ranks: Ranks, strategies: list[tuple[str, int]], moments: dict[str, torch.Tensor]
) -> list[Any]:
    """Of each strategy the history, and the largest difference to the first moments expected."""
    paired = init_distributed("cpu", sequence_parallel=2)
    assert (paired.data_rank, paired.num_data_ranks) == (ranks.rank // 2, 2)
    results = []
    for strategy in strategies:
        history, engine = train_slots(paired, *strategy)
        owned = [each for each in engine.owned_ranges() if each.kind == "exp_avg"]
        differences = [
            (each.tensor - moments[each.name][each.start : each.stop]).abs().max().item()
            for each in owned
        ]
        count = sum(ranks.gather(sum(each.stop - each.start for each in owned)))
        assert count == sum(moment.numel() for moment in moments.values())
        results.append([history, max(differences, default=0.0)])
    return results


@pytest.mark.dist
@pytest.mark.parametrize(
    "strategies",
    [
        [("ddp", 0), ("deepspeed", 2)],
        pytest.param(
            [("fsdp2", 0), *(("deepspeed", stage) for stage in (0, 1, 3))], marks=pytest.mark.slow
        ),
    ],
)
def test_every_strategy_sums_over_groups_and_their_ranks(strategies: list[tuple[str, int]]) -> None:
    """Two pairs of ranks, whose slots are of different sizes. First moments are the gradients."""
    import_before_fork()
    history, alone = train_slots(single_process(), "ddp", 0)
    moments = {each.name: each.tensor for each in alone.owned_ranges() if each.kind == "exp_avg"}
    for results in run_ranks(4, train_in_pairs, strategies, moments):
        for found, difference in results:
            assert found == pytest.approx(history, rel=1e-5)
            assert difference < 1e-5


ODD = (  # 5 tokens to a clip, the first of which may be given
    *("model.patch_size=[1,16,16]", "tasks.i2v=1", "engine.precision=fp32", "train.steps=4"),
    *("train.checkpoint_every=2", "train.val_every=4", "train.sample_every=4"),
    *("validation.noise_levels=[0.5]", "validation.num_videos=1", "data.max_bad_fraction=0.1"),
)


@pytest.fixture(scope="module")
def broken(shards: Path) -> Path:
    """The module's shards, one clip of which is not what was indexed."""
    tar = min((shards / "train").glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[data.index(b"ftyp") + 40] ^= 0xFF
    tar.write_bytes(bytes(data))
    return shards


def train_and_count(ranks: Ranks, overrides: list[str]) -> list[int]:
    """Exit code of the run, and how often this rank read a sample."""
    reads = 0
    plainly = SampleReader.read

    def read(self: SampleReader, sample: PlannedSample) -> Clip:
        nonlocal reads
        reads += 1
        return plainly(self, sample)

    SampleReader.read = read
    return [train_on_rank(ranks, overrides), reads]


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["batches", "packs"])
def test_a_run_of_pairs_is_the_run_of_one_rank(kind: str, broken: Path, tmp_path: Path) -> None:
    """Training, validation, drawings and quarantine; then one rank goes on alone."""
    one, pair, settings = tmp_path / "one", tmp_path / "pair", ODD
    if kind == "packs":
        settings = *ODD, "data.pack=true", "data.cost.max_tokens=12", "data.cost.token=[1,16,16]"
    assert train_here(options(broken, one, *settings)) == 0
    shared = options(broken, pair, *settings, "engine.sequence_parallel=2")
    (code, reads), (other_code, other_reads) = run_ranks(2, train_and_count, shared)
    assert (code, other_code) == (0, 0) and reads > 0 and other_reads == 0
    check_alike(pair, one)
    drawn = {path.relative_to(one) for path in one.glob("samples/*/*.mp4")}
    assert drawn and {path.relative_to(pair) for path in pair.glob("samples/*/*.mp4")} == drawn
    shutil.rmtree(pair / "checkpoints" / "step-00000004")
    assert train_here(options(broken, pair, *settings)) == 0
    check_alike(pair, one)


def check_alike(folder: Path, expected: Path) -> None:
    for name in ("loss", "val/loss_ema", "samples_seen", "grad_norm"):
        values = losses(expected, name)
        assert max(values) == 4, name
        assert losses(folder, name) == pytest.approx(values, rel=1e-5), name
    assert losses(folder, "data_hash") == losses(expected, "data_hash")
    quarantine = (expected / "quarantine.jsonl").read_text()
    assert quarantine and (folder / "quarantine.jsonl").read_text() == quarantine


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("engine", ["ddp", "deepspeed_zero2", "fsdp2"])
def test_a_run_changes_its_degree_twice(engine: str, broken: Path, tmp_path: Path) -> None:
    """Four ranks share the tokens of two samples, then of one (four heads), then one is alone.

    They also draw and score five prompts of the world.
    """
    import_before_fork()
    four_heads = (
        *(*ODD, "model.num_heads=4", f"engine={engine}", "engine.precision=fp32"),
        *("evaluation.every=4", "evaluation.families=[move]", "evaluation.num_prompts=5"),
        *("evaluation.num_pairs=1", "evaluation.batch_size=1"),
    )
    one, many = tmp_path / "one", tmp_path / "many"
    assert train_here(options(broken, one, *four_heads, "engine=ddp")) == 0
    for degree in (2, 4):
        degrees = f"engine.sequence_parallel={degree}"
        assert run_ranks(4, train_on_rank, options(broken, many, *four_heads, degrees)) == [0] * 4
        check_alike(many, one)
        assert losses(many, "eval/clips") == losses(one, "eval/clips")
        assert losses(many, "card.mean")[0] == losses(one, "card.mean")[0]  # of the same weights
        shutil.rmtree(many / "checkpoints" / "step-00000004")
    assert train_here(options(broken, many, *four_heads, "engine=ddp")) == 0
    check_alike(many, one)


def test_a_batch_travels_as_bytes() -> None:
    """Two clips with all that a clip may hold, and a sample left out."""
    plan = PlannedSample(
        *(0, 3, 2**63 - 1, "é/1", 0, (5, 16, 16), (0.0, 0.1), 8.0, (0.25, 0.75), True, "dense"),
        *(2**62 + 1, 0, (0, 5)),
    )
    parts = [EncodedAlone(torch.randn(4, 2, 3, 3), (0, 4)) for _ in range(2)]
    clips = [
        Clip(plan, "a cat", 8.0, text=torch.arange(5), video=torch.ones(3, 5, 2, 2).byte()),
        Clip(replace(plan, replaces=7), "", 7.5, latents=torch.randn(4, 5, 3, 3)),
    ]
    clips[1].segments = {"last": parts[0], "every:4": parts[1]}
    clips[1].scores, clips[1].truth = {"motion": 0.1}, {"objects": [{"speed": 0.3}]}
    batch = Batch(3, 1, clips, [Exclusion(9, 3, "torn")], counted=False, digest="ab")
    found = from_bytes(to_bytes(batch))
    assert [*plain(found)] == [*plain(batch)]
    assert digest_clips(found.clips) == digest_clips(batch.clips)


NOTHING = torch.empty(0)  # the same one in all clips, so that they compare


def plain(batch: Batch) -> Iterator[Any]:
    """All of a batch, tensors as lists."""
    for clip in batch.clips:
        yield {name: (tensor.dtype, tensor.tolist()) for name, tensor in clip.tensors.items()}
        yield {name: segment.places for name, segment in clip.segments.items()}
        yield replace(clip.with_tensors(dict.fromkeys(clip.tensors, NOTHING)), segments={})
    yield replace(batch, clips=[])


def test_what_cannot_be_shared_is_refused() -> None:
    def config(*overrides: str) -> Any:
        return parse_config(tree([*overrides, "engine.sequence_parallel=3"]))

    with pytest.raises(ValueError, match=r"num_heads=2 .*_parallel=3, .* set it to one of 1, 2"):
        config(*TINY_DIT)
    with pytest.raises(ValueError, match=r"sequence_parallel=3 must be 1: a VAE has no tokens"):
        config(*TINY_VAE)
    thirds = config(*TINY_DIT, "model.num_heads=3", "data.micro_batches_per_step=4")
    with pytest.raises(ValueError, match=r"sequence_parallel=3 must divide .* ranks, 4: start"):
        check_world_size(thirds, 4)
    with pytest.raises(ValueError, match=r"per_step=4 .* data-parallel ranks, 3: set it"):
        check_world_size(thirds, 9)
    check_world_size(thirds, 12)
    with pytest.raises(ValueError, match=r"engine\.sequence_parallel=0 must be >= 1"):
        EngineConfig("ddp", 0, "fp32", "none", sequence_parallel=0)


def refuse_on_rank(ranks: Ranks) -> str:
    group = dist.group.WORLD
    assert group is not None
    with pytest.raises(ValueError, match=r"must be divisible") as error:
        DiT(replace(SIZES, num_heads=3)).share_tokens(group)
    return str(error.value)


@pytest.mark.dist
def test_a_model_refuses_heads_that_it_cannot_share() -> None:
    assert "num_heads=3" in run_ranks(2, refuse_on_rank)[0]
