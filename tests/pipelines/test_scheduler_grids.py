"""The timesteps that `TDMScheduler` takes, and the settings it follows, keeps and refuses."""

import math
import warnings

import diffusers
import numpy as np
import pytest
import torch
from tdm import TDMScheduler
from tdm.errors import TDMError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GRIDS = ([999, 749, 499, 249], [899, 674, 449, 224], [799, 599, 399, 199], [999, 856, 665, 399])
SHAPE = (2, 4, 8, 8)


def noise(seed, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---------------------------------------------------------------------- grids


def timesteps_of(scheduler, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(*args, **kwargs)
    return scheduler.timesteps.tolist()


def test_each_trained_step_count_has_its_grid():
    scheduler = TDMScheduler(trained_timesteps={4: GRIDS[3], 2: [999, 500], 1: [900]})
    for k, grid in {4: GRIDS[3], 2: [999, 500], 1: [900]}.items():
        assert timesteps_of(scheduler, k) == grid
        assert scheduler.timesteps.dtype == torch.int64
        assert len(scheduler.sigmas) == k + 1
        assert scheduler.sigmas[-1] == 0


def test_an_untrained_step_count_warns_once_and_names_the_trained_ones():
    scheduler = TDMScheduler(trained_timesteps={4: GRIDS[0], 2: [999, 499]})
    with pytest.warns(UserWarning, match="trained for 2, 4 steps") as record:
        scheduler.set_timesteps(8)
    assert len(record) == 1
    timesteps_of(scheduler, 8)  # would raise on a second warning
    assert scheduler.timesteps.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]


@pytest.mark.parametrize("order", [1, 2])
def test_a_scheduler_that_ran_another_grid_runs_the_next_like_a_fresh_one(order):
    used = TDMScheduler(solver_order=order)
    for grid in ([999, 749, 500, 250], [999, 749, 500, 250], [900, 400, 100, 50], [600, 300], [999, 749, 500, 250]):
        fresh = TDMScheduler(solver_order=order)
        samples = {}
        for scheduler in (used, fresh):
            scheduler.set_timesteps(timesteps=grid)
            x = noise(0)
            for i, t in enumerate(scheduler.timesteps):
                x = scheduler.step(noise(i + 1), t, x).prev_sample
            samples[scheduler] = x
        assert torch.equal(samples[used], samples[fresh])
        assert torch.equal(used.sigmas, fresh.sigmas)


def test_a_pipelines_default_sigmas_mean_the_step_count():
    trained = [999.8, 947.2, 856.9, 666.4]
    grids = {4: trained, 3: trained[:3]}
    scheduler = TDMScheduler(prediction_type="flow_prediction", flow_shift=6.0, trained_timesteps=grids)
    for k, grid in grids.items():  # Z-Image's have float32 rounding, which shows in thirds
        for default in (np.linspace(1.0, 1 / k, k), torch.linspace(1.0, 1 / k, k).tolist()):
            assert timesteps_of(scheduler, sigmas=default, mu=0.7) == pytest.approx(grid)
    with pytest.warns(UserWarning, match="trained for 3, 4 steps"):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 5, 5))


@pytest.mark.parametrize(("k", "first"), [(2, 900), (3, 900), (6, 800), (20, 800)])
def test_an_untrained_step_count_takes_the_nearest_grid(k, first):
    scheduler = TDMScheduler(trained_timesteps={1: [900], 8: [800 - 100 * i for i in range(8)]})
    with pytest.warns(UserWarning, match="trained for 1, 8 steps"):
        scheduler.set_timesteps(k)
    assert scheduler.timesteps[0] == first


