"""A model in one file, such as a fine-tune, becomes a base's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tdm import TDMScheduler
from tdm.cli import main
from tdm.pipelines.loras.layer_names import names_of
from tdm.tests import tiny
from tdm.tests.commands import refused
from tdm.tests.pipelines.students import latents, plain
from torch import Tensor, nn

_NORMS = {"norm1": ("conv1", "in_layers.2", "in_layers.0"), "norm2": ("conv2", "out_layers.3", "out_layers.0")}


def original_names(unet: nn.Module) -> dict[str, Tensor]:
    """A UNet's weights under the names of the original Stable Diffusion checkpoints."""
    blocks = ("input_blocks", "middle_block", "output_blocks", "time_embed", "out")
    known = {layers[0]: name for name, layers in names_of(unet, "sd15").items() if name.split(".")[0] in blocks}

    def original(layer: str) -> str:
        stem, _, last = layer.rpartition(".")
        if layer in known:
            return known[layer]
        if layer == "conv_norm_out":
            return "out.0"
        if ".resnets." in layer:
            sibling, theirs, norm = _NORMS[last]
            return known[f"{stem}.{sibling}"].replace(theirs, norm)
        attention = ".".join(layer.split(".")[: layer.split(".").index("attentions") + 2])
        return known[f"{attention}.proj_in"].removesuffix(".proj_in") + layer.removeprefix(attention)

    tensors = {}
    for name, weight in unet.state_dict().items():
        layer, _, kind = name.rpartition(".")
        tensors[f"model.diffusion_model.{original(layer)}.{kind}"] = weight.clone()
    return tensors


