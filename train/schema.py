"""The dataclasses of a run's config, one per section of `conf/`. YAML is complete: defaults are
what runs of before a key did, so that their configs can still be read.

Each checks its own values; what concerns several sections is checked in `config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from longtake.data.config import DataConfig
from longtake.models.conditioning import TASKS, check_tasks
from longtake.models.dit import CHECKPOINTING, DiTConfig
from longtake.models.flow import TimestepConfig
from longtake.models.sampler import SamplerConfig
from longtake.models.text import TextConfig
from longtake.models.vae_config import VAEConfig
from longtake.train.checks import choice, require
from longtake.train.ema import EmaConfig
from longtake.train.engine import EngineConfig
from longtake.train.optim import OptimConfig
from longtake.train.vae_schema import AdversaryConfig, VAELossConfig

STAGES = ("vae", "dit")
CODECS = ("vae", "identity")
PREDICTIONS = ("velocity", "clean")


@dataclass(frozen=True)
class TrainConfig:
    """The loop. Every `*_every` counts optimizer steps; 0 turns the action off."""

    steps: int
    log_every: int
    val_every: int
    checkpoint_every: int
    sample_every: int
    keep_last: int  # checkpoints kept; 0 keeps all
    deterministic: bool  # bit-equal weights on a GPU too
    num_threads: int  # torch threads per rank; 0 leaves torch's choice
    device: str  # auto | cpu | cuda
    timeout: float  # seconds a collective may take before the run fails
    loss_jump: float  # a loss so many times the recent median rewinds the run; 0: never
    max_rewinds: int  # returns to a checkpoint; then the run fails
    keep_every: int = 0  # steps; checkpoints at their multiples are never deleted; 0: none
    checkpoint_copy: str | None = None  # folder or URL that checkpoints are copied to; null: none
    max_skips: int = 5  # steps skipped in a row; then back to the last checkpoint; 0: never
    hang_factor: float = 20.0  # a step of so many times the median hangs; 0: nobody watches
    hang_seconds: float = 300.0  # but never one that is shorter than this
    max_same_step: int = 3  # attempts in a row that end badly at one step; then the run stays ended
    cost_per_hour: float = 0.0  # of the whole job, in any currency; 0: not known
    peak_tflops: float = 0.0  # of one device, for MFU; 0: what is known of a GPU of its name

    def __post_init__(self) -> None:
        require(self.steps > 0, f"train.steps={self.steps} must be > 0")
        counts = "log_every", "val_every", "checkpoint_every", "sample_every"
        for name in (*counts, "keep_last", "keep_every", "max_skips", "max_same_step"):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)} must be >= 0")
        require(
            self.log_every > 0, "train.log_every=0 must be > 0: metrics.jsonl is always written"
        )
        require(self.num_threads >= 0, f"train.num_threads={self.num_threads} must be >= 0")
        require(self.timeout > 0, f"train.timeout={self.timeout} must be > 0 seconds")
        jump = self.loss_jump
        require(jump == 0 or jump > 1, f"train.loss_jump={jump} must be > 1, or 0 for never")
        require(self.max_rewinds >= 0, f"train.max_rewinds={self.max_rewinds} must be >= 0")
        factor = self.hang_factor
        require(
            factor == 0 or factor > 1, f"train.hang_factor={factor} must be > 1, or 0 for never"
        )
        require(self.hang_seconds > 0, f"train.hang_seconds={self.hang_seconds} must be > 0")
        for name in ("cost_per_hour", "peak_tflops"):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)} must be >= 0")
        choice("train.device", self.device, ("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class TrackingConfig:
    """Where the numbers go besides metrics.jsonl."""

    backend: str  # jsonl | wandb; metrics.jsonl is written either way
    mode: str  # online | offline | disabled
    project: str
    entity: str | None
    name: str | None
    tags: list[str]

    def __post_init__(self) -> None:
        choice("tracking.backend", self.backend, ("jsonl", "wandb"))
        choice("tracking.mode", self.mode, ("online", "offline", "disabled"))


@dataclass(frozen=True)
class ExportConfig:
    required: bool  # refuse at the start a config that `longtake export` could not export


@dataclass(frozen=True)
class ValidationConfig:
    """The fixed, in-order pass over the first clips of the validation sets."""

    num_samples: int  # clips of the fixed validation pass
    num_videos: int  # of them, how many are drawn and shown; 0 draws nothing
    noise_levels: list[float]  # t of the DiT's validation loss
    # Of a VAE; with defaults, for configs that were written before they were there.
    score_share: float = 0.0  # of the clips with world truth, whose reconstructions are scored
    fvd_weights: str | None = None  # TorchScript detector of rFVD, see `fidelity.VideoDetector`

    def __post_init__(self) -> None:
        require(self.num_samples > 0, f"validation.num_samples={self.num_samples} must be > 0")
        require(self.num_videos >= 0, f"validation.num_videos={self.num_videos} must be >= 0")
        share = self.score_share
        require(0 <= share <= 1, f"validation.score_share={share} must lie in [0, 1]")
        for level in self.noise_levels:
            require(0.0 < level <= 1.0, f"validation.noise_levels has {level}, must be in (0, 1]")
        require(
            len(set(self.noise_levels)) == len(self.noise_levels),
            f"validation.noise_levels={self.noise_levels} must differ: name each once",
        )


@dataclass(frozen=True)
class DiTLossConfig:
    weighting: str  # token: every noisy token counts alike; sample: every sample does
    min_snr_gamma: float | None = None  # the clean error is weighted by min(SNR, gamma); null: not

    def __post_init__(self) -> None:
        choice("loss.weighting", self.weighting, ("token", "sample"))
        gamma = self.min_snr_gamma
        require(gamma is None or gamma > 0, f"loss.min_snr_gamma={gamma} must be > 0, or null")


@dataclass(frozen=True)
class CurriculumPoint:
    """Weights of the tasks, and the shift of training noise levels, from a step on; before it they
    go there on a straight line. What is null goes on to the next point that names it."""

    step: int
    tasks: dict[str, float] | None = None
    shift: float | None = None  # of the noise levels, in place of timesteps.shift


@dataclass(frozen=True)
class GivenConfig:
    """What happens to given frames."""

    dropout: float = 0.0  # share of given runs of frames that are not given, each by itself
    noise: float = 0.0  # they are shown at a noise level up to this, which the model is told

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, f"given.dropout={self.dropout} must lie in [0, 1)")
        require(0 <= self.noise < 1, f"given.noise={self.noise} must lie in [0, 1)")


@dataclass(frozen=True)
class NumbersConfig:
    """Numbers told behind the caption: as words, such as "(fps 8, motion 0.3)", or as embeddings.

    A source is "fps", or the name of a score of the sample; what has none is not told.
    """

    sources: dict[str, str | None] = field(
        default_factory=dict
    )  # word -> where from; null: nowhere
    dropout: float = 0.1  # of each, independent of the caption's
    form: str = "words"  # words | embedding: a token for each, learnt, behind those of the text

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, f"numbers.dropout={self.dropout} must lie in [0, 1)")
        choice("numbers.form", self.form, ("words", "embedding"))
        object.__setattr__(self, "sources", self.told)  # null is as good as absent

    @property
    def told(self) -> dict[str, str]:
        """Words and their sources."""
        return {word: source for word, source in self.sources.items() if source is not None}

    @property
    def embedded(self) -> dict[str, str]:
        """Words that are told as embeddings and their sources, in the order of their values."""
        return dict(sorted(self.told.items())) if self.form == "embedding" else {}


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on linear layers of the DiT; with them nothing else is trained."""

    rank: int
    alpha: float  # the adapters' product counts alpha / rank
    targets: list[str]  # patterns of the layers, such as "dit.blocks.*"

    def __post_init__(self) -> None:
        require(self.rank > 0, f"rank={self.rank} must be > 0")
        require(self.alpha > 0, f"alpha={self.alpha} must be > 0")
        require(bool(self.targets), 'targets is empty: name layers, such as ["dit.blocks.*"]')


