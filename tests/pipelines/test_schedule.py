"""The one mathematics: tables against diffusers, conversions against themselves, grids against known numbers."""

import math

import diffusers
import pytest
import torch
from tdm.errors import TDMError
from tdm.pipelines.schedule import (
    PREDICTION_TYPES,
    NoiseSchedule,
    ddim_step,
    expand,
    grid_pairs,
    predict_output,
    predict_x0_eps,
    renoise_coefficients,
    respace_grid,
    second_order_weights,
    shift_sigma,
    uniform_grid,
    unshift_sigma,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VP = NoiseSchedule.vp(**SD)
COG = NoiseSchedule.vp(**SD, rescale_betas_zero_snr=True, snr_shift_scale=3.0)
FLOW = NoiseSchedule.flow()


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    "options", [SD, {}, {**SD, "rescale_betas_zero_snr": True}, {"num_train_timesteps": 500, "beta_end": 0.04}]
)
def test_table_is_the_one_of_ddim(options):
    theirs = diffusers.DDIMScheduler(**options).alphas_cumprod.double()
    ours = NoiseSchedule.vp(**options).alphas_cumprod
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-7)  # theirs is a float32 product


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_table_is_the_one_of_cogvideox(scale, zero_snr):
    options = {"snr_shift_scale": scale, "rescale_betas_zero_snr": zero_snr}
    theirs = diffusers.CogVideoXDDIMScheduler(**SD, **options).alphas_cumprod
    torch.testing.assert_close(NoiseSchedule.vp(**SD, **options).alphas_cumprod, theirs, rtol=1e-10, atol=0)


def test_trained_betas_replace_the_formula():
    betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    assert torch.equal(NoiseSchedule.vp(trained_betas=betas.tolist()).alphas_cumprod, NoiseSchedule.vp().alphas_cumprod)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "cosine"}, "beta_schedule"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"beta_start": 0.0}, "beta"),
        ({"beta_end": math.nan}, "beta"),
        ({"snr_shift_scale": 0.0}, "snr_shift_scale"),
    ],
)
def test_impossible_tables_are_refused(options, message):
    with pytest.raises(TDMError, match=message):
        NoiseSchedule.vp(**options)


# ---------------------------------------------------------------------- levels


@pytest.mark.parametrize("schedule", [VP, COG], ids=["sd", "cogvideox"])
def test_vp_levels_are_exact_at_integers_and_monotone_between(schedule):
    t = torch.arange(1000, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    assert torch.equal(alpha, schedule.alphas_cumprod.sqrt())
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)
    between, _ = schedule.alpha_sigma(t[:-1] + 0.5)
    assert bool(((alpha[1:] < between) & (between < alpha[:-1])).all())


def test_zero_terminal_snr_ends_in_pure_noise():
    alpha, sigma = COG.alpha_sigma(torch.tensor([999]))
    assert (alpha.item(), sigma.item()) == (0.0, 1.0)


def test_flow_levels():
    alpha, sigma = FLOW.alpha_sigma(tensor(1000, 250, 0))
    assert alpha.tolist() == [0, 0.75, 1]
    assert sigma.tolist() == [1, 0.25, 0]


@pytest.mark.parametrize("schedule", [VP, COG, FLOW], ids=["sd", "cogvideox", "flow"])
@pytest.mark.parametrize("bad", [-1.0, 1000.5, math.nan, math.inf])
def test_levels_outside_the_schedule_are_refused(schedule, bad):
    with pytest.raises(TDMError, match="timesteps must lie in"):
        schedule.alpha_sigma(tensor(500, bad))


def test_a_vp_table_has_no_entry_1000():
    with pytest.raises(TDMError, match="999"):
        VP.alpha_sigma(torch.tensor([1000]))


@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
def test_timesteps_come_back_from_noise_levels(schedule):
    t = tensor(999, 749, 499.25, 1, 0)
    alpha, sigma = schedule.alpha_sigma(t)
    levels = sigma if schedule.kind == "flow" else sigma / alpha
    torch.testing.assert_close(schedule.timestep_from_sigma(levels), t, rtol=0, atol=1e-6)


