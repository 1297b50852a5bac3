"""Load TDM Student on the real server: the weights that core patches, the pictures, and what a user reads."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tdm.pipelines.loras.merge import merge
from tdm.pipelines.loras.pairs import Lora, state_dict_of
from tdm.pipelines.students.file import Student, read_header, save_student
from tdm.pipelines.students.recipe import HEADER_KEY, StudentRecipe
from tdm.tests.pipelines.lora_files import LAYOUTS, Update, tensors_of
from torch import Tensor

from . import tiny_sd15
from .graphs import node, sampling
from .server import Graph, PromptError, Server
from .test_sampling import SCALE, error, noise, scheduler

GRID = [999.0, 749.0, 499.0, 249.0]
RECIPE = StudentRecipe("me/tiny", "sd15", "epsilon", {4: GRID}, guidance_scale=1.0, height=64, width=64)
BASE = "tiny_sd15.safetensors"


class Model(NamedTuple):
    """A small SD1.5 in diffusers, a LoRA on its layers, and what ComfyUI calls these."""

    unet: UNet2DConditionModel
    student: dict[str, Lora]
    native: dict[str, str]


@pytest.fixture(scope="module")
def model(server: Server) -> Model:
    """A Model whose file is where the server finds it."""
    unet = tiny_sd15.build()
    for folder in ("diffusion_models", "loras"):
        (server.models / folder).mkdir(exist_ok=True)
    save_file(tiny_sd15.original_names(unet.state_dict()), server.models / "diffusion_models" / BASE)
    student = tiny_sd15.lora(unet)
    native = {name: tiny_sd15.original_name(f"{name}.weight").removesuffix(".weight") for name in student}
    return Model(unet, student, native)


def loaded(file: str, *, clip: bool = False, **options: Any) -> Graph:
    inputs = {"file": file, "released_as": "by its header or name", "strength": 1.0, **options}
    graph = {"base": node("UNETLoader", unet_name=BASE, weight_dtype="default")}
    if clip:
        graph["clip"] = node("TestClip")
        inputs["clip"] = ["clip", 0]
    return {**graph, "student": node("TDMLoadStudent", model=["base", 0], **inputs)}


def weights(server: Server, graph: Graph, link: list[Any], kind: str = "Model") -> dict[str, Tensor]:
    """The weights of a MODEL or CLIP with its patches, as core saves them, by layer."""
    folder = server.output / "weights"
    inputs = {kind.lower(): link, "filename_prefix": "weights/w"}
    try:
        server.run({**graph, "save": node("ModelSave" if kind == "Model" else "CLIPSave", **inputs)})
        state_dict = {}
        for path in folder.iterdir():
            front = path.name[len("w_") : -len("_00001_.safetensors")]
            state_dict |= {f"{front}.{k}" if kind == "CLIP" else k: tensor for k, tensor in load_file(path).items()}
        return {k.removeprefix("model.diffusion_model."): tensor for k, tensor in state_dict.items()}
    finally:
        shutil.rmtree(folder)


def delta(lora: Lora, shape: torch.Size) -> Tensor:
    A, B = (half.double().flatten(1) for half in lora)
    return (B @ A).reshape(shape)


def save(server: Server, name: str, layers: dict[str, Lora], recipe: StudentRecipe = RECIPE, **options: Any) -> Path:
    return save_student(
        server.models / "loras" / name, Student.from_state_dict(recipe, state_dict_of(layers)), force=True, **options
    )


def kohya_native(model: Model, path: Path) -> None:
    """The student as trainers of ComfyUI's users write it: native names, and an alpha that is not the rank."""
    layers = [Update("unet", model.native[name], (name,), lora.A, lora.B) for name, lora in model.student.items()]
    save_file(tensors_of(LAYOUTS["kohya native"], layers), path)  # alpha 3


def raw_peft(model: Model, path: Path) -> None:
    """A layout that ComfyUI itself loads nothing of."""
    layers = [Update("unet", name, (name,), lora.A, lora.B) for name, lora in model.student.items()]
    save_file(tensors_of(LAYOUTS["raw peft"], layers), path)


