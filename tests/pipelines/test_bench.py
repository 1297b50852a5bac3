"""A call of `TDMPipeline` costs its K network calls and little more, counted exactly and never timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tdm.bench.measure import Cost, Counts, bare, count, runs_of
from tdm.bench.models import MODELS
from tdm.cli import main
from tdm.tests import tiny
from tdm.tests.commands import refused
from tdm.tests.pipelines.students import Make, latents, load

STUDENTS = {"num_inference_steps", "guidance_scale", "true_cfg_scale", "height", "width", "num_frames", "generator"}
PER_STEP = {"epsilon": 6, "v_prediction": 9, "flow_prediction": 7}  # x0, the noise, and the next sample
# The stock flow Euler forms no x0 (3 operators and a look-up at every step), which `callback`s and previews need.
FLOW_EULER = ("flux", "zimage", "qwenimage", "krea2")


def counted(family: str, make: Make, **recipe: Any) -> tuple[Counts, Counts]:
    """Counts of one call of a tiny student, after a first one, and of the stock pipeline with the same settings."""
    pipe = load(make(family, **recipe))
    call = {name: value for name, value in tiny.call_kwargs(family).items() if name not in STUDENTS}
    stock, runs = runs_of(pipe, call)
    return count(pipe, runs["TDMPipeline"]), count(stock, runs["stock pipeline"])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_call_makes_k_network_calls_and_its_steps_wait_for_nothing(family: str, make: Make) -> None:
    ours, stock = counted(family, make)
    denoiser = "unet" if family in ("sd15", "sdxl") else "transformer"
    assert ours.calls[denoiser] == 4
    assert {name: n for name, n in ours.calls.items() if name != denoiser} == {
        name: n for name, n in stock.calls.items() if name != denoiser
    }
    assert stock.calls[denoiser] == (5 if family == "sd15" else 4)  # PNDM makes one more
    kind = {"sd15": "epsilon", "sdxl": "epsilon", "pixart": "epsilon", "cogvideox": "v_prediction"}
    operators = 4 * PER_STEP[kind.get(family, "flow_prediction")]
    assert ours.costs["steps"] == Cost(operators=operators, allocations=operators, copies=0, reads=0)


# At the end of a call: the least and the greatest value, their difference, and whether that is finite.
LOOK = {"operators": 3, "allocations": 3, "copies": 0, "reads": 1}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_outside_the_networks_it_does_no_more_than_the_stock_pipeline(family: str, make: Make) -> None:
    ours, stock = counted(family, make)
    for what in ("operators", "allocations", "copies", "reads"):
        rest, stock_rest = (getattr(counts.costs["rest"], what) for counts in (ours, stock))
        assert rest <= stock_rest + LOOK[what], what
    outside, stock_outside = (c.costs["steps"].operators + c.costs["rest"].operators for c in (ours, stock))
    assert outside <= stock_outside + LOOK["operators"] + (5 if family in FLOW_EULER else 0)
    assert ours.costs["networks"].operators > 10 * outside
    # The predicted clean picture, which `pipe.stream` shows, stays alive one step longer than in most stock schedulers.
    assert ours.peak <= stock.peak + latents(load(make(family)), family).nbytes


def test_the_counters_see_what_stock_schedulers_and_pipelines_do(make: Make) -> None:
    assert counted("sdxl", make)[1].costs["steps"].reads > 0  # Euler compares timesteps and looks up sigmas
    flow_euler = counted("flux", make)[1].costs
    assert flow_euler["rest"].copies > 0  # fills in the ids of the latents
    assert flow_euler["steps"].operators - flow_euler["steps"].allocations == 2 * 4  # each looks up two sigmas: views


def test_the_second_order_costs_three_operators_more_where_it_has_a_previous_step(make: Make) -> None:
    first, second = (counted("sd3", make, name=f"{n}.safetensors", solver_order=n)[0].costs["steps"] for n in (1, 2))
    assert second == Cost(operators=first.operators + 3 * 3, allocations=first.allocations + 3 * 3)


def test_the_bare_networks_are_the_very_calls_of_the_pipeline(make: Make) -> None:
    pipe = load(make("pixart"))
    call = {"prompt": tiny.PROMPT, "max_sequence_length": 16, "output_type": "pt"}
    _, runs = runs_of(pipe, call)
    outputs: list[torch.Tensor] = []
    with pipe.transformer.register_forward_hook(lambda _, __, out: outputs.append(out[0])):
        repeat = bare(pipe, runs["TDMPipeline"])
        repeat()
    assert len(outputs) == 8
    assert all(torch.equal(a, b) for a, b in zip(outputs[:4], outputs[4:], strict=True))
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("name", "billions"), [("sdxl", 2.567), ("sd3", 2.028), ("pixart", 0.611), ("cogvideox", 1.694)]
)
def test_the_full_size_models_have_the_released_sizes(name: str, billions: float) -> None:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in MODELS[name].denoiser().parameters())
    assert round(parameters / 1e9, 3) == billions


def test_the_command_prints_a_table_with_what_it_ran_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--models", "bundled,sdxl", "--tiny", "--repeats", "1", "--steps", "2"]) == 0
    title, _, *table = capsys.readouterr().out.splitlines()
    assert torch.__version__ in title
    assert title.startswith("`tdm bench --models bundled,sdxl --tiny --steps 2 --repeats 1` on ")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert {len(row) for row in cells} == {11}
    assert [row[:3] for row in cells[2:]] == [
        [model, run, "2"] for model in ("bundled", "sdxl") for run in ("TDMPipeline", "stock pipeline", "bare networks")
    ]


def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "known: bundled, sdxl" in refused(["bench", "--models", "sdxxl"], capsys)
    assert "at least 1" in refused(["bench", "--steps", "0"], capsys)
    assert "--steps 1 cannot be measured for bundled" in refused(
        ["bench", "--models", "bundled", "--steps", "1"], capsys
    )
