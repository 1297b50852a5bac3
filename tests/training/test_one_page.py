"""`examples/tdm_in_one_page.py` is what the trainer does: the same losses and weights from the same randomness."""

from __future__ import annotations

import ast
import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from tdm.training.batch import Batch, Renoise
from tdm.training.loop import build_roles
from tdm.training.optimizers import build_optimizer
from tdm.training.processes import Processes
from tdm.training.roles import ROLES
from tdm.training.settings import load_config
from tdm.training.tasks.mixture import Mixture, MixtureTask
from tdm.training.trajectory import Trajectory, sample
from tdm.training.update import update
from torch import Tensor, nn
from torch.optim import AdamW

PAGE = Path(__file__).parents[2] / "examples/tdm_in_one_page.py"
SAMPLES = 64
# All else, such as the stage of the whole batch, bands, critic's target, weight, penalty and AdamW, is the default.
SETTINGS = ["full_weights=true", "student.lr=5e-4", "critic.lr=2e-3"]


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tdm_in_one_page", PAGE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OnPage(nn.Module):
    """The trainer's network called as the page calls one: x0 from states ``[B, 2]`` and times ``[B, 1]`` in [0, 1]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x - t * self.network(x, 1000 * t[:, 0])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def task_in_float64() -> MixtureTask:
    mixture = Mixture.scattered()
    task = MixtureTask(mixture=Mixture(mixture.means.double(), mixture.weights.double(), mixture.std))
    task.base.double()
    return task


def test_an_update_is_that_of_the_trainer(page: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """One update of each stage in float64, each from the last one's weights: losses and weights agree to rounding."""
    # The trainer computes in float32. Here this name and cast mean float64, and its code runs as it is.
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config, task = load_config(None, SETTINGS), task_in_float64()
    roles = build_roles(task, config, seeded(0))
    trajectory = Trajectory(config.trajectory, task.schedule)
    networks: dict[str, nn.Module] = {}
    for i, role in enumerate(ROLES):
        for j, weight in enumerate(roles.parameters(role)):
            weight.data += 0.1 * normal(*weight.shape, seed=100 * i + j)  # or both were the teacher, and at rest
        network = copy.deepcopy(task.base).requires_grad_(True)
        network.load_state_dict(roles.state(role))
        networks[role] = OnPage(network)
    settings = {"student": config.student, "critic": config.critic}
    optimizers = {role: build_optimizer(roles.parameters(role), settings[role], config.memory) for role in ROLES}
    page_optimizers = [AdamW(networks[r].parameters(), settings[r].lr, (0.0, 0.99), weight_decay=0) for r in ROLES]

    for k in (4, 3, 2, 1):
        stages = torch.full((SAMPLES,), 4 - k)
        noise, xi = normal(SAMPLES, 2, seed=k), normal(2, SAMPLES, 2, seed=10 + k)
        seeds = (20 + k, 30 + k)
        u = torch.stack([torch.rand(SAMPLES, generator=seeded(s), dtype=torch.float64) for s in seeds])
        taus = [trajectory.draw_tau(stages, seeded(s)) for s in seeds]
        batch = Batch(trajectory, {}, {}, noise, stages, Renoise(taus[0], xi[0]), Renoise(taus[1], xi[1]))

        metrics = update(roles, config, lambda _, batch=batch: [batch], optimizers, Processes())
        losses = page.update(networks["student"], networks["critic"], page_optimizers, k, noise, u[..., None], xi)

        for name, loss in zip(("critic_loss", "student_loss"), losses, strict=True):
            assert metrics[name].dtype == torch.float64
            torch.testing.assert_close(loss, metrics[name], rtol=1e-12, atol=0)
        for role in ROLES:
            state = roles.state(role)
            for name, weight in networks[role].named_parameters():
                torch.testing.assert_close(weight.detach(), state[name.removeprefix("network.")], rtol=0, atol=1e-12)


def test_its_networks_start_as_the_teacher_and_are_sampled_as_the_trainer_samples(page: ModuleType) -> None:
    task, noise, network = MixtureTask(), torch.randn(500, 2, generator=seeded(0)), page.Denoiser()
    roles = build_roles(task, load_config(None, SETTINGS), seeded(0))
    x = torch.tensor([[0.3, -1.0], [2.0, 0.5]])
    with torch.no_grad():
        assert torch.equal(network(x, torch.full((2, 1), 0.6)), page.teacher(x, torch.full((2, 1), 0.6)))
        expected = sample(roles.teacher, task.schedule, [1000, 750, 500, 250], noise, {})
        torch.testing.assert_close(page.roll(network, noise), expected, rtol=0, atol=1e-4)


def test_it_is_one_page_that_needs_torch_and_matplotlib_alone() -> None:
    text = PAGE.read_text()
    assert len(text.splitlines()) <= 100
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module is not None
            names.add(node.module.split(".")[0])
    assert names == {"argparse", "matplotlib", "torch"}


def test_it_runs_alone_draws_its_plot_and_the_student_is_nearer(tmp_path: Path) -> None:
    command = [sys.executable, "-I", PAGE, "--updates", "500", "--out", "plot.png"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    teacher, student = (float(distance) for distance in re.findall(r"mixture (\S+)$", done.stdout, re.MULTILINE))
    assert student < teacher / 3
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.format == "PNG"
        assert len(plot.convert("RGB").getcolors(1 << 24)) > 100  # points, not an empty frame
