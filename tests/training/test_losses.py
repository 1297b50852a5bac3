"""The losses against closed forms, in float64."""

import numpy as np
import pytest
import torch
from tdm.pipelines.guidance_norm import guided
from tdm.pipelines.schedule import NoiseSchedule, renoise_coefficients
from tdm.training.losses import critic_loss, critic_weight, generator_loss, rho, subinterval_target

B, SHAPE = 5, (3, 4, 2)


@pytest.fixture
def tensors():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, *SHAPE, generator=g, dtype=torch.float64) for _ in range(3)]


def test_guidance_is_linear_and_one_is_none(tensors):
    cond, uncond, _ = tensors
    assert torch.equal(guided(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guided(cond, uncond, 4.5), uncond + 4.5 * (cond - uncond))


@pytest.mark.parametrize("kind", ["mse", "pseudo_huber", "vector_huber"])
def test_generator_gradient_is_the_negative_direction_times_rho_over_norm(kind, tensors):
    x0, teacher, critic = tensors
    x0.requires_grad_()
    c = 0.3
    generator_loss(x0, teacher, critic, kind=kind, c=c).backward()

    direction = teacher - critic
    norm = (x0 - teacher).abs().flatten(1).mean(1).view(B, 1, 1, 1)
    d = direction[0].numel()
    slope = {
        "mse": direction / d,
        "pseudo_huber": direction / (direction**2 + c * c).sqrt() / d,
        "vector_huber": direction / (direction.flatten(1).square().sum(1) + c * c).sqrt().view(B, 1, 1, 1),
    }[kind]
    torch.testing.assert_close(x0.grad, (-slope / norm / B).detach())


def test_generator_gradient_reaches_neither_teacher_nor_critic(tensors):
    x0, teacher, critic = (t.requires_grad_() for t in tensors)
    generator_loss(x0, teacher, critic).backward()
    assert x0.grad is not None
    assert teacher.grad is None
    assert critic.grad is None


def test_norm_is_per_sample_and_clipped_below(tensors):
    x0, _, critic = tensors
    teacher = x0.clone()
    teacher[1:] += 1.0  # sample 0 agrees with the teacher: its norm would be 0
    x0.requires_grad_()
    generator_loss(x0, teacher, critic, kind="mse", norm_min=0.1).backward()
    direction = (teacher - critic).detach()
    norm = torch.tensor([0.1, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64).view(B, 1, 1, 1)
    torch.testing.assert_close(x0.grad, -direction / norm / direction[0].numel() / B)


@pytest.mark.parametrize("kind", ["mse", "pseudo_huber", "vector_huber"])
def test_rho_is_zero_at_zero_and_defaults_are_the_published_widths(kind, tensors):
    assert rho(torch.zeros(2, 3), kind).tolist() == [0.0, 0.0]
    x = tensors[0]
    widths = {"mse": None, "pseudo_huber": 1e-3, "vector_huber": 0.00054 * x[0].numel() ** 0.5}
    assert torch.equal(rho(x, kind), rho(x, kind, widths[kind]))
    with pytest.raises(ValueError, match="rho must be"):
        rho(x, "l1")  # type: ignore[arg-type]


def test_critic_weights_are_epsilon_and_v_errors(tensors):
    """An x0 error times the weight is the error of the other prediction of the same state (below the limit)."""
    x0, other, x = tensors
    sigma = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9], dtype=torch.float64)
    alpha = 1 - sigma
    a, s = alpha.view(B, 1, 1, 1), sigma.view(B, 1, 1, 1)
    epsilon_error = (((x - a * x0) / s - (x - a * other) / s) ** 2).mean()
    velocity_error = (((x - x0) / s - (x - other) / s) ** 2).mean()  # v = (x - x0) / sigma
    torch.testing.assert_close(critic_loss(x0, other, critic_weight(alpha, sigma, "min_snr")), epsilon_error)
    torch.testing.assert_close(critic_loss(x0, other, critic_weight(alpha, sigma, "v")), velocity_error)
    low = torch.tensor([0.1], dtype=torch.float64)
    assert critic_weight(1 - low, low, "min_snr").item() == 5.0
    assert critic_weight(1 - low, low, "v", limit=9.0).item() == 9.0


