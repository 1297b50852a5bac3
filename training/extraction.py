"""A LoRA out of whole weights: the difference of a distilled checkpoint from its base, cut to a rank layer by layer.

Both sets of weights are read from their files one tensor at a time. So it makes no difference what the run stores the
base in, and no second model is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import TDMError
from ..files import replacing
from ..pipelines.families.base import on_device
from ..pipelines.loras.average import reduce
from ..pipelines.loras.pairs import Lora, wide_float
from ..pipelines.schedule import uniform_grid
from .config import DistillConfig, Role
from .progress import Progress, Report
from .roles import Roles
from .run import guided_sampler
from .task import Task

EXTRACTION_FILE = "extraction.json"
PROMPTS, STEPS = 8, 8  # of the teacher's trajectories that layers' inputs are gathered on
# Of the mean squared input, on the diagonal of a second moment: a few prompts do not show every direction. On the
# bundled student 0.001 to 0.01 end further from it than the plain SVD at ranks 16 and 32. 0.1 is within 1 % of the SVD
# there, and nearer at ranks 8 and 4.
RIDGE = 0.1
MOMENTS = 2 * 2**30  # bytes of second moments that are held at a time; more layers are further passes
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NAMED = 3  # layers in the summary
_WHERE = ("in_layers_with_an_adapter", "in_other_tensors")


# ---------------------------------------------------------------------- mathematics


def directions(difference: Tensor, rank: int, moment: Tensor | None = None) -> Tensor:
    """The orthonormal columns ``U [out, rank]`` for which ``U U^T D`` is the best matrix of that rank in D's place.

    Without ``moment`` it has the smallest ``||D - X||``: the SVD's own (Eckart and Young, 1936). With the second moment
    C of the layer's inputs it has the smallest ``||(D - X) C^1/2||``, which is the mean squared error of the layer's
    outputs: for C = L L^T the best matrix in the place of D L is ``U U^T D L`` with the left singular vectors of D L,
    which are the eigenvectors of D C D^T.

    Args:
        difference: D, ``[out, in]``.
        rank: at most; a layer has no more than ``min(out, in)``.
        moment: C, ``[in, in]``; None is the identity.
    """
    q, r = (None, difference) if len(difference) <= difference.shape[1] else torch.linalg.qr(difference)
    gram = r @ r.T if moment is None else r @ moment @ r.T
    columns = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    return columns if q is None else q @ columns


def lora_of(difference: Tensor, columns: Tensor) -> Lora:
    """``U U^T D`` as a LoRA whose halves share the singular values equally."""
    return reduce(Lora(columns.T @ difference, columns), columns.shape[1])[0]


def squared(matrix: Tensor, moment: Tensor | None = None) -> float:
    """``||M C^1/2||^2``, with the identity as C if there is no ``moment``."""
    return float((matrix * (matrix if moment is None else matrix @ moment)).sum())


# ---------------------------------------------------------------------- the inputs of layers


def second_moments(
    roles: Roles, task: Task, config: DistillConfig, widths: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """The second moment ``[in, in]`` of each layer's inputs, in float32, while the guided teacher draws a few of the
    run's prompts: its own states at `STEPS` noise levels. A convolution's inputs are its patches. A layer that no
    prompt reaches has 0.

    Args:
        widths: of the inputs, by layer. As many layers are gathered in one pass as `MOMENTS` holds.

    Raises:
        TDMError: a convolution with groups, dilation or padding that is not of zeros.
    """
    grid = uniform_grid(STEPS, task.schedule, config.trajectory.shift)
    draw = guided_sampler(roles, task, config.objective.guidance_scale, grid)
    for group in _groups(widths):
        sums = {name: torch.zeros(widths[name], widths[name], device=task.device) for name in group}
        rows = dict.fromkeys(group, 0)
        hooks = [_gathering(task.base.get_submodule(name), name, sums, rows) for name in group]
        try:
            generator = torch.Generator().manual_seed(config.seed)
            for _ in range(PROMPTS):
                cond, shape = task.conditions(1, generator)
                noise = torch.randn(1, *shape, generator=generator).to(task.device)
                with torch.no_grad():
                    draw(noise, on_device(cond, task.device))
        finally:
            for hook in hooks:
                hook.remove()
        for name in group:
            yield name, sums.pop(name) / max(1, rows[name])


def _groups(widths: Mapping[str, int]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, width in widths.items():
        size += 4 * width**2
        if group and size > MOMENTS:
            yield group
            group, size = [], 4 * width**2
        group.append(name)
    if group:
        yield group


def _gathering(layer: nn.Module, name: str, sums: dict[str, Tensor], rows: dict[str, int]) -> Any:
    """A hook that adds up a layer's inputs."""
    original: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer

    def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = _rows(inputs[0].float(), original, name)
        sums[name].addmm_(x.T, x)
        rows[name] += len(x)

    return layer.register_forward_pre_hook(add)


