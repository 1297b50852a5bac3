"""Every family is distilled by the same code, exported as one file, and sampled exactly as it was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tdm import TDMPipeline
from tdm.errors import TDMError
from tdm.pipelines.families import Condition
from tdm.pipelines.schedule import expand, predict_x0_eps
from tdm.pipelines.students.file import read_student
from tdm.tests import tiny
from tdm.training.export import export_student, read_run
from tdm.training.loop import distill
from tdm.training.roles import ROLES
from tdm.training.settings import load_config
from tdm.training.tasks.pipeline import PipelineTask
from tdm.training.tasks.pipeline_settings import PipelineTaskConfig

from .base_tasks import PROMPTS, task_of


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_student_of_any_family_is_sampled_as_it_was_trained(
    family: str, bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    call = tiny.call_kwargs(family)
    task = task_of(family, bases(family), prompts)
    before = {name: value.clone() for name, value in task.base.state_dict().items()}
    x, t, cond = torch.randn(2, *task.latent_shape), torch.tensor([400.0, 700.0]).double(), task.encode(PROMPTS[:2])
    teacher_before = bare_prediction(task, x, t, cond)
    fast = ["updates=2", "batch_size=3", "precision=fp32", "student.lr=0.02", "critic.lr=0.02", "ema.decay=0"]
    quiet = ["output.preview_every=2", "output.evaluate_every=0", "objective.guidance_scale=2.0", "task.prompts=x"]
    run = distill(task, load_config(None, fast + quiet), tmp_path / "run", report=lambda _: None)
    assert (tmp_path / "run" / "previews" / "000002.png").is_file()
    after = task.base.state_dict()
    assert all(torch.equal(after.get(name, after.get(_wrapped(name))), value) for name, value in before.items())

    assert torch.equal(run.roles.teacher(x, t, cond)[0], teacher_before)
    for role in ROLES:
        getattr(run.roles, role)(x, t, cond)[0].square().mean().backward()
        trained = {id(p) for p in run.roles.parameters(role)}
        # None: the last block of some networks makes text that nobody reads.
        learned = [p.grad for p in run.roles.parameters(role) if p.grad is not None]
        assert len(learned) > 0.8 * len(trained)
        assert all(grad.isfinite().all() for grad in learned)
        assert sum(bool(grad.any()) for grad in learned) > 0.8 * len(trained)
        assert all(p.grad is None for p in task.base.parameters() if id(p) not in trained)
        for p in run.roles.parameters(role):
            p.grad = None

    finished = read_run(tmp_path / "run")
    assert finished is not None
    file = export_student(finished, tmp_path / "student.safetensors")
    exported = load_file(file)
    assert all(torch.equal(exported[f"{task.family.denoiser}.{key}"], value) for key, value in run.ema.weights.items())
    recipe = read_student(file).recipe
    assert recipe is not None
    assert (recipe.family, recipe.height, recipe.num_frames) == (family, call["height"], call.get("num_frames"))

    noise = torch.randn(3, *task.latent_shape, generator=torch.Generator().manual_seed(0))
    expected = task.family.pack(run.student(noise, task.encode(PROMPTS)))
    teacher = task.family.pack(run.teacher(noise, task.encode(PROMPTS)))

    pipe = TDMPipeline.from_pretrained(file)
    pipe.set_progress_bar_config(disable=True)
    options = {} if family != "cogvideox" else {"max_sequence_length": 16}  # the tiny one has room for no more
    generator = torch.Generator().manual_seed(0)
    sampled = pipe(prompt=list(PROMPTS), generator=generator, output_type="latent", **options)[0]
    assert float((sampled - expected).norm() / expected.norm()) < 1e-4
    assert float((sampled - teacher).norm() / expected.norm()) > 1e-3


@pytest.mark.parametrize(
    ("family", "targets", "layers"),
    [("sd15", "[to_q,conv1,time_emb_proj]", None), ("pixart", "[all-linear]", ["adaln_single.linear", "proj_out"])],
)
def test_a_student_may_have_layers_of_ones_own_choice(
    family: str, targets: str, layers: list[str] | None, bases: Callable[[str], Path], prompts: str, tmp_path: Path
) -> None:
    """The critic keeps the layers of the family."""
    task = task_of(family, bases(family), prompts)
    fast = ["updates=2", "batch_size=2", "precision=fp32", "student.lr=0.02", "ema.decay=0", "output.preview_every=0"]
    run = distill(
        task, load_config(None, [*fast, f"student.targets={targets}"]), tmp_path / "run", report=lambda _: None
    )
    chosen, others = ({name.partition(".lora_")[0] for name in run.roles.state(role)} for role in ROLES)
    if layers is None:
        assert {name.rpartition(".")[2] for name in chosen} == {"to_q", "conv1", "time_emb_proj"}
    else:
        assert chosen >= {*others, *layers}
    assert {name.rpartition(".")[2] for name in others} <= {
        str(end).rpartition(".")[2] for end in task.family.lora_targets
    }

    file = export_student(read_run(tmp_path / "run"), tmp_path / "student.safetensors")
    noise = torch.randn(3, *task.latent_shape, generator=torch.Generator().manual_seed(0))
    expected, teacher = (draw(noise, task.encode(PROMPTS)) for draw in (run.student, run.teacher))
    pipe = TDMPipeline.from_pretrained(file)
    pipe.set_progress_bar_config(disable=True)
    sampled = pipe(prompt=list(PROMPTS), generator=torch.Generator().manual_seed(0), output_type="latent")[0]
    assert float((sampled - expected).norm() / expected.norm()) < 1e-4
    assert float((sampled - teacher).norm() / expected.norm()) > 1e-3


def test_layers_that_the_base_lacks_are_refused(bases: Callable[[str], Path], prompts: str, tmp_path: Path) -> None:
    task = task_of("pixart", bases("pixart"), prompts)
    config = load_config(None, ["critic.targets=[to_q,to_nothing]"])
    with pytest.raises(TDMError, match="no layer of PixArtTransformer2DModel has a name that ends in to_nothing"):
        distill(task, config, tmp_path / "run", report=lambda _: None)


@torch.no_grad()
def bare_prediction(task: PipelineTask, x: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
    """The clean prediction of the base as it came."""
    output = task.call(task.base, x, t.float(), cond).float()
    alpha, sigma = (expand(level, x) for level in task.schedule.alpha_sigma(t))
    return predict_x0_eps(task.prediction_type, output, x, alpha, sigma)[0]


def _wrapped(name: str) -> str:
    """The name of a weight under a LoRA."""
    layer, _, kind = name.rpartition(".")
    return f"{layer}.base_layer.{kind}"


def test_a_guidance_distilled_base_is_told_the_same_in_training_and_sampling(
    bases: Callable[[str], Path], prompts: str
) -> None:
    def task(**changes: float) -> PipelineTask:
        return PipelineTask(
            PipelineTaskConfig(model=str(bases("flux")), prompts=prompts, height=16, width=16, **changes)  # type: ignore[arg-type]
        )

    assert task().student_guidance == 3.5  # the pipeline's own
    assert task(embedded_guidance=2.0).student_guidance == 2.0
    assert task(embedded_guidance=2.0).encode(["a cat"])["guidance"].tolist() == [2.0]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"embedded_guidance": 2.0}, "this base takes none"),
        ({"num_frames": 9}, "makes pictures"),
        ({"height": 17}, "multiples of 8 pixels"),
    ],
)
def test_what_the_base_has_no_use_for_is_refused(
    changes: dict[str, float], line: str, bases: Callable[[str], Path], prompts: str
) -> None:
    with pytest.raises(TDMError, match=line):
        PipelineTask(PipelineTaskConfig(model=str(bases("sd15")), prompts=prompts, **changes))  # type: ignore[arg-type]
