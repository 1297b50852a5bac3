"""An update on tensors without data: the training code itself on the meta device, to see what it will cost.

Nothing is loaded and nothing is computed, but every operator runs, with its shapes and dtypes, and so the FLOPs and the
memory that tensors hold are those of the real run. Two things of a device have no counterpart there and are put in: its
autocast, and its attention, which never holds the matrix of scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop, sdpa_flop

from ...bench.memory import LiveMemory
from ...errors import TDMError
from ...pipelines.bases import outline
from ...pipelines.families import Condition
from ...pipelines.scheduler import TDMScheduler
from ..batch import Batch, draw_batch
from ..config import DistillConfig
from ..from_plain import from_dict
from ..loop import build_roles
from ..objectives import objective_of
from ..objectives.passes import teacher_passes
from ..processes import Processes
from ..roles import ROLES, GuidedOutput, Role, Roles
from ..tasks.base_storage import can_offload
from ..tasks.pipeline_settings import PipelineTaskConfig, sizes_of
from ..trajectory import Trajectory
from ..update import update

_ATEN = torch.ops.aten
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu  # keeps what every fused attention keeps
register_flop_formula(_ATTENTION, get_raw=True)(sdpa_flop)  # torch counts only those of GPUs
register_flop_formula(_ATEN._scaled_dot_product_flash_attention_for_cpu_backward, get_raw=True)(sdpa_backward_flop)

# What autocast runs in bfloat16, and on CUDA in float32 (at::autocast), as far as networks here call it.
_HALF: set[Any] = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, torch.einsum, torch.matmul, torch.bmm, torch.mm,
    torch.baddbmm, torch.addmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm, F.scaled_dot_product_attention,
}  # fmt: skip
_SINGLE: set[Any] = {
    F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, torch.pow, Tensor.pow, Tensor.__pow__,
    torch.rsqrt, Tensor.rsqrt, torch.exp, Tensor.exp, torch.log, Tensor.log, torch.sum, Tensor.sum, torch.cumsum,
    Tensor.cumsum, torch.prod, Tensor.prod, F.softplus, torch.norm, Tensor.norm, torch.reciprocal, Tensor.reciprocal,
}  # fmt: skip


class AsOn(TorchFunctionMode):
    """Inside, tensors on the meta device are computed as on a device: attention fused, and autocast if ``bf16``.

    Args:
        device: "cuda", or "cpu", where attention is in float32 under autocast (see `Bf16OnCpu`).
    """

    def __init__(self, device: str, *, bf16: bool) -> None:
        super().__init__()
        self.bf16 = bf16
        self.half = _HALF if device == "cuda" else _HALF - {F.scaled_dot_product_attention}
        self.single = _SINGLE if device == "cuda" else {F.scaled_dot_product_attention}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:  # a mode is off in what it calls, but checkpointing computes forwards again there
            with self:
                loss = args[0]
                return _engine_run_backward(
                    (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if self.bf16 and (func in self.half or func in self.single):
            wanted = torch.bfloat16 if func in self.half else torch.float32

            def cast(value: Any) -> Any:
                if isinstance(value, list | tuple):
                    return type(value)(map(cast, value))
                narrow = isinstance(value, Tensor) and value.dtype in (torch.float32, torch.bfloat16, torch.float16)
                return value.to(wanted) if narrow and value.device.type == "meta" else value

            args, kwargs = tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention and (args[0] if args else kwargs["query"]).device.type == "meta":
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    mask = None if attn_mask is None else attn_mask.to(query.dtype)
    return _ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]


class TaskWithoutWeights:
    """``Task`` of a pipeline without weights, for a rehearsal: conditions are blank, and nothing can be drawn.

    Attributes:
        shapes: whose configs the sizes are from.
        encoder_weights: of all text encoders.

    Raises:
        TDMError: another task than a pipeline, or what ``PipelineTask`` would refuse about base and size.
    """

    def __init__(self, section: dict[str, Any], dtype: torch.dtype) -> None:
        if section.get("name") != "pipeline":
            raise TDMError(f"only task.name=pipeline can be estimated, not {section.get('name')!r}")
        config = from_dict(PipelineTaskConfig, section, "task.")
        self.dtype = dtype
        self.family, self.pipe, self.shapes = outline(config.model)
        self.base: nn.Module = getattr(self.pipe, self.family.denoiser).to(dtype)
        encoders = [part for name, part in self.pipe.components.items() if name.startswith("text_encoder") and part]
        self.encoder_weights = sum(map(_numel, encoders))
        self.targets, self.time_embedder = self.family.lora_targets, self.family.time_embedder
        self.guided_output: GuidedOutput | None = None  # a normalisation makes no pass
        scheduler = TDMScheduler.from_config(self.pipe.scheduler.config)
        self.schedule, self.prediction_type = scheduler.schedule, scheduler.config.prediction_type
        self.size = max(sizes_of(config, self.family, self.pipe), key=lambda size: size.height * size.width)
        self.latent_shape = self.family.latent_shape(self.pipe, self.size)
        self.device = torch.device("meta")
        self._cond = self.family.blank(self.pipe, 1, self.size)

    def call(self, base: nn.Module, x: Tensor, timesteps: Tensor, cond: Condition) -> Tensor:
        """See ``Task``."""
        return self.family.denoise(base, x.to(self.dtype), timesteps, cond)

    def conditions(self, n: int) -> Condition:
        """Blank conditions of ``n`` prompts of full length."""
        return {key: value.repeat_interleave(n, 0) for key, value in self._cond.items()}


@dataclass(frozen=True)
class Course:
    """What a rehearsed update took.

    Attributes:
        flops: of one sample's pass, by "student", "critic", "teacher", "student_backward" and "critic_backward"; the
            last two with what gradient checkpointing computes again.
        peak: bytes that its tensors held at a time: activations, gradients, and what operators need in passing.
    """

    flops: Mapping[str, float]  # 0 for what the objective has not
    peak: int


class Rehearsal:
    """The run of a configuration, for one update.

    Args:
        config: of the run.
        task: with or without weights; on the meta device nothing is computed.
        bf16: under autocast.
        device: whose arithmetic it is, "cuda" or "cpu".

    Attributes:
        shapes: of the frozen base's weights, see `shapes_of`.
        largest_block: of the base, as a fraction of it.
        offloads: whether it can be trained from main memory, which a convolution in a block prevents.
        trained: numbers of trained weights by role.
    """

    def __init__(self, config: DistillConfig, task: TaskWithoutWeights, bf16: bool, device: str = "cuda") -> None:
        self.task, self.as_on = task, AsOn(device, bf16=bf16)
        self.shapes = shapes_of(self.task.base)
        self.largest_block = _largest_block(self.task.base)
        self.offloads = can_offload(self.task.base)
        self.trajectory = Trajectory(config.trajectory, self.task.schedule)
        self.config = replace(config, precision="fp32")  # autocast is put in here
        with task.device:
            self.roles = build_roles(self.task, self.config, torch.Generator())  # type: ignore[arg-type]
        self.trained = {role: sum(p.numel() for p in self.roles.parameters(role)) for role in ROLES}

    def update(self, samples: int, micro_batches: int = 1) -> Course:
        """One update without data. Its stage is the first, so that nothing rolls: a prefix holds less than the rest.

        Args:
            samples: at a time.
            micro_batches: how many; more than two hold what two do.
        """
        n = min(micro_batches, 2)
        optimizers: dict[Role, Optimizer] = {role: SGD(self.roles.parameters(role), lr=0.0) for role in ROLES}
        shape = (samples * n, *self.task.latent_shape)

        def draw(student: bool) -> list[Batch]:
            band = objective_of(self.config.objective).guidance_band(self.config.objective)
            batch = draw_batch(self.trajectory, {}, {}, shape, torch.Generator(), student=student, guidance_band=band)
            stages = torch.zeros_like(batch.stages)
            tau = self.trajectory.draw_tau(stages, torch.Generator())
            critic, student_renoise = batch.critic._replace(tau=tau), batch.student and batch.student._replace(tau=tau)
            guidance = batch.guidance and batch.guidance._replace(tau=tau)
            batch = batch._replace(stages=stages, critic=critic, student=student_renoise, guidance=guidance)
            cond, null = self.task.conditions(samples), self.task.conditions(samples)
            return [batch.part(i, n).to(self.task.device)._replace(cond=cond, null=null) for i in range(n)]

        once = replace(self.config, critic=replace(self.config.critic, per_student=1, skip_above=None))
        leash = self.config.critic.leash > 0
        with self.as_on, _Tally(self.roles, self.task.device.type, leash=leash) as tally:
            update(self.roles, once, draw, optimizers, Processes())
        tally.samples["student_backward"] = shape[0]
        guided = self.config.objective.guided_critic
        tally.samples["critic_backward"] = shape[0] * (teacher_passes(self.config) if guided else 1)
        return Course(
            Counter({name: flops / tally.samples[name] for name, flops in tally.flops.items() if flops}), tally.peak
        )


class _Tally(LiveMemory):
    """FLOPs by pass, while an update runs. Between the passes are the backward ones: the critic's after its forward
    with a graph and the teacher's for its leash, the student's else.
    """

    def __init__(self, roles: Roles, device: str, *, leash: bool) -> None:
        super().__init__(device)
        self.roles, self.current, self.leash = roles, "critic_backward", leash
        self.critic_before = False  # whether the last pass was the critic's with a graph
        self.flops: Counter[str] = Counter()
        self.samples: Counter[str] = Counter()

    def __enter__(self) -> _Tally:
        for name in (*ROLES, "teacher"):
            setattr(self.roles, name, self._watched(name, getattr(self.roles, name)))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for name in (*ROLES, "teacher"):
            delattr(self.roles, name)  # the class's own is under it

    def _watched(self, name: str, predict: Callable[..., Any]) -> Callable[..., Any]:
        def watched(x: Tensor, *rest: Any) -> Any:
            self.current = name
            self.samples[name] += len(x)
            out = predict(x, *rest)
            critic = name == "critic" and torch.is_grad_enabled()
            held = name == "teacher" and self.leash and self.critic_before
            self.current, self.critic_before = "critic_backward" if critic or held else "student_backward", critic
            return out

        return watched

    def record(self, function: Any, args: Any, kwargs: Any, out: Any, allocations: int) -> None:  # noqa: ARG002
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None:
            self.flops[self.current] += formula(*args, **kwargs, out_val=out)


def shapes_of(base: nn.Module) -> list[tuple[str, torch.Size]]:
    """(kind, shape) of every weight of a network; the kind "linear" is a matrix that quantisation makes smaller."""
    linear = {id(m.weight) for m in base.modules() if isinstance(m, nn.Linear)}
    return [("linear" if id(p) in linear else "other", p.shape) for p in base.parameters()]


def _largest_block(base: nn.Module) -> float:
    """What share of a network's weights the largest of the blocks has that stay together (``_no_split_modules``)."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    sizes = [_numel(module) for module in base.modules() if type(module).__name__ in names]
    return max(sizes, default=_numel(base)) / _numel(base)


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
