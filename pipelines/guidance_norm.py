"""Classifier-free guidance of a network's outputs, and the normalisations that keep it from oversaturating, by name.

All work on the network's own output (epsilon, v or velocity), ``[B, ...]``, where the published code has them:

- ``rescale@phi`` (arXiv 2305.08891, section 3.4): the guided output gets the standard deviation of the conditional one,
  and is mixed with itself as it was. Stable Diffusion; phi is 0.7 in the paper.
- ``token_norm``: each token of the guided output gets the norm of the conditional one's. Qwen-Image does it always.
- ``norm_limit@f``: the norm of the guided output is at most f times that of the conditional one. Z-Image.
- ``zero_star`` (CFG-Zero*, arXiv 2503.18886, without its zeroed first steps): the unconditional output is first scaled
  to fit the conditional one best. Flow models.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import TDMError

if TYPE_CHECKING:  # what a student file says of itself is read without torch
    from torch import Tensor

    from .families import Family

    TokenNorms = Callable[[Tensor], Tensor]

ARGUMENTS = {"rescale": "guidance_rescale", "norm_limit": "cfg_normalization"}  # of the stock pipelines that have it
AMOUNTS = {"rescale": "from 0 to 1, such as rescale@0.7", "norm_limit": "above 0, such as norm_limit@1"}
NAMES = (*ARGUMENTS, "token_norm", "zero_star")


def guided(cond: Tensor, uncond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Classifier-free guidance of predictions ``[B, ...]``: ``c + (w - 1)(c - u)``. ``w = 1`` is ``c`` itself."""
    return cond + (guidance_scale - 1.0) * (cond - uncond)


@dataclass(frozen=True)
class GuidanceNorm:
    """A normalisation of guidance: its name and, where it has one, its amount."""

    name: str
    amount: float = 0.0

    @classmethod
    def parse(cls, text: str) -> GuidanceNorm:
        """Read ``name`` or ``name@amount``.

        Raises:
            TDMError: an unknown name, or an amount that is missing, out of range or not wanted.
        """
        name, _, amount = text.partition("@")
        if name not in NAMES:
            raise TDMError(f"guidance_norm must be one of {', '.join(NAMES)}, not {text!r}")
        if name not in AMOUNTS:
            if amount:
                raise TDMError(f"guidance_norm {name} has no amount; write {name} alone")
            return cls(name)
        try:
            value = float(amount)
        except ValueError:
            value = 0.0
        if not 0 < value <= (1 if name == "rescale" else float("inf")):
            raise TDMError(f"guidance_norm {name} needs an amount {AMOUNTS[name]}, not {text!r}")
        return cls(name, value)

    def __str__(self) -> str:
        return f"{self.name}@{self.amount:g}" if self.name in AMOUNTS else self.name

    def __call__(self, cond: Tensor, uncond: Tensor, guidance_scale: float | Tensor, token_norms: TokenNorms) -> Tensor:
        """The guided output ``[B, ...]`` of a network's outputs with the prompt and without it.

        Args:
            guidance_scale: a number, or a tensor that broadcasts to ``[B, ...]``.
            token_norms: `Family.token_norms` of the network's family.
        """
        if self.name == "zero_star":
            uncond = best_scale(cond, uncond) * uncond
        output = guided(cond, uncond, guidance_scale)
        if self.name == "rescale":
            rest = tuple(range(1, cond.ndim))
            same_std = output * (cond.std(rest, keepdim=True) / output.std(rest, keepdim=True))
            return self.amount * same_std + (1 - self.amount) * output
        if self.name == "token_norm":
            return output * (token_norms(cond) / token_norms(output))
        if self.name == "norm_limit":
            limit, norm = self.amount * _norm(cond), _norm(output)
            return output * (limit / norm).clamp_max(1)
        return output


def best_scale(cond: Tensor, uncond: Tensor) -> Tensor:
    """What the unconditional output is multiplied by to fit the conditional one best, ``[B, 1, ...]``: their inner
    product over the square of its norm (CFG-Zero*).
    """
    product = (cond.float() * uncond.float()).flatten(1).sum(1)
    scale = product / (uncond.float().flatten(1).square().sum(1) + 1e-8)
    return scale.to(cond.dtype).reshape(-1, *[1] * (cond.ndim - 1))


def _norm(output: Tensor) -> Tensor:
    return output.flatten(1).norm(dim=1).reshape(-1, *[1] * (output.ndim - 1))


def norm_of_family(family: Family, text: str | None, *, flow: bool) -> GuidanceNorm | None:
    """The normalisation that a family's base is guided with.

    Args:
        text: its name, as in `GuidanceNorm.parse`; None is what the base's own pipeline does.
        flow: the base is a flow model.

    Raises:
        TDMError: one that the family's pipeline cannot be run with.
    """
    if text is None or text == family.own_guidance_norm:
        return GuidanceNorm.parse(family.own_guidance_norm) if family.own_guidance_norm else None
    norm = GuidanceNorm.parse(text)
    possible = [family.own_guidance_norm] if family.own_guidance_norm else _possible(family, flow=flow)
    if norm.name not in possible:
        others = f"it has {' and '.join(possible)}" if possible else "it has none: leave guidance_norm out"
        raise TDMError(f"guidance_norm={text} is nothing that {family.pipeline} can be run with; {others}")
    return norm


def _possible(family: Family, *, flow: bool) -> list[str]:
    known = inspect.signature(family.pipeline_class().__call__).parameters
    arguments = [name for name, argument in ARGUMENTS.items() if argument in known]
    return arguments + ["zero_star"] * (flow and family.guidance_halves is not None)


def arguments_of_norm(norm: GuidanceNorm | None) -> dict[str, float]:
    """The argument of a stock pipeline's call that switches a normalisation on; {} if there is none."""
    return {ARGUMENTS[norm.name]: norm.amount} if norm is not None and norm.name in ARGUMENTS else {}


@contextlib.contextmanager
def zero_star(pipe: Any, family: Family) -> Iterator[None]:
    """For the length of a `with`, a stock pipeline's guided calls have CFG-Zero*: the unconditional output of its
    network is scaled before the pipeline gets it. Each step must call the network with both halves of guidance.
    """
    import torch

    halves = family.guidance_halves
    # A network that predicts a variance, too, has it in further channels.
    known = (slice(None), slice(0, family.latent_channels(pipe)))
    earlier: list[Tensor] = []

    def scale(_module: Any, _inputs: Any, output: Any) -> Any:
        result = output[0]
        if halves == "two calls":
            if not earlier:
                earlier.append(result)
                return output
            return (best_scale(earlier.pop(), result) * result, *output[1:])
        both = torch.stack(list(result))
        first, second = both.chunk(2)
        cond, uncond = (second, first) if halves == "negative first" else (first, second)
        uncond = best_scale(cond[known], uncond[known]) * uncond
        both = torch.cat([uncond, cond] if halves == "negative first" else [cond, uncond])
        return (both if isinstance(result, torch.Tensor) else list(both), *output[1:])

    hook = getattr(pipe, family.denoiser).register_forward_hook(scale)
    try:
        yield
    finally:
        hook.remove()