@pytest.mark.parametrize(
    ("layout", "strength", "scale"),
    [("student", 1.0, 1.0), ("student", 0.5, 0.5), ("kohya native", 1.0, 3 / 4), ("raw peft", 1.0, 1.0)],
)
def test_core_patches_exactly_the_students_weights(
    server: Server, model: Model, layout: str, strength: float, scale: float
) -> None:
    file = f"{layout.replace(' ', '_')}.safetensors"
    if layout == "student":
        save(server, file, model.student)
    else:
        write = {"kohya native": kohya_native, "raw peft": raw_peft}[layout]
        write(model, server.models / "loras" / file)
    actual = weights(server, loaded(file, strength=strength), ["student", 0])
    for name, weight in model.unet.state_dict().items():
        layer = name.removesuffix(".weight")
        expected = weight.double()
        if layer in model.student:
            expected = expected + scale * delta(model.student[layer], weight.shape)
        (there,) = tiny_sd15.original_names({name: weight})
        torch.testing.assert_close(actual[there].double(), expected, rtol=0, atol=1e-6)


def test_a_student_adds_to_the_other_loras_of_a_workflow(server: Server, model: Model) -> None:
    save(server, "student.safetensors", model.student)
    kohya_native(model, server.models / "loras" / "style.safetensors")  # of scale 3/4
    style = {"lora_name": "style.safetensors", "strength_model": 0.4}
    before = loaded("student.safetensors")
    before["style"] = node("LoraLoaderModelOnly", model=["base", 0], **style)
    before["student"]["inputs"]["model"] = ["style", 0]
    after = loaded("student.safetensors") | {"style": node("LoraLoaderModelOnly", model=["student", 0], **style)}
    for graph, link in ((before, ["student", 0]), (after, ["style", 0])):
        actual = weights(server, graph, link)
        for name, lora in model.student.items():
            weight = model.unet.get_submodule(name).weight
            expected = weight.double() + (1 + 0.4 * 3 / 4) * delta(lora, weight.shape)
            torch.testing.assert_close(actual[f"{model.native[name]}.weight"].double(), expected, rtol=0, atol=1e-6)


def test_the_same_student_samples_the_same_latents_as_diffusers(server: Server, model: Model) -> None:
    save(server, "student.safetensors", model.student)
    graph = loaded("student.safetensors") | {"prompt": node("TestPrompt", width=768)}
    plain = {**graph, **sampling(["base", 0], ["prompt", 0], timesteps=GRID)}
    graph |= sampling(["student", 0], ["prompt", 0], timesteps=GRID)
    (actual,) = server.latents(graph, ["samples", 0])
    (untouched,) = server.latents(plain, ["samples", 0])

    prompt = torch.linspace(-1, 1, 7 * 768).reshape(1, 7, 768).expand(2, -1, -1)

    def sample() -> Tensor:
        reference, x = scheduler("epsilon", GRID), noise()
        with torch.no_grad():
            for t in reference.timesteps:
                x = reference.step(model.unet(x, t, prompt).sample, t, x).prev_sample
        return x

    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    base = sample()
    try:
        merge(model.unet, model.student)
        expected = sample()
    finally:
        model.unet.load_state_dict(before)
    assert error(expected, base) > 0.1
    assert error(actual * SCALE, expected) <= 1e-5
    assert error(untouched * SCALE, base) <= 1e-5  # no patch is left behind


