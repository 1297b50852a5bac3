"""All settings of a distillation: one tree of dataclasses. Every switch is here and nowhere else.

The docstring under a field says what it does; ``tdm distill --settings`` prints them. training/settings.py reads a
tree from YAML and ``key=value``, training/validation.py checks it. Out of memory: lower ``micro_batch_size``, then turn
on ``memory.gradient_checkpointing``, then store the base smaller (``memory.base``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .losses import CriticWeight, Rho

Band = Literal["separate", "overlap", "full", "below"]
Role = Literal["student", "critic"]
Storage = Literal["auto", "fp32", "bf16", "fp16", "fp8", "int8", "llm_int8", "nf4"]


@dataclass(frozen=True)
class TrajectoryConfig:
    """The student's own grid, and where along it the distributions are matched."""

    steps: int = 4
    """K, the student's number of steps. With `unify` it is that of previews, of evaluation and of best.pt."""

    unify: tuple[int, ...] | None = None
    """Step counts that one student learns together, `steps` among them (TDM-unify). Each update draws one."""

    tell_steps: Literal["timestep", "embedding", "none"] = "timestep"
    """How a unified student knows its step count. timestep: no two step counts share a timestep, so a plain LoRA
    knows; the critic, which is never exported, gets an embedding. embedding: one for each step count, added to the time
    embedding of student and critic; the student then needs code at inference and cannot be exported. none: neither
    knows."""

    spread: float = 0.02
    """For tell_steps=timestep: `steps` begin at the last timestep. Each other count, from many to few, begins lower
    than the one before by this share of the range."""

    timesteps: tuple[float, ...] | None = None
    """The grid, strictly decreasing. None: uniform steps, with `shift`."""

    shift: float = 1.0
    """For flow models: time shift of the grid and of tau (3.0 for SD3). Must be 1 for epsilon and v models."""

    sampler: Literal["deterministic", "stochastic"] = "deterministic"
    """The noise of the next state: the student's own (DDIM, Euler), or fresh noise (consistency models, DMD2)."""

    eta: float = 1.0
    """For sampler=stochastic: how fresh the noise is, as in DDIM and TCD. 1: fresh only. Below 1: ``sqrt(1 - eta^2)``
    of the student's own and ``eta`` of fresh noise. BLADE keeps 0.9 of its own, which is eta=0.436."""

    renoise: Literal["state", "clean"] = "state"
    """What is diffused up to tau: the state x_m that a stage ends in, or the clean prediction x0 (the paper's key
    ablation)."""

    bands: Band = "separate"
    """Where tau lies. separate: in [t_{k-1}, t_k], so that one critic serves all stages. overlap: in [t_{k-1}, T].
    full: anywhere. below: anywhere up to t_k. The last two are for renoise=clean."""

    tau_min: float = 0.02
    """The lowest tau, as a share of the unshifted time range. Both scores are well defined above it."""

    tau_max: float = 0.98
    """The highest tau, as a share of the unshifted time range. Both scores are well defined below it."""

    tau_law: Literal["uniform", "logit_normal"] = "uniform"
    """How tau is drawn within its band of unshifted time: evenly, or from a logit-normal law (mean 0, deviation 1) cut
    to the band, which favours the middle noise levels."""

    margin: float = 0.02
    """How far tau stays above the stage's end, as a share of the range; a subinterval target would blow up there."""

    stages: Literal["update", "sample"] = "update"
    """Which stages one update trains. update: one for the whole batch. sample: spread evenly over the batch. Both cost
    (K - 1) / 2 prefix passes per sample on average, but `update` makes them in full batches, in half as many calls. On
    the mixture they end equally close."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the student minimises (training/objectives)."""

    name: str = "matching"
    """The objective. matching: the student's distribution against the teacher's (TDM, DMD2, SiD). consistency: the
    student against itself, one step of the teacher further on (LCM). regression: onto the end of the teacher's ODE. The
    last two train no critic."""

    gradient: Literal["kl", "sid"] = "kl"
    """For matching. kl: along the difference of the two scores. sid: through both networks (SiD)."""

    sid_alpha: float = 1.0
    """For gradient=sid: the weight of its squared term, 1 to 1.2 in its papers."""

    ode_steps: int = 16
    """For consistency and regression: guided steps of the teacher's ODE over the whole range."""

    guidance_scale: float = 1.0
    """w, the teacher's guidance scale. 1 is no guidance and saves one of 6.5 passes."""

    stage_guidance: tuple[float, ...] | None = None
    """w by noise level: one for each stage of the grid of `trajectory.steps`, the noisiest first. A tau takes the w of
    the stage that it lies in, whichever stage is trained. None: guidance_scale everywhere. Previews and evaluation keep
    guidance_scale."""

    guidance_range: tuple[float, float] | None = None
    """w drawn evenly from this range for each sample of an update, so that the student is not tied to one w (SNOOPI's
    PG-SB). None: not drawn. Previews and evaluation keep guidance_scale."""

    guidance_term: Literal["coupled", "decoupled"] = "coupled"
    """coupled: the teacher's prediction is the guided one. decoupled: (w - 1)(x0(c) - x0(uncond)) is a separate term,
    with its own tau and weight (Decoupled DMD). It costs one pass more and needs rho=mse: the gradient of a Huber is a
    sign, which cancels w."""

    guidance_band: Band = "overlap"
    """For guidance_term=decoupled: the band of that term's tau, as `trajectory.bands`. below is the published one (the
    preset decoupled has it): guidance acts where the step has yet to decide. For below and full the clean prediction
    is diffused, whatever `trajectory.renoise` says."""

    guidance_weight: float = 1.0
    """For guidance_term=decoupled: the weight of that term."""

    guided_critic: bool = False
    """For gradient=sid: the critic is guided as the teacher is, where it learns and where it is asked (SiD-LSG). Each
    of its passes becomes two."""

    rho: Rho = "pseudo_huber"
    """The penalty: pseudo_huber (elementwise), vector_huber (of the whole sample) or mse."""

    huber_c: float | None = None
    """The width of the penalty. None: 1e-3 for pseudo_huber, 0.00054 sqrt(d) for vector_huber."""

    normalise: bool = True
    """Divide each sample's loss by mean |x0 - x0_teacher|."""

    norm_min: float = 0.01
    """The smallest number that `normalise` divides by. Raise it if the loss spikes."""

    norm_max: float | None = None
    """The largest number that `normalise` divides by. None: no limit. 5 in BLADE (video)."""

    anchor: float = 0.0
    """The weight of a pull on the student's first step to where the guided teacher is at the end of it. It keeps the
    teacher's variety."""

    anchor_steps: int = 4
    """For anchor: the teacher's steps over the student's first step."""

    spread: float = 0.0
    """The weight of a push between the first predictions for one prompt; needs `samples_per_prompt` above 1."""

    @property
    def teacher_guidance(self) -> str:
        """For people: the scale that the student learned from, one for each stage of the grid, or a range."""
        if self.guidance_range is not None:
            return "{:g} to {:g}".format(*self.guidance_range)
        return ", ".join(f"{w:g}" for w in self.stage_guidance or (self.guidance_scale,))


