"""Adapters extracted from distilled checkpoints: exact where the rank suffices, the best of a rank where not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tdm.errors import TDMError
from tdm.tests import tiny
from tdm.tests.test_checkpoint_files import original_names
from tdm.training.card import model_card
from tdm.training.export import read_run
from tdm.training.extraction import directions, lora_of, second_moments, squared
from tdm.training.folder import check_run
from tdm.training.loop import build_roles, distill
from tdm.training.roles import AdapterRoles, Roles
from tdm.training.run import Run
from tdm.training.settings import load_config
from tdm.training.tasks import build_task
from torch import Tensor, nn

Settings = Callable[[str], list[str]]
STILL = ["updates=1", "student.lr=1e-30", "critic.lr=1e-30", "ema.decay=0", "output.preview_every=0"]
RANK = 2


def fresh(settings: list[str]) -> tuple[Any, Roles, Any]:
    """(task, fresh roles, configuration) of settings."""
    config = load_config(None, settings)
    task: Any = build_task(config.task, config.memory, "cpu", lambda _: None)
    return task, build_roles(task, config, torch.Generator().manual_seed(0)), config


def denoiser_of(pipe: Any) -> nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def distilled(family: str, settings: list[str], rank: int = RANK) -> tuple[Any, dict[str, Tensor]]:
    """(a tiny pipeline of which every layer with an adapter has learned an update of this rank, those updates)."""
    pipe, updates = tiny.build(family), {}
    generator = torch.Generator().manual_seed(1)
    _, roles, _ = fresh(settings)
    for name in roles.state("student"):
        layer = name.removesuffix(".lora_A.weight")
        if layer == name:
            continue
        weight = denoiser_of(pipe).get_parameter(f"{layer}.weight")
        out, width = weight.flatten(1).shape
        product = torch.randn(out, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
        before = weight.detach().clone()
        weight.data += 0.02 * product.reshape(weight.shape)
        updates[layer] = (weight - before).double()
    return pipe, updates


def started(settings: list[str], out: Path, lines: list[str] | None = None) -> Run:
    config = load_config(None, [*settings, *STILL])
    task = build_task(config.task, config.memory, "cpu", lambda _: None)
    return distill(task, config, out, report=(lines if lines is not None else []).append)


def product(run: Run, role: Any, layer: str) -> Tensor:
    """What a role's adapter adds to a layer's weight, in float64 ``[out, in]``."""
    state, settings = run.roles.state(role), run.config.roles[role]
    A, B = (state[f"{layer}.lora_{half}.weight"].double().flatten(1) for half in "AB")
    return (1.0 if settings.alpha is None else settings.alpha / settings.rank) * B @ A


def facts_of(run: Run) -> Any:
    return json.loads((run.out_dir / "extraction.json").read_text())


def prediction(run: Run, role: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    cond, shape = run.task.conditions(2, generator)
    x = torch.randn(2, *shape, generator=generator)
    with torch.no_grad():
        return getattr(run.roles, role)(x, run.trajectory.timesteps[:1].expand(2), cond)[0]


def sharded(pipe: Any, out: Path) -> None:
    denoiser_of(pipe).save_pretrained(out, max_shard_size="20KB")  # type: ignore[operator]
    assert len(list(out.glob("*.safetensors"))) > 1


LAYOUTS: dict[str, Callable[[Any, Path], object]] = {
    "pipeline": lambda pipe, out: pipe.save_pretrained(out),
    "fp16 variant": lambda pipe, out: pipe.save_pretrained(out, variant="fp16"),
    "denoiser": sharded,
    "file": lambda pipe, out: save_file(denoiser_of(pipe).state_dict(), out),
    "prefixed file": lambda pipe, out: save_file(
        {f"model.diffusion_model.{k}": v for k, v in denoiser_of(pipe).state_dict().items()}, out
    ),
    "original file": lambda pipe, out: save_file(original_names(pipe.unet), out),
}


@pytest.mark.parametrize("method", ["svd", "activations"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_checkpoint_starts_the_student_that_it_is(
    layout: str, method: str, settings: Settings, tmp_path: Path
) -> None:
    pipe, updates = distilled("sd15", settings("sd15"))
    source = tmp_path / ("model.safetensors" if "file" in layout else "model")
    LAYOUTS[layout](pipe, source)
    start = [f"start_from={source}", "critic.start=student", f"extraction={method}"]
    lines: list[str] = []
    run = started([*settings("sd15"), *start], tmp_path / "run", lines)
    for role in ("student", "critic"):
        for layer, update in updates.items():
            assert float((product(run, role, layer) - update.flatten(1)).norm() / update.norm()) < 1e-5
    facts = facts_of(run)
    assert facts["method"] == method
    for role in ("student", "critic"):
        assert 0 <= facts["left"][role]["in_layers_with_an_adapter"] < 1e-9
        assert facts["left"][role]["in_other_tensors"] == 0
        assert sum(line == f"start_from: {facts['summary'][role]}" for line in lines) == 1
    assert {part["tensor"] for part in facts["tensors"]} == set(updates)


def test_every_family_starts_from_a_pipeline_of_its_own(settings: Settings, tmp_path: Path) -> None:
    """By the table of families: the student predicts what the checkpoint does."""
    for family in tiny.FAMILIES:
        pipe, updates = distilled(family, settings(family))
        source = tmp_path / f"{family}-model"
        pipe.save_pretrained(source)
        run = started([*settings(family), f"start_from={source}", "critic.start=teacher"], tmp_path / family)
        of_its_own = [text for text in settings(family) if not text.startswith("task.model=")]
        whole = started([*of_its_own, f"task.model={source}"], tmp_path / f"{family}-whole")
        expected = prediction(whole, "teacher")
        assert float((prediction(run, "student") - expected).norm() / expected.norm()) < 1e-4, family
        assert float((prediction(run, "critic") - prediction(run, "teacher")).norm()) == 0
        assert float((prediction(run, "teacher") - expected).norm() / expected.norm()) > 1e-3, family
        assert len(facts_of(run)["tensors"]) == len(updates)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_the_rank_that_is_kept_is_the_best_there_is(shape: tuple[int, int]) -> None:
    """Against closed forms in float64: the SVD of D (Eckart and Young), and that of D L with C = L L^T."""
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(*shape, generator=generator, dtype=torch.float64)
    u, s, v = torch.linalg.svd(D, full_matrices=False)
    A, B = lora_of(D, directions(D, 5))
    torch.testing.assert_close(B @ A, u[:, :5] * s[:5] @ v[:5])
    torch.testing.assert_close(A @ A.T, B.T @ B)  # the singular values go in equal parts into both halves
    assert squared(D - B @ A) == pytest.approx(float(s[5:].square().sum()))

    X = torch.randn(300, shape[1], generator=generator, dtype=torch.float64) @ torch.diag(
        torch.logspace(0, -2, shape[1], dtype=torch.float64)
    )
    C = X.T @ X / len(X)
    L = torch.linalg.cholesky(C)
    u, s, v = torch.linalg.svd(D @ L, full_matrices=False)
    A_w, B_w = lora_of(D, directions(D, 5, C))
    torch.testing.assert_close(B_w @ A_w, torch.linalg.solve(L.T, (u[:, :5] * s[:5] @ v[:5]).T).T)
    error, plain = ((X @ (D - product).T).square().sum() / len(X) for product in (B_w @ A_w, B @ A))
    assert squared(D - B_w @ A_w, C) == pytest.approx(float(error))
    assert float(error) == pytest.approx(float(s[5:].square().sum()))
    assert float(error) < 0.9 * float(plain)


def test_a_rank_too_small_leaves_what_is_reported(settings: Settings, tmp_path: Path) -> None:
    pipe, updates = distilled("sd15", settings("sd15"), rank=4)
    denoiser_of(pipe).get_parameter("conv_in.bias").data += 0.3
    pipe.save_pretrained(tmp_path / "model")
    start = [f"start_from={tmp_path / 'model'}", "critic.start=student", "extraction=svd", "critic.rank=3"]
    run = started([*settings("sd15"), *start, "student.rank=2"], tmp_path / "run")
    facts = facts_of(run)
    by_name = {entry["tensor"]: entry for entry in facts["tensors"]}
    total = sum(float(update.square().sum()) for update in updates.values()) + 8 * 0.3**2
    for role, rank in (("student", 2), ("critic", 3)):
        lost = 0.0
        for layer, update in updates.items():
            u, s, v = torch.linalg.svd(update.flatten(1), full_matrices=False)
            best = u[:, :rank] * s[:rank] @ v[:rank]
            assert float((product(run, role, layer) - best).norm() / best.norm()) < 1e-5
            tail = float(s[rank:].square().sum())
            assert by_name[layer]["left"][role] == pytest.approx(tail / float(s.square().sum()), rel=1e-5, abs=1e-9)
            lost += tail
        assert facts["left"][role]["in_layers_with_an_adapter"] == pytest.approx(lost / total, rel=1e-5)
        assert facts["left"][role]["in_other_tensors"] == pytest.approx(8 * 0.3**2 / total, rel=1e-5)
    assert by_name["conv_in.bias"]["left"] == {"student": 1.0, "critic": 1.0}
    assert "1 tensors without an adapter, such as conv_in.bias" in facts["summary"]["student"]
    finished = read_run(run.out_dir)
    assert finished is not None
    card = model_card(finished, "student.safetensors", "student")
    assert f"| started from | `model`: {facts['summary']['student']} |" in card


@pytest.mark.parametrize(
    ("family", "targets", "share"), [("sd15", "[conv1,conv,to_q,ff.net.2]", 0.9), ("wan", "[patch_embedding]", 0.999)]
)
def test_weighting_follows_the_inputs_of_layers_and_convolutions(
    family: str, targets: str, share: float, settings: Settings, tmp_path: Path
) -> None:
    """For any weight W the second moment C of a layer's inputs gives the mean squared output as tr(W C W^T)."""
    text = [*settings(family), f"student.targets={targets}"]
    task, roles, config = fresh(text)
    assert isinstance(roles, AdapterRoles)
    lora_A = {name.removesuffix(".lora_A.weight"): A for name, A in roles.state("student").items() if "lora_A" in name}
    means: dict[str, list[Tensor]] = {name: [] for name in lora_A}
    for name in lora_A:

        def keep(module: Any, inputs: tuple[Tensor, ...], name: str = name) -> None:
            base = module.get_base_layer()
            output = base(inputs[0]) - (0 if base.bias is None else base(torch.zeros_like(inputs[0])))
            flat = output.movedim(1, -1) if isinstance(base, nn.Conv2d | nn.Conv3d) else output
            means[name].append(flat.flatten(0, -2))

        task.base.get_submodule(name).register_forward_pre_hook(keep)
    moments = dict(second_moments(roles, task, config, {name: A.flatten(1).shape[1] for name, A in lora_A.items()}))
    for name, outputs in means.items():
        W = task.base.get_submodule(name).get_base_layer().weight.flatten(1)
        expected = float(torch.cat(outputs).square().sum(1).mean())
        assert float((W @ moments[name] @ W.T).trace()) == pytest.approx(expected, rel=1e-4)

    pipe, updates = distilled(family, text, rank=4)
    pipe.save_pretrained(tmp_path / "model")
    left = {}
    for method in ("svd", "activations"):
        start = [f"start_from={tmp_path / 'model'}", "critic.start=teacher", f"extraction={method}"]
        run = started([*text, *start], tmp_path / method)
        rests = {layer: update.flatten(1) - product(run, "student", layer) for layer, update in updates.items()}
        left[method] = {layer: squared(rest, moments[layer].double()) for layer, rest in rests.items()}
        assert all(float(rest.norm() / updates[layer].norm()) < 1 for layer, rest in rests.items())
    assert all(left["activations"][layer] < 1.001 * left["svd"][layer] for layer in updates)
    assert sum(left["activations"].values()) < share * sum(left["svd"].values())