def test_the_recipe_that_was_loaded_is_the_one_that_is_sampled(server: Server, model: Model) -> None:
    """One link from the loader sets timesteps and order, and overrides the widgets of TDM Sigmas."""
    grid = [899.0, 674.0, 449.0, 224.0]
    recipe = StudentRecipe("me/tiny", "sd15", "epsilon", {4: grid}, 1.0, 64, 64, solver_order=2)
    save(server, "linked.safetensors", model.student, recipe)
    graph = loaded("linked.safetensors") | {"prompt": node("TestPrompt", width=768)}
    typed = {**graph, **sampling(["student", 0], ["prompt", 0], timesteps=grid, order=2)}
    linked = {**graph, **sampling(["student", 0], ["prompt", 0], timesteps=[500.0], order=["sigmas", 2])}
    linked["sigmas"]["inputs"]["recipe"] = ["student", 2]
    (expected,), (actual,) = (server.latents(each, ["samples", 0]) for each in (typed, linked))
    assert torch.equal(actual, expected)

    raw_peft(model, server.models / "loras" / "unknown.safetensors")
    linked["student"]["inputs"]["file"] = "unknown.safetensors"
    with pytest.raises(PromptError, match="says nothing about its timesteps: choose released_as"):
        server.latents(linked, ["samples", 0])


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_text_encoders_are_patched_where_the_file_has_them(server: Server, model: Model, layout: str) -> None:
    layers = {f"text_model.encoder.layers.{i}.self_attn.q_proj": (8, 8) for i in range(3)}
    layers["text_model.encoder.layers.2.mlp.fc2"] = (16, 8)
    both = {
        f"{encoder}.{name}": Lora(torch.randn(2, inputs), torch.randn(outputs, 2))
        for encoder in ("text_encoder", "text_encoder_2")
        for name, (inputs, outputs) in layers.items()
    }
    save(server, "with_text.safetensors", {**model.student, **both}, layout=layout)
    graph = loaded("with_text.safetensors", clip=True)
    before, after = (weights(server, graph, link, "CLIP") for link in (["clip", 0], ["student", 1]))
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    fronts = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    expected = {}
    for name, lora in both.items():
        encoder, _, layer = name.partition(".")
        expected[f"{fronts[encoder]}.{layer}"] = lora
    assert changed == expected.keys()
    for name, lora in expected.items():
        key = f"{name}.weight"
        moved = after[key].double() - before[key].double()
        torch.testing.assert_close(moved, delta(lora, moved.shape), rtol=0, atol=2e-6)
    with pytest.raises(PromptError, match=r"8 do not: text_encoder\..*\(without a CLIP there is no text_encoder\)"):
        shown(server, loaded("with_text.safetensors"))


def shown(server: Server, graph: Graph) -> tuple[str, str]:
    """(the recipe output, the text on the node)."""
    outputs = server.run({**graph, "look": node("PreviewAny", source=["student", 2])}).outputs
    return outputs["look"]["text"][0], outputs["student"]["text"][0]


def test_the_node_shows_its_counts_and_gives_the_recipe(server: Server, model: Model) -> None:
    save(server, "student.safetensors", model.student)
    recipe, text = shown(server, loaded("student.safetensors"))
    assert StudentRecipe.from_metadata({HEADER_KEY: recipe}) == RECIPE
    n = len(model.student)
    assert text.splitlines() == [
        f"{n} layers matched, 0 unmatched",
        "student of me/tiny",
        "timesteps 999, 749, 499, 249",
        "order 1, guidance 1, 64 x 64",
    ]
    save(server, "several.safetensors", model.student, replace(RECIPE, trained_timesteps={1: [899], 4: GRID}))
    _, text = shown(server, loaded("several.safetensors"))
    assert text.splitlines()[2:4] == ["1 step: 899", "4 steps: 999, 749, 499, 249"]
    raw_peft(model, server.models / "loras" / "unknown.safetensors")
    recipe, text = shown(server, loaded("unknown.safetensors"))
    assert recipe == ""
    assert "no recipe in the file" in text
    recipe, _ = shown(server, loaded("unknown.safetensors", released_as="Luo-Yihong/TDM_dreamshaper_LoRA"))
    assert json.loads(recipe)["base_model"] == "lykon/dreamshaper-7"