def test_subinterval_target_is_the_clean_one_where_the_state_is_clean(tensors):
    x0, xi, _ = tensors
    sigma = torch.linspace(0.1, 0.9, B, dtype=torch.float64)
    x_tau = (1 - sigma).view(B, 1, 1, 1) * x0 + sigma.view(B, 1, 1, 1) * xi
    target, factor = subinterval_target(x_tau, xi, sigma, 1 - sigma, sigma, torch.ones_like(sigma))
    torch.testing.assert_close(target, x0)
    torch.testing.assert_close(factor, torch.ones(B, dtype=torch.float64))


def test_subinterval_weight_bounds_the_target(tensors):
    """With its factor the loss is ``mean (alpha_m (b / sigma eps_critic - xi))^2``: a bounded target for any b."""
    x0_critic, xi, x_tau = tensors
    sigma = torch.linspace(0.5, 0.9, B, dtype=torch.float64)
    b = sigma * torch.tensor([0.01, 0.1, 0.3, 0.7, 1.0], dtype=torch.float64)
    alpha_m = torch.linspace(0.2, 1.0, B, dtype=torch.float64)
    target, factor = subinterval_target(x_tau, xi, b, 1 - sigma, sigma, alpha_m)
    loss = critic_loss(x0_critic, target, critic_weight(1 - sigma, sigma, "min_snr") * factor)
    a, s, ratio, kept = (v.view(B, 1, 1, 1) for v in (1 - sigma, sigma, b / sigma, alpha_m))
    torch.testing.assert_close(loss, (kept * (ratio * (x_tau - a * x0_critic) / s - xi)).square().mean())


# -- a linear-Gaussian student: everything is a variance ---------------------------------------------------------

FLOW = NoiseSchedule.flow()
START, END, DATA_STD = 0.75, 0.5, 0.6  # sigma of t_k and of m


def variance(sigma: float) -> float:
    return ((1 - sigma) * DATA_STD) ** 2 + sigma**2


def student(c: float) -> float:
    """``x_m = q x`` of the linear student ``x0 = c x`` at t_k."""
    return (1 - END) * c + END * (1 - (1 - START) * c) / START


def critic_slope(c: float, sigma: float, target: str) -> float:
    """Slope of the best linear critic ``x0 = slope * x_tau``, by quadrature that is exact for these quadratics."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    z, xi = (torch.from_numpy(v).reshape(-1, 1) for v in np.meshgrid(nodes, nodes))
    weight = torch.from_numpy(np.outer(weights, weights) / weights.sum() ** 2).reshape(-1, 1)
    x = variance(START) ** 0.5 * z
    level = torch.full((len(x),), sigma, dtype=torch.float64)
    end = torch.full_like(level, END)
    r, b = renoise_coefficients(1 - end, end, 1 - level, level)
    x_tau = r[:, None] * student(c) * x + b[:, None] * xi
    goal = c * x if target == "clean" else subinterval_target(x_tau, xi, b, 1 - level, level, 1 - end)[0]
    return float((weight * goal * x_tau).sum() / (weight * x_tau**2).sum())


@pytest.mark.parametrize("sigma", [0.55, 0.65, 0.75])
def test_subinterval_critic_is_the_exact_score_and_clean_is_not(sigma):
    c = 0.4
    r, b = renoise_coefficients(*(torch.tensor(v, dtype=torch.float64) for v in (1 - END, END, 1 - sigma, sigma)))
    width = float(r) ** 2 * student(c) ** 2 * variance(START) + float(b) ** 2
    exact = (1 - sigma**2 / width) / (1 - sigma)  # x0 = (x + sigma^2 score) / alpha, score = -x / width
    assert critic_slope(c, sigma, "subinterval") == pytest.approx(exact, abs=1e-12)
    assert abs(critic_slope(c, sigma, "clean") - exact) > 0.01


@pytest.mark.parametrize("sigma", [0.55, 0.65, 0.75])
def test_clean_target_leaves_intermediate_states_too_wide(sigma):
    """Where critic and teacher agree the student rests: with the true width (subinterval) or a wider one (clean)."""

    def resting_std(target: str) -> float:
        teacher = (1 - sigma) * DATA_STD**2 / variance(sigma)
        low, high = -0.5, 2.0
        for _ in range(60):  # the critic's slope grows with c in this range
            c = (low + high) / 2
            low, high = (c, high) if critic_slope(c, sigma, target) < teacher else (low, c)
        return abs(student(low)) * (variance(START) / variance(END)) ** 0.5

    assert resting_std("subinterval") == pytest.approx(1.0, abs=1e-9)
    assert 1.01 < resting_std("clean") < 1.2