def _rows(x: Tensor, layer: Any, name: str) -> Tensor:
    """What each output of a layer is computed from, ``[rows, in]``, in the order of its weight's axes."""
    if not isinstance(layer, _CONVOLUTIONS):
        return x.flatten(0, -2)
    plain = layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    if not plain or isinstance(layer.padding, str):
        raise TDMError(f"the inputs of the convolution {name} are not gathered here; set extraction=svd")
    x = F.pad(x, [width for width in reversed(layer.padding) for _ in range(2)])
    n = len(layer.kernel_size)
    for axis, (size, stride) in enumerate(zip(layer.kernel_size, layer.stride, strict=True)):
        x = x.unfold(2 + axis, size, stride)
    return x.movedim(1, n + 1).flatten(n + 1).flatten(0, n)  # [B, C, *out, *kernel] to [B * out, C * kernel]


# ---------------------------------------------------------------------- extraction


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that differs.

    Attributes:
        name: of the layer, or of a tensor that no adapter is on.
        squared: its share of the squared norm of the whole difference is this over the sum of all.
        left: by role, the share of ``squared`` that the role's adapter does not hold.
        outputs_left: the same of the squared difference in the layer's outputs, where inputs were gathered.
    """

    name: str
    squared: float
    left: dict[Role, float]
    outputs_left: dict[Role, float]


@dataclass(frozen=True)
class Extraction:
    """An adapter for each of some roles, and what of the difference it leaves.

    Attributes:
        source: the checkpoint's name, without its place.
        method: svd or activations.
        ranks: by role.
        layers: by role and layer, in float32.
        differences: all tensors that differ.
        extra: names of tensors that the base does not have.
    """

    source: str
    method: str
    ranks: dict[Role, int]
    layers: dict[Role, dict[str, Lora]]
    differences: list[TensorDifference]
    extra: list[str]

    def left(self, role: Role) -> tuple[float, float]:
        """Two shares of the squared difference: what a role's adapter leaves of its own layers, and all that is in
        tensors without an adapter. Their sum is what the student lacks of the checkpoint.
        """
        total = sum(change.squared for change in self.differences)
        inside = sum(change.left[role] * change.squared for change in self.differences if role in change.left)
        return inside / total, sum(change.squared for change in self.differences if role not in change.left) / total

    def summary(self, role: Role) -> str:
        """One line about a role's adapter."""
        inside, outside = self.left(role)
        held = sorted((p for p in self.differences if role in p.left), key=lambda p: -p.left[role] * p.squared)
        without = sorted((p for p in self.differences if role not in p.left), key=lambda p: -p.squared)
        worst = ", ".join(f"{change.name} ({_percent(change.left[role])} of its own)" for change in held[:_NAMED])
        text = (
            f"of {self.source} a {role} of rank {self.ranks[role]} ({self.method}) leaves {_percent(inside + outside)} "
            f"of the squared difference from the base: {_percent(inside)} in the adapter's layers, most in {worst}"
        )
        if without:
            names = f"{len(without)} tensors without an adapter, such as {without[0].name}"
            text += f"; {_percent(outside)} in {names}"
        if self.extra:
            text += f"; {len(self.extra)} tensors that the base does not have, such as {self.extra[0]}, are left out"
        return text

    def write(self, path: Path) -> None:
        """Write the shares as JSON, a tensor a line, the largest loss first.

        Raises:
            TDMError: it cannot be written.
        """
        total = sum(change.squared for change in self.differences)
        facts = {
            "source": self.source,
            "method": self.method,
            "summary": {role: self.summary(role) for role in self.ranks},
            "left": {role: dict(zip(_WHERE, self.left(role), strict=True)) for role in self.ranks},
            "not_in_the_base": self.extra,
        }
        first: Role = next(iter(self.ranks))
        differences = sorted(self.differences, key=lambda change: -change.squared * change.left.get(first, 1.0))
        lines = [
            {
                "tensor": p.name,
                "share_of_difference": p.squared / total,
                "left": {role: p.left.get(role, 1.0) for role in self.ranks},
            }
            | ({"left_of_outputs": p.outputs_left} if p.outputs_left else {})
            for p in differences
        ]
        head = json.dumps(facts, indent=1)[:-2]
        body = ",\n".join(f"  {json.dumps(line)}" for line in lines)
        with replacing(path) as file:
            file.write(f'{head},\n "tensors": [\n{body}\n ]\n}}\n'.encode())