def test_a_wrong_file_is_refused_in_one_line_and_the_server_goes_on(server: Server, model: Model) -> None:
    name, lora = next(iter(model.student.items()))
    flux = StudentRecipe("me/flux", "flux", "flow_prediction", {4: GRID}, guidance_scale=1.0, height=64, width=64)
    save(server, "flux.safetensors", {name: lora}, flux)
    save(server, "other.safetensors", {name: lora, "some.layer": lora})
    save(server, "nothing.safetensors", {"some.layer": lora})
    save(server, "narrow.safetensors", {name: Lora(lora.A[:, :-1], lora.B)})
    halves = state_dict_of({f"unet.{name}": lora})
    save_file({k: t * torch.nan for k, t in halves.items()}, server.models / "loras" / "nan.safetensors")
    (server.models / "loras" / "short.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    for file, message in {
        "flux.safetensors": r"flux.safetensors is a student of me/flux \(flux\); this MODEL is sd15",
        "other.safetensors": r"1 of its 2 LoRA layers match, 1 do not: unet.some.layer \(no such layer\)",
        "nothing.safetensors": r"0 of its 1 LoRA layers match",
        "narrow.safetensors": r"0 of its 1 LoRA layers match.* wide, not ",
        "nan.safetensors": "holds NaN or infinite values",
        "short.safetensors": "is truncated or not a .safetensors file",
    }.items():
        with pytest.raises(PromptError, match=message):
            shown(server, loaded(file))
    save(server, "student.safetensors", model.student)
    with pytest.raises(PromptError, match="has a recipe of its own"):
        shown(server, loaded("student.safetensors", released_as="Luo-Yihong/TDM_dreamshaper_LoRA"))
    assert shown(server, loaded("student.safetensors"))[0]


def test_what_is_no_lora_is_left_out_where_the_user_asks(server: Server, model: Model) -> None:
    file = save(server, "student.safetensors", model.student)
    native = next(iter(model.native.values()))
    extras = {
        f"diffusion_model.{native}.diff_b": torch.ones(8),
        "bundle_emb.token.clip_l": torch.ones(1, 768),
        "unet.some.layer.lora_A.weight": torch.ones(2, 4),
        "unet.some.layer.lora_B.weight": torch.ones(4, 2),
    }
    save_file(load_file(file) | extras, server.models / "loras" / "more.safetensors", metadata=read_header(file))
    message = "a change of biases next to the LoRA, which is not supported; with strict off, Load TDM Student leaves"
    with pytest.raises(PromptError, match=message) as failure:
        shown(server, loaded("more.safetensors", strict=True))
    assert "strict=False" not in str(failure.value)
    actual, expected = (
        weights(server, loaded(name, strict=False), ["student", 0])
        for name in ("more.safetensors", "student.safetensors")
    )
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())
    n, lines = len(model.student), shown(server, loaded("more.safetensors", strict=False))[1].splitlines()
    assert lines[0] == f"{n} layers matched"
    assert lines[1].startswith("more.safetensors: 2 tensors next to the LoRA are left out: ")
    assert {f"diffusion_model.{native}.diff_b", "bundle_emb.token.clip_l"} == set(lines[1].split(": ")[2].split(", "))
    assert lines[2].endswith("1 do not: unet.some.layer (no such layer); these are left out")
    assert lines[3] == "student of me/tiny"

    save_file(
        load_file(file) | {"bundle_emb.token.clip_l": torch.ones(1, 768)},
        server.models / "loras" / "embedded.safetensors",
        metadata=read_header(file),
    )
    assert "bundle_emb.token.clip_l" in shown(server, loaded("embedded.safetensors"))[1].splitlines()[1]


def test_a_student_that_was_trained_further_is_loaded_again(server: Server, model: Model) -> None:
    save(server, "again.safetensors", model.student)
    assert json.loads(shown(server, loaded("again.safetensors"))[0])["guidance_scale"] == 1.0
    changed = StudentRecipe(**{**vars(RECIPE), "guidance_scale": 2.0})
    save(server, "again.safetensors", model.student, changed)
    assert json.loads(shown(server, loaded("again.safetensors"))[0])["guidance_scale"] == 2.0
