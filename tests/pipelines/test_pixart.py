"""PixArt's callbacks at the end of a step, which stock diffusers swallows, behave as in every other pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from tdm import TDMPipeline
from tdm.errors import TDMError
from tdm.pipelines.fixes.pixart import TDMPixArtAlphaPipeline, TDMPixArtSigmaPipeline
from tdm.tests.pipelines.students import latents

Loaded = Callable[[str], TDMPipeline]

PIPELINES = [(TDMPixArtAlphaPipeline, PixArtAlphaPipeline), (TDMPixArtSigmaPipeline, PixArtSigmaPipeline)]


class Shift(PipelineCallback):
    """Adds 1 to the latents from a given part of the run on."""

    tensor_inputs = ["latents"]  # noqa: RUF012

    def callback_fn(self, pipeline: Any, step_index: int, _t: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        if step_index >= int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
            callback_kwargs["latents"] = callback_kwargs["latents"] + 1
        return callback_kwargs


def test_callback_objects_of_diffusers_work_alone_and_together(loaded: Loaded) -> None:
    pipe = loaded("pixart")
    plain = latents(pipe, "pixart")
    once = latents(pipe, "pixart", callback_on_step_end=Shift(cutoff_step_ratio=0.75))  # after the last of 4 steps
    torch.testing.assert_close(once, plain + 1)
    both = MultiPipelineCallbacks([Shift(cutoff_step_ratio=0.75)] * 2)
    torch.testing.assert_close(latents(pipe, "pixart", callback_on_step_end=both), plain + 2)
    earlier = latents(pipe, "pixart", callback_on_step_end=Shift(cutoff_step_ratio=0.5))
    assert not torch.allclose(earlier, once, atol=0.1)


def test_the_old_callback_runs_beside_it_at_its_own_pace(loaded: Loaded) -> None:
    old: list[tuple[int, float]] = []
    new: list[int] = []

    def callback(i: int, _t: Any, tensor: torch.Tensor) -> None:
        old.append((i, float(tensor.abs().max())))

    def zero(_pipe: Any, i: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        new.append(i)
        return {"latents": tensors["latents"] * 0}

    options = {"callback": callback, "callback_steps": 2}
    latents(loaded("pixart"), "pixart", callback_on_step_end=zero, **options)
    assert new == [0, 1, 2, 3]
    assert old == [(0, 0.0), (2, 0.0)]
    with pytest.raises(ValueError, match="callback_steps"):
        latents(loaded("pixart"), "pixart", callback_on_step_end=zero, callback_steps=0)


def test_what_it_cannot_do_is_refused(loaded: Loaded) -> None:
    pipe = loaded("pixart")
    names = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with pytest.raises(TDMError, match="can be given latents, not prompt_embeds"):
        latents(pipe, "pixart", callback_on_step_end=lambda *_: {}, **names)
    with pytest.raises(TDMError, match="can be given latents, not prompt_embeds"):
        latents(pipe, "pixart", callback_on_step_end=SDCFGCutoffCallback())
    with pytest.raises(TDMError, match="shape"):
        latents(pipe, "pixart", callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 4, 4, 4)})


@pytest.mark.parametrize(("ours", "stock"), PIPELINES)
def test_the_signature_shows_it_and_keeps_the_rest(ours: Any, stock: Any) -> None:
    parameters = dict(inspect.signature(ours.__call__).parameters)
    assert parameters.pop("callback_on_step_end").default is None
    assert list(parameters.pop("callback_on_step_end_tensor_inputs").default) == ["latents"]
    assert parameters == dict(inspect.signature(stock.__call__).parameters)