@dataclass(frozen=True)
class SpeedConfig:
    """How the DiT is computed, not what; older runs computed plainly."""

    checkpointing: str = "none"  # none | selective | full: activations computed anew for gradients
    compile: bool = False  # torch.compile each block

    def __post_init__(self) -> None:
        choice("speed.checkpointing", self.checkpointing, CHECKPOINTING)


@dataclass(frozen=True)
class PixelsConfig:
    """Mean and deviation of the pixels in [-1, 1], with which codec=identity normalises them."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        require(self.std > 0, f"pixels.std={self.std} must be positive")


@dataclass(frozen=True)
class SamplesConfig:
    """What is drawn during training, and the defaults of `longtake sample`."""

    prompts: list[str]  # all from the same noise; empty: captions of the first validation clips
    steps: int  # sampler steps
    guidance_scale: float
    shift: float
    seed: int
    solver: Literal["euler", "unipc"] = "euler"
    negative_prompt: str = ""  # what guidance leads away from

    def __post_init__(self) -> None:
        assert self.sampler  # its own checks

    @property
    def sampler(self) -> SamplerConfig:
        """These settings as the sampler takes them."""
        return SamplerConfig(self.steps, self.shift, self.guidance_scale, self.solver)


@dataclass(frozen=True)
class EvaluationConfig:
    """World prompts drawn from the EMA weights during training, and scored (`card.mean`)."""

    every: int  # optimizer steps; 0 evaluates nothing
    families: list[str]
    splits: list[str]
    num_prompts: int  # per family and split
    num_pairs: int  # of them in val, with a twin that differs in one word
    captions: str | None  # kind; null: the one that training sees most
    seconds: float  # budget of each evaluation; fewer prompts are drawn where it does not suffice
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        require(self.every >= 0, f"evaluation.every={self.every} must be >= 0")
        require(self.seconds > 0, f"evaluation.seconds={self.seconds} must be > 0")
        for name in ("num_prompts", "batch_size"):
            require(getattr(self, name) > 0, f"evaluation.{name}={getattr(self, name)} must be > 0")
        require(
            not self.every or bool(self.families and self.splits),
            f"evaluation.every={self.every} needs evaluation.families and evaluation.splits",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every stage shares."""

    stage: str
    seed: int
    output_dir: str
    resume: str  # auto: go on where the folder stopped; force: although keys differ; never: refuse
    train: TrainConfig
    data: DataConfig
    engine: EngineConfig
    optim: OptimConfig
    ema: EmaConfig
    tracking: TrackingConfig
    validation: ValidationConfig
    export: ExportConfig
    # Defaults for configs that were written before these keys existed.
    init_from: str | None = None  # run, checkpoint, diffusers folder or hub id to start from
    init_names: list[str] = field(default_factory=list)  # patterns of what is taken; empty: all
    freeze: list[str] = field(default_factory=list)  # patterns of what stays as it is, "encoder.*"

    def __post_init__(self) -> None:
        choice("resume", self.resume, ("auto", "force", "never"))
        require(0 <= self.seed < 2**63, f"seed={self.seed} must lie in [0, 2^63)")


