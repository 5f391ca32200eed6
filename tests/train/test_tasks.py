"""Losses of the tasks: what counts, what does not, and that slicing a batch changes nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtake.data.loader import Batch, Loader
from longtake.data.plan import Plan
from longtake.train.codec import Codec
from longtake.train.config import parse_config
from longtake.train.dit_task import DiTTask
from longtake.train.engine import Engine, single_process
from longtake.train.schema import DiTRun, VAERun
from longtake.train.tasks import Means
from longtake.train.text_to_video import pad_embeddings
from longtake.train.vae_task import VAETask
from tests.train.tiny_runs import TINY_VAE, options, tree

TOKENS = 5 * 4 * 4  # 5 frames of 16x16 in patches of (1, 4, 4)
CPU = torch.device("cpu")
Network = Callable[[Tensor, Tensor], Tensor]


def dit_task(shards: Path, *more: str) -> DiTTask:
    config = parse_config(tree(options(shards, shards / "run", "engine.precision=fp32", *more)))
    assert isinstance(config, DiTRun)
    torch.manual_seed(0)
    return DiTTask(config, CPU, Codec(3, (1, 1, 1), torch.tensor(0.0), torch.tensor(1.0)))


def first_batches(task: DiTTask | VAETask) -> list[Batch]:
    plan = Plan.from_config(task.config.data, task.config.seed)
    return next(iter(Loader(plan, range(4))))


def engine_of(task: DiTTask | VAETask) -> Engine:
    return Engine(task.module, task.config.optim, task.config.engine, single_process())


class Stub:
    """Stands in for the engine: `network(noisy, t)` instead of the transformer."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.rows: list[list[int]] = []
        self.levels: list[Tensor | None] = []

    def __call__(self, noisy: Tensor, t: Tensor, rows: Any, levels: Any, index: Any) -> Tensor:
        self.rows += [row.tolist() for row in rows]
        self.levels.append(levels)
        return self.network(noisy, t)


def test_weight_counts_noisy_tokens(shards: Path) -> None:
    whole = dit_task(shards)
    given = dit_task(shards, "tasks.t2v=0", "tasks.i2v=1")
    each = dit_task(shards, "loss.weighting=sample")
    batch = first_batches(whole)[0]
    assert whole.weight(batch) == 2 * TOKENS
    assert given.weight(batch) == 2 * (TOKENS - 16)
    assert each.weight(batch) == 2
    assert given.tokens(batch) == 2 * TOKENS


@pytest.mark.parametrize("prediction", ["velocity", "clean"])
@pytest.mark.parametrize("i2v", [0, 1])
def test_a_perfect_network_has_no_loss(shards: Path, prediction: str, i2v: int) -> None:
    task = dit_task(shards, f"prediction={prediction}", f"tasks.i2v={i2v}", f"tasks.t2v={1 - i2v}")
    batch = first_batches(task)[0]
    clean = batch.stack_video()

    def network(noisy: Tensor, t: Tensor) -> Tensor:
        velocity = (noisy - clean) / t.view(-1, 1, 1, 1, 1)
        output = clean.clone() if prediction == "clean" else velocity
        if i2v:
            assert torch.equal(noisy[:, :, 0], clean[:, :, 0])
            output[:, :, 0] = 7.0  # what it says about given frames bears no loss
        return output

    stub: Any = Stub(network)
    assert task.loss(stub, batch).total.item() == pytest.approx(0, abs=1e-4)
    assert (stub.levels[0] is not None) == bool(i2v)
    worse: Any = Stub(lambda noisy, t: network(noisy, t) + 0.1)
    noisy_tokens = 2 * (TOKENS - 16 * i2v)
    found = task.loss(worse, batch).total.item() / noisy_tokens
    assert found >= 0.0099 if prediction == "clean" else found == pytest.approx(0.01, rel=1e-2)