@pytest.mark.parametrize(("family", "dtype"), [("sd15", torch.float32), ("sd3", torch.float16)])
def test_a_fine_tune_in_one_file_becomes_a_base(
    family: str, dtype: torch.dtype, bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The UNet has its original names, and the SD3 transformer those of diffusers. All other files are the base's."""
    tuned = tiny.build(family)
    denoiser = tuned.unet if family == "sd15" else tuned.transformer
    generator = torch.Generator().manual_seed(1)
    for weight in denoiser.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    denoiser.to(dtype)
    state = original_names(denoiser) if family == "sd15" else denoiser.state_dict()
    save_file(state, tmp_path / "tuned.safetensors")

    file, out = str(tmp_path / "tuned.safetensors"), tmp_path / "tuned"
    assert main(["convert", file, "--base", str(bases(family)), "--out", str(out)]) == 0
    assert f"base     {out}" in capsys.readouterr().out
    converted = plain(out)
    tensors = dict((converted.unet if family == "sd15" else converted.transformer).named_parameters())
    assert all(torch.equal(tensors[name], weight) for name, weight in denoiser.named_parameters())
    (stored,) = (out / ("unet" if family == "sd15" else "transformer")).glob("*.safetensors")
    assert {weight.dtype for weight in load_file(stored).values()} == {dtype}
    if dtype == torch.float32:
        assert torch.equal(latents(converted, family), latents(tuned, family))

    assert "exists" in refused(["convert", file, "--base", str(bases(family)), "--out", str(out)], capsys)
    assert main(["convert", file, "--base", str(bases(family)), "--out", str(out), "--force"]) == 0


def test_what_is_not_to_be_had_is_told_in_one_line(
    bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = str(tmp_path / "tuned.safetensors"), str(tmp_path / "tuned")
    save_file(original_names(tiny.build("sd15").unet), file)
    assert "pass --base" in refused(["convert", file, "--out", out], capsys)
    assert "reads no single files of pixart" in refused(
        ["convert", file, "--base", str(bases("pixart")), "--out", out], capsys
    )
    assert "cannot be read as a sd3 model" in refused(
        ["convert", file, "--base", str(bases("sd3")), "--out", out], capsys
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned.safetensors"]
    run = ["distill", f"task.model={file}", "--out", str(tmp_path / "run")]
    assert f"write it as a folder first: tdm convert {file} --base" in refused(run, capsys)


V_ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SCALES = ("scale_weight", "weight_scale", "weight_scale_2", "input_scale")


@pytest.mark.parametrize(
    ("family", "markers", "header", "stated"),
    [
        ("sd15", ["v_pred"], {}, {"prediction_type": "v_prediction"}),
        ("sd15", ["v_pred", "ztsnr"], {}, V_ZERO),
        ("sdxl", [], {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ("sdxl", [], {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, V_ZERO),
        ("sdxl", [], {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
        ("sd15", [], {"modelspec.title": "mine"}, {"prediction_type": "epsilon"}),
    ],
)
def test_what_a_file_states_of_its_prediction_goes_into_the_scheduler(
    family: str,
    markers: list[str],
    header: dict[str, str],
    stated: dict[str, object],
    bases: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    unet = tiny.build(family).unet
    weights = original_names(unet) if family == "sd15" else dict(unet.state_dict())
    save_file({**weights, **{name: torch.tensor([]) for name in markers}}, tmp_path / "tuned.safetensors", header)
    out = tmp_path / "converted"
    assert main(["convert", str(tmp_path / "tuned.safetensors"), "--base", str(bases(family)), "--out", str(out)]) == 0
    converted = plain(out)
    assert {name: converted.scheduler.config[name] for name in stated} == stated
    schedule = TDMScheduler.from_config(converted.scheduler.config)
    assert schedule.config.prediction_type == stated["prediction_type"]
    assert bool(schedule.config.rescale_betas_zero_snr) == (stated == V_ZERO)
    assert latents(converted, family).isfinite().all()


def test_an_edm_model_or_an_unknown_prediction_is_refused(
    bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, file = original_names(tiny.build("sd15").unet), tmp_path / "tuned.safetensors"
    argv = ["convert", str(file), "--base", str(bases("sd15")), "--out", str(tmp_path / "converted")]
    for marker in ("edm_mean", "edm_vpred.sigma_max"):
        save_file({**weights, marker: torch.ones(1)}, file)
        assert f"EDM model (it has {marker})" in refused(argv, capsys)
    save_file(weights, file, {"modelspec.prediction_type": "sample"})
    assert "prediction type 'sample'" in refused(argv, capsys)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_file_in_scaled_fp8_is_refused_by_name_and_one_without_scales_is_read(
    family: str, scale: str, bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, file = tiny.build(family), tmp_path / "tuned.safetensors"
    weights = original_names(pipe.unet) if family == "sd15" else dict(pipe.transformer.state_dict())
    small = {
        name: weight.to(torch.float8_e4m3fn) if weight.ndim == 2 and name.endswith("weight") else weight
        for name, weight in weights.items()
    }
    layer = next(name for name in small if small[name].dtype == torch.float8_e4m3fn).removesuffix("weight")
    argv = ["convert", str(file), "--base", str(bases(family)), "--out", str(tmp_path / "converted")]
    save_file({**small, layer + scale: torch.ones(1)}, file)
    line = refused(argv, capsys)
    assert f"quantised ({layer}{scale} is the scale of a weight)" in line
    assert "bf16 or fp16" in line
    if scale == SCALES[0]:
        save_file(small, file)
        assert main(argv) == 0


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "gguf"])
def test_a_whole_model_in_another_container_is_told_what_to_get(
    suffix: str, bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"x.{suffix}"
    if suffix == "gguf":
        file.write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    else:
        torch.save({"state_dict": {"model.diffusion_model.out.2.weight": torch.zeros(4, 8, 3, 3)}}, file)
    for argv in (
        ["distill", f"task.model={file}", "--out", str(tmp_path / "run"), "--device", "cpu"],
        ["convert", str(file), "--base", str(bases("sd15")), "--out", str(tmp_path / "converted")],
    ):
        line = refused(argv, capsys)
        assert "as .safetensors" in line or "as a .safetensors file" in line
        assert "tdm convert" not in line
