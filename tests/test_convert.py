"""tdm info and tdm convert on LoRA files of any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tdm.cli import main
from tdm.pipelines.bases import networks_without_weights
from tdm.pipelines.families import family_of_name
from tdm.pipelines.loras.layer_names import layer_shapes, names_of
from tdm.pipelines.loras.released import released
from tdm.pipelines.students.describe import describe
from tdm.pipelines.students.file import read_header, read_student
from tdm.pipelines.students.released import PRESETS
from tdm.tests import tiny
from tdm.tests.commands import refused
from tdm.tests.pipelines.lora_files import LAYOUTS, diffusers_names, tensors_of, updates
from tdm.tests.pipelines.students import load, short_call

RECIPE = ["trained_timesteps=900,700,500,300", "guidance_scale=1", "height=16", "width=16"]
FIELDS = {"trained_timesteps": {4: [900, 700, 500, 300]}, "guidance_scale": 1.0, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.build("sd15").save_pretrained(folder)
    return folder


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    """A kohya file for the tiny SD1.5, with alphas and text encoder layers."""
    pipe = tiny.build("sd15")
    loras = [
        u for part in ("unet", "text_encoder") for u in updates(pipe, part, diffusers_names(getattr(pipe, part), ""))
    ]
    torch.save(tensors_of(LAYOUTS["kohya"], loras), tmp_path / "lora.pt")
    return tmp_path / "lora.pt"


def test_a_converted_file_runs_alone_as_the_original_did(
    base: Path, kohya: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "student.safetensors"
    argv = ["convert", str(kohya), "--base", str(base), "--out", str(out), "--recipe", *RECIPE]
    assert main(argv) == 0
    assert "all of its LoRA layers" in capsys.readouterr().out
    expected = short_call(load(base, student=kohya, recipe=FIELDS), "sd15")
    assert torch.equal(short_call(load(out), "sd15"), expected)
    recipe, tensors = read_student(out).recipe, load_file(out)
    assert recipe is not None
    assert recipe.trained_timesteps == {4: [900.0, 700.0, 500.0, 300.0]}
    assert {key.split(".")[0] for key in tensors} == {"unet", "text_encoder"}

    before = out.read_bytes()
    assert "--force" in refused(argv, capsys)
    assert out.read_bytes() == before
    assert main([*argv, "--force", "--recipe", "height=24"]) == 0
    assert "16 x 24" in capsys.readouterr().out


def test_kohyas_names_hold_the_same_student(
    base: Path, kohya: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["convert", str(kohya), "--base", str(base), "--recipe", *RECIPE, "--out"]
    files = {layout: tmp_path / f"{layout}.safetensors" for layout in ("diffusers", "kohya")}
    for layout, file in files.items():
        assert main([*argv, str(file), "--layout", layout]) == 0
    assert "all of its LoRA layers" in capsys.readouterr().out
    assert {key.split("_")[1] for key in load_file(files["kohya"])} == {"unet", "te1"}
    ours, other = (short_call(load(file, base=base), "sd15") for file in files.values())
    assert torch.equal(ours, other)
    assert main(["convert", str(files["kohya"]), "--out", str(tmp_path / "back.safetensors")]) == 0
    assert load_file(tmp_path / "back.safetensors").keys() == load_file(files["diffusers"]).keys()


def test_what_is_no_lora_is_left_out_where_the_user_asks(
    base: Path, kohya: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "lora_unet_conv_in.diff_b"
    torch.save(torch.load(kohya) | {key: torch.ones(8)}, tmp_path / "biases.pt")
    out = tmp_path / "student.safetensors"
    argv = ["convert", str(tmp_path / "biases.pt"), "--base", str(base), "--out", str(out), "--recipe", *RECIPE]
    assert main(["convert", str(kohya), *argv[2:4], "--out", str(tmp_path / "own.safetensors"), *argv[6:]]) == 0
    student = tmp_path / "biases.safetensors"
    save_file(
        load_file(tmp_path / "own.safetensors") | {key: torch.ones(8)}, student, read_header(student.with_stem("own"))
    )
    for command in (argv, ["generate", "a", "--student", str(student)]):
        text = refused(command, capsys)
        assert (
            f"{key!r}: this is a change of biases next to the LoRA, which is not supported; tdm convert --no-s" in text
        )
        assert "strict=False" not in text
    assert not out.exists()
    with pytest.warns(UserWarning, match=f"1 tensors next to the LoRA are left out: {key}"):
        assert main([*argv, "--no-strict"]) == 0
    expected = short_call(load(base, student=kohya, recipe=FIELDS), "sd15")
    assert torch.equal(short_call(load(out), "sd15"), expected)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "biases.pt"), "--base", str(base)]) == 0
    text = capsys.readouterr().out
    assert f"not a LoRA        1 tensors, which are not loaded: {key}\n" in text
    assert "tdm convert --no-strict leaves out what does not fit" in text


def test_only_the_configs_of_the_base_are_read(base: Path, kohya: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    for file in base.rglob("*.json"):
        (bare / file.relative_to(base)).parent.mkdir(parents=True, exist_ok=True)
        (bare / file.relative_to(base)).write_bytes(file.read_bytes())
    out = tmp_path / "s.safetensors"
    assert main(["convert", str(kohya), "--base", str(bare), "--out", str(out), "--recipe", *RECIPE]) == 0
    assert out.is_file()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_networks_without_weights_have_the_layers_of_their_base(family: str, tmp_path: Path) -> None:
    pipe = tiny.build(family)
    pipe.save_pretrained(tmp_path)
    detected, networks = networks_without_weights(str(tmp_path))
    assert detected.name == family
    for component, network in networks.items():
        assert layer_shapes(network) == layer_shapes(getattr(pipe, component))
        assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


def test_info_explains_a_foreign_file(base: Path, kohya: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(kohya), "--base", str(base)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "kohya (lora_te1_), lora_down / lora_up + kohya (lora_unet_), lora_down / lora_up; pickle",
        "recipe            none: no TDM metadata",
        "family            sd15",
        "all of its LoRA layers",
        "LoRA rank         2 (",
        "LoRA alpha        3 (",
        "LoRA scale        1.5 (",
    ):
        assert expected in text


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("style", ["own", "native"])
def test_info_tells_the_family_by_the_names(family: str, style: str, tmp_path: Path) -> None:
    network = released(family)
    shapes = layer_shapes(network)
    names = {
        n: layers for n, layers in names_of(network, family).items() if "." in n and (n in shapes) == (style == "own")
    }
    chosen = {n: layers for n, layers in names.items() if "att" in n} or names
    state: dict[str, Any] = {}
    for name in list(chosen)[-8:]:
        stack = [shapes[layer] for layer in chosen[name]]
        state[f"diffusion_model.{name}.lora_A.weight"] = torch.ones(1, stack[0].inputs, *stack[0].kernel)
        rows = sum(part.outputs for part in stack)
        state[f"diffusion_model.{name}.lora_B.weight"] = torch.ones(rows, 1, *[1] * len(stack[0].kernel))
    if not state:
        assert (family, style) == ("qwenimage", "native")  # its own names are the native ones
        return
    torch.save(state, tmp_path / "lora.bin")
    text = describe(tmp_path / "lora.bin")
    count = len(state) // 2
    assert f"family            {family}\n" in text
    assert f"{count} of its {count} LoRA layers are in a released {family}" in text


@pytest.mark.parametrize("name", PRESETS)
def test_info_explains_a_released_student(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", name]) == 0
    text, preset = capsys.readouterr().out, PRESETS[name]
    grids = [", ".join(f"{t:g}" for t in grid) for grid in preset.recipe["trained_timesteps"].values()]
    for expected in (name, preset.base, *grids, preset.sampler, preset.source, family_of_name(preset.family).name):
        assert expected in text
    if preset.scale != 1:
        assert "preset scale      0.125" in text


def test_info_of_a_repository_with_several_students_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["info", "ByteDance/Hyper-SD"], capsys)
    assert message.count("ByteDance/Hyper-SD/Hyper-SD") == 12
    assert "ByteDance/Hyper-SD/Hyper-SDXL-8steps-CFG-lora.safetensors" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{lora}"], "--out"),
        (["{lora}", "--out", "{tmp}/s.safetensors"], "does not name its base"),
        (["{lora}", "--out", "{tmp}/s.safetensors", "--base", "{tmp}/gone"], "cannot read the base"),
        (["{lora}", "--out", "{tmp}/s.safetensors", "--base", "bundled"], "LoRA"),
        (["{lora}", "--out", "{tmp}/s.safetensors", "--base", "{base}"], "lacks: trained_timesteps, guidance_scale"),
        (["{lora}", "--out", "{tmp}", "--base", "{base}"], "is a folder"),
        (["{lora}", "--out", "{tmp}/s.safetensors", "--recipe", "height"], "not KEY=VALUE"),
        (["{lora}", "--out", "{tmp}/s.safetensors", "--recipe", "hight=3"], "did you mean height?"),
        (["{lora}", "--out", "{tmp}/s.safetensors", "--recipe", "trained_timesteps=a,b"], "cannot read the value"),
        (["{tmp}/gone.pt", "--out", "{tmp}/s.safetensors", "--base", "{base}"], "no such file"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, base: Path, kohya: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"{tmp}": kohya.parent, "{lora}": kohya, "{base}": base}
    for name, path in places.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    recipe_arguments = ["--recipe", *RECIPE] if "bundled" in arguments else []
    assert message in refused(["convert", *arguments, *recipe_arguments], capsys)
    assert [path.name for path in kohya.parent.iterdir()] == ["lora.pt"]
