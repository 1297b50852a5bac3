"""A `Student` in memory goes wherever its file goes, and is checked as the file is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tdm import TDMPipeline
from tdm.errors import TDMError
from tdm.pipelines.loras.pairs import Lora
from tdm.pipelines.students.file import Student, read_student
from tdm.tests import tiny
from tdm.tests.pipelines.students import Make, load, plain, short_call, state


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_draws_what_its_file_draws_however_it_comes_in(
    family: str, make: Make, bases: Callable[[str], Path]
) -> None:
    file = make(family)
    student = read_student(file)
    expected = short_call(load(file), family)
    pipes = [load(student), load(bases(family), student=student)]
    pipes.append(TDMPipeline.from_pipe(plain(bases(family)), student=student))
    pipes.append(load(make(family, "other.safetensors", seed=1)))
    pipes[-1].load_student(student)
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        assert pipe.recipe == student.recipe
        assert torch.equal(short_call(pipe, family), expected)


def test_it_stays_itself_when_the_pipeline_changes(make: Make) -> None:
    student = read_student(make("sd15"))
    copies = {name: lora.A.clone() for name, lora in student.layers["unet"].items()}
    pipe = load(student)
    with torch.no_grad():
        for name, weight in pipe.unet.named_parameters():
            if "lora" in name:
                weight.fill_(7)
    assert all(torch.equal(student.layers["unet"][name].A, copy) for name, copy in copies.items())


def _other_name(name: str, lora: Lora) -> tuple[str, Lora]:
    return f"{name}x", lora


def _wider(name: str, lora: Lora) -> tuple[str, Lora]:
    return name, Lora(lora.A, torch.cat([lora.B, lora.B]))


@pytest.mark.parametrize(("change", "message"), [(_other_name, "no such layer"), (_wider, "wide, not")])
def test_one_that_does_not_fit_is_refused_and_the_pipeline_left_as_it_was(
    change: Callable[[str, Lora], tuple[str, Lora]], message: str, make: Make
) -> None:
    pipe = load(make("sd3"))
    expected, before = short_call(pipe, "sd3"), state(pipe)
    student = read_student(make("sd3", "two.safetensors", seed=1))
    (layers,) = student.layers.values()
    broken = Student(student.recipe, {"transformer": dict(change(name, lora) for name, lora in layers.items())})
    with pytest.raises(TDMError, match=f"0 of its {len(layers)} LoRA layers match .*{message}"):
        pipe.load_student(broken)
    assert state(pipe) == before
    assert torch.equal(short_call(pipe, "sd3"), expected)


def test_two_students_and_a_student_of_another_base_are_refused(make: Make, bases: Callable[[str], Path]) -> None:
    student = read_student(make("sd15"))
    with pytest.raises(TDMError, match="two students"):
        TDMPipeline.from_pretrained(student, student=student)
    with pytest.raises(TDMError, match="trained for family 'sd15'"):
        TDMPipeline.from_pretrained(bases("sd3"), student=student)
