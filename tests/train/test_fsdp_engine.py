import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from longtake.models.dit import DiT, DiTConfig
from longtake.models.text import TextConfig, TextEncoder
from longtake.train.engine import Ranks
from longtake.train.fsdp_engine import units_of
from longtake.train.text_to_video import TextToVideo
from tests.train import tiny
from tests.train.forked import import_before_fork, run_ranks


def test_units_are_blocks_and_what_may_be_called_alone() -> None:
    dit = DiT(DiTConfig(4, 4, hidden_size=12, num_heads=2, depth=2, ffn_dim=8, text_dim=8))
    text = TextConfig(max_length=8, d_model=8, num_layers=1, num_heads=2, d_ff=8)
    module = TextToVideo(dit, TextEncoder(text), 8)
    name_of = {each: name for name, each in module.named_modules()}
    encoder = "text.encoder.encoder.block.0"
    assert [name_of[unit] for unit in units_of(module)] == [
        *(f"{encoder}.layer.1", f"{encoder}.layer.0", encoder, "text"),
        *("dit.blocks.1", "dit.blocks.0", "dit", ""),
    ]


def call_alone(ranks: Ranks) -> list[bool]:
    torch.manual_seed(0)
    block = tiny.Tiny().blocks[0]
    x = torch.ones(2, 13)
    engine = tiny.build(ranks, "fsdp2")
    module = engine.module
    assert isinstance(module, tiny.Tiny)
    with torch.no_grad():
        alone = torch.equal(module.blocks[0](x), block(x))
    tiny.train(engine, range(1))
    with engine.whole_weights() as weights:
        whole = [tuple(w.shape) for w in weights.values()] == [
            tuple(p.shape) for p in tiny.Tiny().parameters()
        ]
    freed = all(is_sharded(parameter) for parameter in module.parameters())
    return [alone, whole, freed]


def is_sharded(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) and parameter.to_local().numel() < parameter.numel()


@pytest.mark.dist
def test_a_unit_may_be_called_alone_and_first() -> None:
    import_before_fork()
    assert run_ranks(2, call_alone) == [[True] * 3] * 2