@dataclass(frozen=True)
class VAESpeedConfig:
    """How the VAE is computed, not what; vae.checkpoint_blocks belongs to it, too."""

    compile: bool = False  # torch.compile encoder and decoder, in training alone


@dataclass(frozen=True, kw_only=True)
class VAERun(RunConfig):
    """A run of stage=vae: the video autoencoder."""

    vae: VAEConfig
    loss: VAELossConfig
    discriminator: AdversaryConfig
    speed: VAESpeedConfig = VAESpeedConfig()
    cuts: float = 0.0  # share of training clips that become another picture at a drawn frame
    fades: float = 0.0  # share of those that do so over a drawn time

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.cuts >= 0 and self.fades >= 0 and self.cuts + self.fades <= 1,
            f"cuts={self.cuts} and fades={self.fades} must be shares: at least 0, together at most "
            "1",
        )
        for name in ("in_channels", "out_channels"):
            channels = getattr(self.vae, name)
            require(channels == 3, f"vae.{name}={channels} must be 3 (RGB)")
        is_exact = self.discriminator.r1 > 0 and self.discriminator.r1_kind == "exact"
        plays, strategy = self.loss.adversarial.weight > 0, self.engine.strategy
        require(
            not (plays and is_exact) or strategy == "ddp",
            f"discriminator.r1_kind=exact needs double backward, which engine.strategy={strategy} "
            "has no path for: use finite_difference, or ddp",
        )


