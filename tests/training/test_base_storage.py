"""The frozen base in 32, 16, 8 and 4 bits: adapters train on each, the base stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tdm.errors import TDMError
from tdm.training.config import MemoryConfig
from tdm.training.loop import build_roles, distill
from tdm.training.settings import load_config
from tdm.training.tasks.pipeline import PipelineTask
from torch import Tensor, nn

from .base_tasks import task_of

# Relative error of a prediction that storing the base smaller may make, of tiny networks with random weights.
NEAR = {"fp32": 0.0, "bf16": 0.02, "fp16": 0.002, "fp8": 0.1, "int8": 0.02, "llm_int8": 0.02, "nf4": 0.3}
SMALL = ["updates=2", "batch_size=2", "student.rank=2", "critic.rank=2", "student.lr=0.01", "critic.lr=0.01"]
QUIET = ["objective.guidance_scale=2", "output.preview_every=0"]


def stored(network: nn.Module) -> dict[str, Tensor]:
    """The bytes of the base's weights, without adapters, under the names that they had before."""
    weights = {}
    for name, value in network.state_dict().items():
        if "lora_" in name:
            continue
        tensors = [value.qdata, value.scale] if hasattr(value, "qdata") else [value]
        for i, part in enumerate(tensors):
            weights[f"{name.replace('.base_layer', '')} {i}"] = part.contiguous().view(-1).view(torch.uint8).clone()
    return weights


@torch.no_grad()
def prediction(task: PipelineTask) -> Tensor:
    x = torch.randn(2, *task.latent_shape, generator=torch.Generator().manual_seed(0))
    return task.call(task.base, x, torch.tensor([800.0, 300.0]), task.encode(["a cat", "a red cube"])).float()


@pytest.mark.parametrize("family", ["sdxl", "pixart", "wan"])
@pytest.mark.parametrize("storage", NEAR)
def test_adapters_train_on_a_base_of_any_storage(
    storage: str, family: str, bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    task = task_of(family, bases(family), prompts, MemoryConfig(base=storage))
    exact = prediction(task_of(family, bases(family), prompts))
    near, before = prediction(task), stored(task.base)
    assert float((near - exact).norm() / exact.norm()) <= NEAR[storage]
    assert torch.equal(near, exact) == (storage == "fp32")

    run = distill(task, load_config(None, [*SMALL, *QUIET]), tmp_path / "run", report=lambda _: None)
    after = stored(task.base)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for role in ("student", "critic"):
        trained = [value for name, value in run.roles.state(role).items() if "lora_B" in name]
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in trained)
        assert sum(bool(value.any()) for value in trained) >= 0.8 * len(trained)  # lora_B starts at zero

    for weight in task.base.parameters():
        weight.grad = None
    x = torch.randn(2, *task.latent_shape, generator=torch.Generator().manual_seed(0))
    run.roles.student(x, torch.tensor([800.0, 300.0]), task.encode(["a cat", "a cat"]))[0].square().mean().backward()
    with_gradient = [name for name, weight in task.base.named_parameters() if weight.grad is not None]
    assert with_gradient
    assert all(".student." in name for name in with_gradient)


@pytest.mark.parametrize(
    ("storage", "share"), [("bf16", 0.5), ("fp16", 0.5), ("fp8", 0.5), ("int8", 0.5), ("llm_int8", 0.5), ("nf4", 0.45)]
)
def test_a_smaller_storage_is_smaller(storage: str, share: float, bases: Callable[[str], Path], prompts: str) -> None:
    """The limits are loose: layers kept in full (norms, embeddings) are large in a tiny network."""
    sizes = [
        sum(map(len, stored(task_of("flux", bases("flux"), prompts, MemoryConfig(base=base)).base).values()))
        for base in (storage, "fp32")
    ]
    assert sizes[0] <= share * sizes[1]


@pytest.mark.parametrize("storage", ["fp8", "int8", "llm_int8", "nf4"])
def test_checkpointing_gives_the_same_gradients_on_a_small_base(
    storage: str, bases: Callable[[str], Path], prompts: str
) -> None:
    gradients = []
    for checkpointing in ("false", "true"):
        task = task_of("pixart", bases("pixart"), prompts, MemoryConfig(base=storage))
        config = load_config(None, [*SMALL, f"memory.gradient_checkpointing={checkpointing}"])
        roles = build_roles(task, config, torch.Generator().manual_seed(0))
        x = torch.randn(2, *task.latent_shape, generator=torch.Generator().manual_seed(0))
        timesteps = torch.tensor([800.0, 300.0], dtype=torch.float64)
        roles.student(x, timesteps, task.encode(["a cat", "a cat"]))[0].square().mean().backward()
        gradients.append([weight.grad for weight in roles.parameters("student")])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])


@pytest.mark.parametrize(
    ("memory", "line"),
    [
        ({"offload": True}, "memory.offload is for a GPU"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused_before_anything_is_loaded(
    memory: dict[str, Any], line: str, tmp_path: Path
) -> None:
    with pytest.raises(TDMError, match=line):
        task_of("sd15", tmp_path / "nowhere", "nothing.txt", MemoryConfig(**memory))
