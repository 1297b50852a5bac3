"""The teacher's guidance scale belongs to a noise level, whichever stage is trained there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tdm.errors import TDMError
from tdm.pipelines.schedule import NoiseSchedule
from tdm.training.batch import Batch, draw_batch
from tdm.training.loop import distill
from tdm.training.objectives.guidance import guidance_at
from tdm.training.settings import load_config
from tdm.training.tasks.mixture import MixtureTask
from tdm.training.trajectory import build_trajectories

FLOW, VP = NoiseSchedule.flow(), NoiseSchedule.vp()
BY_STAGE = ["objective.guidance_scale=3", "objective.stage_guidance=[5,4,3,2]"]


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
def test_a_tau_has_the_scale_of_the_stage_that_it_lies_in(schedule: NoiseSchedule) -> None:
    config = load_config(None, BY_STAGE)
    trajectory = build_trajectories(config.trajectory, schedule)[4]
    top, tau = schedule.last_timestep, trajectory.timesteps
    just_below, just_above = tau - 1, (tau + 1).clamp_max(top)
    assert guidance_at(config.objective, trajectory, tau).tolist() == [5, 4, 3, 2]
    assert guidance_at(config.objective, trajectory, just_below).tolist() == [5, 4, 3, 2]
    assert guidance_at(config.objective, trajectory, just_above).tolist() == [5, 5, 4, 3]
    plain = load_config(None, ["objective.guidance_scale=3"])
    assert guidance_at(plain.objective, trajectory, tau) == 3


@pytest.mark.parametrize(
    "settings", [["trajectory.renoise=clean", "trajectory.bands=full"], ["trajectory.bands=overlap"], []]
)
def test_a_stage_gives_no_scale_to_a_tau_of_another(settings: list[str]) -> None:
    config = load_config(None, [*BY_STAGE, *settings, "trajectory.stages=sample"])
    trajectory = build_trajectories(config.trajectory, FLOW)[4]
    batch = draw_batch(trajectory, {}, {}, (4000, 1), torch.Generator().manual_seed(0), student=True)
    scale = guidance_at(config.objective, trajectory, batch.critic.tau)
    expected = torch.tensor([2.0, 3.0, 4.0, 5.0])[(batch.critic.tau / 250.0001).long()]
    assert torch.equal(scale, expected.double())


def test_every_step_count_of_a_unified_student_has_the_scale_of_the_noise_level() -> None:
    unify = ["trajectory.unify=[1,2,4,8]", "trajectory.spread=0.01", "trajectory.shift=2"]
    config = load_config(None, [*BY_STAGE, *unify])
    trajectories = build_trajectories(config.trajectory, FLOW)
    ends = trajectories[4].timesteps[1:].tolist()  # 857, 667, 400
    tau = torch.tensor([990.0, ends[0] - 1, ends[1] - 1, ends[2] - 1], dtype=torch.float64)
    for trajectory in trajectories.values():
        assert guidance_at(config.objective, trajectory, tau).tolist() == [5, 4, 3, 2]


def test_a_range_gives_each_sample_a_scale_of_its_own() -> None:
    config = load_config(None, ["objective.guidance_scale=3", "objective.guidance_range=[2, 6]"])
    trajectory = build_trajectories(config.trajectory, FLOW)[4]

    def drawn(range_of: tuple[float, float] | None) -> Batch:
        generator = torch.Generator().manual_seed(0)
        return draw_batch(trajectory, {}, {}, (4000, 1), generator, student=True, guidance_range=range_of)

    batch, plain = drawn(config.objective.guidance_range), drawn(None)
    assert batch.scale is not None
    assert plain.scale is None
    assert torch.equal(batch.noise, plain.noise)  # what else is drawn stays as it is
    assert 2 <= float(batch.scale.min()) < 2.01
    assert 5.99 < float(batch.scale.max()) <= 6
    assert float(batch.scale.mean()) == pytest.approx(4, abs=0.05)
    portion = batch.part(1, 2)
    assert portion.scale is not None
    assert torch.equal(portion.scale, batch.scale[1::2])
    assert torch.equal(guidance_at(config.objective, trajectory, batch.critic.tau, batch.scale), batch.scale)
    assert config.objective.teacher_guidance == "2 to 6"
    for wrong in ("[6, 2]", "[0.5, 2]"):
        with pytest.raises(TDMError, match="guidance_range needs two rising numbers"):
            load_config(None, ["objective.guidance_scale=3", f"objective.guidance_range={wrong}"])


@pytest.mark.parametrize("preset", [None, "decoupled", "sid", "lcm", "regression"])
def test_every_objective_trains_with_a_drawn_scale(preset: str | None, tmp_path: Path) -> None:
    small = ["updates=3", "batch_size=8", "student.rank=2", "critic.rank=2", "output.evaluate_every=0"]
    drawn = ["objective.guidance_scale=3", "objective.guidance_range=[2,4]", "output.preview_every=0"]
    config = load_config(["mixture", *([preset] if preset else [])], [*small, *drawn, "objective.ode_steps=4"])
    run = distill(MixtureTask(width=8, samples=50), config, tmp_path, report=lambda _: None)
    assert any(bool(weight.any()) for name, weight in run.roles.state("student").items() if "lora_B" in name)
