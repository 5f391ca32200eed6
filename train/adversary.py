"""The VAE's opponent: when the discriminator plays, what it learns, how loud it may be.

Its state is a second engine's, under whatever strategy the VAE has; its moving figures are equal on
all ranks and travel in the checkpoint's train_state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from longtake.data.plan import PlannedSample
from longtake.models.discriminator import Discriminator
from longtake.models.transfer import HostCopy, to_device
from longtake.train.engine import Engine, Ranks
from longtake.train.metrics import WeightedMean
from longtake.train.schema import VAERun
from longtake.train.strategy import StepResult
from longtake.train.tasks import LossSum, normal_draws
from longtake.train.vae_schema import changes

VERDICT_DECAY = 0.99  # of the running means of logits that LeCAM holds the verdicts to
TINY = 1e-8  # keeps the adaptive weight finite where the critic is indifferent


@dataclass
class Figures:
    """What the game is decided by: the same numbers on all ranks."""

    started: int | None = None  # optimizer step of the first lesson
    windows: list[float] = field(default_factory=list)  # finished windows' mean reconstruction
    window_steps: int = 0  # of the present one
    real: float = 0.0  # running mean of the logits of true clips
    fake: float = 0.0
    lessons: int = 0


@dataclass(frozen=True)
class Taught:
    """A lesson of which the device has yet to tell what came of it."""

    result: StepResult
    verdicts: HostCopy | None  # (2,) mean logits of true and of drawn clips, where LeCAM asks


class Adversary:
    """Discriminator with engine, losses and figures. All ranks call everything alike."""

    def __init__(self, config: VAERun, ranks: Ranks) -> None:
        """ValueError for a bucket too small to be judged."""
        settings = config.discriminator
        for bucket in config.data.buckets:
            settings.network.check_size(bucket.height, bucket.width)
        self.settings, self.term, self._loss = settings, config.loss.adversarial, config.loss
        self.optim = replace(
            config.optim, lr=settings.lr, betas=settings.betas, weight_decay=0.0, muon=[]
        )
        self.engine = Engine(Discriminator(settings.network), self.optim, config.engine, ranks)
        with torch.device("meta"):  # lends its forward to weights that the engine holds
            self._listener = Discriminator(settings.network)
        self.figures = Figures(started=settings.start)
        self._window = WeightedMean()  # reconstruction in the present one
        self._logits: list[Tensor] = []  # (2,) sums of this step's micro-batches
        self._taught: Taught | None = None  # until it is settled

    def learns(self, step: int) -> bool:
        """Whether the discriminator is taught at this optimizer step."""
        return self.figures.started is not None and step >= self.figures.started

    def is_heard(self, step: int) -> bool:
        """Whether the VAE is charged for what the discriminator says."""
        return self.learns(step) and self.figures.lessons >= self.settings.head_start

    def charge(
        self, pixels: Tensor, weights: Tensor, slope: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient at the reconstructed pixels (B, 3, T, H, W) of the adversarial term.

        The hinge game's generator wants high logits: −D(pixels). Its weight is adapted so that both
        gradients are alike at the pixels (VQGAN, arXiv 2012.09841 eq. 7, there at the last layer,
        whose weights a sharding strategy may have put elsewhere). `slope` is the gradient of the
        other terms at the same pixels, `weights` (B,) what each clip counts. Nothing is left in the
        discriminator's gradients.
        """
        leaf = pixels.detach().requires_grad_()
        with self.engine.whole_weights() as held, self.engine.autocast():
            logits = functional_call(self._listener, held, leaf)
            loss = (weights * -logits.flatten(1).mean(1)).sum()
            (away,) = torch.autograd.grad(loss, leaf)
        adaptive = slope.float().norm() / (away.float().norm() + TINY)
        adaptive = adaptive.clamp(max=self.term.max_adaptive)
        parts = {"adversarial": loss.detach(), "adaptive_weight": adaptive * weights.sum()}
        return self.term.weight * adaptive * away, parts

    def lesson(
        self, pixels: Tensor, video: Tensor, weights: Tensor, samples: Sequence[PlannedSample]
    ) -> LossSum:
        """Hinge loss of the discriminator over clips it should tell apart, with its penalties.

        Hinge: arXiv 1705.02894. LeCAM holds each side's logits to the running mean of the other's
        (arXiv 2104.03310 eq. 4). R1 as a finite difference: ‖D(x) − D(x + σ·noise)‖² (arXiv
        2501.08316 §3.3); exact: ‖∇D(x)‖² / 2 (arXiv 1801.04406).
        """
        settings, figures = self.settings, self.figures
        clips = [video, pixels.detach()]
        shakes = settings.r1 > 0 and settings.r1_kind == "finite_difference"
        if shakes:
            noise = normal_draws(samples, tuple(video.shape[1:]), "r1")
            clips.append(video + settings.r1_sigma * to_device(noise, video.device))
        # One forward for all: under sharding a module's forward and backward come in pairs.
        real, fake, *shaken = self.engine(torch.cat(clips)).flatten(1).split(len(video))
        hinge = F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1)
        total = hinge
        parts = {"critic": hinge, "logits_real": real.mean(1), "logits_fake": fake.mean(1)}
        if settings.lecam > 0:
            pull = (real - figures.fake).square().mean(1) + (fake - figures.real).square().mean(1)
            parts["lecam"], total = pull, total + settings.lecam * pull
        if settings.r1 > 0:
            slope = (real - shaken[0]).square().mean(1) if shakes else self._slope(video)
            parts["r1"], total = slope, total + settings.r1 * slope
        sums = {name: (weights * value).sum().detach() for name, value in parts.items()}
        if settings.lecam > 0:
            self._logits.append(torch.stack((sums["logits_real"], sums["logits_fake"])))
        return LossSum((weights * total).sum(), sums)

    def _slope(self, video: Tensor) -> Tensor:
        leaf = video.detach().requires_grad_()
        (slope,) = torch.autograd.grad(
            self.engine(leaf).flatten(1).mean(1).sum(), leaf, create_graph=True
        )
        return 0.5 * slope.square().flatten(1).sum(1)

    def watch(self, reconstruction: Tensor) -> None:
        """Count a micro-batch's weighted reconstruction loss, by which a plateau is found."""
        if self.figures.started is None:
            self._window.count("reconstruction", reconstruction.detach())

    def finish_step(self, step: int, weight: float) -> None:
        """Teach the lesson of this optimizer step; without one, see whether there is a plateau.

        `weight` is the denominator of the step. Windows are of one loss: where a term of it begins
        to count, they begin anew.
        """
        if self.learns(step):
            verdicts = self._verdicts(weight) if self._logits else None
            result = self.engine.clip_and_step(self.settings.lr, self.optim.max_grad_norm)
            self._taught = Taught(result, verdicts)
        elif self.figures.started is None:
            self._look_for_plateau(step, weight)
            if changes(self._loss, step + 1):
                self._window = WeightedMean()
                self.figures.windows, self.figures.window_steps = [], 0

    @property
    def last_result(self) -> StepResult | None:
        """What came of the last lesson, until it is settled."""
        return None if self._taught is None else self._taught.result

    def row(self) -> dict[str, float]:
        """What belongs in the log of the step just finished; waits for the device."""
        return {} if self.last_result is None else {"critic_grad_norm": self.last_result.grad_norm}

    def settle(self) -> None:
        """Bring the figures up to date with the last lesson, of which the device has told by now;
        once."""
        taught, self._taught = self._taught, None
        if taught is None or taught.result.skipped:
            return
        figures = self.figures
        figures.lessons += 1
        if taught.verdicts is not None:
            real, fake = taught.verdicts.read().tolist()
            # the first verdict is the mean itself
            keep = VERDICT_DECAY if figures.lessons > 1 else 0.0
            figures.real = keep * figures.real + (1 - keep) * real
            figures.fake = keep * figures.fake + (1 - keep) * fake

    def _verdicts(self, weight: float) -> HostCopy:
        total = torch.stack(self._logits).double().sum(0) / weight
        self._logits = []
        if self.engine.ranks.world_size > 1:
            dist.all_reduce(total)
        return HostCopy(total)

    def _look_for_plateau(self, step: int, weight: float) -> None:
        figures, settings = self.figures, self.settings
        self._window.add_weight(weight)
        figures.window_steps += 1
        if figures.window_steps < settings.plateau_window:
            return
        mean = self._window.read(self.engine.ranks)["reconstruction"]
        figures.windows, figures.window_steps = [*figures.windows, mean][-2:], 0
        if len(figures.windows) == 2:
            before, now = figures.windows
            if now > (1 - settings.plateau_gain) * before:
                figures.started = step + 1

    def state(self) -> dict[str, Any]:
        """JSON of the figures; the weights are the engine's."""
        self.settle()
        window = self._window.state(self.engine.ranks)
        steps = self.engine.optimizer_steps
        return {"figures": asdict(self.figures), "window": window, "optimizer_steps": steps}

    def load(self, state: dict[str, Any]) -> None:
        """Take the figures of `state`."""
        self.figures = Figures(**state["figures"])
        self._window.load(state["window"], self.engine.ranks)
        self._logits, self._taught = [], None
