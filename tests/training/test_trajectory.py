"""The trajectory: grids, bands, roll-out and the marginals of re-noising."""

import pytest
import torch
from tdm.errors import TDMError
from tdm.pipelines.schedule import NoiseSchedule, mixed_noise, uniform_grid
from tdm.training.config import TrajectoryConfig
from tdm.training.trajectory import Trajectory, sample

FLOW, VP = NoiseSchedule.flow(), NoiseSchedule.vp()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def curved(x, timesteps, cond):
    """A predictor that depends on everything it is given; x0 and eps are consistent with nothing, which is enough."""
    t = timesteps.to(x).view(-1, 1) / 1000
    return torch.tanh(x) * (1 - t) + cond["c"], x * t - 0.1 * cond["c"]


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
def test_rolled_states_lie_on_the_sampled_trajectory(schedule):
    trajectory = Trajectory(TrajectoryConfig(), schedule)
    noise = torch.randn(8, 2, generator=seeded())
    cond = {"c": torch.randn(8, 1, generator=seeded(1))}
    stages = torch.tensor([3, 3, 2, 2, 1, 1, 0, 0])
    x = trajectory.roll(curved, noise, stages, cond)
    for i in range(4):  # the rest of the way by hand, from every stage's start
        todo = stages <= i
        here = torch.full((int(todo.sum()),), i)
        x0, eps = curved(x[todo], trajectory.timesteps[here], {"c": cond["c"][todo]})
        x[todo] = trajectory.step(x0, eps, here)
    whole = sample(curved, schedule, trajectory.timesteps.tolist(), noise, cond)
    torch.testing.assert_close(x, whole)


def test_roll_moves_each_sample_only_as_far_as_needed():
    trajectory = Trajectory(TrajectoryConfig(), FLOW)
    counted = []

    def predict(x, timesteps, cond):
        counted.append((len(x), timesteps.tolist()))
        return curved(x, timesteps, cond)

    noise, cond = torch.randn(4, 2, generator=seeded()), {"c": torch.zeros(4, 1)}
    x = trajectory.roll(predict, noise, torch.tensor([3, 1, 0, 0]), cond)
    assert counted == [(2, [1000, 1000]), (1, [750]), (1, [500])]
    assert torch.equal(x[2:], noise[2:])


def test_stages_are_even_over_the_batch_latest_first():
    trajectory, g = Trajectory(TrajectoryConfig(stages="sample"), FLOW), seeded()
    assert trajectory.draw_stages(8, g).tolist() == [3, 3, 2, 2, 1, 1, 0, 0]
    extra = torch.stack([trajectory.draw_stages(6, g).bincount(minlength=4) for _ in range(400)]).double()
    assert extra.min() == 1
    assert extra.max() == 2
    assert (extra.mean(0) - 1.5).abs().max() < 0.1  # which stages get the remainder is drawn
    one = Trajectory(TrajectoryConfig(stages="update"), FLOW)
    draws = torch.stack([one.draw_stages(5, g) for _ in range(100)])
    assert (draws == draws[:, :1]).all()
    assert draws[:, 0].unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("schedule", "shift", "bands", "expected"),
    [
        (FLOW, 1.0, "separate", [(0.77, 0.98), (0.52, 0.75), (0.27, 0.5), (0.02, 0.25)]),
        (FLOW, 3.0, "separate", [(0.77, 0.98), (0.52, 0.75), (0.27, 0.5), (0.02, 0.25)]),
        (FLOW, 1.0, "overlap", [(0.77, 0.98), (0.52, 0.98), (0.27, 0.98), (0.02, 0.98)]),
        (VP, 1.0, "separate", [(0.769, 0.98), (0.519, 0.749), (0.269, 0.499), (0.02, 0.249)]),
    ],
)
def test_tau_fills_its_band_in_unshifted_time(schedule, shift, bands, expected):
    trajectory = Trajectory(TrajectoryConfig(shift=shift, bands=bands), schedule)
    torch.testing.assert_close(trajectory.bands, torch.tensor(expected, dtype=torch.float64))
    for i, (low, high) in enumerate(expected):
        tau = trajectory.draw_tau(torch.full((4000,), i), seeded())
        time = tau / 1000 / (shift + (1 - shift) * tau / 1000)
        assert low - 1e-3 <= time.min() < low + 0.01
        assert high - 0.01 < time.max() <= high + 1e-3
        assert abs(float(time.mean()) - (low + high) / 2) < 0.02
        if schedule.kind == "vp":
            assert torch.equal(tau, tau.round())


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
def test_renoised_state_is_the_student_prediction_with_mixed_noise(schedule):
    """``x_tau = alpha x0 + sigma n``, ``n = (r sigma_m eps + b xi) / sigma``, and n has variance 1 if eps has."""
    trajectory = Trajectory(TrajectoryConfig(stages="sample"), schedule)
    g = seeded()
    stages = trajectory.draw_stages(8, g)
    x0, eps, xi = (torch.randn(8, 3, generator=g, dtype=torch.float64) for _ in range(3))
    noised = trajectory.renoise(trajectory.step(x0, eps, stages), stages, trajectory.draw_tau(stages, g), xi)
    a, s, b = (v[:, None] for v in (noised.alpha, noised.sigma, noised.b))
    r_sigma = a / trajectory.alphas[stages + 1, None] * trajectory.sigmas[stages + 1, None]
    torch.testing.assert_close(noised.x_tau, a * x0 + s * (r_sigma * eps + b * xi) / s)
    torch.testing.assert_close(r_sigma**2 + b**2, s**2)
    assert (b > 0).all()


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
def test_renoised_true_states_have_the_true_marginal(schedule):
    """States drawn from the forward process at m and diffused to tau are distributed as the forward process at tau."""
    n, std = 200_000, 0.5
    trajectory, g = Trajectory(TrajectoryConfig(), schedule), seeded()
    for i in range(4):
        stages = torch.full((n,), i)
        x0, eps, xi = (torch.randn(n, 1, generator=g) for _ in range(3))
        tau = trajectory.draw_tau(stages[:1], g).expand(n)
        noised = trajectory.renoise(trajectory.step(std * x0, eps, stages), stages, tau, xi)
        expected = (noised.alpha[0] * std) ** 2 + noised.sigma[0] ** 2
        assert noised.x_tau.var().item() == pytest.approx(float(expected), rel=0.02)


