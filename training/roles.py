"""Teacher, student and critic on one frozen base: the teacher is the base itself, the other two are LoRA adapters, or
whole copies for those who have the memory.

A role is an argument, never a state that somebody left behind: each call puts its own adapter in place first. Two
traps of peft are closed here. ``set_adapter`` flips ``requires_grad`` (peft #2759): it is not used, the active
adapter is set on the LoRA layers and gradients are fixed once. Gradient checkpointing recomputes a forward in the
backward pass with whatever adapter is active then (peft #2832): a hook on each prediction puts its adapter back
before its own backward pass, in any order.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import get_args

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import TDMError
from ..pipelines.guidance_norm import guided
from ..pipelines.prediction_types import PredictionType
from ..pipelines.schedule import NoiseSchedule, expand, predict_output, predict_x0_eps
from .config import Role
from .precision import Precision, autocast
from .trajectory import Condition, Predict

ROLES: tuple[Role, ...] = get_args(Role)
Denoiser = Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
"""``(base, x [B, ...], timesteps [B] float32, cond) -> model output [B, ...]``: what differs between model families."""


GuidedOutput = Callable[[Tensor, Tensor, float | Tensor], Tensor]
"""``(with the prompt, without it, guidance scale) -> guided``, all network outputs ``[B, ...]``: a normalised guidance;
the scale broadcasts to them.
"""

STEPS = "steps_embedding"
"""In a condition: the index ``[B]`` of each sample's step count. Among weights: the vectors ``[N, D]`` of all."""


def without_steps(cond: Condition) -> tuple[Condition, Tensor | None]:
    """A condition as the network takes it, and the step counts ``[B]`` that came with it."""
    return {key: value for key, value in cond.items() if key != STEPS}, cond.get(STEPS)


