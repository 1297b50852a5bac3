"""Wrong LoRA files: one clear line each, and the pipeline stays as it was; lists without names; containers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tdm import TDMPipeline
from tdm.errors import TDMError
from tdm.pipelines.families import family_of_name
from tdm.pipelines.loras.file import read_lora_file
from tdm.pipelines.loras.layouts import Address, Positional, parse
from tdm.pipelines.loras.pairs import pair_layers
from tdm.pipelines.loras.places import place
from tdm.tests import tiny
from tdm.tests.pipelines.lora_files import sd15_lora, write
from tdm.tests.pipelines.students import lora_for, recipe_for, state
from torch import Tensor, nn


class Malice:
    """An object whose pickle runs a command when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def replaced(old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): tensor for key, tensor in sd15_lora().items()}


def first(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    tensors = sd15_lora()
    key = next(iter(tensors))
    return {**tensors, key: change(tensors[key])}


def plus(key: str, shape: tuple[int, ...] = (2, 2)) -> dict[str, Tensor]:
    return {**sd15_lora(), key: torch.ones(shape)}


def other_family() -> dict[str, Tensor]:
    return {f"transformer.{key}": tensor for key, tensor in lora_for(tiny.build("sd3").transformer).items()}


TO_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "wrong family": (
        other_family,
        r"0 of its 6 LoRA layers match the UNet2DConditionModel, 6 do not: \S+to_q \(no such",
    ),
    "zero matches": (lambda: replaced("attn", "attention"), "0 of its .* do not"),
    "missing half": (lambda: {k: t for k, t in sd15_lora().items() if "mid_block" not in k or "_A" in k}, "only one"),
    "NaN": (lambda: first(lambda t: t * torch.nan), "NaN"),
    "other rank": (lambda: first(lambda t: torch.cat([t, t])), "do not fit together"),
    "other width": (lambda: first(lambda t: torch.cat([t, t], dim=1)), r"\(16, 16\) wide, not \(32, 16\)"),
    "another kernel": (lambda: first(lambda t: t[..., None, None].expand(-1, -1, 3, 3).clone()), "another kernel"),
    "DoRA": (lambda: plus(f"unet.{TO_Q}.dora_scale"), "this is DoRA"),
    "PEFT's DoRA": (lambda: plus(f"unet.{TO_Q}.lora_magnitude_vector"), "this is DoRA"),
    "LoKr": (lambda: plus(f"unet.{TO_Q}.lokr_w1"), "this is LoKr"),
    "bias": (lambda: plus(f"unet.{TO_Q}.lora_B.bias", (16,)), "a change of biases next to the LoRA"),
    "bias of core's": (lambda: plus(f"diffusion_model.{TO_Q}.diff_b", (16,)), "strict=False leaves out what"),
    "whole weights": (lambda: plus(f"diffusion_model.{TO_Q}.diff", (16, 16)), "a change of whole weights"),
    "modulation": (lambda: plus("diffusion_model.blocks.0.diff_m", (1, 6)), "a change of whole weights"),
    "rank 0": (lambda: {k: t[:0] if "_A" in k else t[:, :0] for k, t in sd15_lora().items()}, "has rank 0"),
    "whole numbers": (lambda: first(lambda t: t.to(torch.int8)), "stored as torch.int8"),
    "a scale of nothing": (lambda: plus("unet.conv_in.lora_A.scale_weight", ()), "the scale of a tensor that is not"),
    "a scale of another tensor": (lambda: plus(f"unet.{TO_Q}.lora_A.scale_weight", (7,)), "is no scale of a tensor"),
    "something else": (lambda: plus("unet.conv_in.weight"), "'unet.conv_in.weight' is not the key of a LoRA"),
    "whole model": (lambda: dict(tiny.build("sd15").unet.state_dict()), "is it a whole model"),
    "no tensors": (dict, "there are no LoRA tensors"),
    "two adapters": (
        lambda: {f"{k.removesuffix('.weight')}.{n}.weight": t for n in ("a", "b") for k, t in sd15_lora().items()},
        "does it hold two adapters",
    ),
    "one layer by two names": (
        lambda: {**sd15_lora(), **sd15_lora(key="diffusion_model.{}.lora_{}.weight")},
        "two LoRAs for the layer",
    ),
    "alpha alone": (lambda: plus("unet.conv_in.alpha", ()), "'conv_in' has an alpha without a LoRA"),
    "alpha of many numbers": (lambda: plus(f"unet.{TO_Q}.alpha"), "not one finite number"),
    "unknown text encoder": (lambda: replaced("unet.", "text_encoder_2."), "0 of its .*no such layer"),
    "list of tensors": (lambda: {"decay": 0.9, "ema_parameters": [torch.ones(2)]}, "without names: only a preset"),
    "no dictionary": (lambda: 3, "holds a int, not LoRA tensors"),
    "code": (lambda: {"state_dict": Malice(Path("ran"))}, "is refused: it holds .*system, not only tensors"),
}