def test_explicit_sigmas_and_timesteps_win_over_the_trained_grid():
    scheduler = TDMScheduler(prediction_type="flow_prediction", flow_shift=3.0, trained_timesteps=GRIDS[0])
    assert timesteps_of(scheduler, timesteps=[900, 600, 300, 100]) == [900, 600, 300, 100]
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas = [0.9, 0.6, 0.3, 0.1]
    stock.set_timesteps(sigmas=sigmas)
    assert timesteps_of(scheduler, sigmas=sigmas) == pytest.approx(stock.timesteps.tolist())
    torch.testing.assert_close(scheduler.sigmas, stock.sigmas)


def test_vp_sigmas_are_those_of_euler():
    sigmas = [14.6, 3.0, 1.0, 0.3, 0.0]
    euler, ours = diffusers.EulerDiscreteScheduler(**SD), TDMScheduler(**SD)
    euler.set_timesteps(sigmas=sigmas)
    ours.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(ours.timesteps, euler.timesteps, rtol=0, atol=0.1)  # it interpolates log sigma
    torch.testing.assert_close(ours.sigmas, euler.sigmas, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shift_type", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.02])
@pytest.mark.parametrize("k", [4, 9])
def test_dynamic_shift_and_terminal_are_those_of_flow_match_euler(k, terminal, shift_type):
    options = {"use_dynamic_shifting": True, "shift_terminal": terminal, "time_shift_type": shift_type}
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    stock.set_timesteps(sigmas=np.linspace(1.0, 1 / k, k), mu=0.8)
    ours = TDMScheduler.from_config(stock.config)
    assert timesteps_of(ours, k, mu=0.8) == pytest.approx(stock.timesteps.tolist(), abs=1e-3)


@pytest.mark.parametrize("mu", [0.1 * i for i in range(-15, 16)])
def test_every_shift_begins_at_pure_noise_exactly(mu):
    scheduler = TDMScheduler(prediction_type="flow_prediction", use_dynamic_shifting=True)
    assert timesteps_of(scheduler, 4, mu=mu)[0] == 1000
    assert scheduler.sigmas[0] == 1


def test_one_step_survives_a_terminal_shift():
    scheduler = TDMScheduler(prediction_type="flow_prediction", shift_terminal=0.02)
    assert timesteps_of(scheduler, 1) == [1000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give num_inference_steps"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"num_inference_steps": -4}, "at least 1"),
        ({"num_inference_steps": 4.0}, "integer"),
        ({"num_inference_steps": True}, "integer"),
        ({"timesteps": [500], "sigmas": [0.5]}, "not both"),
        ({"timesteps": [500], "num_inference_steps": 2}, "contradicts"),
        ({"sigmas": [0.5], "num_inference_steps": 2}, "contradicts"),
        ({"timesteps": []}, "at least one"),
        ({"timesteps": [500, 600]}, "strictly decrease"),
        ({"timesteps": [500, 500]}, "strictly decrease"),
        ({"timesteps": [1001]}, "must lie in"),
        ({"timesteps": [500, 0]}, "must lie in"),
        ({"timesteps": [math.nan]}, "must lie in"),
        ({"sigmas": [math.nan]}, "noise levels"),
        ({"sigmas": [1.5]}, "noise levels"),
        ({"sigmas": [0.2, 0.5]}, "strictly decrease"),
        ({"sigmas": [0.0]}, "level above 0"),
    ],
    ids=str,
)
def test_wrong_grids_are_refused(arguments, message):
    with pytest.raises(TDMError, match=message):
        TDMScheduler(prediction_type="flow_prediction").set_timesteps(**arguments)