@dataclass(frozen=True, kw_only=True)
class DiTRun(RunConfig):
    """A run of stage=dit: the diffusion transformer on latents or pixels."""

    codec: str  # vae: cached latents; identity: normalised pixels are the latents
    pixels: PixelsConfig
    vae_run: str | None  # run or checkpoint of the VAE; null: the one the latents name
    model: DiTConfig
    text: TextConfig
    prediction: str  # velocity | clean: what the network predicts; the loss is the velocity loss
    timesteps: TimestepConfig
    tasks: dict[str, float]  # what is given: name -> probability weight, drawn per sample
    caption_dropout: float  # share of samples that see the encoding of ""
    loss: DiTLossConfig
    samples: SamplesConfig
    evaluation: EvaluationConfig
    lora: LoraConfig | None = None  # null: full fine-tuning
    speed: SpeedConfig = SpeedConfig()
    curriculum: list[CurriculumPoint] = field(default_factory=list)  # other weights later
    given: GivenConfig = GivenConfig()
    numbers: NumbersConfig = NumbersConfig()

    @property
    def has_channels(self) -> bool:
        """Whether what is given are channels behind the noisy latents (see `image_condition`)."""
        return self.model.in_channels != self.model.out_channels

    @property
    def trained_tasks(self) -> list[str]:
        """Tasks that have a weight at some step, t2v first."""
        stages = [tasks for _, tasks in self.task_stages]
        return [name for name in TASKS if any(stage.get(name, 0.0) > 0 for stage in stages)]

    @property
    def task_stages(self) -> list[tuple[int, dict[str, float]]]:
        """Steps with the weights of the tasks that are reached there."""
        later = [(point.step, point.tasks) for point in self.curriculum if point.tasks is not None]
        return [(0, self.tasks), *later]

    @property
    def shift_stages(self) -> list[tuple[int, float]]:
        """Steps with the shift of noise levels that is reached there."""
        later = [(point.step, point.shift) for point in self.curriculum if point.shift is not None]
        return [(0, self.timesteps.shift), *later]

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("codec", self.codec, CODECS)
        choice("prediction", self.prediction, PREDICTIONS)
        check_tasks(self.tasks)
        # Complete and in one order: draws must not depend on how the YAML is written.
        object.__setattr__(self, "tasks", {name: self.tasks.get(name, 0.0) for name in TASKS})
        steps = [0, *(point.step for point in self.curriculum)]
        require(
            all(a < b for a, b in pairwise(steps)),
            f"curriculum has steps {steps[1:]}: they must be positive and ascend",
        )
        for number, point in enumerate(self.curriculum):
            name, values = f"curriculum.{number}", (point.tasks, point.shift)
            require(values != (None, None), f"{name} changes nothing: give it tasks or shift")
            if point.tasks is not None:
                check_tasks(point.tasks, f"{name}.tasks")
            if point.shift is not None:
                require(point.shift > 0, f"{name}.shift={point.shift} must be positive")
        rate = self.caption_dropout
        require(0 <= rate < 1, f"caption_dropout={rate} must lie in [0, 1)")
        if self.lora is not None:
            require(self.init_from is not None, "lora needs init_from: weights to adapt")
            require(not self.freeze, f"freeze={self.freeze} with lora: only adapters are trained")