@pytest.mark.parametrize("storage", ["bf16", "nf4", "int8"])
def test_the_difference_is_that_of_the_files_whatever_the_base_is_stored_in(
    storage: str, settings: Settings, tmp_path: Path
) -> None:
    pipe, updates = distilled("pixart", settings("pixart"))
    pipe.save_pretrained(tmp_path / "model")
    start = [f"start_from={tmp_path / 'model'}", "critic.start=teacher", f"memory.base={storage}"]
    run = started([*settings("pixart"), *start], tmp_path / "run")
    for layer, update in updates.items():
        assert float((product(run, "student", layer) - update.flatten(1)).norm() / update.norm()) < 1e-5


def test_a_base_and_a_checkpoint_of_pickles_are_read(settings: Settings, tmp_path: Path) -> None:
    pipe, updates = distilled("pixart", settings("pixart"))
    pipe.save_pretrained(tmp_path / "model", safe_serialization=False)
    tiny.build("pixart").save_pretrained(tmp_path / "base", safe_serialization=False)
    assert not list(tmp_path.rglob("transformer/*.safetensors"))
    start = [f"start_from={tmp_path / 'model'}", "critic.start=teacher", f"task.model={tmp_path / 'base'}"]
    run = started([*settings("pixart"), *start], tmp_path / "run")
    for layer, update in updates.items():
        assert float((product(run, "student", layer) - update.flatten(1)).norm() / update.norm()) < 1e-5


