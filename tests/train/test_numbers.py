"""numbers.form=embedding: with every text encoder and codec, told, resumed, exported."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from longtake.launch.compose import compose_dit
from longtake.models.sampler import SamplerConfig
from longtake.train.codec import load_codec
from longtake.train.config import check_exportable
from longtake.train.encode import encode_shards
from longtake.train.export import export_run
from longtake.train.init_from import start_from
from longtake.train.painter import Painter, noise_for
from longtake.train.runs import load_dit
from longtake.train.text_to_video import TextToVideo

from .conftest import Road, small_text
from .forked import import_before_fork, run_ranks
from .small_runs import four_steps, train_and_resume, write_dit_run
from .tiny_runs import losses, options, train_here, train_on_rank

TOLD = "numbers.form=embedding", "numbers.sources={fps: fps}"
LAST = "tokens.0.fc2.weight"  # zero until it is learnt


@pytest.fixture(scope="module")
def umt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small UMT5 encoder of 16 channels."""
    folder = tmp_path_factory.mktemp("umt5")
    torch.manual_seed(1)
    sizes = UMT5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=20, num_layers=1, num_heads=2)
    UMT5EncoderModel(sizes).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("codec", ["vae", "identity"])
@pytest.mark.parametrize("kind", ["bytes", "words", "pretrained"])
def test_numbers_are_learnt_told_and_kept(
    road: Road, umt5: Path, tmp_path: Path, codec: str, kind: str
) -> None:
    text = [f"text.kind={kind}", *([f"text.path={umt5}"] if kind == "pretrained" else [])]
    data, more = road.latents, [*TOLD, *text, "numbers.dropout=0.3", "caption_dropout=0.3"]
    if codec == "identity":
        data = road.pixels
        more += ["codec=identity", "model.in_channels=3", "model.out_channels=3"]
    elif kind != "bytes":
        data = tmp_path / "latents"
        wanted = compose_dit([*four_steps(data, data, 5, ["t2v"]), *text]).text
        encode_shards(road.vae, road.pixels, data, replace(small_text(), text=wanted))
    command = partial(_command, data, [*more, "samples.prompts=[red,blue]"])
    folder = train_and_resume(command, tmp_path)  # goes on as it did, and draws
    run = load_dit(folder)
    assert run.numbers is not None and run.numbers.sources == {"fps": "fps"}
    assert run.numbers.state_dict()[LAST].any()
    painter = Painter(run, load_codec(run.config, folder=folder), SamplerConfig(2, 1.0, 1.0))
    with torch.no_grad():  # four steps from zero are too few to be seen in pixels
        for parameter in run.numbers.parameters():
            parameter.add_(torch.randn_like(parameter))
    noise = torch.stack([noise_for(0, painter.codec.latent_shape(5, 16, 16))])
    slow, fast = (painter.draw(["red"], noise, numbers=[{"fps": fps}]) for fps in (4.0, 16.0))
    silent, plain = painter.draw(["red"], noise, numbers=[{}]), painter.draw(["red"], noise)
    assert not torch.allclose(slow, fast, atol=1e-4)
    assert not torch.allclose(slow, silent, atol=1e-4)
    assert torch.equal(silent, plain)


def _command(data: Path, more: list[str], folder: Path) -> list[str]:
    return four_steps(data, folder, 5, ["t2v"], *more)


@pytest.mark.dist
def test_sharded_ranks_train_and_draw_with_them(shards: Path, tmp_path: Path) -> None:
    import_before_fork()
    more = *TOLD, "engine.precision=fp32", "train.steps=4", "train.sample_every=4"
    one, two = tmp_path / "one", tmp_path / "two"
    assert train_here(options(shards, one, *more)) == 0
    assert run_ranks(2, train_on_rank, options(shards, two, *more, "engine=fsdp2")) == [0, 0]
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    assert sorted((two / "samples" / "step-00000004").iterdir())


def test_stock_pipelines_draw_without_them(road: Road, tmp_path: Path) -> None:
    run = write_dit_run(tmp_path / "dit", road.latents, *TOLD)
    report = export_run(run, tmp_path / "pipeline")
    assert max(report.worst.values()) < 1e-3
    assert "without the embeddings of fps (numbers.form=embedding)" in str(report)
    config = load_dit(run).config
    always = replace(config, numbers=replace(config.numbers, dropout=0.0))
    with pytest.raises(ValueError, match=r"numbers.dropout=0 must be > 0 with numbers.form=emb"):
        check_exportable(always)


def test_a_start_without_them_or_with_others_is_said(road: Road, tmp_path: Path) -> None:
    run = write_dit_run(tmp_path / "dit", road.latents, *TOLD)
    module = TextToVideo.from_config(load_dit(run).config)
    with pytest.raises(ValueError, match=r"numbers.tokens.0.fc1.weight is missing"):
        start_from(module, str(road.dit))
    start_from(module, str(road.dit), ["dit.*", "text.*"])
    assert not module.state_dict()[f"numbers.{LAST}"].any()
    start_from(module, str(run))
    assert module.state_dict()[f"numbers.{LAST}"].any()
    for told in ("motion: fps", "fps: motion"):  # another word, and another source of the same
        sources = f"numbers.sources={{{told}}}"
        other = write_dit_run(tmp_path / told, road.latents, TOLD[0], sources)
        word, source = told.split(": ")
        line = f"numbers.sources is {{'{word}': '{source}'}} there, the config has {{'fps': 'fps'}}"
        with pytest.raises(ValueError, match=re.escape(line)):
            start_from(module, str(other))
        start_from(module, str(other), ["dit.*", "text.*"])


def test_words_are_refused_where_captions_are_cached(umt5: Path, tmp_path: Path) -> None:
    text = "text.kind=pretrained", f"text.path={umt5}", TOLD[1]
    with pytest.raises(ValueError, match=r"numbers.form=words must be embedding, or all of"):
        compose_dit(four_steps(tmp_path, tmp_path, 5, ["t2v"], *text))
    with pytest.raises(ValueError, match=r"text.max_length=1 must be at least 2"):
        more = "numbers.sources={fps: fps, motion: motion}", "text.max_length=1"
        compose_dit(four_steps(tmp_path, tmp_path, 5, ["t2v"], TOLD[0], *more))
