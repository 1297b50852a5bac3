"""The estimate against what really happens: real updates of tiny networks on the CPU, and published sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tdm.bench.memory import LiveMemory
from tdm.cli.estimate import advice, table
from tdm.errors import TDMError
from tdm.pipelines.bases import pipeline_without_weights
from tdm.pipelines.families import Size
from tdm.pipelines.outlines import published_bases
from tdm.tests import tiny
from tdm.tests.training.base_tasks import task_of
from tdm.training.batch import Batch, draw_batch
from tdm.training.config import DistillConfig
from tdm.training.estimate.estimator import CONTEXT, GIB, USABLE, Estimator, Gpu, largest_micro_batch, what_to_lower
from tdm.training.estimate.rehearsal import AsOn, Rehearsal, TaskWithoutWeights
from tdm.training.loop import build_roles
from tdm.training.objectives import objective_of
from tdm.training.presets import MEMORY
from tdm.training.processes import Processes
from tdm.training.roles import ROLES
from tdm.training.settings import load_config, read_settings
from tdm.training.stages import stages_of
from tdm.training.trajectory import Trajectory
from tdm.training.update import update
from torch import nn
from torch.optim import SGD
from torch.utils.flop_counter import FlopCounterMode

Bases = Callable[[str], Path]


def settings(family: str, base: Path, *more: str, preset: str | None = None) -> DistillConfig:
    call = tiny.call_kwargs(family)
    frames = [f"task.num_frames={call['num_frames']}"] if "num_frames" in call else []
    size = [f"task.height={call['height']}", f"task.width={call['width']}", *frames]
    common = ["task.name=pipeline", f"task.model={base}", "objective.guidance_scale=2", "batch_size=4"]
    return load_config(preset, [*common, *size, "student.rank=4", "critic.rank=4", *more])


class WithWeights(TaskWithoutWeights):
    """The task of a rehearsal with the real network on the CPU."""

    def __init__(self, config: DistillConfig) -> None:
        super().__init__(config.task, torch.float32)
        self.pipe = self.family.pipeline_class().from_pretrained(config.task["model"])
        self.pipe.set_progress_bar_config(disable=True)
        self.base = getattr(self.pipe, self.family.denoiser)
        self.device = torch.device("cpu")
        self._cond = self.family.blank(self.pipe, 1, self.size)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_rehearsal_holds_and_computes_what_the_real_update_does(family: str, bases: Bases) -> None:
    config = settings(family, bases(family))
    tasks = TaskWithoutWeights(config.task, torch.float32), WithWeights(config)
    if family == "zimage":  # the tiny one has room for no more
        for task in tasks:
            task._cond = {"text": task._cond["text"][:, :64], "length": torch.tensor([64])}
    without, real = (Rehearsal(config, task, bf16=False).update(2) for task in tasks)
    assert without.flops == real.flops
    assert without.peak == pytest.approx(real.peak, rel=0.02)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_blank_conditions_are_those_of_prompts(family: str, bases: Bases) -> None:
    call = tiny.call_kwargs(family)
    size = Size(call["height"], call["width"], call.get("num_frames"))
    kind, without = pipeline_without_weights(str(bases(family)))
    pipe = kind.pipeline_class().from_pretrained(bases(family))
    blank, real = kind.blank(without, 2, size), kind.encode(pipe, [tiny.PROMPT] * 2, size)
    padded = family not in ("zimage", "qwenimage", "krea2")  # whose text is as long as the longest prompt of a batch
    assert {name: value.dtype for name, value in blank.items()} == {name: value.dtype for name, value in real.items()}
    for name, value in real.items():
        assert blank[name].shape[2:] == value.shape[2:]
        assert not padded or blank[name].shape == value.shape
    assert kind.latent_shape(without, size) == kind.latent_shape(pipe, size)


@pytest.mark.parametrize("leash", ["0", "0.02"])
@pytest.mark.parametrize("objective", [None, "dmd2", "sid", "fisher", "lcm", "regression", "decoupled"])
def test_flops_of_an_update_are_those_of_the_real_one(objective: str | None, leash: str, bases: Bases) -> None:
    each_once = ["trajectory.stages=sample", "critic.per_student=1", f"critic.leash={leash}"]  # one sample a stage
    config = settings("pixart", bases("pixart"), *each_once, preset=objective)
    run = Rehearsal(config, WithWeights(config), bf16=False)
    optimizers = {role: SGD(run.roles.parameters(role), lr=0.1) for role in ROLES}
    cond = run.task.conditions(4)
    band = objective_of(config.objective).guidance_band(config.objective)
    batch = draw_batch(
        run.trajectory,
        cond,
        dict(cond),
        (4, *run.task.latent_shape),
        torch.Generator(),
        student=True,
        guidance_band=band,
    )
    with FlopCounterMode(display=False) as counter:
        update(run.roles, config, lambda _: [batch], optimizers, Processes())
    assert Estimator()(config).flops_per_update == counter.get_total_flops()


def test_gradient_checkpointing_trades_memory_for_a_forward(bases: Bases) -> None:
    plain, less = (
        Estimator()(settings("sd3", bases("sd3"), f"memory.gradient_checkpointing={on}")) for on in ("false", "true")
    )
    assert less.memory["update"] < 0.7 * plain.memory["update"]
    recomputed = (less.flops["student_backward"] - plain.flops["student_backward"]) / plain.flops["student"]
    assert 0.8 < recomputed <= 1.01  # all blocks, not what is around them
    assert {part: size for part, size in less.memory.items() if part != "update"} == {
        part: size for part, size in plain.memory.items() if part != "update"
    }


def test_memory_of_more_samples_follows_from_one_and_two(bases: Bases) -> None:
    config = settings("pixart", bases("pixart"), "batch_size=8", "micro_batch_size=8")
    rehearsed = Rehearsal(config, TaskWithoutWeights(config.task, torch.bfloat16), bf16=False).update(8).peak
    assert Estimator()(config).memory["update"] == pytest.approx(rehearsed, rel=0.02)


def test_parts_of_memory_follow_the_configuration(bases: Bases) -> None:
    estimator = Estimator()

    def memory(*more: str) -> dict[str, float]:
        return estimator(settings("pixart", bases("pixart"), *more)).memory

    plain, numbers = memory(), estimator(settings("pixart", bases("pixart")))
    trained = sum(numbers.trained.values())
    assert plain["base"] == 2 * numbers.parameters
    assert plain["adapters"] == 4 * 1.5 * trained  # two roles and the student's mean
    assert plain["optimisers"] == 8 * trained
    assert memory("memory.optimizer=adamw8bit")["optimisers"] < 0.3 * plain["optimisers"]
    assert memory("memory.base=nf4")["base"] < memory("memory.base=int8")["base"] < plain["base"]


def test_what_to_lower_is_just_enough(bases: Bases) -> None:
    config, estimator = settings("pixart", bases("pixart"), "batch_size=8"), Estimator()
    whole, single = estimator(config), estimator(replace(config, micro_batch_size=1))
    gpu = Gpu("small", 0.5 * (whole.total + single.total) / GIB / USABLE, 1)
    assert not whole.fits(gpu)
    lower = what_to_lower(estimator, config, gpu)
    assert lower is not None
    assert [text.partition("=")[0] for text in lower] == ["micro_batch_size"]
    micro = int(lower[0].partition("=")[2])
    assert estimator(replace(config, micro_batch_size=micro)).fits(gpu)
    assert not estimator(replace(config, micro_batch_size=2 * micro)).fits(gpu)
    assert largest_micro_batch(estimator, config, gpu) == micro
    assert what_to_lower(estimator, config, Gpu("none", 0.9 * CONTEXT["cuda"] / GIB, 1)) is None


def test_a_tokenizer_that_the_base_names_and_lacks_is_said(tmp_path: Path) -> None:
    """transformers would make an empty tokenizer, whose prompts have no maximum length."""
    index = Path(shutil.copytree(published_bases()["sdxl"], tmp_path / "base")) / "model_index.json"
    named = {"tokenizer": ["transformers", "CLIPTokenizer"]}
    index.write_text(json.dumps({**json.loads(index.read_text()), **named}))
    with pytest.raises(TDMError, match=r"the config of tokenizer of the base .* \(there is no folder tokenizer\)"):
        pipeline_without_weights(str(tmp_path / "base"))


def test_on_a_gpu_products_are_half_and_norms_single() -> None:
    x, w = torch.empty(2, 8, device="meta"), torch.empty(4, 8, device="meta")
    q = torch.empty(1, 2, 64, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with AsOn("cuda", bf16=True), LiveMemory("meta") as memory:
        assert nn.functional.linear(x, w).dtype == torch.bfloat16
        assert nn.functional.layer_norm(x.bfloat16(), (8,)).dtype == torch.float32
        out = nn.functional.scaled_dot_product_attention(q, q, q)
        assert memory.live < 2 * 64 * 64 * 2  # no matrix of scores is kept
        out.sum().backward()
    with AsOn("cuda", bf16=False):
        assert nn.functional.linear(x, w).dtype == torch.float32


def test_live_memory_follows_what_the_graph_keeps() -> None:
    x = torch.zeros(1000, requires_grad=True)
    with LiveMemory() as memory:
        y = x.exp().exp()  # both results are kept for the backward pass
        assert memory.live == 8000
        z = y.detach() + 1
        del z
        assert (memory.live, memory.peak) == (8000, 12000)
        del y
        assert memory.live == 0


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["task.name=mixture"], "only task.name=pipeline"),
        (["task.height=17"], "multiples of"),
        (["batch_size=6", "micro_batch_size=4"], "micro_batch_size"),
        (["trajectory.timesteps=[2000, 700, 500, 300]"], "2000"),
    ],
)
def test_what_a_run_would_refuse_is_refused(more: list[str], line: str, bases: Bases) -> None:
    with pytest.raises(TDMError, match=line):
        Estimator()(settings("sd15", bases("sd15"), *more))


def test_an_estimate_of_stages_adds_up(bases: Bases) -> None:
    two = "stages=[{updates: 3, objective: {name: regression}}, {updates: 5, critic: {head_start: 2}}]"
    whole, estimator = settings("sd3", bases("sd3"), two), Estimator()
    estimate = estimator(whole)
    each = [estimator(stage.config) for stage in stages_of(whole)]
    assert [(name, updates) for name, updates, _ in estimate.stages] == [
        ("regression, 4 steps", 3),
        ("matching, 4 steps", 7),
    ]
    assert estimate.run_flops == sum(one.run_flops for one in each)
    assert each[0].run_flops == 3 * each[0].flops_per_update
    assert 5 * each[1].flops_per_update < each[1].run_flops < 7 * each[1].flops_per_update  # two of the critic alone
    assert estimate.total == max(one.total for one in each)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("storage", ["auto", "bf16"])
def test_an_estimate_for_a_cpu_is_of_what_a_cpu_computes(
    storage: str, precision: str, bases: Bases, tmp_path: Path
) -> None:
    """The real update on the CPU, under its own autocast, holds what the rehearsal says."""
    config = settings("pixart", bases("pixart"), f"memory.base={storage}", f"precision={precision}", "batch_size=4")
    estimate = Estimator("cpu")(config)
    assert estimate.memory["base"] == (4 if storage == "auto" else 2) * estimate.parameters
    assert estimate.memory["context"] == CONTEXT["cpu"]
    (tmp_path / "prompts.txt").write_text(tiny.PROMPT)
    task = task_of("pixart", bases("pixart"), f"{tmp_path}/prompts.txt", config.memory, cache=str(tmp_path))
    roles, trajectory = build_roles(task, config, torch.Generator()), Trajectory(config.trajectory, task.schedule)
    optimizers = {role: SGD(roles.parameters(role), lr=0.1) for role in ROLES}

    def draw(student: bool) -> list[Batch]:
        cond, null = (task.family.blank(task.pipe, 4, task.size) for _ in range(2))
        shape = (4, *task.latent_shape)
        return [draw_batch(trajectory, cond, null, shape, torch.Generator(), student=student)]

    with LiveMemory() as memory:
        update(roles, config, draw, optimizers, Processes())
    assert estimate.memory["update"] == pytest.approx(memory.peak, rel=0.03)


def test_text_encoders_must_fit_too() -> None:
    """PixArt's T5 is larger than all that an update takes."""
    estimator = Estimator()
    estimate = estimator(read_settings(["pixart", "12gb", "task.height=512", "task.width=512"]))
    assert estimate.encoders == 2 * 4_762_310_656
    assert estimate.total < 0.4 * estimate.encoding
    small = Gpu("small", 0.99 * estimate.encoding / GIB / USABLE, 1)
    assert not estimate.fits(small)
    assert "does not fit small: the text encoders take 8.87 GiB" in advice(estimator, estimate, small)
    assert estimate.fits(Gpu("card", 1.01 * estimate.encoding / GIB / USABLE, 1))


def test_a_cpu_refuses_what_is_for_a_gpu(bases: Bases) -> None:
    with pytest.raises(TDMError, match="offload is for a GPU"):
        Estimator("cpu")(settings("pixart", bases("pixart"), "memory.offload=true"))


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_preset_is_estimated_offline_in_every_memory_class(family: str) -> None:
    estimator, totals = Estimator(), {}
    for memory in (None, *MEMORY):
        settings = read_settings([family, *([memory] if memory else [])])
        estimate = estimator(settings, 8 if memory in ("node", "nodes") else 1)
        printed = table(estimate)
        assert f"shapes       published configs of {settings.task['model']}, shipped with tdm" in printed
        totals[memory] = estimate.total
    assert totals["12gb"] <= totals["16gb"] <= totals["24gb"] < totals[None]
