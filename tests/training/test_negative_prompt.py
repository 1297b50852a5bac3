"""The teacher's negative prompt: the same in training, previews, the student's file and `TDMPipeline.teacher`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tdm import TDMPipeline
from tdm.errors import TDMError
from tdm.pipelines.families import family_of_name
from tdm.tests import tiny
from tdm.training.card import write_card
from tdm.training.export import export, read_run
from tdm.training.loop import distill
from tdm.training.presets import presets
from tdm.training.settings import load_config
from tdm.training.tasks import build_task

Settings = Callable[[str], list[str]]
NEGATIVE = "task.negative_prompt=blurry, a frame"


def task_of(settings: list[str]) -> Any:
    config = load_config(None, settings)
    return build_task(config.task, config.memory, "cpu", lambda _: None)


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "flux"])
def test_guidance_leads_away_from_it(family: str, settings: Settings) -> None:
    """The unconditional half of guidance is the negative prompt as the family encodes it."""
    plain, negative = task_of(settings(family)), task_of([*settings(family), NEGATIVE])
    cond, _ = negative.conditions(2, torch.Generator().manual_seed(0))
    null, empty = negative.null(cond), plain.null(cond)
    assert null.keys() == empty.keys() == cond.keys()
    with negative.base_model.text_encoders(torch.device("cpu"), torch.float32) as pipe:
        expected = negative.family.null(pipe, cond, negative_prompt="blurry, a frame")
    for key, value in expected.items():  # a pipeline may pad further than a batch of the cache does
        torch.testing.assert_close(null[key], value[:, : null[key].shape[1]] if value.ndim > 1 else value)
        assert key != "mask" or not value[:, null[key].shape[1] :].any()
    assert any(not torch.equal(null[key], empty[key]) for key in null)


def test_file_card_and_teacher_have_it(settings: Settings, tmp_path: Path) -> None:
    config = load_config(None, [*settings("sd15"), NEGATIVE, "output.preview_every=0"])
    task = build_task(config.task, config.memory, "cpu", lambda _: None)
    distill(task, config, tmp_path / "run", report=lambda _: None)
    trained = read_run(tmp_path / "run")
    assert trained is not None
    file = export(trained, "student", tmp_path / "student.safetensors")
    assert "| teacher's negative prompt | blurry, a frame |" in write_card(trained, file, "student").read_text()
    pipe = TDMPipeline.from_pretrained(file)
    pipe.set_progress_bar_config(disable=True)

    def drawn(prompt: str | list[str], **call: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt, generator=generator, num_inference_steps=3, output_type="latent", **call)[0]

    prompts = ["a red cube", "a dog"]
    with pipe.teacher():
        own, alone, named = drawn(prompts), drawn(prompts[0]), drawn(prompts, negative_prompt=["blurry, a frame"] * 2)
        other = drawn(prompts, negative_prompt=["", ""])
    assert torch.equal(own, named)
    assert torch.allclose(own[:1], alone, atol=1e-5)
    assert not torch.allclose(own, other, atol=1e-4)
    student = drawn(prompts)
    assert torch.equal(student, drawn(prompts, negative_prompt=["", ""]))  # of the teacher alone


def test_base_is_what_its_authors_publish(settings: Settings) -> None:
    task = task_of([*settings("wan"), "task.negative_prompt=base"])
    assert task.negative_prompt == family_of_name("wan").published_negative_prompt
    assert "worst quality" in task.negative_prompt
    with pytest.raises(TDMError, match=r"task\.negative_prompt=base: no negative prompt is published for sd15"):
        task_of([*settings("sd15"), "task.negative_prompt=base"])


def test_presets_name_it_only_where_it_is_published() -> None:
    for name in presets():
        if name in tiny.FAMILIES:
            named = load_config(name).task.get("negative_prompt")
            assert (named == "base") == (family_of_name(name).published_negative_prompt is not None)
