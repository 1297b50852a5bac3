"""A teacher that is known in closed form: a Gaussian mixture in two dimensions, the proof that the method works.

At any noise level the posterior mean ``E[x0 | x_t]`` of a mixture is a formula, so this "pretrained network" makes no
error, its true samples are known, and a student's distance to the true distribution can be measured. It is distilled
by the same code as an image model: this file only implements `training.task.Task`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from ...pipelines.prediction_types import PredictionType
from ...pipelines.schedule import NoiseSchedule, predict_output
from ..best import Metric
from ..metrics import energy_distance
from ..preview import Preview
from ..roles import GuidedOutput
from ..task import Sample, Teacher
from ..trajectory import Condition, Trajectory

PREVIEWS = 1000  # samples whose spread is compared
SHOWN = 1500  # samples in a picture


@dataclass(frozen=True)
class Mixture:
    """``sum_j weights_j N(means_j, std^2 I)``: ``means`` ``[M, D]``, ``weights`` ``[M]`` summing to 1."""

    means: Tensor
    weights: Tensor
    std: float

    @classmethod
    def scattered(cls) -> Mixture:
        """Eight modes without symmetry, the heaviest four times the lightest: a 4-step base misses most of their
        weights.
        """
        means = [(-2.0, 1.4), (-1.2, -1.7), (-0.4, 0.5), (0.4, 2.2), (0.9, -0.7), (1.9, 0.8), (2.4, -1.9), (-2.6, -0.5)]
        weights = torch.linspace(4.0, 1.0, len(means))
        return cls(torch.tensor(means), weights / weights.sum(), 0.15)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` true samples ``[n, D]``."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.means[which] + self.std * torch.randn(n, self.means.shape[1], generator=generator)

    def posterior_mean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``E[x0 | x]`` for ``x = alpha x0 + sigma eps`` ``[B, D]``; ``alpha``, ``sigma`` are ``[B, 1]``.

        Mode ``j`` explains ``x`` with weight ``w_j N(x; alpha mu_j, (alpha^2 s^2 + sigma^2) I)`` and mean
        ``mu_j + alpha s^2 / (alpha^2 s^2 + sigma^2) (x - alpha mu_j)``.
        """
        variance = (alpha * self.std).square() + sigma.square()
        offset = x[:, None] - alpha[:, :, None] * self.means  # [B, M, D]
        logits = self.weights.log() - offset.square().sum(2) / (2 * variance)
        share = logits.softmax(1)[:, :, None]
        return (share * (self.means + (alpha * self.std**2 / variance)[:, :, None] * offset)).sum(1)

    def coverage(self, x: Tensor) -> Tensor:
        """Share of the samples ``[n, D]`` nearest to each mode, over that mode's weight: ``[M]``, 1 where it is
        right.
        """
        nearest = torch.cdist(x, self.means).argmin(1)
        return torch.bincount(nearest, minlength=len(self.weights)) / len(x) / self.weights


class MixtureDenoiser(nn.Module):
    """The closed-form denoiser plus a small residual network whose last layer is zero.

    With adapters off it therefore is the analytic teacher, exactly; adapters on the residual's layers make student
    and critic.
    """

    frequencies: Tensor

    def __init__(
        self,
        mixture: Mixture,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        width: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.mixture, self.schedule, self.prediction_type = mixture, schedule, prediction_type
        dim, frequencies = mixture.means.shape[1], 8
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(frequencies) / 4, persistent=False)
        self.inner = nn.Linear(dim + 2 * frequencies, width)
        self.hidden1 = nn.Linear(width, width)
        self.hidden2 = nn.Linear(width, width)
        self.outer = nn.Linear(width, dim)
        for layer in (self.inner, self.hidden1, self.hidden2):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features), generator=generator)
            nn.init.normal_(layer.bias, std=0.5, generator=generator)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """``x`` ``[B, D]``, ``timesteps`` ``[B]`` -> the output of the chosen prediction type ``[B, D]``."""
        alpha, sigma = (level.to(x)[:, None] for level in self.schedule.alpha_sigma(timesteps.double()))
        x0 = self.mixture.posterior_mean(x, alpha, sigma)
        output = predict_output(self.prediction_type, x0, (x - alpha * x0) / sigma, alpha, sigma)
        angle = (timesteps / self.schedule.num_train_timesteps)[:, None] * self.frequencies
        h = nn.functional.silu(self.inner(torch.cat([x, angle.sin(), angle.cos()], 1)))
        h = h + nn.functional.silu(self.hidden1(h))
        h = h + nn.functional.silu(self.hidden2(h))
        return output + self.outer(h)


