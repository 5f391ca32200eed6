"""Sequences of any make: appended segments against a peer with their coordinates, packs against
their samples one by one."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longtake.models import attention
from longtake.models.dit import CHECKPOINTING, DiT
from longtake.models.interop import dit_from_diffusers
from longtake.models.tokens import Segment, Video
from tests.models.test_dit import TINY, compare, inputs, peer, randomise

# (T, H, W) in patches, words of the text, frames (in patches) of segments at their starts.
Sample = tuple[tuple[int, int, int], int, dict[float, int]]
MIXES: dict[str, list[Sample]] = {
    "odd grids": [((1, 5, 3), 2, {}), ((3, 2, 7), 9, {}), ((4, 1, 1), 1, {})],
    "alike and segments": [
        ((2, 3, 3), 3, {0: 1, 5: 2}),
        ((2, 3, 3), 5, {}),
        ((3, 3, 5), 9, {7.5: 1}),
        ((2, 3, 3), 4, {}),
    ],
    "above the explicit kernel": [((4, 7, 6), 6, {1: 1}), ((1, 2, 2), 3, {})],
}


def with_coordinates(theirs: Any, frames: Sequence[int]) -> None:
    """Let the peer's frames stand at these latent frames, one behind the other or not."""
    rope = theirs.rope.forward
    step = theirs.config.patch_size[0]

    def forward(latents: Tensor) -> tuple[Tensor, Tensor]:
        long = latents.new_zeros(*latents.shape[:2], step * (max(frames) + 1), *latents.shape[3:])
        chosen = [table.unflatten(1, (max(frames) + 1, -1))[:, frames] for table in rope(long)]
        return chosen[0].flatten(1, 2), chosen[1].flatten(1, 2)

    theirs.rope.forward = forward


@pytest.mark.parametrize(
    ("name", "given_t"), [("two heads", None), ("no cross norm, other patch", 0.1)]
)
def test_segments_stand_at_their_place(name: str, given_t: float | None) -> None:
    """Copies of a frame of the video and of later ones, behind it: as a peer that holds them in one
    sequence with the same coordinates and a timestep per token."""
    theirs = peer(name)
    ours = dit_from_diffusers(theirs)
    step = theirs.config.patch_size[0]
    _, t, text = inputs(theirs)
    places = [0, 1, 1, 4, 5]  # in patches: a video of two, a copy of its second, two from 4 on
    shape = (3, theirs.config.in_channels, step * len(places), 6, 6)
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    whole[:, :, 2 * step : 3 * step] = whole[:, :, step : 2 * step]
    with_coordinates(theirs, places)
    video, copy, later = whole.split((2 * step, step, 2 * step), 2)
    extra = [Segment(copy, 1.0 * step), Segment(later, 4.0 * step)]
    extra_t = None if given_t is None else given_t * torch.ones(3)
    found = ours(video, t, text, extra=extra, extra_t=extra_t)
    per_frame = math.prod(whole.shape[3:]) // math.prod(theirs.config.patch_size[1:])
    per_token = torch.cat([t[:, None]] * 2 + [torch.full((3, 3), given_t or 0.0)], 1)
    steps = 1000 * per_token.repeat_interleave(per_frame, 1)
    expected = theirs(whole, steps, text).sample[:, :, : 2 * step]
    compare(ours, theirs, found, expected)


def draw(dit: DiT, mix: list[Sample]) -> tuple[list[Video], dict[str, Tensor]]:
    """Videos of a mix with a random half of their tokens given, and the rest of the inputs."""
    generator = torch.Generator().manual_seed(6)
    patch, channels = dit.config.patch_size, dit.config.in_channels

    def latents(grid: Sequence[int]) -> Tensor:
        shape = [size * step for size, step in zip(grid, patch, strict=True)]
        return torch.randn(channels, *shape, generator=generator)

    videos = [
        Video(
            latents(grid),
            torch.randint(0, 2, (math.prod(grid),), generator=generator),
            [Segment(latents((t, *grid[1:])), start) for start, t in places.items()],
        )
        for grid, _, places in mix
    ]
    lens = torch.tensor([words for _, words, _ in mix])
    text = torch.randn(len(mix), 9, dit.config.text_dim, generator=generator)
    text *= torch.arange(9)[:, None] < lens[:, None, None]
    levels = torch.rand(len(mix), 2, generator=generator)
    extra_t = torch.rand(len(mix), generator=generator)
    return videos, {"text_embeds": text, "text_lens": lens, "levels": levels, "extra_t": extra_t}