@pytest.mark.parametrize("mu", [None, math.nan])
def test_dynamic_shift_needs_mu_where_a_shift_applies(mu):
    options = {"prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    with pytest.raises(TDMError, match="mu"):
        TDMScheduler(**options).set_timesteps(4, mu=mu)
    with pytest.raises(TDMError, match="mu"):
        TDMScheduler(**options, time_shift_type="linear").set_timesteps(4, mu=mu and -1)
    TDMScheduler(**options, trained_timesteps=GRIDS[0]).set_timesteps(4, mu=mu)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "undefined at zero terminal SNR"),
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"prediction_type": "epsilon", "use_flow_sigmas": True}, "contradicts"),
        ({"prediction_type": "flow_prediction", "use_flow_sigmas": False}, "contradicts"),
        ({"prediction_type": "flow_prediction", "rescale_betas_zero_snr": True}, "vp models"),
        ({"flow_shift": 3.0}, "flow models"),
        ({"prediction_type": "flow_prediction", "snr_shift_scale": 3.0}, "vp models"),
        ({"prediction_type": "flow_prediction", "flow_shift": 0.0}, "flow_shift"),
        ({"prediction_type": "flow_prediction", "time_shift_type": "cubic"}, "time_shift_type"),
        ({"solver_order": 3}, "solver_order"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"trained_timesteps": [1000, 500]}, "must lie in"),
        ({"trained_timesteps": [500, 999]}, "strictly decrease"),
        ({"trained_timesteps": []}, "empty"),
        ({"trained_timesteps": {}}, "empty"),
        ({"trained_timesteps": {4: [999, 499]}}, "K = 4"),
    ],
    ids=str,
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(TDMError, match=message):
        TDMScheduler(**options)


# ---------------------------------------------------------------------- config


def settings(scheduler):
    return {k: v for k, v in scheduler.config.items() if not k.startswith("_")}


def test_save_and_load_is_bit_equal(tmp_path):
    grids = {4: [999.8, 947.2, 856.9, 666.4], 10: [1000 - 99.7 * i for i in range(10)], 1: [1000]}
    options = {"prediction_type": "flow_prediction", "flow_shift": 6.0, "solver_order": 2}
    scheduler = TDMScheduler(**options, trained_timesteps=grids)
    scheduler.save_pretrained(tmp_path)
    for other in (TDMScheduler.from_pretrained(tmp_path), TDMScheduler.from_config(scheduler.config)):
        assert settings(other) == settings(scheduler)
        assert other.trained_timesteps == grids
        x = []
        for each in (scheduler, other):
            each.set_timesteps(4)
            x.append([each.step(noise(i + 1), t, noise(0)).prev_sample for i, t in enumerate(each.timesteps)])
        assert all(torch.equal(a, b) for a, b in zip(*x, strict=True))


def test_from_config_takes_overrides():
    scheduler = TDMScheduler(trained_timesteps=GRIDS[0])
    assert TDMScheduler.from_config(scheduler.config, solver_order=2).config.solver_order == 2
    assert TDMScheduler.from_config(scheduler.config, trained_timesteps=None).trained_timesteps == {}
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert TDMScheduler.from_config(flow.config, flow_shift=6.0).config.flow_shift == 6.0
    assert TDMScheduler.from_config(flow.config, shift=6.0).config.flow_shift == 6.0
    clipped = diffusers.DDIMScheduler(**SD)
    assert TDMScheduler.from_config(clipped.config, clip_sample=False).config.beta_end == SD["beta_end"]
    for config in (scheduler.config, diffusers.EulerDiscreteScheduler().config):
        with pytest.raises(TDMError, match="unknown scheduler arguments: trained_timestep"):
            TDMScheduler.from_config(config, trained_timestep=GRIDS[0])