def weights(pipe: TDMPipeline) -> dict[str, Tensor]:
    return {f"{n}.{k}": t.clone() for n in pipe._adaptable() for k, t in getattr(pipe, n).state_dict().items()}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_file_is_one_clear_line_and_the_pipeline_stays_as_it_was(
    name: str,
    loaded: Callable[[str], TDMPipeline],
    bases: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = REFUSED[name]
    pipe = loaded("sd15")
    torch.save(content(), tmp_path / "wrong.pt")
    before, tensors = state(pipe), weights(pipe)
    with pytest.raises(TDMError, match=message) as refused:
        pipe.load_student(tmp_path / "wrong.pt", recipe=vars(recipe_for("sd15", bases("sd15"))))
    assert "\n" not in str(refused.value)
    assert state(pipe) == before
    after = weights(pipe)
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in tensors.items())
    assert os.listdir(tmp_path) == ["wrong.pt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html lang='en'><head><title>Sign in</title>", "an HTML page"),
        (b"\xef\xbb\xbf\n  <HTML><body>", "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "an XML answer"),
    ],
)
@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pt"])
def test_what_a_download_left_in_the_place_of_a_file_is_named(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TDMError, match=f"{name} is {message}"):
        read_lora_file(tmp_path / name)


def test_a_damaged_pickle_is_one_clear_line(tmp_path: Path) -> None:
    for i, old in enumerate((True, False)):
        file = tmp_path / f"{i}.bin"
        torch.save(sd15_lora(), file, _use_new_zipfile_serialization=not old)
        assert read_lora_file(file).tensors.keys() == sd15_lora().keys()
        file.write_bytes(file.read_bytes()[:-2000])
        with pytest.raises(TDMError, match="truncated or damaged") as refused:
            read_lora_file(file)
        assert "\n" not in str(refused.value)


def test_the_container_is_told_by_content(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", sd15_lora()).rename(tmp_path / "a.ckpt")
    write(tmp_path / "b.ckpt", sd15_lora()).rename(tmp_path / "b.safetensors")
    for name, container in (("a.ckpt", "safetensors"), ("b.safetensors", "pickle")):
        file = read_lora_file(tmp_path / name)
        assert file.container == container
        assert parse(file).layers.keys() == {Address("unet", layer.removeprefix("unet.")) for layer in LAYERS}


LAYERS = set(pair_layers(sd15_lora()))

# ---------------------------------------------------------------------- lists without names

TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.to_add_out")


def wrapped_in_training(rank: int) -> tuple[nn.Module, list[str]]:
    """The denoiser as a training wraps it, and the names of its trainable parameters in their order."""
    model = get_peft_model(tiny.build("sd3").transformer, LoraConfig(r=rank, target_modules=list(TARGETS)))
    return model, [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def ema_list(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters() if p.requires_grad]


def test_a_list_is_laid_on_peft_s_parameters_in_their_order(tmp_path: Path) -> None:
    model, names = wrapped_in_training(rank=4)
    tensors = ema_list(model)
    torch.save({"decay": 0.99, "ema_parameters": tensors}, tmp_path / "ema.ckpt")
    placed = place(
        read_lora_file(tmp_path / "ema.ckpt"),
        family_of_name("sd3"),
        {"transformer": tiny.build("sd3").transformer},
        positional=Positional(TARGETS, rank=4, scale=2.0),
    )["transformer"]
    for name, tensor in zip(names, tensors, strict=True):
        layer, half = name.removeprefix("base_model.model.").removesuffix(".default.weight").rsplit(".lora_", 1)
        assert torch.equal(getattr(placed[layer], half), tensor * (2.0 if half == "B" else 1.0))
    assert names[:4] == [  # pinned: a change of the order in a new version cannot be told from the shapes
        f"base_model.model.transformer_blocks.0.attn.{part}.lora_{half}.default.weight"
        for part in ("to_q", "to_k")
        for half in "AB"
    ]
    order = [name.removeprefix("transformer_blocks.") for name in placed]
    block = ["to_q", "to_k", "to_v", "add_k_proj", "to_out.0", "to_add_out"]
    assert order == [f"0.attn.{part}" for part in block] + [f"1.attn.{part}" for part in block[:-1]]


def swap(tensors: list[Tensor]) -> list[Tensor]:
    return [tensors[1], tensors[0], *tensors[2:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors[:-1], r"the list has 21 tensors, but 11 layers .* need 22"),
        (lambda tensors: [*tensors, tensors[0]], "the list has 23 tensors"),
        (swap, r"does not fit at 'transformer_blocks.0.attn.to_q': tensors 0 and 1 are \(16, 4\) and \(4, 16\), not"),
        (lambda tensors: [tensors[0] * torch.nan, *tensors[1:]], "NaN"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    torch.save({"decay": 0.99, "ema_parameters": change(ema_list(wrapped_in_training(4)[0]))}, tmp_path / "ema.ckpt")
    with pytest.raises(TDMError, match=message):
        place(
            read_lora_file(tmp_path / "ema.ckpt"),
            family_of_name("sd3"),
            {"transformer": tiny.build("sd3").transformer},
            positional=Positional(TARGETS, rank=4, scale=2.0),
        )