def gradients(dit: DiT, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    dit.zero_grad()
    weights = [torch.randn(one.shape, generator=generator).to(one.device) for one in outputs]
    parts = [o.numel() ** -0.5 * (w * o).sum() for o, w in zip(outputs, weights, strict=True)]
    torch.stack(parts).sum().backward(retain_graph=True)
    return {name: p.grad for name, p in dit.named_parameters() if p.grad is not None}


def same(dit: DiT, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected) and expected[0].std() > 0.1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    wanted = gradients(dit, expected)
    for name, grad in gradients(dit, found).items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("name", "mix", "spare"),
    [
        ("two heads", "odd grids", None),
        ("two heads", "alike and segments", 13),
        ("two heads", "above the explicit kernel", 0),
        ("no cross norm, other patch", "odd grids", 0),
        ("no cross norm, other patch", "alike and segments", None),
    ],
)
def test_pack_equals_its_samples(name: str, mix: str, spare: int | None) -> None:
    dit = dit_from_diffusers(peer(name))
    videos, rest = draw(dit, MIXES[mix])
    expected = []
    for index, video in enumerate(videos):
        one = {key: value[index : index + 1] for key, value in rest.items()}
        given = [replace(s, latents=s.latents[None]) for s in video.extra]
        assert video.level_index is not None
        output = dit(
            video.latents[None], None, level_index=video.level_index[None], extra=given, **one
        )
        expected.append(output[0])
    budget = None
    if spare is not None:
        budget = spare + sum(
            (grid[0] + sum(places.values())) * math.prod(grid[1:]) for grid, _, places in MIXES[mix]
        )
    same(dit, dit(videos, None, budget=budget, **rest), expected)