def test_loras_that_are_part_of_the_teacher_are_no_part_of_the_difference(settings: Settings, tmp_path: Path) -> None:
    pipe, updates = distilled("pixart", settings("pixart"))
    layer = next(iter(updates))
    weight = pipe.transformer.get_parameter(f"{layer}.weight")
    A, B = torch.ones(1, weight.shape[1]), 0.1 * torch.ones(weight.shape[0], 1)
    weight.data += 0.5 * B @ A
    pipe.save_pretrained(tmp_path / "model")
    lora = {f"transformer.{layer}.lora_A.weight": A, f"transformer.{layer}.lora_B.weight": B}
    save_file(lora, tmp_path / "style.safetensors")
    start = [
        f"start_from={tmp_path / 'model'}",
        "critic.start=teacher",
        f"task.loras=[{tmp_path}/style.safetensors@0.5]",
    ]
    run = started([*settings("pixart"), *start], tmp_path / "run")
    assert float((product(run, "student", layer) - updates[layer]).norm() / updates[layer].norm()) < 1e-5


def test_a_run_of_whole_weights_begins_with_the_whole_checkpoint(settings: Settings, tmp_path: Path) -> None:
    pipe, _ = distilled("sd15", settings("sd15"))
    denoiser_of(pipe).get_parameter("conv_in.bias").data += 0.3
    pipe.save_pretrained(tmp_path / "model")
    start = [f"start_from={tmp_path / 'model'}", "critic.start=student", "full_weights=true"]
    run = started([*settings("sd15"), *start], tmp_path / "run")
    weights = dict(pipe.unet.named_parameters())
    for role in ("student", "critic"):
        for name, value in run.roles.state(role).items():  # type: ignore[arg-type]
            torch.testing.assert_close(value, weights[name].detach())


