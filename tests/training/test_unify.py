"""One student for several step counts: what tells them apart, and that each is sampled as it was trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tdm import TDMPipeline
from tdm.errors import TDMError
from tdm.pipelines.schedule import NoiseSchedule, uniform_grid
from tdm.pipelines.students.file import read_student
from tdm.tests import tiny
from tdm.training.config import TrajectoryConfig
from tdm.training.export import export_student, read_run
from tdm.training.loop import distill
from tdm.training.roles import ROLES, STEPS
from tdm.training.run import Run
from tdm.training.settings import load_config
from tdm.training.tasks.mixture import MixtureTask
from tdm.training.trajectory import build_trajectories

from .base_tasks import PROMPTS, task_of

FLOW = NoiseSchedule.flow()
VP = NoiseSchedule.vp(1000, 0.00085, 0.012, "scaled_linear")
COUNTS = (1, 2, 4, 8)


@pytest.mark.parametrize(("schedule", "shift"), [(FLOW, 1.0), (FLOW, 2.0), (FLOW, 3.0), (VP, 1.0)])
def test_no_two_step_counts_share_a_timestep(schedule: NoiseSchedule, shift: float) -> None:
    trajectories = build_trajectories(TrajectoryConfig(unify=COUNTS, shift=shift), schedule)
    assert {k: len(t) for k, t in trajectories.items()} == {k: k for k in COUNTS}
    every = sorted(t for trajectory in trajectories.values() for t in trajectory.timesteps.tolist())
    assert len(every) == sum(COUNTS)
    assert min(b - a for a, b in itertools.pairwise(every)) >= 1
    assert trajectories[4].timesteps.tolist() == uniform_grid(4, schedule, shift)  # its own steps: as stock samplers do
    assert trajectories[1].timesteps.tolist() < [schedule.last_timestep]
    if schedule.kind == "vp":
        assert all(t == round(t) for t in every)  # stock networks take whole ones


def test_where_nothing_tells_the_grids_are_the_usual_ones() -> None:
    trajectories = build_trajectories(TrajectoryConfig(unify=COUNTS, tell_steps="none", shift=2.0), FLOW)
    assert {k: t.timesteps.tolist() for k, t in trajectories.items()} == {k: uniform_grid(k, FLOW, 2.0) for k in COUNTS}


def test_a_shared_timestep_is_refused() -> None:
    with pytest.raises(TDMError, match=r"1 and 2 steps share timestep 999, .* trajectory.spread"):
        build_trajectories(TrajectoryConfig(unify=(1, 2, 4, 8), spread=0.0005), FLOW)


def go(out: Path, *overrides: str, resume: bool = False) -> Run:
    small = ["updates=12", "batch_size=16", "student.rank=4", "critic.rank=4", "student.lr=0.01", "ema.decay=0"]
    quiet = ["output.evaluate_every=12", "output.checkpoint_every=6", "output.preview_every=0"]
    config = load_config(["mixture", "unify"], [*small, *quiet, *overrides])
    return distill(MixtureTask(width=16, samples=100), config, out, resume=resume, report=lambda _: None)


@pytest.mark.parametrize(
    ("tell", "informed"), [("timestep", ["critic"]), ("embedding", ["student", "critic"]), ("none", [])]
)
def test_who_is_told_by_an_embedding_learns_one_for_each_step_count(
    tell: str, informed: list[str], tmp_path: Path
) -> None:
    run = go(tmp_path, f"trajectory.tell_steps={tell}", "updates=40")
    assert [role for role in ROLES if STEPS in run.roles.state(role)] == informed
    for role in informed:
        vectors = run.roles.state(role)[STEPS]  # type: ignore[arg-type]
        assert vectors.shape[0] == len(COUNTS)
        assert bool(vectors.any(1).all())
    noise, t = torch.randn(5, 2), torch.full((5,), 600.0, dtype=torch.float64)
    conds = [run.with_steps({}, k, 5) for k in COUNTS]
    for role in ROLES:
        predictions = [getattr(run.roles, role)(noise, t, cond)[0] for cond in conds]
        assert all(torch.equal(predictions[0], other) for other in predictions[1:]) == (role not in informed)
    teacher = [run.roles.teacher(noise, t, cond)[0] for cond in conds]
    assert all(torch.equal(teacher[0], other) for other in teacher[1:])


def test_one_step_count_teaches_its_embedding_alone(tmp_path: Path) -> None:
    run = go(tmp_path, "trajectory.tell_steps=embedding", "updates=10")
    x0, _ = run.roles.student(torch.randn(5, 2), torch.full((5,), 600.0, dtype=torch.float64), run.with_steps({}, 4, 5))
    x0.square().sum().backward()
    gradient = run.roles.parameters("student")[-1].grad
    assert gradient is not None
    assert gradient.any(1).tolist() == [k == 4 for k in COUNTS]


def test_every_step_count_is_evaluated_and_in_the_metrics(tmp_path: Path) -> None:
    lines: list[dict[str, float]] = []
    small = ["updates=60", "batch_size=16", "trajectory.stages=sample", "output.evaluate_every=60"]
    config = load_config(["mixture", "unify"], small)
    distill(
        MixtureTask(width=16, samples=100), config, tmp_path,
        callbacks=[lambda _run, line: lines.append(line)], report=lambda _: None,
    )  # fmt: skip
    (evaluation,) = [line for line in lines if "eval/energy" in line]
    assert {"eval/energy/1_steps", "eval/energy/2_steps", "eval/energy/8_steps"} <= set(evaluation)
    assert "eval/energy/4_steps" not in evaluation  # trajectory.steps: without a name
    gaps = {name for line in lines for name in line if name.startswith("gap_")}
    assert gaps == {f"gap_{k}_{i}" for k in COUNTS for i in range(k)}


@pytest.mark.parametrize("tell", ["timestep", "embedding"])
def test_a_unified_run_resumes_bit_for_bit(tell: str, tmp_path: Path) -> None:
    whole = go(tmp_path / "whole", f"trajectory.tell_steps={tell}")
    go(tmp_path / "cut", f"trajectory.tell_steps={tell}", "updates=6")
    cut = go(tmp_path / "cut", f"trajectory.tell_steps={tell}", resume=True)
    for role in ROLES:
        a, b = whole.roles.state(role), cut.roles.state(role)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_unified_student_goes_on_from_one_of_a_single_step_count(tmp_path: Path) -> None:
    first = go(tmp_path / "first", "trajectory.unify=null", "updates=6")
    start = f"start_from={tmp_path / 'first' / 'checkpoint.pt'}"
    with pytest.raises(TDMError, match=r"these critic weights .*; critic.start=teacher begins a new critic"):
        go(tmp_path / "second", start)
    still = ["updates=1", "student.lr=1e-30", "output.checkpoint_every=1", "output.evaluate_every=1"]
    second = go(tmp_path / "second", start, "critic.start=teacher", *still)
    weights = second.roles.state("student")
    assert all(torch.equal(weights[name], value) for name, value in first.roles.state("student").items())
    assert list(second.trajectories) == [1, 2, 4, 8]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_time_embedding_of_every_family_can_be_told(
    family: str, bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    """Once learned, the vector of a step count changes what the network says, and only for roles that are told."""
    task = task_of(family, bases(family), prompts)
    fast = ["updates=1", "batch_size=2", "precision=fp32", "output.preview_every=0", "output.checkpoint_every=0"]
    config = load_config("unify", [*fast, "trajectory.tell_steps=embedding"])
    run = distill(task, config, tmp_path / "run", report=lambda _: None)
    with torch.no_grad():
        run.roles.parameters("student")[-1].normal_(generator=torch.Generator().manual_seed(0))
    assert next(reversed(run.roles.state("student"))) == STEPS
    x, t, cond = torch.randn(2, *task.latent_shape), torch.tensor([400.0, 700.0]).double(), task.encode(PROMPTS[:2])
    for role, informed in (("student", True), ("teacher", False)):
        one, two = (getattr(run.roles, role)(x, t, run.with_steps(cond, k, 2))[0] for k in (1, 8))
        assert torch.equal(one, two) != informed
    finished = read_run(tmp_path / "run")
    assert finished is not None
    with pytest.raises(TDMError, match="told its step count by an embedding"):
        export_student(finished, tmp_path / "student.safetensors")


@pytest.mark.parametrize("family", ["sd15", "cogvideox", "pixart", "sd3", "wan"])
def test_every_step_count_is_sampled_as_it_was_trained(
    family: str, bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    """A stock pipeline samples it by its timesteps alone, for epsilon, v and flow."""
    task = task_of(family, bases(family), prompts)
    fast = ["updates=4", "batch_size=2", "precision=fp32", "student.lr=0.02", "ema.decay=0", "output.preview_every=0"]
    run = distill(task, load_config("unify", fast), tmp_path / "run", report=lambda _: None)
    file = export_student(read_run(tmp_path / "run"), tmp_path / "student.safetensors")  # type: ignore[arg-type]
    recipe = read_student(file).recipe
    assert recipe is not None
    assert list(recipe.trained_timesteps) == list(COUNTS)
    assert recipe.default_steps == 4
    pipe = TDMPipeline.from_pretrained(file)
    pipe.set_progress_bar_config(disable=True)
    options = {} if family != "cogvideox" else {"max_sequence_length": 16}  # the tiny one has room for no more
    noise = torch.randn(3, *task.latent_shape, generator=torch.Generator().manual_seed(0))
    for k in COUNTS:
        expected = task.family.pack(run.student(noise, task.encode(PROMPTS), steps=k))
        generator = torch.Generator().manual_seed(0)
        sampled = pipe(
            prompt=list(PROMPTS), num_inference_steps=k, generator=generator, output_type="latent", **options
        )[0]
        assert float((sampled - expected).norm() / expected.norm()) < 1e-4