@dataclass(frozen=True)
class RoleConfig:
    """One trained adapter and its AdamW."""

    rank: int = 32
    """LoRA rank. Lower it on out of memory."""

    alpha: float | None = None
    """LoRA alpha. None: the rank, which is a scale of 1."""

    targets: tuple[str, ...] | None = None
    """Endings of the names of layers that get an adapter, or [all-linear]. None: the family's own list."""

    lr: float = 1e-4
    """Learning rate."""

    betas: tuple[float, float] = (0.0, 0.99)
    """AdamW's betas. The first is 0 because the other role moves the target all the time."""

    weight_decay: float = 0.0
    """AdamW's weight decay."""

    clip: float = 1.0
    """Limit of the gradient norm."""

    warmup: int = 0
    """Updates of linear warm-up of the learning rate."""

    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate decays, over all updates."""

    lr_end: float = 0.0
    """Where `decay` ends, as a fraction of lr."""


@dataclass(frozen=True)
class CriticConfig(RoleConfig):
    """The fake score, which follows the student's distribution."""

    lr: float = 4e-4
    """Learning rate: 4 to 10 times the student's in published settings."""

    target: Literal["subinterval", "clean"] = "subinterval"
    """What it regresses to (training/losses.py). On the mixture `clean` passes 1/8 of the base's distance and then
    drifts away to 1/2; `subinterval` falls below 1/10 and stays. The authors' demo has clean."""

    weight: CriticWeight = "v"
    """The weight of its errors over noise levels, v or min_snr. min_snr nearly ignores the noisiest stage, whose critic
    then goes astray."""

    weight_limit: float = 5.0
    """The most that an error may weigh."""

    same_rate: bool = False
    """Learn at the student's rate, as DMD2 does. `critic.lr` is then not used."""

    leash: float = 0.0
    """How strongly the critic is held near the unguided teacher: the weight of the square of their difference, next to
    its errors, and weighted by noise level as they are. 0.02 in TDM-R1, 0.5 in BLADE; one pass more. 0: not at all."""

    skip_above: float | None = None
    """Skip a step of the critic whose loss is above this: 2 in BLADE. Each update then waits for the device once. None:
    skip none."""

    per_student: int = 1
    """Critic updates per student update. Each beyond the first costs about 3.5 passes."""

    share_noise: bool = False
    """Student and critic see the same re-noised state, and the student follows the critic as it was before its step:
    one pass less of 6.5."""

    head_start: int = 0
    """Critic updates before the student's first, so that the student never follows an untrained critic. They come on
    top of `updates`, and the student's warm-up begins after them."""

    start: Literal["checkpoint", "student", "teacher"] = "checkpoint"
    """The adapter that it starts from when `start_from` gives the student one: the earlier run's critic, its student,
    or none. A student file has no critic."""


