"""`fuse_lora` of any subset, in any component: right, or an error; no adapter is dropped without a word."""

from __future__ import annotations

import itertools

import pytest
import torch
from tdm.errors import TDMError
from tdm.pipelines.families import family_of_name
from tdm.tests import tiny
from tdm.tests.pipelines.students import Make, error, load, lora_for, short_call
from torch import Tensor


def style(family: str, ends: str, *, text: bool = False, seed: int = 5) -> dict[str, Tensor]:
    """A LoRA on the denoiser's layers whose names contain `ends`, and on one layer of a text encoder."""
    pipe, component = tiny.build(family), family_of_name(family).denoiser
    lora = {f"{component}.{key}": half for key, half in lora_for(getattr(pipe, component), seed).items() if ends in key}
    if text:
        layer = next(name for name, _ in pipe.text_encoder.named_modules() if name.endswith("q_proj"))
        lora |= {
            f"text_encoder.{layer}.lora_{half}.weight": torch.ones(s) for half, s in (("A", (2, 8)), ("B", (8, 2)))
        }
    return lora


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_any_subset_is_an_error_or_right(family: str, make: Make) -> None:
    pipe = load(make(family))
    pipe.load_lora_weights(style(family, "to_q"), adapter_name="same layers")
    pipe.load_lora_weights(style(family, "to_v", seed=6), adapter_name="others")
    names = pipe.get_active_adapters()
    assert names == ["student", "same layers", "others"]
    expected, fused, refused = short_call(pipe, family), [], []
    for count in range(1, 4):
        for subset in itertools.combinations(names, count):
            try:
                pipe.fuse_lora(adapter_names=list(subset))
            except TDMError as refusal:
                refused.append(str(refusal))
            else:
                fused.append(subset)
            assert error(short_call(pipe, family), expected) < 1e-5
            if fused and subset == fused[-1]:
                pipe.unfuse_lora()
    assert fused == [tuple(names)]
    assert len(refused) == 6
    assert all("would be dropped" in text for text in refused)
    pipe.set_adapters("student")
    alone = short_call(pipe, family)
    pipe.fuse_lora()  # what is off is not in it, and nothing is dropped
    assert error(short_call(pipe, family), alone) < 1e-5


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_a_component_alone_is_an_error_where_an_adapter_has_more(family: str, make: Make) -> None:
    pipe = load(make(family))
    pipe.load_lora_weights(style(family, "to_q", text=True), adapter_name="style")
    assert set(pipe.get_list_adapters()) == {pipe.family.denoiser, "text_encoder"}
    expected = short_call(pipe, family)
    for component in (pipe.family.denoiser, "text_encoder"):
        with pytest.raises(TDMError, match="would be fused in part"):
            pipe.fuse_lora(components=[component])
        assert error(short_call(pipe, family), expected) < 1e-5
    pipe.fuse_lora()
    assert error(short_call(pipe, family), expected) < 1e-5
    pipe.unload_lora_weights()
    assert error(short_call(pipe, family), expected) < 1e-5


def test_what_comes_after_fusing_is_not_lost_in_silence(make: Make) -> None:
    pipe = load(make("sd15"))
    pipe.load_lora_weights(style("sd15", "to_q"), adapter_name="style")
    pipe.disable_lora()
    with pytest.raises(TDMError, match="switched off"):
        pipe.fuse_lora()
    pipe.enable_lora()
    pipe.fuse_lora()
    for change in (lambda: pipe.set_adapters(["student", "style"], [1.0, 0.3]), lambda: pipe.delete_adapters("style")):
        with pytest.raises(TDMError, match="unfuse_lora first"):
            change()
    pipe.load_lora_weights(style("sd15", "to_q", seed=7), adapter_name="late")  # peft takes the others out again
    actual = short_call(pipe, "sd15")
    pipe.set_adapters(["student", "style", "late"])
    assert error(short_call(pipe, "sd15"), actual) < 1e-5
    with pipe.teacher():
        pass
    pipe.unet.fuse_lora(adapter_names=["late"])  # past the pipeline
    with pytest.raises(TDMError, match="'student' and 'style' would be dropped, because 'late' was fused"):
        short_call(pipe, "sd15")
    pipe.unet.unfuse_lora()
    assert error(short_call(pipe, "sd15"), actual) < 1e-5