def test_infinite_noise_level_is_the_end_of_a_zero_snr_table():
    assert COG.timestep_from_sigma(tensor(math.inf)).tolist() == [999]


@pytest.mark.parametrize(("schedule", "bad"), [(VP, 100.0), (VP, 0.001), (VP, math.nan), (FLOW, 1.01), (FLOW, -0.1)])
def test_noise_levels_outside_the_schedule_are_refused(schedule, bad):
    with pytest.raises(TDMError, match="noise levels"):
        schedule.timestep_from_sigma(tensor(bad))


# ---------------------------------------------------------------------- predictions


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predictions_convert_there_and_back(prediction_type):
    schedule = FLOW if prediction_type == "flow_prediction" else VP
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    alpha, sigma = (expand(c, x0) for c in schedule.alpha_sigma(tensor(900, 500, 100)))
    x = ddim_step(x0, eps, alpha, sigma)
    out = predict_output(prediction_type, x0, eps, alpha, sigma)
    x0_back, eps_back = predict_x0_eps(prediction_type, out, x, alpha, sigma)
    torch.testing.assert_close(x0_back, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(eps_back, eps, rtol=0, atol=1e-12)


def test_unknown_prediction_type_is_refused():
    x = torch.zeros(1)
    with pytest.raises(TDMError, match="prediction_type"):
        predict_x0_eps("noise", x, x, 1.0, 0.0)
    with pytest.raises(TDMError, match="prediction_type"):
        predict_output("noise", x, x, 1.0, 0.0)


def test_expand_follows_dtype_and_rank():
    like = torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16)
    c = expand(tensor(0.5, 0.25), like)
    assert c.shape == (2, 1, 1, 1)
    assert c.dtype == torch.bfloat16


# ---------------------------------------------------------------------- re-noising


@pytest.mark.parametrize("schedule", [VP, COG, FLOW], ids=["sd", "cogvideox", "flow"])
def test_renoising_lands_on_the_forward_process(schedule):
    """x_m = alpha_m x0 + sigma_m eps, re-noised, has mean alpha_tau x0 and standard deviation sigma_tau."""
    alpha_m, sigma_m = schedule.alpha_sigma(tensor(200, 500, 749))
    alpha_tau, sigma_tau = schedule.alpha_sigma(tensor(201, 800, 999))
    r, b = renoise_coefficients(alpha_m, sigma_m, alpha_tau, sigma_tau)
    torch.testing.assert_close(r * alpha_m, alpha_tau, rtol=0, atol=1e-12)
    torch.testing.assert_close((r * sigma_m) ** 2 + b**2, sigma_tau**2, rtol=0, atol=1e-12)


def test_renoising_in_two_hops_is_one_hop():
    pairs = [VP.alpha_sigma(tensor(t)) for t in (100, 400, 700)]
    r1, b1 = renoise_coefficients(*pairs[0], *pairs[1])
    r2, b2 = renoise_coefficients(*pairs[1], *pairs[2])
    r, b = renoise_coefficients(*pairs[0], *pairs[2])
    torch.testing.assert_close(r1 * r2, r)
    torch.testing.assert_close((r2 * b1) ** 2 + b2**2, b**2)


def test_renoising_from_the_clean_end_and_from_itself():
    pair = VP.alpha_sigma(tensor(500))
    assert renoise_coefficients(tensor(1), tensor(0), *pair) == pair
    r, b = renoise_coefficients(*pair, *pair)
    assert (r.item(), b.item()) == (1, 0)


def test_renoising_never_goes_down():
    low, high, noise = (COG.alpha_sigma(tensor(t)) for t in (100, 101, 999))
    with pytest.raises(TDMError, match="only goes up"):
        renoise_coefficients(*high, *low)
    with pytest.raises(TDMError, match="pure noise"):
        renoise_coefficients(*noise, *high)