FLOW_UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
V = {"prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("stock", "expected"),
    [
        (diffusers.DDIMScheduler(**SD, clip_sample=False), SD | {"prediction_type": "epsilon"}),
        (diffusers.DDIMScheduler(**SD, **V, rescale_betas_zero_snr=True, clip_sample=False), {**SD, **V}),
        (diffusers.PNDMScheduler(**SD), SD),
        (
            diffusers.EulerDiscreteScheduler(**SD, **V, num_train_timesteps=1100),
            {**SD, **V, "num_train_timesteps": 1100},
        ),
        (diffusers.LCMScheduler(), SD),
        (diffusers.DPMSolverMultistepScheduler(), {"beta_schedule": "linear", "solver_order": 2}),
        (diffusers.DPMSolverMultistepScheduler(**FLOW_UNIPC), FLOW_UNIPC),
        (diffusers.UniPCMultistepScheduler(**FLOW_UNIPC), FLOW_UNIPC),
        (
            diffusers.CogVideoXDDIMScheduler(**V, rescale_betas_zero_snr=True),
            {**SD, **V, "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0},
        ),
        (diffusers.CogVideoXDPMScheduler(snr_shift_scale=1.0), {**SD, "snr_shift_scale": 1.0}),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 1},
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_shift=0.4, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
            ),
            {
                "use_dynamic_shifting": True,
                "base_shift": 0.4,
                "max_shift": 0.9,
                "max_image_seq_len": 8192,
                "shift_terminal": 0.02,
            },
        ),
        (diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0), {"flow_shift": 2.0, "use_flow_sigmas": True}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "",
)
def test_stock_schedulers_are_followed(stock, expected, tmp_path):
    """The config is live or saved, with and without trained timesteps."""
    stock.save_pretrained(tmp_path)
    for ours in (TDMScheduler.from_config(stock.config), TDMScheduler.from_pretrained(tmp_path)):
        assert expected.items() <= settings(ours).items()
        assert ours.trained_timesteps == {}
        if hasattr(stock, "alphas_cumprod") and not ours.config.use_flow_sigmas:
            theirs = stock.alphas_cumprod.double()
            torch.testing.assert_close(ours.schedule.alphas_cumprod, theirs, rtol=2e-5, atol=1e-7)
    student = TDMScheduler.from_config(stock.config, trained_timesteps=GRIDS[0], solver_order=1)
    assert student.trained_timesteps == {4: GRIDS[0]}
    assert student.config.solver_order == 1


def test_a_file_that_lacks_keys_gets_the_defaults_of_its_class():
    ours = TDMScheduler.from_config({"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"})
    assert ours.config.beta_schedule == "scaled_linear"
    assert ours.config.snr_shift_scale == 3.0


@pytest.mark.parametrize(
    "stock", [diffusers.DDPMScheduler(), diffusers.DDIMScheduler()], ids=lambda s: type(s).__name__
)
def test_the_clipping_of_a_training_scheduler_is_not_followed(stock):
    with pytest.warns(UserWarning, match="latents are not clipped"):
        ours = TDMScheduler.from_config(stock.config, trained_timesteps=[999, 500])
    ours.set_timesteps(2)
    x = torch.full((1, 1, 2, 2), 9.0)
    assert float(ours.step(torch.zeros_like(x), ours.timesteps[0], x).pred_original_sample.max()) > 9


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_fractions_of_timesteps_are_for_flow_models(prediction_type):
    with pytest.raises(TDMError, match="are whole numbers"):
        TDMScheduler(prediction_type=prediction_type, trained_timesteps=[999, 499.5])
    scheduler = TDMScheduler(prediction_type=prediction_type)
    with pytest.raises(TDMError, match="are whole numbers"):
        scheduler.set_timesteps(timesteps=[999, 499.5])
    flow = TDMScheduler(prediction_type="flow_prediction", trained_timesteps=[999, 499.5])
    assert flow.trained_timesteps == {2: [999.0, 499.5]}


@pytest.mark.parametrize(
    ("stock", "message"),
    [
        (diffusers.EDMEulerScheduler(), "neither beta_schedule nor shift"),
        (diffusers.SCMScheduler(), "neither beta_schedule nor shift"),
        (diffusers.DPMSolverMultistepScheduler(thresholding=True), "thresholding"),
        (diffusers.DPMSolverMultistepScheduler(solver_order=3), "solver_order"),
        (diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2"), "beta_schedule"),
        (diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "contradicts"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), "timestep_type"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_configs_that_cannot_be_followed_are_refused(stock, message):
    with pytest.raises(TDMError, match=message):
        TDMScheduler.from_config(stock.config)