def test_pack_of_plain_timesteps() -> None:
    dit = dit_from_diffusers(peer("two heads"))
    latents, t, text = inputs(peer("two heads"))
    found = dit([Video(one) for one in latents], t, text)
    same(dit, found, list(dit(latents, t, text).unbind()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's kernel for packs needs CUDA")
def test_pack_on_a_gpu_equals_its_samples() -> None:
    """In bf16 with the kernel for packed sequences, against fp32 by document."""
    dit = DiT(replace(TINY, hidden_size=64))
    randomise(dit)
    videos, rest = draw(dit.cuda(), MIXES["alike and segments"])
    videos = [
        Video(
            video.latents.cuda(),
            None if video.level_index is None else video.level_index.cuda(),
            [replace(s, latents=s.latents.cuda()) for s in video.extra],
        )
        for video in videos
    ]
    rest = {name: x if name == "text_lens" else x.cuda() for name, x in rest.items()}
    expected = dit(videos, None, **rest)
    wanted = gradients(dit, expected)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = dit(videos, None, budget=256, **rest)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().mean() < 0.03 * other.abs().mean()
    for name, grad in gradients(dit, found).items():
        assert (grad - wanted[name]).norm() < 0.1 * wanted[name].norm() + 1e-3, name


def varlen(q: Tensor, k: Tensor, v: Tensor, *ends_and_bounds: Any) -> Tensor:
    """What torch's kernel for packed sequences computes, by a mask."""
    ends, bounds = ends_and_bounds[:2], ends_and_bounds[2:]
    owners = [
        torch.bucketize(torch.arange(len(x)), end[1:].long(), right=True)
        for x, end in zip((q, k), ends, strict=True)
    ]
    assert all(end.dtype == torch.int32 and end.dim() == 1 for end in ends)
    assert all(bound >= 0 for bound in bounds)
    mask = owners[0][:, None] == owners[1]
    out = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask)
    return out.transpose(0, 1)


def test_packs_share_one_graph_on_the_kernel_for_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The road of a GPU with a reference of its kernel: right, and traced once for all packs."""
    dit = dit_from_diffusers(peer("one head"))
    packs = [
        [((3, 5, 3), 2, {}), ((1, 2, 7), 8, {3: 1})],
        [((2, 2, 2), 9, {}), ((2, 3, 2), 1, {})],
    ]
    drawn = [draw(dit, pack) for pack in packs]
    with torch.no_grad():
        expected = [dit(videos, None, **rest) for videos, rest in drawn]
        monkeypatch.setattr(attention, "varlen_attn", varlen)
        monkeypatch.setattr(attention, "has_varlen", lambda q: True)
        graphs = []

        def count(graph: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        torch.compiler.reset()
        dit.compile_blocks(backend=count, fullgraph=True)
        for (videos, rest), wanted in zip(drawn, expected, strict=True):
            for one, other in zip(dit(videos, None, budget=96, **rest), wanted, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert len(graphs) == 1
    assert any(node.target is F.scaled_dot_product_attention for node in graphs[0].graph.nodes)


def test_packs_share_graphs_on_a_cpu() -> None:
    """However many compositions there are, the first has compiled all."""
    dit = dit_from_diffusers(peer("one head"))
    packs: list[list[Sample]] = [
        [((1 + i % 3, 2 + i % 4, 2), 1 + i % 8, {}), ((2, 1 + i // 2, 2), 2, {})] for i in range(10)
    ]
    drawn = [draw(dit, pack) for pack in packs]
    expected = [dit(videos, None, **rest) for videos, rest in drawn]
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    dit.compile_blocks(backend=count)
    found = [dit(drawn[0][0], None, budget=96, **drawn[0][1])]
    first = len(graphs)
    found += [dit(videos, None, budget=96, **rest) for videos, rest in drawn[1:]]
    assert len(graphs) == first > 0
    for one, wanted in zip(found, expected, strict=True):
        same(dit, one, wanted)


@pytest.mark.parametrize("in_bf16", [False, True])
def test_checkpointing_recomputes_what_it_says(in_bf16: bool) -> None:
    """FLOPs of the matrix products in a step: selective repeats the logits of written-out
    attention alone, which are few in fp32 and most of it in bf16; full repeats all blocks."""
    dit = dit_from_diffusers(peer("two heads"))
    videos, rest = draw(dit, MIXES["above the explicit kernel"])
    flops, logits = {}, 0
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        expected = dit(videos, None, **rest)
        for kind in CHECKPOINTING:
            dit.set_checkpointing(kind)
            same(dit, dit(videos, None, **rest), expected)
            with FlopCounterMode(display=False) as counter:
                gradients(dit, dit(videos, None, **rest))
            flops[kind] = counter.get_total_flops()
            if kind == "none":  # as many again for the gradients of q, and of k
                logits = counter.get_flop_counts()["Global"][torch.ops.aten.baddbmm] // 3
    assert flops["none"] < flops["selective"] == flops["none"] + logits
    assert flops["selective"] < (1.15 if in_bf16 else 1.02) * flops["none"]
    assert flops["full"] > 1.25 * flops["none"]


@pytest.mark.slow
def test_compiled_blocks_compute_the_same() -> None:
    dit = dit_from_diffusers(peer("two heads"))
    latents, t, text = inputs(peer("two heads"))
    expected = dit(latents, t, text)
    names = list(dit.state_dict())
    torch.compiler.reset()  # of other models, whose widths would be taken for sizes that vary
    dit.compile_blocks(backend="aot_eager")
    assert list(dit.state_dict()) == names
    same(dit, [dit(latents, t, text)], [expected])


def test_wrong_sequences_are_refused() -> None:
    dit = dit_from_diffusers(peer("two heads"))
    videos, rest = draw(dit, MIXES["odd grids"])
    with pytest.raises(ValueError, match="a pack of 61 tokens is over its budget=60"):
        dit(videos, None, budget=60, **rest)
    latents, t, text = inputs(dit)
    for wrong, rule in ((latents[:2], "must be of the samples"), (latents[..., :3], "divisible")):
        with pytest.raises(ValueError, match=rule):
            dit(latents, t, text, extra=[Segment(wrong, 0.0)])
    for wrong in ({"budget": 60}, {"extra": [Segment(latents, 0.0)]}):
        with pytest.raises(ValueError, match="budget is for packs"):
            dit(latents if "budget" in wrong else videos, t, text, **wrong)
    with pytest.raises(ValueError, match="'some' must be one of"):
        dit.set_checkpointing("some")