def test_trained_grid_is_the_sampled_grid():
    trajectory = Trajectory(TrajectoryConfig(timesteps=(899, 674, 449, 224)), VP)
    assert trajectory.timesteps.tolist() == [899, 674, 449, 224]
    assert (trajectory.alphas[-1].item(), trajectory.sigmas[-1].item()) == (1.0, 0.0)
    assert Trajectory(TrajectoryConfig(shift=3.0), FLOW).timesteps.tolist() == uniform_grid(4, FLOW, 3.0)


@pytest.mark.parametrize(
    ("config", "schedule", "message"),
    [
        (TrajectoryConfig(shift=3.0), VP, "only flow models have a time shift"),
        (TrajectoryConfig(margin=0.3), FLOW, "no room.*lower trajectory.margin"),
        (TrajectoryConfig(timesteps=(1200, 674, 449, 224)), VP, "timesteps must lie in"),
    ],
)
def test_impossible_trajectories_are_refused(config, schedule, message):
    with pytest.raises(TDMError, match=message):
        Trajectory(config, schedule)


@pytest.mark.parametrize("schedule", [FLOW, VP], ids=["flow", "vp"])
def test_below_reaches_from_the_lowest_tau_to_where_a_stage_starts(schedule):
    trajectory = Trajectory(TrajectoryConfig(renoise="clean", bands="below"), schedule)
    stages = torch.arange(4).repeat_interleave(4000)
    tau = trajectory.draw_tau(stages, seeded()) / schedule.num_train_timesteps
    for i, start in enumerate((0.98, 0.75, 0.5, 0.25)):  # tau_max, and the grid
        here = tau[stages == i]
        assert float(here.min()) == pytest.approx(0.02, abs=2e-3)
        assert float(here.max()) == pytest.approx(start, abs=2e-3)


def test_a_clean_prediction_is_diffused_as_one_whatever_the_configuration_says():
    trajectory, stages = Trajectory(TrajectoryConfig(), FLOW), torch.tensor([1, 0])
    x0, xi = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    tau = torch.tensor([100.0, 900.0], dtype=torch.float64)  # the first is far below the state that its stage ends in
    noised = trajectory.renoise(x0, stages, tau, xi, clean=True)
    torch.testing.assert_close(noised.x_tau, (1 - tau / 1000)[:, None] * x0 + (tau / 1000)[:, None] * xi)
    with pytest.raises(TDMError, match="re-noising only goes up"):
        trajectory.renoise(x0, stages, tau, xi)


def test_a_logit_normal_tau_stays_in_its_band_and_has_that_law():
    config = TrajectoryConfig(renoise="clean", bands="full", tau_law="logit_normal")
    trajectory, stages = Trajectory(config, FLOW), torch.zeros(40_000, dtype=torch.long)
    time = trajectory.draw_tau(stages, seeded()) / 1000
    assert 0.02 <= float(time.min()) < 0.05
    assert 0.95 < float(time.max()) <= 0.98
    normal = torch.logit(time)  # cut at +-3.9 deviations: as good as whole
    assert float(normal.mean()) == pytest.approx(0, abs=0.02)
    assert float(normal.std()) == pytest.approx(1, abs=0.02)
    banded = Trajectory(TrajectoryConfig(tau_law="logit_normal"), FLOW)
    for i, (low, high) in enumerate(banded.bands.tolist()):
        tau = banded.draw_tau(torch.full((1000,), i), seeded()) / 1000
        assert low <= float(tau.min())
        assert float(tau.max()) <= high


def test_targets_that_would_be_infinite_are_refused():
    rounds_shut = Trajectory(TrajectoryConfig(margin=1e-4), VP)
    with pytest.raises(TDMError, match=r"trajectory.margin is 0.0001.*set it to at least 0.001"):
        rounds_shut.require_finite_targets()
    zero_snr = NoiseSchedule.vp(1000, 0.00085, 0.012, "scaled_linear", None, True, 1.0)
    with pytest.raises(TDMError, match=r"trajectory.tau_max is 0.9996.*pure noise"):
        Trajectory(TrajectoryConfig(tau_max=0.9996), zero_snr).require_finite_targets()
    for schedule in (FLOW, VP, zero_snr):
        Trajectory(TrajectoryConfig(margin=0.001, tau_max=0.998), schedule).require_finite_targets()


@pytest.mark.parametrize("eta", [0.3, 0.8])
def test_eta_mixes_the_own_noise_with_a_fresh_one_of_the_same_variance(eta):
    noise, fresh = torch.randn(2, 100_000, generator=seeded()).double()
    mixed = mixed_noise(noise, fresh, eta)
    assert float(mixed.var()) == pytest.approx(1, abs=0.02)
    assert float((mixed * fresh).mean()) == pytest.approx(eta, abs=0.02)
    assert float((mixed * noise).mean()) == pytest.approx((1 - eta**2) ** 0.5, abs=0.02)
    assert torch.equal(mixed_noise(noise, fresh, 1.0), fresh)