def test_the_sum_does_not_depend_on_the_slicing(shards: Path) -> None:
    """Nor does the value of a sample, whatever the others of its batch are given or told."""
    task = dit_task(
        *(shards, "tasks={t2v: 1, i2v: 1, join: 1, random_frames: 2}", "given.noise=0.3"),
        *("given.dropout=0.2", "numbers.sources={fps: fps}", "loss.min_snr_gamma=5"),
        *("timesteps.distribution=mode", "timesteps.base_tokens=40", "model.depth=2"),
    )
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    engine = engine_of(task)
    batches = first_batches(task)
    joined = replace(batches[0], clips=[clip for batch in batches for clip in batch.clips])
    with torch.no_grad():
        parts = [task.loss(engine, batch).total.item() for batch in batches]
        single = [
            task.loss(engine, replace(joined, clips=[clip])).total.item() for clip in joined.clips
        ]
        whole = task.loss(engine, joined).total.item()
    assert sum(parts) == pytest.approx(whole, rel=1e-5)
    assert sum(single) == pytest.approx(whole, rel=1e-5)
    alone = [task.loss(engine, replace(joined, clips=[clip])) for clip in joined.clips]
    for number, group in enumerate(task.loss(engine, joined).groups):
        for name in ("totals", "weights"):
            others = [getattr(one.groups[number], name) for one in alone]
            torch.testing.assert_close(getattr(group, name), torch.stack(others).sum(0))
    assert task.loss(engine, joined).total.item() == pytest.approx(whole, rel=1e-6)


def test_no_more_is_drawn_at_once_than_is_trained(shards: Path) -> None:
    task = dit_task(shards, "tasks={t2v: 1, i2v: 1}", "samples.prompts=[a,b,c,d,e]")
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    engine, batches = engine_of(task), first_batches(task)[:2]
    seen: list[int] = []
    task.module.dit.patch_embed.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    drawings = task.draw(engine, batches)
    assert max(seen) == 2 == len(batches[0].clips)
    assert [drawing.name for drawing in drawings] == [
        *(f"sample-{number:02d}" for number in range(5)),
        *(f"i2v-{number:02d}" for number in range(4)),
    ]
    task.config = replace(
        task.config,
        data=replace(
            task.config.data,
            buckets=[replace(bucket, batch_size=8) for bucket in task.config.data.buckets],
        ),
    )
    for one, other in zip(drawings, task.draw(engine, batches), strict=True):
        np.testing.assert_allclose(one.frames.astype(int), other.frames.astype(int), atol=1)
    assert max(seen) == 5


def test_speed_options_reach_the_model(shards: Path) -> None:
    assert dit_task(shards).module.dit.checkpointing == "none"
    task = dit_task(shards, "speed.checkpointing=full", "speed.compile=true")
    assert task.module.dit.checkpointing == "full"
    assert all(block._compiled_call_impl is not None for block in task.module.dit.blocks)


def test_captions_are_dropped_at_the_rate_asked_for(shards: Path) -> None:
    task = dit_task(shards, "caption_dropout=0.5")
    plan = Plan.from_config(task.config.data, 0)
    stub: Any = Stub(lambda noisy, t: noisy)
    loader = iter(Loader(plan, range(4)))
    for _ in range(12):
        for batch in next(loader):
            task.loss(stub, batch)
    empty = task.captions.tokenizer([""])[0].tolist()
    share = sum(row == empty for row in stub.rows) / len(stub.rows)
    assert 0.3 < share < 0.7
    assert len({tuple(row) for row in stub.rows}) > 4


def test_captions_that_are_too_long_are_refused_where_asked_for(shards: Path) -> None:
    strict = "text.too_long=refuse", "numbers.sources={fps: fps}", "numbers.dropout=0"
    task = dit_task(shards, *strict, "text.max_length=512")
    clips = first_batches(task)[0].clips
    longest = max(len(row) for row in task.captions.whole(clips))
    task.captions.training(clips)
    fits = dit_task(shards, *strict, f"text.max_length={longest}")
    assert fits.captions.training(clips)[1] == [False] * len(clips)
    tight = dit_task(shards, *strict, f"text.max_length={longest - 1}")
    for read in (tight.captions.training, tight.captions.whole):
        with pytest.raises(
            ValueError, match=rf"train-.*{longest} tokens, text.max_length={longest - 1} cuts it"
        ):
            read(clips)


