"""What a VAE run starts from, what stays frozen, and what its validation says of its latents."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtake.data.plan.planned import PlannedSample
from longtake.models.interop import vae_to_diffusers
from longtake.models.vae import VAE, Posterior
from longtake.train import checkpoint
from longtake.train.config import parse_config
from longtake.train.init_from import start_from
from longtake.train.latent_figures import LatentFigures, fine_power
from longtake.train.optim import freeze
from longtake.train.ranks import single_process
from longtake.train.schema import VAERun
from longtake.train.tasks import Means
from longtake.train.vae_task import VAETask, change_
from tests.train.metric_weights import save_perceptual
from tests.train.tiny_runs import TINY_VAE, losses, options, train_here, tree


def config_of(shards: Path, *more: str) -> VAERun:
    config = parse_config(tree(options(shards, shards / "run", *more, task=TINY_VAE)))
    assert isinstance(config, VAERun)
    return config


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.find_last_good(folder / "checkpoints")
    assert path is not None
    return checkpoint.load_full(path, "param")


def test_decoder_only_fine_tuning_of_another_run(shards: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_here(options(shards, first, "train.steps=4", task=TINY_VAE)) == 0
    started = checkpoint.load_full(first / "checkpoints" / "step-00000004", "ema")
    more = f"init_from={first}", 'freeze=["encoder.*","quant.*"]', "train.steps=4"
    assert train_here(options(shards, second, *more, task=TINY_VAE)) == 0
    found = weights_of(second)
    for name, tensor in found.items():
        is_frozen = name.startswith(("encoder.", "quant."))
        assert torch.equal(tensor, started[name]) == is_frozen, name


def test_a_diffusers_folder_is_a_start(shards: Path, tmp_path: Path) -> None:
    config = config_of(shards)
    torch.manual_seed(1)
    theirs, ours = VAE(config.vae), VAE(config.vae)
    vae_to_diffusers(theirs, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).save_pretrained(
        tmp_path / "vae"
    )
    start_from(ours, str(tmp_path / "vae"))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_a_start_of_other_sizes_is_refused_by_name(shards: Path, tmp_path: Path) -> None:
    vae = VAE(config_of(shards).vae)
    vae_to_diffusers(vae, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).save_pretrained(
        tmp_path / "vae"
    )
    wider = VAE(config_of(shards, "vae.base_dim=16").vae)
    with pytest.raises(ValueError, match=r"encoder\.conv_in\.weight is \(8, .*makes it \(16, "):
        start_from(wider, str(tmp_path / "vae"))
    deeper = VAE(config_of(shards, "vae.num_res_blocks=2").vae)
    with pytest.raises(ValueError, match=r"blocks\.1\.conv1\.weight is missing"):
        start_from(deeper, str(tmp_path / "vae"))


def test_patterns_that_freeze_nothing_or_everything_are_refused(shards: Path) -> None:
    vae = VAE(config_of(shards).vae)
    with pytest.raises(ValueError, match=r"freeze has encodr\.\*"):
        freeze(vae, ["encodr.*"])
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(vae, ["*"])


def test_validation_says_how_good_and_what_the_latents_are_like(shards: Path) -> None:
    net = save_perceptual(shards / "net.pt")
    folder = shards / "run"
    more = "train.steps=2", "train.val_every=2", f"loss.perceptual.weights={net}"
    more = *more, "loss.perceptual.weight=0.1", "loss.flicker.weight=0.1"
    assert train_here(options(shards, folder, *more, task=TINY_VAE)) == 0
    for name in ("psnr", "ssim", "flicker", "flicker_of_truth", "lpips", "l1"):
        whole, bucket = (losses(folder, f"val/{key}") for key in (name, f"{name}/5x16x16"))
        assert whole.keys() == {0, 2} and whole == bucket, name
    for name in ("std", "std_min", "mean_max", "kurtosis_max", "dead", "fine", "channel/03/std"):
        assert losses(folder, f"val/latent_{name}").keys() == {0, 2}, name
    for name in ("detail", "flicker", "perceptual", "kl"):
        assert losses(folder, name).keys() == {1, 2}, name


def drawn_clips(number: int) -> tuple[Tensor, list[PlannedSample]]:
    """Clips of five frames whose pictures differ from all that they may be changed to."""
    plan = PlannedSample(
        *(0, 0, 0, "a", 0, (5, 4, 6), (0.0, 0.1, 0.2, 0.3, 0.4), 10.0),
        *((0.5, 0.5), False, "short", 0, 0, (0, 0)),
    )
    video = torch.rand(number, 3, 5, 4, 6, generator=torch.Generator().manual_seed(0)) - 0.5
    return video, [replace(plan, seed=seed) for seed in range(number)]


def changed(video: Tensor, samples: list[PlannedSample], cuts: float, fades: float) -> Tensor:
    video = video.clone()
    change_(video, samples, cuts, fades)
    return video


def others_of(clip: Tensor) -> Iterator[Tensor]:
    """The four pictures that a clip may become, in full light."""
    for turned in (clip.flip(0), clip.flip(0, 2, 3)):
        yield from (turned, -turned)


def test_clips_are_cut_to_another_picture_by_their_own_draws() -> None:
    video, samples = drawn_clips(64)
    all_cut, half_cut = (changed(video, samples, share, 0.0) for share in (1.0, 0.5))
    assert torch.equal(changed(video, samples, 0.0, 0.0), video)
    firsts = (all_cut == video).flatten(3).all(3).all(1).sum(1).tolist()
    assert set(firsts) == {1, 2, 3, 4}
    kinds, light = set(), []
    for clip, cut, first in zip(video, all_cut, firsts, strict=True):
        assert torch.equal(cut[:, :first], clip[:, :first])
        shares = [(cut[:, first:] + 1) / (other[:, first:] + 1) for other in others_of(clip)]
        kind = min(range(4), key=lambda index: float(shares[index].std()))
        assert shares[kind].std() < 1e-5
        kinds.add(kind)
        light.append(shares[kind].mean().item())
    assert kinds == {0, 1, 2, 3}
    assert 0.5 <= min(light) < 0.6 and 0.9 < max(light) <= 1
    is_cut = (half_cut != video).flatten(1).any(1)
    assert 16 < is_cut.sum() < 48
    assert torch.equal(half_cut[is_cut], all_cut[is_cut])  # whatever the others and the share
    still = video[:, :, :1]
    assert torch.equal(changed(still, samples, 0.5, 0.5), still)


def test_clips_fade_into_another_picture() -> None:
    video, samples = drawn_clips(64)
    all_cut, faded = changed(video, samples, 1.0, 0.0), changed(video, samples, 0.0, 1.0)
    both = changed(video, samples, 0.5, 0.5)
    is_cut = (both == all_cut).flatten(1).all(1)
    assert 16 < is_cut.sum() < 48
    assert torch.equal(both[~is_cut], faded[~is_cut])  # each clip is cut or faded
    on_the_way = []
    for clip, cut, fade in zip(video, all_cut, faded, strict=True):
        other = cut[:, -1] - clip[:, -1]  # of the last frame both show it alone
        torch.testing.assert_close(fade[:, -1], cut[:, -1])
        assert torch.equal(fade[:, 0], clip[:, 0]) and other.abs().max() > 0
        moved = (fade - clip).flatten(2).norm(dim=2).norm(dim=0)  # (T,)
        on_the_way.append(int((moved[1:-1] > 0).sum()))
    assert set(on_the_way) == {1, 2, 3}
    # A still clip shows the shares themselves: they rise from 0 to 1, evenly.
    still = video[:, :, :1].expand(-1, -1, 5, -1, -1)
    faded = changed(still, samples, 0.0, 1.0)
    way = (faded - still).flatten(3).norm(dim=3).norm(dim=1)
    share = way / way[:, -1:]
    steps = share.diff(dim=1)
    inner = steps[(share[:, :-1] > 0).logical_and(share[:, 1:] < 1)]
    assert steps.min() >= -1e-6 and len(inner) > 16
    for row, clip in zip(steps, share, strict=True):
        even = row[(clip[:-1] > 0).logical_and(clip[1:] < 1)]
        assert len(even) == 0 or even.max() - even.min() < 1e-4


@pytest.mark.parametrize("change", ["cuts=1", "fades=1"])
def test_training_sees_the_changes_and_validation_none(
    change: str, shards: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "plain", tmp_path / "changed"
    for folder, more in zip(runs, ("cuts=0", change), strict=True):
        watched = "train.steps=1", "train.val_every=1", more
        assert train_here(options(shards, folder, *watched, task=TINY_VAE)) == 0
    assert losses(runs[0])[1] != losses(runs[1])[1]
    assert losses(runs[0], "val/psnr")[0] == losses(runs[1], "val/psnr")[0]


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ("cuts=1.5", r"cuts=1\.5 and fades=0\.0 must be shares"),
        ("resume=sometimes", "resume=sometimes must be"),
        ("seed=-1", "seed=-1 must lie in"),
    ],
)
def test_values_that_no_run_can_have_are_refused(shards: Path, wrong: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        config_of(shards, wrong)


def test_training_is_compiled_where_the_config_says_and_validation_never(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[bool] = []
    compile_parts = VAE.compile_parts

    def keep(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(torch.is_grad_enabled())
        return module.forward

    monkeypatch.setattr(VAE, "compile_parts", lambda vae: compile_parts(vae, backend=keep))
    seen = []
    for name, more in (("plain", ()), ("compiled", ("speed.compile=true",))):
        watched = "train.steps=2", "train.val_every=1", *more
        assert train_here(options(shards, shards / name, *watched, task=TINY_VAE)) == 0
        seen.append((list(graphs), losses(shards / name, "val/psnr")))
    assert seen[0][0] == [] and seen[1][0] and all(seen[1][0])
    assert seen[0][1] == pytest.approx(seen[1][1], abs=1e-3)


def test_latent_figures_add_up_over_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(8, 3, 2, 32, 32, generator=generator) * torch.tensor(
        [2.0, 1.0, 0.001]
    ).view(1, 3, 1, 1, 1)
    latents[:, 0] += 5
    figures = LatentFigures(3)
    halves = [Means(figures.summary), Means(figures.summary)]
    for means, part in zip(halves, latents.chunk(2), strict=True):
        figures.add(means, Posterior(part, torch.full_like(part, math.log(0.25))), "5x64x64")
    row = halves[0].merged([dict(means.sums) for means in halves])
    assert row["latent_channel/00/mean"] == pytest.approx(5, abs=0.1)
    assert row["latent_channel/00/std"] == pytest.approx(2, rel=0.05)
    assert row["latent_channel/00/signal"] == pytest.approx(4 / 4.25, abs=0.01)
    assert row["latent_channel/01/kurtosis"] == pytest.approx(3, rel=0.1)
    assert row["latent_dead"] == pytest.approx(1 / 3)
    assert row["latent_fine"] == pytest.approx(0.72, abs=0.02)  # white noise
    assert not any(name.startswith("latent.") for name in row)


def test_fine_detail_is_told_per_bucket() -> None:
    noise = torch.randn(2, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    wave = torch.cos(2 * torch.pi * torch.arange(8) / 8).expand(2, 3, 2, 8, 8)
    means = Means(LatentFigures(3).summary)
    for mean, bucket in ((noise, "5x32x32"), (wave, "5x16x16")):
        LatentFigures(3).add(means, Posterior(mean, torch.zeros_like(mean)), bucket)
    row = means.merged([dict(means.sums)])
    assert row["latent_fine/5x32x32"] == pytest.approx(0.7, abs=0.05)
    assert row["latent_fine/5x16x16"] < 1e-6 < row["latent_fine"] < row["latent_fine/5x32x32"]


@pytest.mark.parametrize(("std", "noise", "dead"), [(1e-4, 1.0, 1), (1e-4, 0.05, 1), (1, 0.05, 0)])
def test_a_collapse_of_all_channels_is_seen(std: float, noise: float, dead: float) -> None:
    mean = std * torch.randn(4, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    means = Means(LatentFigures(3).summary)
    posterior = Posterior(mean, torch.full_like(mean, 2 * math.log(noise)))
    LatentFigures(3).add(means, posterior, "5x16x16")
    assert means.merged([dict(means.sums)])["latent_dead"] == dead


def test_smooth_latents_have_no_fine_detail() -> None:
    wave = torch.cos(2 * torch.pi * torch.arange(16) / 16).expand(1, 1, 1, 16, 16)
    fine, whole = fine_power(wave + 3)
    assert fine / whole < 1e-6
    assert fine_power(torch.ones(1, 1, 1, 1, 1)) == (0.0, 0.0)


def test_a_bucket_the_vae_cannot_take_is_refused(shards: Path) -> None:
    config = config_of(shards, "data.buckets=[{frames: 5, height: 16, width: 17, batch_size: 2}]")
    with pytest.raises(ValueError, match="16x17"):
        VAETask(config, single_process())
