"""`TDMScheduler` against float64 arithmetic written here from the formulas, and against diffusers' own solvers."""

import math

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
    """The meta device holds no values, so a sync would raise."""
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
