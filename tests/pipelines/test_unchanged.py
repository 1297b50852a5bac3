"""Whatever fails in loading, attaching or swapping a LoRA leaves networks, active adapters and recipe as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tdm import TDMPipeline
from tdm.pipelines.families import family_of_name
from tdm.pipelines.loras.adapters import tuner_layers
from tdm.tests import tiny
from tdm.tests.pipelines.students import Make, load, lora_for, short_call, state
from torch import Tensor, nn

WITH_TEXT = ("sd15", "sdxl", "sd3", "flux")


def structure(pipe: TDMPipeline) -> list[tuple[str, type, object]]:
    """All modules of the networks, and what is on in the layers that peft wrapped."""
    return [
        (name, type(module), (list(module.active_adapters), dict(module.scaling)) if hasattr(module, "lora_A") else ())
        for network in pipe._adaptable().values()
        for name, module in network.named_modules()
    ]


def with_style(make: Make, family: str) -> TDMPipeline:
    pipe = load(make(family))
    denoiser = family_of_name(family).denoiser
    style = {f"{denoiser}.{key}": half for key, half in lora_for(getattr(tiny.build(family), denoiser), seed=5).items()}
    pipe.load_lora_weights({key: half for key, half in style.items() if "to_q" in key}, adapter_name="style")
    pipe.set_adapters(["student", "style"], [1.0, 0.8])
    return pipe


def too_wide(family: str) -> dict[str, Tensor]:
    """A LoRA whose last layer does not fit."""
    denoiser = family_of_name(family).denoiser
    lora = {f"{denoiser}.{key}": half for key, half in lora_for(getattr(tiny.build(family), denoiser), seed=9).items()}
    last = list(lora)[-1]
    return {**lora, last: torch.cat([lora[last]] * 2)}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_user_s_lora_that_does_not_fit_changes_nothing(family: str, make: Make) -> None:
    pipe = with_style(make, family)
    expected, before, known = short_call(pipe, family), structure(pipe), state(pipe)
    trainable = [
        p.requires_grad for n in pipe._adaptable().values() for layer in tuner_layers(n) for p in layer.parameters()
    ]
    with pytest.raises((RuntimeError, ValueError)):
        pipe.load_lora_weights(too_wide(family), adapter_name="new")
    assert structure(pipe) == before
    assert state(pipe) == known
    assert trainable == [
        p.requires_grad for n in pipe._adaptable().values() for layer in tuner_layers(n) for p in layer.parameters()
    ]
    assert torch.equal(short_call(pipe, family), expected)
    pipe.load_lora_weights(str(make(family, "other.safetensors", seed=3)), adapter_name="new")  # the name is free
    assert pipe.get_active_adapters() == ["student", "style", "new"]


@pytest.mark.parametrize("family", WITH_TEXT)
def test_a_half_for_a_text_encoder_that_does_not_fit_takes_the_other_half_out_again(family: str, make: Make) -> None:
    pipe = with_style(make, family)
    expected, before = short_call(pipe, family), structure(pipe)
    denoiser = family_of_name(family).denoiser
    lora = {f"{denoiser}.{key}": half for key, half in lora_for(getattr(tiny.build(family), denoiser), seed=9).items()}
    layer = next(n for n, m in pipe.text_encoder.named_modules() if isinstance(m, nn.Linear) and n.endswith("q_proj"))
    lora |= {
        f"text_encoder.{layer}.lora_A.weight": torch.ones(2, 99),
        f"text_encoder.{layer}.lora_B.weight": torch.ones(99, 2),
    }
    with pytest.raises(Exception, match=r"."):  # whatever diffusers and transformers raise
        pipe.load_lora_weights(lora, adapter_name="new")
    assert structure(pipe) == before
    assert torch.equal(short_call(pipe, family), expected)


@pytest.mark.parametrize("family", WITH_TEXT)
def test_a_student_that_fails_on_the_way_in_leaves_the_old_one(
    family: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = with_style(make, family)
    expected, before, known = short_call(pipe, family), structure(pipe), state(pipe)
    attach = type(pipe)._attach

    def fail_after(self: TDMPipeline, component: str, layers: object) -> None:
        attach(self, component, layers)  # type: ignore[arg-type]
        raise MemoryError

    monkeypatch.setattr(type(pipe), "_attach", fail_after)
    with pytest.raises(MemoryError):
        pipe.load_student(make(family, "second.safetensors", seed=4))
    assert (structure(pipe), state(pipe)) == (before, known)
    assert torch.equal(short_call(pipe, family), expected)


def test_hooks_of_offloading_are_put_back(make: Make) -> None:
    from accelerate.hooks import CpuOffload, add_hook_to_module

    pipe = with_style(make, "sd15")
    expected = short_call(pipe, "sd15")
    hook = CpuOffload(execution_device="cpu")
    add_hook_to_module(pipe.unet, hook)
    with pytest.raises((RuntimeError, ValueError)):
        pipe.load_lora_weights(too_wide("sd15"), adapter_name="new")
    assert pipe.unet._hf_hook is hook
    assert torch.equal(short_call(pipe, "sd15"), expected)


def test_a_pipeline_that_gets_no_student_stays_as_it_was(bases: Callable[[str], Path], tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline
    from tdm.errors import TDMError

    stock = DiffusionPipeline.from_pretrained(bases("sd15"))
    torch.save(
        {"unet.nowhere.lora_A.weight": torch.ones(2, 8), "unet.nowhere.lora_B.weight": torch.ones(8, 2)},
        tmp_path / "l.pt",
    )
    with pytest.raises(TDMError, match=r"trained_timesteps|no such layer"):
        TDMPipeline.from_pipe(stock, student=tmp_path / "l.pt")
    assert not tuner_layers(stock.unet)