def test_a_resumed_run_extracts_nothing_again(settings: Settings, tmp_path: Path) -> None:
    pipe, _ = distilled("sd15", settings("sd15"))
    pipe.save_pretrained(tmp_path / "model")
    config = load_config(
        None, [*settings("sd15"), f"start_from={tmp_path / 'model'}", "critic.start=student", "output.preview_every=0"]
    )

    def run(out: str, **options: Any) -> dict[str, Tensor]:
        task = build_task(config.task, config.memory, "cpu", lambda _: None)
        return distill(task, config, tmp_path / out, report=lambda _: None, **options).roles.state("student")

    whole = run("whole")
    run("halves", stop=lambda: True)
    shutil.rmtree(tmp_path / "model")
    halves = run("halves", resume=True)
    assert all(torch.equal(whole[name], value) for name, value in halves.items())


def test_what_cannot_be_extracted_is_one_line(settings: Settings, bases: Callable[[str], Path], tmp_path: Path) -> None:
    def refused(line: str, *more: str, family: str = "sd15", source: str = "model") -> None:
        start = [f"start_from={tmp_path / source}", "critic.start=teacher", *more]
        with pytest.raises(TDMError, match=line) as error:
            started([*settings(family), *start], tmp_path / "run")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run" / "extraction.json").exists()

    pipe, updates = distilled("sd15", settings("sd15"))
    pipe.save_pretrained(tmp_path / "model")
    refused("set critic.start=student or critic.start=teacher", "critic.start=checkpoint")
    refused("has no transformer: it is not a model of the base's family", family="sd3")
    refused("is a UNet2DConditionModel, and the base's denoiser a SD3", family="sd3", source="model/unet")
    refused("model is another model than the base: .* is .* there, and .* in the base|lacks .* tensors", family="sdxl")
    refused(r"in no layer that the student trains, .* set student.targets", "student.targets=[conv1]")
    refused(r"in no layer that the critic trains, .* set critic", "critic.start=student", "critic.targets=[conv1]")
    refused("extraction", "extraction=qr")

    state = pipe.unet.state_dict()
    layer = f"{next(iter(updates))}.weight"
    save_file({name: value for name, value in state.items() if name != layer}, tmp_path / "short.safetensors")
    refused(f"lacks 1 of the base's {len(state)} tensors, such as {layer}", source="short.safetensors")
    save_file({**state, layer: state[layer] * float("nan")}, tmp_path / "nan.safetensors")
    refused(f"{layer} of nan.safetensors holds NaN", source="nan.safetensors")
    save_file({**state, layer: state[layer].to(torch.int8)}, tmp_path / "int.safetensors")
    refused("stored as torch.int8: the model is quantised", source="int.safetensors")
    save_file({**state, f"{layer}_scale": torch.ones(1)}, tmp_path / "scaled.safetensors")
    save_file({**state, layer.replace("weight", "weight_scale"): torch.ones(1)}, tmp_path / "scaled.safetensors")
    refused("is quantised", source="scaled.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    refused("cannot be read as a UNet2DConditionModel", source="other.safetensors")
    save_file({f"net.{name}": value for name, value in tiny.build("pixart").transformer.state_dict().items()},
              tmp_path / "names.safetensors")  # fmt: skip
    refused("diffusers reads no other single files", family="pixart", source="names.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF rest")
    refused("is a .gguf file, whose weights are quantised", source="model.gguf")
    torch.save(dict(state), tmp_path / "model.ckpt")
    refused("is a whole model in a pickle", source="model.ckpt")
    bare = {name: value.to(torch.bfloat16) for name, value in tiny.build("sd15").unet.state_dict().items()}
    save_file(bare, tmp_path / "base.safetensors")
    refused("base.safetensors is the base itself", source="base.safetensors")
    shutil.copytree(tmp_path / "model", tmp_path / "v")
    scheduler = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "v_prediction"}))
    refused("predicts v_prediction, and the base epsilon", source="v")
    for file in (tmp_path / "model" / "unet").glob("*.safetensors"):
        file.unlink()
    refused("has no weights")
    mixture = load_config("mixture", ["updates=1", f"start_from={tmp_path / 'v'}", "critic.start=teacher"])
    task = build_task(mixture.task, mixture.memory, "cpu", lambda _: None)
    with pytest.raises(TDMError, match="which this task does not distil"):
        distill(task, mixture, tmp_path / "mixture", report=lambda _: None)
    check_run(tmp_path / "new", load_config(None, [*settings("sd15"), f"start_from={tmp_path / 'v'}"]), resume=False)
    assert bases("sd15").is_dir()
