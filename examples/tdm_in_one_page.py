"""Trajectory Distribution Matching (TDM, arXiv 2503.06674) on one page, in two dimensions, without data.

The teacher denoises a Gaussian mixture exactly; its student learns to sample in four steps. A state of the student is
noised to time tau, where teacher and critic (trained on such states) predict x0. Their difference moves the student.
"""

import argparse

import torch
from matplotlib import pyplot
from torch import Tensor, nn
from torch.optim import AdamW, swa_utils

MEANS = torch.tensor([[-2.0, -1.2, -0.4, 0.4, 0.9, 1.9, 2.4, -2.6], [1.4, -1.7, 0.5, 2.2, -0.7, 0.8, -1.9, -0.5]]).T
WEIGHTS, STD = torch.linspace(4.0, 1.0, 8) / 20, 0.15
TIMES = [0.0, 0.25, 0.5, 0.75, 1.0]  # t_0 to t_K, the trained grid; a state at time t is x_t = (1 - t) x0 + t eps


def teacher(x: Tensor, t: Tensor) -> Tensor:
    """The mixture's posterior mean E[x0 | x_t] for states x (B, 2) at times t (B, 1)."""
    means, variance = MEANS.to(x), (1 - t) ** 2 * STD**2 + t**2
    offset = x[:, None] - (1 - t)[:, :, None] * means  # (B, modes, 2)
    share = (WEIGHTS.to(x).log() - offset.square().sum(2) / (2 * variance)).softmax(1)  # probability of each mode
    return (share[:, :, None] * (means + ((1 - t) * STD**2 / variance)[:, :, None] * offset)).sum(1)


class Denoiser(nn.Module):  # student or critic: predicts x0, and starts as the teacher because `last` is zero
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.last = nn.Parameter(torch.zeros(128, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return teacher(x, t) + t * (self.hidden(torch.cat([x, t], 1)) @ self.last)


def step(network: nn.Module, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """One step from t_k to m = t_{k-1}: the predicted x0, and the state x_m, which keeps the noise that x0 implies."""
    t, m = TIMES[k], TIMES[k - 1]
    x0 = network(x, torch.full_like(x[:, :1], t))
    return x0, (1 - m) * x0 + m * (x - (1 - t) * x0) / t


@torch.no_grad()
def roll(network: nn.Module, x: Tensor, k: int = 0) -> Tensor:
    """The trajectory from pure noise x down to the state at t_k. Down to t_0 = 0 it is the few-step sampler."""
    for i in range(len(TIMES) - 1, k, -1):
        x = step(network, x, i)[1]
    return x


def descend(network: nn.Module, optimizer: AdamW, loss: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def update(student: nn.Module, critic: nn.Module, optimizers: list[AdamW], k: int, *draws: Tensor) -> list[Tensor]:
    """Train both on the step from t_k to m = t_{k-1}. Of u in [0, 1) and xi, [0] is for the critic, [1] the student."""
    (noise, u, xi), m = draws, TIMES[k - 1]  # draws: (B, 2), (2, B, 1), (2, B, 2)
    x0, x_m = step(student, roll(student, noise, k), k)
    low, high = m + 0.02, min(TIMES[k], 0.98)
    tau = low + (high - low) * u  # the bands of the stages do not overlap, so one critic serves all
    r = (1 - tau) / (1 - m)
    b = (tau**2 - (r * m) ** 2).sqrt()
    x_tau = r * x_m.detach() + b * xi  # noised from the trajectory's state x_m, not from x0
    x0_target = (x_tau[0] - tau[0] ** 2 * xi[0] / b[0]) / (1 - tau[0])  # as the score of x_tau given x_m is -xi / b
    weight = ((1 - m) * b[0] / tau[0]) ** 2 * (1 / tau[0] ** 2).clamp(max=5)
    loss = descend(critic, optimizers[1], (weight * (critic(x_tau[0], tau[0]) - x0_target) ** 2).mean())
    with torch.no_grad():  # the student's x0 moves along the teacher's minus the critic's
        x0_teacher, x0_critic = teacher(x_tau[1], tau[1]), critic(x_tau[1], tau[1])
        x0_target = x0 + (x0_teacher - x0_critic)
        norm = (x0 - x0_teacher).abs().mean(1, keepdim=True).clamp(min=0.01)
    huber = ((x0 - x0_target) ** 2 + 0.001**2).sqrt() - 0.001
    return [loss, descend(student, optimizers[0], (huber / norm).mean())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in {"out": "tdm_in_one_page.png", "updates": 2000, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    student, critic = Denoiser(), Denoiser()
    mean = swa_utils.AveragedModel(student, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.995))
    optimizers = [AdamW(n.parameters(), lr, (0.0, 0.99), weight_decay=0) for n, lr in ((student, 5e-4), (critic, 2e-3))]
    for _ in range(args.updates):
        k = int(torch.randint(1, len(TIMES), ()))
        update(student, critic, optimizers, k, torch.randn(256, 2), torch.rand(2, 256, 1), torch.randn(2, 256, 2))
        mean.update_parameters(student)
    true = MEANS[torch.multinomial(WEIGHTS, 5000, replacement=True)] + STD * torch.randn(5000, 2)
    for name, network in (("teacher", Denoiser()), ("student", mean)):
        x = roll(network, torch.randn(5000, 2))
        distance = 2 * torch.cdist(x, true).mean() - torch.pdist(x).mean() - torch.pdist(true).mean()
        print(f"{name} in {len(TIMES) - 1} steps: energy distance to the mixture {distance:.4f}")
    pyplot.scatter(MEANS[:, 0], MEANS[:, 1], s=4000 * WEIGHTS, color="#f2b84b", alpha=0.5)
    pyplot.scatter(x[:, 0], x[:, 1], s=2, color="#27364f", alpha=0.5)
    pyplot.savefig(args.out)