@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_captions_are_cut_where_something_is_left_out(shards: Path, kind: str) -> None:
    """By the limit or by the numbers behind them; what fits to the token is whole."""
    told = f"text.kind={kind}", "numbers.dropout=0", "caption_dropout=0.5"
    for more in ("numbers.sources={fps: fps}", "numbers.sources={}"):
        loose = dit_task(shards, *told, more, "text.max_length=512")
        clips = first_batches(loose)[0].clips
        lengths = [len(row) for row in loose.captions.whole(clips)]
        for limit in (max(lengths), max(lengths) - 1):
            task = dit_task(shards, *told, more, f"text.max_length={limit}")
            rows, are_cut = task.captions.training(clips)
            assert are_cut == [length > limit for length in lengths]
            assert max(map(len, rows)) <= limit


def test_validation_is_fixed_and_skips_filling(shards: Path) -> None:
    task = dit_task(shards)
    engine = engine_of(task)
    batches = first_batches(task)
    first = task.validate(engine, batches).merged([dict(task.validate(engine, batches).sums)])
    again = Means().merged([dict(task.validate(engine, batches).sums)])
    assert first == again
    cells = {f"loss/t{level}/5x16x16/t2v" for level in ("0.30", "0.80")}
    margins = {"loss", "loss/t0.30", "loss/t0.80", "loss/5x16x16", "loss/t2v"}
    assert cells | margins == set(again)
    assert again["loss"] == pytest.approx((again["loss/t0.30"] + again["loss/t0.80"]) / 2)
    close = dit_task(shards, "validation.noise_levels=[0.996,1.0]").validate(engine, batches)
    assert {"loss/t0.996/5x16x16/t2v", "loss/t1.00/5x16x16/t2v"} <= set(close.sums)
    filling = [replace(batch, counted=False) for batch in batches]
    assert dict(task.validate(engine, filling).sums) == {}


def test_means_add_up_over_ranks() -> None:
    one, two = Means(), Means()
    one.add("psnr", 60.0, 2)
    two.add("psnr", 10.0, 1)
    two.add("only here", 4.0, 2)
    assert one.merged([dict(one.sums), dict(two.sums)]) == {"only here": 2.0, "psnr": 70 / 3}


def test_the_vae_loss_is_a_sum_over_pixels(shards: Path) -> None:
    config = parse_config(
        tree(options(shards, shards / "run", "engine.precision=fp32", task=TINY_VAE))
    )
    assert isinstance(config, VAERun)
    torch.manual_seed(0)
    task = VAETask(config, single_process())
    engine = engine_of(task)
    batches = first_batches(task)
    with torch.no_grad():
        both = [task.loss(engine, batch) for batch in batches]
        joined = replace(batches[0], clips=[clip for batch in batches for clip in batch.clips])
        whole = task.loss(engine, joined)
    weight = task.weight(joined)
    assert weight == len(joined.clips) * 5 * 16 * 16
    split = sum(part.total.item() for part in both)
    assert split == pytest.approx(whole.total.item(), rel=1e-5)
    parts = {name: value.item() / weight for name, value in whole.parts.items()}
    total = sum(getattr(config.loss, name).weight * value for name, value in parts.items())
    assert whole.total.item() / weight == pytest.approx(total, rel=1e-5)
    assert 0 < parts["l1"] < 2 and parts["kl"] > 0
    assert task.tokens(joined) == len(joined.clips) * 3 * 8 * 8


def test_padding_of_embeddings() -> None:
    rows = [torch.ones(2, 3), torch.ones(4, 3, dtype=torch.bfloat16)]
    text = pad_embeddings(rows, 6)
    assert text.embeds.shape == (2, 6, 3)
    assert text.lens is not None and text.lens.tolist() == [2, 4]
    assert text.embeds.sum((1, 2)).tolist() == [6, 12]
    with pytest.raises(ValueError, match=r"text\.max_length=3"):
        pad_embeddings(rows, 3)