@dataclass(frozen=True)
class MixtureTaskConfig:
    """The ``task`` section of a configuration that distils the mixture (name=mixture)."""

    name: str = "mixture"
    """The kind of task."""

    kind: Literal["flow", "vp"] = "flow"
    """The noise schedule: flow predicts velocity; vp has Stable Diffusion's table and predicts v."""

    width: int = 128
    """Width of the residual network that gets the adapters."""

    samples: int = 10_000
    """Samples per evaluation."""


class MixtureTask:
    """``Task`` of the mixture, without prompts: ``kind`` "flow" predicts velocity, "vp" (SD's table) predicts v.

    Args:
        samples: how many samples an evaluation takes.
    """

    base: nn.Module
    targets: Sequence[str] | str = ("inner", "hidden1", "hidden2", "outer")
    guided_output: GuidedOutput | None = None
    time_embedder = "inner"  # which also sees x: the vector of a step count is added to both
    device: torch.device = torch.device("cpu")
    measure = Metric("energy", higher_is_better=False)

    def __init__(
        self, kind: str = "flow", width: int = 128, samples: int = 10_000, mixture: Mixture | None = None
    ) -> None:
        self.schedule = (
            NoiseSchedule.flow() if kind == "flow" else NoiseSchedule.vp(1000, 0.00085, 0.012, "scaled_linear")
        )
        self.prediction_type: PredictionType = "flow_prediction" if kind == "flow" else "v_prediction"
        self.mixture = mixture or Mixture.scattered()
        self.dim = self.mixture.means.shape[1]
        self.samples = samples
        generator = torch.Generator().manual_seed(0)  # the base is the same in every run
        self.base = MixtureDenoiser(self.mixture, self.schedule, self.prediction_type, width, generator)

    def call(self, base: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:  # noqa: ARG002
        """See ``Task``."""
        return base(x, timesteps)

    def conditions(self, n: int, generator: torch.Generator) -> tuple[Condition, tuple[int, ...]]:  # noqa: ARG002
        """An empty condition, since the mixture has no prompts, and the shape of a sample."""
        return {}, (self.dim,)

    def null(self, cond: Condition) -> Condition:
        """An empty condition, since the mixture has no prompts."""
        return cond

    def identity(self) -> dict[str, str]:
        """See ``Task``. The settings say it all."""
        return {}

    def preview(self, student: Sample, teacher: Teacher, critic: Sample) -> Preview:  # noqa: ARG002
        """No picture, but how far apart the student's samples are, over that of true samples."""
        generator = torch.Generator().manual_seed(2)
        true = self.mixture.sample(PREVIEWS, generator)
        x = student(torch.randn(PREVIEWS, self.dim, generator=generator), {})
        return Preview(None, {"diversity": float(torch.pdist(x).mean() / torch.pdist(true).mean())})

    def evaluate(self, student: Sample, teacher: Teacher) -> dict[str, float]:  # noqa: ARG002
        """Energy distance to true samples, and the smallest and largest share of a mode over its weight."""
        generator = torch.Generator().manual_seed(1)
        true = self.mixture.sample(self.samples, generator)
        x = student(torch.randn(self.samples, self.dim, generator=generator), {})
        shares = self.mixture.coverage(x)
        return {"energy": energy_distance(x, true), "least_mode": float(shares.min()), "most_mode": float(shares.max())}

    def show(self, sampler: Sample) -> Image.Image:
        """Samples as points over the true modes, whose size is their weight."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        x = sampler(torch.randn(SHOWN, self.dim, generator=torch.Generator().manual_seed(3)), {})
        figure = plt.figure(figsize=(2.4, 2.4), dpi=100)
        axis = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        modes, sizes = self.mixture.means.T, (4000 * self.mixture.weights).tolist()
        axis.scatter(modes[0], modes[1], s=sizes, color="#f2b84b", alpha=0.45, linewidth=0)
        axis.scatter(x[:, 0], x[:, 1], s=2, color="#27364f", alpha=0.5, linewidth=0)
        axis.set(xlim=(-3.5, 3.5), ylim=(-3.0, 3.2), xticks=(), yticks=())
        file = io.BytesIO()
        figure.savefig(file, format="png")
        plt.close(figure)
        return Image.open(file).convert("RGB")

    def recipe(self, trajectories: Mapping[int, Trajectory]) -> None:
        """None: this task is no pipeline that could load a student's file."""
