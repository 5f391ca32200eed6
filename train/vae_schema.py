"""The config sections of the VAE's losses and of its discriminator."""

from __future__ import annotations

from dataclasses import dataclass, fields

from longtake.models.discriminator import DiscriminatorConfig
from longtake.train.checks import choice, require

R1_KINDS = ("finite_difference", "exact")


@dataclass(frozen=True)
class LossTerm:
    """One term of the loss: a mean over a clip's values, weighed."""

    weight: float  # 0: not even measured
    start: int  # optimizer step from which it counts; before, it is only measured

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"weight={self.weight} must be >= 0")
        require(self.start >= 0, f"start={self.start} must be >= 0")

    def at(self, step: int) -> float:
        """Its weight at an optimizer step."""
        return self.weight if step >= self.start else 0.0


@dataclass(frozen=True)
class PerceptualTerm(LossTerm):
    """LPIPS of some of a clip's frames."""

    weights: str | None  # TorchScript file, see `vae_losses.Perceptual`
    frames: int  # of a clip that are compared, evenly spaced

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.frames > 0, f"frames={self.frames} must be > 0")
        require(
            self.weight == 0 or self.weights is not None,
            f"weight={self.weight} needs the file of its network: set weights, or weight=0 "
            "(loss.detail needs no file)",
        )


@dataclass(frozen=True)
class AdversarialTerm:
    """The VAE's own part of the game; when it starts is the discriminator's matter."""

    weight: float  # 0: no discriminator
    max_adaptive: float  # most by which the adaptive weight may raise it

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"weight={self.weight} must be >= 0")
        require(self.max_adaptive > 0, f"max_adaptive={self.max_adaptive} must be > 0")


@dataclass(frozen=True)
class VAELossConfig:
    """Every term is a mean over the values of a clip, pixels in [-1, 1]."""

    l1: LossTerm
    mse: LossTerm
    charbonnier: LossTerm  # sqrt(e² + 1e-6): L1 that is smooth at zero
    detail: LossTerm  # bands of the Haar transform of the error, three scales
    flicker: LossTerm  # change of the error from frame to frame
    kl: LossTerm  # nats per latent value
    perceptual: PerceptualTerm
    adversarial: AdversarialTerm
    chroma: LossTerm = LossTerm(0.0, 0)  # squared error of colour without light

    def __post_init__(self) -> None:
        pixels = (self.l1, self.mse, self.charbonnier)
        require(
            any(term.at(0) > 0 for term in pixels),
            "loss needs l1, mse or charbonnier with weight > 0 from start=0: nothing else says "
            "what the pixels are",
        )


@dataclass(frozen=True)
class AdversaryConfig:
    """The discriminator: its size, its optimizer, when it plays, what keeps it calm."""

    base_dim: int
    num_layers: int
    lr: float
    betas: tuple[float, float]
    start: int | None  # optimizer step of its first lesson; null: when reconstruction stands still
    plateau_window: int  # steps of each of the two windows whose mean losses are compared
    plateau_gain: float  # share by which the later window must be better, or it is a plateau
    head_start: int  # steps it learns alone before the VAE hears of it
    lecam: float  # weight of LeCAM
    r1: float  # weight of the penalty of its slope at true clips
    r1_kind: str  # finite_difference | exact (needs double backward: engine.strategy=ddp only)
    r1_sigma: float  # noise of the finite difference, in pixel units

    def __post_init__(self) -> None:
        assert self.network  # its own checks
        for name in ("lecam", "r1", "head_start"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be >= 0")
        for name in ("lr", "plateau_window", "r1_sigma"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be > 0")
        require(all(0 <= b < 1 for b in self.betas), f"betas={self.betas} must lie in [0, 1)")
        require(self.start is None or self.start >= 0, f"start={self.start} must be >= 0 or null")
        gain = self.plateau_gain
        require(0 < gain < 1, f"plateau_gain={gain} must lie in (0, 1)")
        choice("r1_kind", self.r1_kind, R1_KINDS)

    @property
    def network(self) -> DiscriminatorConfig:
        """Sizes of the network."""
        return DiscriminatorConfig(self.base_dim, self.num_layers)


def changes(loss: VAELossConfig, step: int) -> bool:
    """Whether a term begins to count at an optimizer step after the first: the loss is then not
    what it was before."""
    return any(step == term.start > 0 for term in (*measured_terms(loss).values(), loss.kl))


def measured_terms(loss: VAELossConfig) -> dict[str, LossTerm]:
    """The terms over pixels that have a weight, by name; KL and the adversary are not of them."""
    terms = {field.name: getattr(loss, field.name) for field in fields(loss)}
    return {
        name: term
        for name, term in terms.items()
        if isinstance(term, LossTerm) and name != "kl" and term.weight > 0
    }