# ---------------------------------------------------------------------- grids


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0, 6.0])
def test_shift_and_its_inverse(shift):
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(unshift_sigma(shift_sigma(sigma, shift), shift), sigma)
    assert shift_sigma(0.5, shift) == pytest.approx(shift / (1 + shift))


def test_uniform_grids():
    assert uniform_grid(4, VP) == [999, 749, 499, 249]
    assert uniform_grid(4, VP, first=899) == [899, 674, 449, 224]
    assert uniform_grid(4, VP, first=799) == [799, 599, 399, 199]
    assert uniform_grid(3, VP) == [999, 666, 332]  # DDIM's rounding
    assert uniform_grid(4, FLOW) == [1000, 750, 500, 250]
    assert uniform_grid(2, FLOW, shift=3.0) == [1000, 750]
    assert uniform_grid(1, VP) == [999]


@pytest.mark.parametrize("k", [3, 7, 10, 25])
def test_uniform_vp_grid_is_the_trailing_one_of_ddim(k):
    ddim = diffusers.DDIMScheduler(timestep_spacing="trailing")
    ddim.set_timesteps(k)
    assert uniform_grid(k, VP) == ddim.timesteps.tolist()


def test_respaced_grids_keep_the_first_timestep_and_the_curve():
    assert respace_grid([999, 749, 499, 249], 2, VP) == [999, 499]
    assert respace_grid([999, 749, 499, 249], 8, VP) == [999, 874, 749, 624, 499, 374, 249, 124]
    assert respace_grid([899, 674, 449, 224], 1, VP) == [899]
    shifted = uniform_grid(4, FLOW, shift=3.0)
    assert respace_grid(shifted, 4, FLOW) == shifted
    assert respace_grid(shifted, 2, FLOW) == shifted[::2]
    assert len(respace_grid(shifted, 7, FLOW)) == 7


def test_grid_pairs_end_clean():
    alphas, sigmas = grid_pairs(VP, [999, 499])
    assert alphas.dtype == sigmas.dtype == torch.float64
    assert alphas.tolist() == [*VP.alphas_cumprod[[999, 499]].sqrt().tolist(), 1]
    assert sigmas[-1] == 0


@pytest.mark.parametrize(
    ("schedule", "grid", "message"),
    [
        (VP, [], "at least one"),
        (VP, [499, 999], "strictly decrease"),
        (VP, [999, 499, 499], "strictly decrease"),
        (VP, [1000, 499], "must lie"),
        (VP, [999, -1], "must lie"),
        (VP, [999, math.nan], "must lie"),
        (FLOW, [1000.1, 500], "must lie"),
        (FLOW, [1000, 0], "must lie"),
        (FLOW, [math.inf], "must lie"),
    ],
)
def test_invalid_grids_are_refused(schedule, grid, message):
    with pytest.raises(TDMError, match=message):
        grid_pairs(schedule, grid)


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(TDMError, match="strictly decrease"):
        uniform_grid(2000, VP)


# ---------------------------------------------------------------------- second order


def test_second_order_weights_are_those_of_dpm_solver():
    """The 2M update (2211.01095, eq. 11-12) minus the first-order one, term by term."""
    alphas, sigmas = grid_pairs(VP, [899, 674, 449, 224])
    lambdas = [math.log(a / s) for a, s in zip(alphas.tolist()[:-1], sigmas.tolist()[:-1], strict=True)]
    expected = [0.0]
    for i in (1, 2):
        h, h_before = lambdas[i + 1] - lambdas[i], lambdas[i] - lambdas[i - 1]
        expected.append(-alphas[i + 1].item() * math.expm1(-h) / (2 * h_before / h))
    assert second_order_weights(alphas, sigmas) == pytest.approx([*expected, 0.0], rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 20])
def test_second_order_weights_are_finite_from_pure_noise(k):
    weights = second_order_weights(*grid_pairs(FLOW, uniform_grid(k, FLOW)))
    assert len(weights) == k
    assert weights[0] == weights[-1] == 0
    assert all(math.isfinite(w) for w in weights)
