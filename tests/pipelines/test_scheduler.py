"""`TDMScheduler` against float64 arithmetic written here from the formulas, and against diffusers' own solvers."""

import math
import warnings

import diffusers
import numpy as np
import pytest
import torch
from tdm import TDMScheduler
from tdm.errors import TDMError
from torch.utils._python_dispatch import TorchDispatchMode

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {**SD, "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0}
GRIDS = ([999, 749, 499, 249], [899, 674, 449, 224], [799, 599, 399, 199], [999, 856, 665, 399])
SHIFTS = (1.0, 2.0, 3.0, 6.0)
SHAPE = (2, 4, 8, 8)


def shifted_grid(shift, k=4):
    return [1000 * shift * s / (1 + (shift - 1) * s) for s in ((k - i) / k for i in range(k))]


def noise(seed, dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---------------------------------------------------------------------- an independent reference, numpy float64


def reference_table(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", zero_snr=False, snr_shift=1.0):
    if beta_schedule == "linear":
        betas = [beta_start + (beta_end - beta_start) * i / 999 for i in range(1000)]
    else:
        betas = [(beta_start**0.5 + (beta_end**0.5 - beta_start**0.5) * i / 999) ** 2 for i in range(1000)]
    product, table = 1.0, []
    for beta in betas:
        product *= 1 - beta
        snr = product / (1 - product) / snr_shift
        table.append(math.sqrt(snr / (1 + snr)))
    if zero_snr:
        first, last = table[0], table[-1]
        table = [(a - last) * first / (first - last) for a in table]
    return table


def vp_pairs(grid, table):
    return [(table[t], math.sqrt(1 - table[t] ** 2)) for t in grid] + [(1.0, 0.0)]


def reference_trajectory(prediction_type, pairs, x, outputs):
    """Every state after x: x0 and epsilon from the output, then alpha' x0 + sigma' epsilon."""
    for (a, s), (a_next, s_next), tensor in zip(pairs, pairs[1:], outputs, strict=False):
        out = tensor.double().numpy()
        if prediction_type == "epsilon":
            eps, x0 = out, (x - s * out) / a
        elif prediction_type == "v_prediction":
            x0 = a * x - s * out
            eps = s * x + a * out
        elif prediction_type == "sample":
            x0, eps = out, (x - a * out) / s
        else:
            x0 = x - s * out
            eps = x0 + out
        x = a_next * x0 + s_next * eps
        yield x, x0


def relative_error(ours, reference):
    return np.linalg.norm(ours.double().numpy() - reference) / np.linalg.norm(reference)


def check_against_reference(scheduler, prediction_type, pairs):
    scheduler.set_timesteps(len(pairs) - 1)
    x = noise(0)
    outputs = [noise(i + 1) for i in range(len(pairs) - 1)]
    reference = reference_trajectory(prediction_type, pairs, x.double().numpy(), outputs)
    for t, out, (x_next, x0) in zip(scheduler.timesteps, outputs, reference, strict=True):
        x, ours_x0 = scheduler.step(out, t, x, return_dict=False)
        assert relative_error(x, x_next) < 1e-6
        assert relative_error(ours_x0, x0) < 1e-6
    assert torch.equal(x, ours_x0)  # the last step lands on x0


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("betas", [SD, {}], ids=["scaled_linear", "linear"])
def test_vp_steps(betas, prediction_type, grid):
    scheduler = TDMScheduler(**betas, prediction_type=prediction_type, trained_timesteps=grid)
    check_against_reference(scheduler, prediction_type, vp_pairs(grid, reference_table(**betas)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_vp_steps_at_zero_terminal_snr(prediction_type, grid):
    scheduler = TDMScheduler(**ZERO_SNR, prediction_type=prediction_type, trained_timesteps=grid)
    table = reference_table(**SD, zero_snr=True, snr_shift=3.0)
    check_against_reference(scheduler, prediction_type, vp_pairs(grid, table))


@pytest.mark.parametrize("grid", [*GRIDS, *map(shifted_grid, SHIFTS)], ids=str)
@pytest.mark.parametrize("prediction_type", ["flow_prediction", "sample"])
def test_flow_steps(prediction_type, grid):
    scheduler = TDMScheduler(prediction_type=prediction_type, use_flow_sigmas=True, trained_timesteps=grid)
    pairs = [(1 - t / 1000, t / 1000) for t in grid] + [(1.0, 0.0)]
    check_against_reference(scheduler, prediction_type, pairs)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", SHIFTS)
def test_teacher_flow_grid_is_uniform_with_the_shift(shift, k):
    scheduler = TDMScheduler(prediction_type="flow_prediction", flow_shift=shift)
    pairs = [(1 - t / 1000, t / 1000) for t in shifted_grid(shift, k)] + [(1.0, 0.0)]
    check_against_reference(scheduler, "flow_prediction", pairs)


# ---------------------------------------------------------------------- order 2 is DPM-Solver++ 2M


def check_against_dpm(ours, theirs, ours_timesteps, first=0):
    ours.set_timesteps(timesteps=ours_timesteps)
    x_ours = x_theirs = noise(0)
    for scheduler in (ours, theirs):
        scheduler.set_begin_index(first)
    for i in range(first, len(theirs.timesteps)):
        out = noise(i + 1)
        x_ours = ours.step(out, ours.timesteps[i], x_ours).prev_sample
        x_theirs = theirs.step(out, theirs.timesteps[i], x_theirs).prev_sample
        assert relative_error(x_ours, x_theirs.double().numpy()) < 1e-5


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("grid", [*GRIDS, [999 - 49 * i for i in range(20)]], ids=str)
def test_vp_equals_dpm_solver(grid, prediction_type, order):
    options = {**SD, "prediction_type": prediction_type, "solver_order": order}
    theirs = diffusers.DPMSolverMultistepScheduler(**options)
    theirs.set_timesteps(timesteps=grid)
    check_against_dpm(TDMScheduler(**options), theirs, grid)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("grid", GRIDS[1:3], ids=str)
def test_zero_snr_table_equals_dpm_solver_below_its_end(grid, order):
    options = {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "solver_order": order}
    theirs = diffusers.DPMSolverMultistepScheduler(**options)
    theirs.set_timesteps(timesteps=grid)
    check_against_dpm(TDMScheduler(**options), theirs, grid)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("k", [2, 4, 20])
@pytest.mark.parametrize("shift", SHIFTS)
def test_flow_equals_dpm_solver(shift, k, order):
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    theirs = diffusers.DPMSolverMultistepScheduler(**options, solver_order=order)
    theirs.set_timesteps(k)
    grid = (theirs.sigmas[:-1].double() * 1000).tolist()
    check_against_dpm(TDMScheduler(**options, solver_order=order), theirs, grid)


def test_second_order_starts_over_in_the_middle_of_a_grid():
    options = {**SD, "solver_order": 2}
    theirs = diffusers.DPMSolverMultistepScheduler(**options)
    theirs.set_timesteps(timesteps=GRIDS[0])
    check_against_dpm(TDMScheduler(**options), theirs, GRIDS[0], first=1)


def test_second_order_does_not_remember_an_earlier_run():
    scheduler = TDMScheduler(**SD, solver_order=2, trained_timesteps=GRIDS[0])
    runs = []
    for _ in range(2):
        scheduler.set_timesteps(4)
        x = noise(0)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(noise(i + 1), t, x).prev_sample
        runs.append(x)
    assert torch.equal(*runs)


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


# ---------------------------------------------------------------------- stepping


class RecordedOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("begin_index", [None, 0])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prediction_type", ["epsilon", "flow_prediction"])
def test_step_is_arithmetic_only(prediction_type, dtype, order, begin_index):
    """No operator that reads a value back to the host: the whole loop is the arithmetic of `step` and its casts."""
    scheduler = TDMScheduler(prediction_type=prediction_type, solver_order=order, trained_timesteps=GRIDS[0])
    scheduler.set_timesteps(4)
    if begin_index is not None:
        scheduler.set_begin_index(begin_index)
    x, outputs = noise(0, dtype), [noise(i + 1, dtype) for i in range(4)]
    timesteps = list(scheduler.timesteps)
    with RecordedOps() as ops:
        for t, out in zip(timesteps, outputs, strict=True):
            x = scheduler.step(out, t, x, return_dict=False)[0]
    arithmetic = {f"aten.{op}.Tensor" for op in ("mul", "add", "sub", "div")}
    assert set(ops.names) <= arithmetic | {"aten._to_copy.default", "aten.promote_types.default"}


def test_the_recorder_sees_a_host_sync():
    with RecordedOps() as ops:
        torch.ones(()).item()
    assert "aten._local_scalar_dense.default" in ops.names


@pytest.mark.parametrize("begin_index", [None, 0])
def test_step_runs_without_any_values(begin_index):
    """On the meta device there is nothing to read, so a sync would raise."""
    scheduler = TDMScheduler(solver_order=2, trained_timesteps=GRIDS[0])
    scheduler.set_timesteps(4, device="meta")
    if begin_index is not None:
        scheduler.set_begin_index(begin_index)
    x = torch.empty(SHAPE, device="meta")
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.empty(SHAPE, device="meta"), t, x).prev_sample
        assert scheduler.step_index == i + 1


@pytest.mark.parametrize("index", [0, 2, 3])
@pytest.mark.parametrize("form", ["view", "slice", "copy", "number"])
def test_a_run_begins_at_the_timestep_given(form, index):
    scheduler = TDMScheduler(trained_timesteps=GRIDS[0])
    scheduler.set_timesteps(4)
    t = {
        "view": scheduler.timesteps[index],
        "slice": next(iter(scheduler.timesteps[index:])),
        "copy": scheduler.timesteps[index].clone(),
        "number": GRIDS[0][index],
    }[form]
    scheduler.step(noise(1), t, noise(0))
    assert scheduler.step_index == index + 1


def test_a_begin_index_is_taken_at_its_word():
    scheduler = TDMScheduler(trained_timesteps=GRIDS[0])
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    assert scheduler.begin_index == 2
    scheduler.step(noise(1), 0, noise(0))  # not on the grid: not looked at
    assert scheduler.step_index == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(dtype):
    scheduler = TDMScheduler(**SD, trained_timesteps=GRIDS[0])
    out, x = noise(1, dtype), noise(0, dtype)
    scheduler.set_timesteps(4)
    half = scheduler.step(out, 999, x)
    scheduler.set_timesteps(4)
    full = scheduler.step(out.float(), 999, x.float())
    assert half.prev_sample.dtype == half.pred_original_sample.dtype == dtype
    assert torch.equal(half.prev_sample, full.prev_sample.to(dtype))


def test_wrong_steps_are_refused():
    scheduler = TDMScheduler(trained_timesteps=GRIDS[0])
    with pytest.raises(TDMError, match="call set_timesteps"):
        scheduler.step(noise(1), 999, noise(0))
    scheduler.set_timesteps(4)
    with pytest.raises(TDMError, match="learned variance"):
        scheduler.step(torch.cat([noise(1)] * 2, dim=1), 999, noise(0))
    with pytest.raises(TDMError, match="not one of"):
        scheduler.step(noise(1), 998, noise(0))
    for t in scheduler.timesteps:
        scheduler.step(noise(1), t, noise(0))
    with pytest.raises(TDMError, match="no step 4 among 4"):
        scheduler.step(noise(1), 999, noise(0))
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(-1)
    with pytest.raises(TDMError, match="no step -1"):
        scheduler.step(noise(1), 999, noise(0))


@pytest.mark.parametrize("options", [SD, ZERO_SNR | {"prediction_type": "v_prediction"}], ids=["sd", "cogvideox"])
def test_add_noise_is_the_forward_process_of_ddim(options):
    stock = diffusers.CogVideoXDDIMScheduler(**{"snr_shift_scale": 1.0, **options})
    t = torch.tensor([999, 100])
    ours = TDMScheduler(**options).add_noise(noise(0), noise(1), t)
    torch.testing.assert_close(ours, stock.add_noise(noise(0), noise(1), t), rtol=1e-5, atol=1e-5)


def test_scale_noise_is_the_forward_process_of_flow_match_euler():
    ours = TDMScheduler(prediction_type="flow_prediction", trained_timesteps=GRIDS[0])
    ours.set_timesteps(4)
    stock = diffusers.FlowMatchEulerDiscreteScheduler()
    stock.set_timesteps(sigmas=[t / 1000 for t in GRIDS[0]])
    t = ours.timesteps[2:3]
    expected = stock.scale_noise(noise(0), stock.timesteps[2:3], noise(1))
    torch.testing.assert_close(ours.scale_noise(noise(0), t, noise(1)), expected)
    assert ours.scale_noise(noise(0, torch.float16), t, noise(1, torch.float16)).dtype == torch.float16


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
    """From a live config and from a saved one, with and without trained timesteps."""
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
    ("stock", "message"),
    [
        (diffusers.EDMEulerScheduler(), "neither beta_schedule nor shift"),
        (diffusers.SCMScheduler(), "neither beta_schedule nor shift"),
        (diffusers.DDIMScheduler(clip_sample=True), "clip_sample"),
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