def extract(
    roles: Roles,
    task: Task,
    config: DistillConfig,
    of: Sequence[Role],
    weights: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    source: str,
    report: Report,
) -> Extraction:
    """The adapters of some roles that come nearest to a distilled checkpoint (``config.extraction``).

    Args:
        of: these roles, each at its own rank, for the layers that it trains.
        weights: of the base and of the checkpoint, by diffusers' names.
        source: the checkpoint's name.
        report: takes the progress lines.

    Raises:
        TDMError: the checkpoint lacks a tensor or has one of another shape, holds NaN, or differs from the base in no
            layer that is trained.
    """
    base, distilled = weights
    check_same_model(base, distilled, source)
    widths, ranks = _adapters(roles, config, of)
    if lacking := [name for name in widths if f"{name}.weight" not in base]:
        raise TDMError(f"the files of the base have no {lacking[0]}.weight, whose adapter is to be extracted")
    layers: dict[Role, dict[str, Lora]] = {role: {} for role in of}
    differences: list[TensorDifference] = []
    progress = Progress("extracting adapters", len(widths), report)
    for name, moment in _with_moments(roles, task, config, widths):
        progress.add(1)
        whole = difference(base[f"{name}.weight"], distilled[f"{name}.weight"], f"{name}.weight of {source}")
        if whole is None:
            continue
        D, C = _ready(whole.flatten(1), task), None if moment is None else _ridged(_ready(moment, task))
        if widths[name] != D.shape[1]:
            raise TDMError(f"{name} is a convolution in groups, which is not extracted; leave it out of the targets")
        columns = directions(D, max(ranks[name].values()), C)
        change = TensorDifference(name, squared(D), {}, {})
        for role, rank in ranks[name].items():
            A, B = (half.float() for half in lora_of(D, columns[:, :rank]))
            rest = D - B.to(D) @ A.to(D)
            change.left[role] = squared(rest) / change.squared
            if C is not None:
                change.outputs_left[role] = squared(rest, C) / squared(D, C)
            kernel = whole.shape[2:]
            layers[role][name] = Lora(A.reshape(len(A), -1, *kernel), B.reshape(*B.shape, *(1 for _ in kernel)))
        differences.append(change)
    for name in (name for name in base if name.removesuffix(".weight") not in widths):
        if (other := difference(base[name], distilled[name], f"{name} of {source}")) is not None:
            differences.append(TensorDifference(name, float(other.square().sum()), {}, {}))
    if not differences:
        raise TDMError(f"{source} is the base itself: no tensor differs, and there is nothing to extract")
    if idle := [role for role in of if not layers[role]]:
        raise TDMError(
            f"{source} differs from the base in no layer that the {idle[0]} trains, but in others such as "
            f"{differences[0].name}; set {idle[0]}.targets so that they are among them"
        )
    extra = sorted(name for name in distilled if name not in base)
    return Extraction(
        source, config.extraction, {role: config.roles[role].rank for role in of}, layers, differences, extra
    )


def check_same_model(base: Mapping[str, Tensor], distilled: Mapping[str, Tensor], source: str) -> None:
    """Raise TDMError unless a checkpoint has every tensor of the base, in its shape."""
    missing = [name for name in base if name not in distilled or distilled[name].is_meta]
    if len(missing) == len(base):
        raise TDMError(f"{source} is another model than the base: it has none of the base's tensors")
    if missing:
        raise TDMError(
            f"{source} lacks {len(missing)} of the base's {len(base)} tensors, such as {missing[0]}: it is of another "
            "model, or not whole"
        )
    for name, weight in base.items():
        if (shape := distilled[name].shape) != weight.shape:
            raise TDMError(
                f"{source} is another model than the base: {name} is {tuple(shape)} there, and {tuple(weight.shape)} "
                "in the base"
            )


def difference(base: Tensor, distilled: Tensor, what: str) -> Tensor | None:
    """``distilled - base`` in float64; None if the two are equal in the coarser of their dtypes.

    Raises:
        TDMError: ``distilled`` holds NaN or infinite values, or whole numbers.
    """
    if not distilled.is_floating_point():
        raise TDMError(f"{what} is stored as {distilled.dtype}: the model is quantised; get it in bf16 or fp16")
    base, distilled = wide_float(base), wide_float(distilled)
    if not bool(distilled.isfinite().all()):
        raise TDMError(f"{what} holds NaN or infinite values")
    coarser = max(base.dtype, distilled.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return None if torch.equal(base.to(coarser), distilled.to(coarser)) else distilled.double() - base.double()


def _adapters(
    roles: Roles, config: DistillConfig, of: Sequence[Role]
) -> tuple[dict[str, int], dict[str, dict[Role, int]]]:
    """The width of the inputs of every layer with an adapter of these roles, and the adapters' ranks, by layer."""
    widths: dict[str, int] = {}
    ranks: dict[str, dict[Role, int]] = {}
    for role in of:
        for name, A in roles.state(role).items():
            if (layer := name.removesuffix(".lora_A.weight")) != name:
                widths[layer] = A.flatten(1).shape[1]
                ranks.setdefault(layer, {})[role] = config.roles[role].rank
    return widths, ranks


def _with_moments(
    roles: Roles, task: Task, config: DistillConfig, widths: Mapping[str, int]
) -> Iterator[tuple[str, Tensor | None]]:
    if config.extraction == "activations":
        yield from second_moments(roles, task, config, widths)
    else:
        yield from ((name, None) for name in widths)


def _ready(matrix: Tensor, task: Task) -> Tensor:
    """A matrix on the run's device in float64, or in float32 where a device has no other."""
    return matrix.to(task.device, torch.float32 if task.device.type == "mps" else torch.float64)


def _ridged(moment: Tensor) -> Tensor:
    """A second moment with `RIDGE` on its diagonal; the identity for a layer that no prompt reached."""
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    mean = moment.diagonal().mean()
    return moment + RIDGE * mean * eye if mean > 0 else eye


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"
