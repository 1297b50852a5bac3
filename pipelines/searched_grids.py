"""The timestep search on a loaded pipeline: its network, its prompts, and the grids that a user would run otherwise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .families import Family, Size
from .guidance_norm import guided, norm_of_family
from .schedule import grid_of_steps, predict_x0_eps, uniform_grid
from .scheduler import TDMScheduler
from .students.recipe import StudentRecipe
from .timestep_search import Predict, cheapest_paths, fine_levels, fine_run, path_cost, run_error

BATCH = 32
SEED = 30_000  # of the noises


class SearchedGrid(NamedTuple):
    """Timesteps, the error that the costs of their steps add up to, and that of real runs on them: the root mean
    square of what is missed over that of the clean latents.
    """

    timesteps: list[float]
    predicted: float
    error: float


def predictor(
    pipe: Any, family: Family, prompts: Sequence[str], size: Size, guidance_scale: float, **options: Any
) -> Predict:
    """``(x [B, ...], timestep) -> (x0, epsilon)`` in float32 of a pipeline's denoiser, with what adapters are on.

    Args:
        pipe: a pipeline of the family; its text encoders encode the prompts, once.
        prompts: B of them.
        size: of the pictures.
        guidance_scale: 1 is none. A guidance-distilled network is told it; others make two passes, in one batch.
        options: arguments of `pipe(...)` about the text, as `Family.encode` has them.
    """
    network = getattr(pipe, family.denoiser)
    scheduler = TDMScheduler.from_config(pipe.scheduler.config)
    if family.embeds_guidance(pipe):
        options["guidance_scale"] = guidance_scale
    is_guided = _guided(pipe, family, guidance_scale)
    norm = norm_of_family(family, None, flow=scheduler.schedule.kind == "flow")
    combine = guided if norm is None else functools.partial(norm, token_norms=family.token_norms)
    with torch.no_grad():
        cond = family.encode(pipe, list(prompts), size, **options)
        if is_guided:
            null = family.null(pipe, cond, **options)
            cond = {key: torch.cat([value, null[key]]) for key, value in cond.items()}

    @torch.no_grad()
    def predict(x: Tensor, timestep: float) -> tuple[Tensor, Tensor]:
        inputs = torch.cat([x, x]) if is_guided else x
        clock = torch.full((len(inputs),), timestep, dtype=torch.float32, device=x.device)
        output = family.denoise(network, inputs.to(network.dtype), clock, cond).float()
        if is_guided:
            prompted, without = output.chunk(2)
            output = combine(prompted, without, guidance_scale)
        alpha, sigma = scheduler.schedule.alpha_sigma(torch.tensor(timestep, dtype=torch.float64))
        return predict_x0_eps(scheduler.config.prediction_type, output, x.float(), float(alpha), float(sigma))

    return predict


def search(
    pipe: Any,
    family: Family,
    recipe: StudentRecipe | None,
    prompts: Sequence[str],
    steps: Sequence[int],
    *,
    levels: int,
    guidance_scale: float,
    expect: Callable[[int], Any] = lambda total: None,  # noqa: ARG005
) -> dict[int, dict[str, SearchedGrid]]:
    """The best grid of each step count, with those that would be run otherwise.

    Args:
        pipe: of the family.
        recipe: of the student that is on it; None: the pipeline is a teacher.
        prompts: one noise each, the same in every call.
        steps: counts K.
        levels: how many evenly spaced timesteps to choose from; those of the other grids come on top.
        guidance_scale: as in `predictor`.
        expect: told how many network calls there will be, each of a sample and with guidance two.

    Returns:
        by K, then by name: "found", "uniform" and, of a student, "trained" or, where K was not, "re-spaced".

    Raises:
        TDMError: see `fine_run` and `cheapest_paths`.
    """
    scheduler = TDMScheduler.from_config(pipe.scheduler.config)
    schedule, shift = scheduler.schedule, scheduler.config.flow_shift
    size, first = family.default_size(pipe), None
    others: dict[int, dict[str, list[float]]] = {k: {} for k in steps}
    if recipe is not None:
        size = Size(recipe.height, recipe.width, recipe.num_frames)
        first = max(grid[0] for grid in recipe.trained_timesteps.values())
        for k in steps:
            grid, nearest = grid_of_steps(recipe.trained_timesteps, k, schedule)
            others[k]["trained" if nearest == k else "re-spaced"] = grid
    for k in steps:
        others[k]["uniform"] = uniform_grid(k, schedule, shift, first)
    fine = fine_levels(schedule, levels, shift, [grid for grids in others.values() for grid in grids.values()])
    calls = len(fine) + sum(k * (1 + len(others[k])) for k in steps)
    expect(calls * len(prompts) * (1 + _guided(pipe, family, guidance_scale)))

    shape = family.latent_shape(pipe, size)
    generator = torch.Generator().manual_seed(SEED)
    device = getattr(pipe, family.denoiser).device
    costs = torch.zeros(len(fine), len(fine) + 1, dtype=torch.float64)
    runs = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        predict = predictor(pipe, family, part, size, guidance_scale)
        noise = torch.randn(len(part), *shape, generator=generator).to(device)
        each, x0 = fine_run(predict, schedule, fine, noise)
        costs += each * (len(part) / len(prompts))
        runs.append((predict, noise, x0))

    def measured(grid: list[float]) -> SearchedGrid:
        errors = [run_error(predict, schedule, grid, noise, x0) * len(x0) for predict, noise, x0 in runs]
        predicted = path_cost(costs, [fine.index(t) for t in grid])
        return SearchedGrid(grid, predicted**0.5, (sum(errors) / len(prompts)) ** 0.5)

    best = {k: [fine[i] for i in path.levels] for k, path in cheapest_paths(costs, steps).items()}
    return {k: {name: measured(grid) for name, grid in {"found": best[k], **others[k]}.items()} for k in steps}


def _guided(pipe: Any, family: Family, guidance_scale: float) -> bool:
    """Whether the network makes two passes."""
    return guidance_scale != 1 and not family.embeds_guidance(pipe)