@dataclass(frozen=True)
class EmaConfig:
    """The running mean of the student's weights, which previews, evaluation and export use."""

    decay: float = 0.999
    """The decay of the mean per update. 0 is the student itself."""

    warmup: bool = True
    """Start with a short memory: min(decay, (1 + n) / (10 + n)) at update n."""


@dataclass(frozen=True)
class MemoryConfig:
    """What a run may cost in memory. None of it changes what is learned, beyond the rounding of a smaller base."""

    base: Storage = "auto"
    """How the frozen base is stored. auto: bf16 on a GPU, fp32 on a CPU. fp8: layerwise casting; with
    gradient_checkpointing, or the backward pass keeps what was cast. int8: torchao's weight-only. llm_int8 and nf4:
    bitsandbytes, the first with activations in 8 bits on a GPU. Convolutions stay as they are in all of these."""

    gradient_checkpointing: bool = False
    """Recompute activations instead of storing them: less memory, about 30 % slower."""

    offload: bool = False
    """Keep the base in main memory and bring groups of its layers to the GPU as they are called."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit stores the moments in 8 bits (torchao)."""

    shard: bool = False
    """With several processes: each holds its part of the base (FSDP2), not the whole."""


@dataclass(frozen=True)
class OutputConfig:
    """What a run writes. Intervals are in updates; 0 is never."""

    log_every: int = 20
    """A line of metrics.jsonl, a mean over that many updates."""

    preview_every: int = 500
    """Teacher, student and the critic's prediction from fixed seeds, and their health."""

    evaluate_every: int = 500
    """The task's own measure, in metrics.jsonl. best.pt is kept by it."""

    checkpoint_every: int = 500
    """checkpoint.pt, for exact resume. One is always written at the end."""

    keep: int = 1
    """How many checkpoints stay: the last, and the ones before it as checkpoint-<step>.pt."""

    teacher_steps: int = 50
    """Steps of the teacher in previews and evaluation."""

    stop_on_alarm: bool = False
    """An alarm of training/health.py ends the run, with a checkpoint and exit code 2."""

    tensorboard: bool = False
    """Metrics and previews in tensorboard/ too. Needs the package tensorboard."""


@dataclass(frozen=True)
class DistillConfig:
    """All settings of ``tdm distill``. `task` says what is distilled and is read by that task."""

    task: dict[str, Any] = field(default_factory=lambda: {"name": "mixture"})
    """What is distilled: name=pipeline or name=mixture, and that task's own settings."""

    seed: int = 0
    """The seed of all randomness. On a CPU the same seed is the same run, bit for bit, for one number of
    threads (OMP_NUM_THREADS)."""

    updates: int = 1000
    """Student updates. With `stages` each stage has a number of its own, or a share of this one."""

    stages: tuple[dict[str, Any], ...] = ()
    """Stages that follow one another on the same student: settings in the place of the run's own, and `updates` (a
    number, or a share such as 0.25). A stage may set batch_size, micro_batch_size, trajectory, objective, student,
    critic and ema, but no rank, alpha or targets, and have a name. `optimizers: continue` keeps those of the stage
    before, fresh (the default) begins anew; `critic: {start: student}` or `{start: teacher}` begins a new critic
    there."""

    batch_size: int = 16
    """Samples per update, over all processes. Best a multiple of trajectory.steps."""

    samples_per_prompt: int = 1
    """How many of them are of one prompt, each from a noise of its own. Above 1 for objective.spread."""

    micro_batch_size: int | None = None
    """How many of these samples a device takes at a time; the gradients are summed. None: all of its share."""

    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """bf16: autocast; adapters, losses and optimisers stay float32. auto: bf16 where the device is faster with it."""

    full_weights: bool = False
    """Train whole copies of the network in float32 (two more of them, and their optimisers), not adapters."""

    start_from: str | None = None
    """What student and critic begin with: checkpoint.pt of an earlier run, a few-step LoRA as `TDMPipeline` loads it
    (file, folder or hub repository), or a distilled checkpoint of the base's family (a pipeline's folder, its
    denoiser's, or one .safetensors file), from which adapters are extracted. For the last two set critic.start. Rank
    and alpha are converted. None: the teacher."""

    extraction: Literal["activations", "svd"] = "activations"
    """How an adapter is extracted from a distilled checkpoint (start_from). svd: nearest to the difference of the
    weights. activations: nearest in the layers' outputs, for inputs that the teacher gives them as it draws 8 of the
    run's prompts."""

    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    student: RoleConfig = field(default_factory=RoleConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    @property
    def roles(self) -> dict[Role, RoleConfig]:
        """The settings of each trained role."""
        critic = replace(self.critic, lr=self.student.lr) if self.critic.same_rate else self.critic
        return {"student": self.student, "critic": critic}