class Roles(ABC):
    """Student, critic and teacher on one frozen network.

    ``student``, ``critic`` and ``teacher`` each map ``(x, timesteps, cond)`` to ``(x0, eps)`` in float32;
    ``timesteps`` is ``[B]`` float64 on the CPU.

    Args:
        base: the pretrained network. It is frozen and put in eval mode.
        call: how to call it.
        precision: of the network's own arithmetic; trained weights, predictions and losses are float32.
        guided_output: how guidance is normalised; None: not at all.
    """

    _weights: dict[Role, dict[str, nn.Parameter]]
    _step_vectors: Tensor | None = None  # [B, D], while a network with an embedding of step counts runs

    def __init__(
        self,
        base: nn.Module,
        call: Denoiser,
        *,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        precision: Precision = "fp32",
        guided_output: GuidedOutput | None = None,
    ) -> None:
        self.base, self.call, self.schedule, self.prediction_type = base, call, schedule, prediction_type
        self.precision: Precision = precision
        self.guided_output = guided_output
        self._step_hooks: list[RemovableHandle] = []
        base.eval().requires_grad_(False)

    def tell_steps(self, roles: Sequence[Role], count: int, embedder: str) -> None:
        """Give roles, and no others, a trained vector for each of ``count`` step counts, which is added to the time
        embedding; it starts at 0. A role that has as many keeps them. A call tells which by ``cond[STEPS]``, indices
        ``[B]``; without that entry nothing is added.

        Args:
            embedder: the base's module whose output ``[B, D]`` is the time embedding.
        """
        for hook in self._step_hooks:
            hook.remove()
        self._step_hooks = []
        for role in ROLES:
            if role not in roles:
                self._weights[role].pop(STEPS, None)
        for network in dict.fromkeys(self._network(role) for role in roles):
            module = network.get_submodule(embedder)
            self._step_hooks.append(module.register_forward_hook(self._add_steps))
        for role in roles:
            vectors = self._weights[role].get(STEPS)
            if vectors is None or len(vectors) != count:
                width = [m for m in module.modules() if isinstance(m, nn.Linear)][-1].out_features
                device = next(iter(self.parameters(role))).device
                self._weights[role][STEPS] = nn.Parameter(torch.zeros(count, width, device=device))

    def _add_steps(self, _module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        if self._step_vectors is None:
            return output
        return output + self._step_vectors.to(output.dtype).unflatten(0, (-1, *[1] * (output.ndim - 2)))

    @contextmanager
    def _adding_steps(self, role: Role | None, steps: Tensor | None) -> Iterator[None]:
        """Inside, the time embedding of a role that has vectors for step counts contains those of ``steps`` ``[B]``."""
        vectors = None if role is None else self._weights[role].get(STEPS)
        self._step_vectors = None if vectors is None or steps is None else vectors[steps]
        try:
            yield
        finally:
            self._step_vectors = None

    @abstractmethod
    def _network(self, role: Role | None) -> nn.Module:
        """The network, put in order for a role (None is the teacher)."""

    def _put_in_place(self, role: Role | None) -> None:
        self._network(role)

    def _predict(self, role: Role | None, x: Tensor, timesteps: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        network = self._network(role)
        cond, steps = without_steps(cond)
        with autocast(self.precision, x.device.type), self._adding_steps(role, steps):
            output = self.call(network, x, timesteps.to(x.device, torch.float32), cond).float()
        if output.requires_grad:  # runs before any recomputation of this forward (the second trap above)
            output.register_hook(lambda _: self._put_in_place(role))
        alpha, sigma = self.schedule.alpha_sigma(timesteps)
        return predict_x0_eps(self.prediction_type, output, x, expand(alpha, x), expand(sigma, x))

    def student(self, x: Tensor, timesteps: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """The student's ``(x0, eps)``, each ``[B, ...]``, at ``x`` ``[B, ...]`` and ``timesteps`` ``[B]`` (float64)."""
        return self._predict("student", x, timesteps, cond)

    def critic(self, x: Tensor, timesteps: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """The critic's ``(x0, eps)``, each ``[B, ...]``, at ``x`` and ``timesteps`` ``[B]``: the fake score."""
        return self._predict("critic", x, timesteps, cond)

    def teacher(self, x: Tensor, timesteps: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """The base's ``(x0, eps)``, each ``[B, ...]``, at ``x`` and ``timesteps`` ``[B]``, without guidance. It has a
        gradient only to ``x``, if ``x`` has one.
        """
        return self._predict(None, x, timesteps, cond)

    def guided_teacher(
        self, x: Tensor, timesteps: Tensor, cond: Condition, null: Condition, guidance_scale: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The teacher's ``(x0, eps)``, each ``[B, ...]``, with classifier-free guidance (see `guided`)."""
        return self.guided(self.teacher, x, timesteps, cond, null, guidance_scale)

    def guided(
        self,
        predict: Predict,
        x: Tensor,
        timesteps: Tensor,
        cond: Condition,
        null: Condition,
        guidance_scale: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """A role's ``(x0, eps)``, each ``[B, ...]``, with classifier-free guidance. The scale is a number, or one for
        each sample, ``[B]`` on the CPU. The number 1 is one pass; any other is two, in one batch of 2 B.

        Args:
            predict: of the role, such as `teacher`.
        """
        if not isinstance(guidance_scale, Tensor) and guidance_scale == 1:
            return predict(x, timesteps, cond)
        return self.with_and_without_guidance(predict, x, timesteps, cond, null, guidance_scale)[0]

    def with_and_without_guidance(
        self,
        predict: Predict,
        x: Tensor,
        timesteps: Tensor,
        cond: Condition,
        null: Condition,
        guidance_scale: float | Tensor,
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A role's ``(x0, eps)``, each ``[B, ...]``, guided and with the prompt alone, from one batch of 2 B."""
        if isinstance(guidance_scale, Tensor):
            guidance_scale = expand(guidance_scale, x)
        prompted, without = _pair(predict, x, timesteps, cond, null)
        if self.guided_output is None:  # it is linear: any parametrisation will do
            x0, eps = (guided(c, u, guidance_scale) for c, u in zip(prompted, without, strict=True))
            return (x0, eps), prompted
        alpha, sigma = (expand(value, x) for value in self.schedule.alpha_sigma(timesteps))
        c, u = (predict_output(self.prediction_type, *part, alpha, sigma) for part in (prompted, without))
        output = self.guided_output(c, u, guidance_scale)
        return predict_x0_eps(self.prediction_type, output, x, alpha, sigma), prompted

    @abstractmethod
    def reset(self, role: Role) -> None:
        """Make a role the teacher again."""

    def parameters(self, role: Role) -> list[nn.Parameter]:
        """The trained weights of a role, and of no other."""
        return list(self._weights[role].values())

    def state(self, role: Role) -> dict[str, Tensor]:
        """A copy of a role's weights under the base's own names: of an adapter ``<layer>.lora_A.weight``, without the
        adapter's name.
        """
        return {name: weight.detach().clone() for name, weight in self._weights[role].items()}

    @torch.no_grad()
    def load(self, role: Role, state: dict[str, Tensor]) -> None:
        """Copy ``state`` (from :meth:`state`) into a role's weights.

        Raises:
            TDMError: other layers or another rank.
        """
        weights = self._weights[role]
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        if shapes != {name: tuple(weight.shape) for name, weight in weights.items()}:
            raise TDMError(f"these {role} weights are for other layers or another rank than this run trains")
        for name, weight in weights.items():
            weight.copy_(state[name])


def _pair(
    predict: Predict, x: Tensor, timesteps: Tensor, cond: Condition, null: Condition
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``(x0, eps)`` with the prompt and without it, from one batch of 2 B."""
    both = {key: torch.cat([cond[key], null[key]]) for key in cond}
    x0, eps = predict(torch.cat([x, x]), torch.cat([timesteps, timesteps]), both)
    n = len(x)
    return (x0[:n], eps[:n]), (x0[n:], eps[n:])


class AdapterRoles(Roles):
    """Student and critic as LoRA adapters on the base, which is the teacher as it is.

    Args:
        targets: per role, names (endings) of the layers that get an adapter, or one regular expression or "all-linear",
            as in peft.
        rank, alpha: per role; alpha defaults to the rank, which is a scale of 1.
        generator: of the adapters' initial weights. Both start as the teacher: the second factor of a LoRA starts at 0.
        device: of the adapters; None is where their layers are, unless those wait in main memory (offload).

    Raises:
        TDMError: no layer matches the targets of a role.
    """

    def __init__(
        self,
        base: nn.Module,
        call: Denoiser,
        *,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        targets: dict[Role, Sequence[str] | str],
        rank: dict[Role, int],
        alpha: dict[Role, float | None],
        generator: torch.Generator,
        precision: Precision = "fp32",
        guided_output: GuidedOutput | None = None,
        device: torch.device | None = None,
    ) -> None:
        for role in ROLES:
            scale = alpha[role] if alpha[role] is not None else rank[role]
            layers = targets[role]
            lora = LoraConfig(
                r=rank[role],
                lora_alpha=scale,  # type: ignore[arg-type]  # peft annotates int, and divides
                target_modules=layers if isinstance(layers, str) else list(layers),
            )
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are what we want
                    warnings.filterwarnings("ignore", "TorchaoLoraLinear")  # warns of merging, which is not done here
                    inject_adapter_in_model(lora, base, adapter_name=role)
            except ValueError as error:
                raise TDMError(f"no {role} adapter fits the base: {error}") from error
        super().__init__(
            base,
            call,
            schedule=schedule,
            prediction_type=prediction_type,
            precision=precision,
            guided_output=guided_output,
        )
        self._layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
        self._weights = {role: self._find(role) for role in ROLES}
        for role in ROLES:
            for name, weight in self._weights[role].items():
                weight.data = weight.data.to(device or weight.device, torch.float32)
                weight.requires_grad_(True)
                if "lora_A" in name:  # peft draws from the global generator: draw again from ours, by the same law
                    drawn = torch.empty(weight.shape)
                    nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
                    weight.data.copy_(drawn)

    @torch.no_grad()
    def reset(self, role: Role) -> None:
        """Make a role the teacher again: the second factors of its adapter, and what it knows of step counts, are 0."""
        for name, weight in self._weights[role].items():
            if "lora_B" in name or name == STEPS:
                weight.zero_()

    def _find(self, role: Role) -> dict[str, nn.Parameter]:
        mark = f".{role}."
        return {
            name.replace(mark, "."): p for name, p in self.base.named_parameters() if "lora_" in name and mark in name
        }

    def _network(self, role: Role | None) -> nn.Module:
        for layer in self._layers:
            layer._active_adapter = [] if role is None else [role]
        return self.base


class CopyRoles(Roles):
    """Student and critic as whole copies of the base in float32: three networks in memory, every weight trained."""

    def __init__(
        self,
        base: nn.Module,
        call: Denoiser,
        *,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        precision: Precision = "fp32",
        guided_output: GuidedOutput | None = None,
    ) -> None:
        super().__init__(
            base,
            call,
            schedule=schedule,
            prediction_type=prediction_type,
            precision=precision,
            guided_output=guided_output,
        )
        self._copies = {role: copy.deepcopy(base).float().requires_grad_(True) for role in ROLES}
        self._weights = {role: dict(network.named_parameters()) for role, network in self._copies.items()}

    @torch.no_grad()
    def reset(self, role: Role) -> None:
        """Make a role the teacher again: a copy of the base, and nothing known of step counts."""
        base = dict(self.base.named_parameters())
        for name, weight in self._weights[role].items():
            weight.zero_() if name == STEPS else weight.copy_(base[name])

    def _network(self, role: Role | None) -> nn.Module:
        return self.base if role is None else self._copies[role]


class Ema:
    """The running mean of a role's weights. ``decay`` 0 is the last weights themselves.

    With ``warmup`` the memory starts short, ``min(decay, (1 + n) / (10 + n))``, so that early weights are soon
    forgotten.
    """

    def __init__(self, roles: Roles, role: Role = "student", *, decay: float = 0.99, warmup: bool = True) -> None:
        self.roles, self.role, self.decay, self.warmup = roles, role, decay, warmup
        self.count = 0
        self.weights = roles.state(role)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the role's current weights."""
        decay = min(self.decay, (1 + self.count) / (10 + self.count)) if self.warmup else self.decay
        self.count += 1
        torch._foreach_lerp_(list(self.weights.values()), tuple(self.roles.parameters(self.role)), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the role runs on its mean weights; after, on its current ones."""
        current = self.roles.state(self.role)
        self.roles.load(self.role, self.weights)
        try:
            yield
        finally:
            self.roles.load(self.role, current)
