"""The optimiser of a role and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..errors import TDMError
from .config import MemoryConfig, RoleConfig


def build_optimizer(weights: list[nn.Parameter], config: RoleConfig, memory: MemoryConfig) -> Optimizer:
    """AdamW of a role; with its two moments in 8 bits (torchao) if asked for.

    Raises:
        TDMError: torchao is not installed.
    """
    kind: Callable[..., Optimizer] = AdamW
    if memory.optimizer == "adamw8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise TDMError("memory.optimizer=adamw8bit needs torchao: pip install 'tdm-diffusion[quant]'") from error
        kind = AdamW8bit
    return kind(weights, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups. torchao keeps it in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate(config: RoleConfig, step: int, updates: int) -> float:
    """The learning rate of update ``step`` (from 0): linear warm-up times the decay. No checkpoint keeps it, since it
    is a function of the step.
    """
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    done = step / updates
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.decay]
    return config.lr * warm * (config.lr_end + (1 - config.lr_end) * left)
