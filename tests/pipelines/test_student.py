"""The student file: what is written comes back, whole or not at all, and what is wrong is said in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from tdm.errors import TDMError
from tdm.pipelines.loras.pairs import Layers, Lora
from tdm.pipelines.students.describe import describe
from tdm.pipelines.students.file import Student, read_header, read_student, save_student
from tdm.pipelines.students.recipe import HEADER_KEY, StudentRecipe, completed
from torch import Tensor

RECIPE = StudentRecipe(
    base_model="someone/base",
    family="sd3",
    prediction_type="flow_prediction",
    trained_timesteps={4: [1000.0, 900.0, 750.0, 500.0], 1: [1000.0]},
    guidance_scale=1.0,
    height=512,
    width=768,
    flow_shift=3.0,
    solver_order=2,
    notes={"trained with": "TDM, 500 iterations"},
)


def tensors(rank: int = 4, prefix: str = "transformer.") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{prefix}blocks.{i}.attn.to_q.lora_{half}.weight": torch.randn(shape, generator=generator)
        for i in range(2)
        for half, shape in (("A", (rank, 8)), ("B", (8, rank)))
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save_student(tmp_path / "student.safetensors", Student.from_state_dict(RECIPE, tensors(), alpha=4))


def with_header(path: Path, fields: Any) -> Path:
    entry = fields if isinstance(fields, str) else json.dumps(fields)
    safetensors.torch.save_file(tensors(), path, metadata={HEADER_KEY: entry})
    return path


# ---------------------------------------------------------------------- round trip


def test_no_length_of_the_header_is_taken_for_a_pickle(tmp_path: Path) -> None:
    lengths = set()
    for i in range(0, 264, 8):  # headers are padded to 8 bytes
        recipe = dataclasses.replace(RECIPE, notes={"n": "x" * i})
        path = save_student(tmp_path / f"{i}.safetensors", Student.from_state_dict(recipe, tensors(), alpha=4))
        lengths.add(path.read_bytes()[0])
        assert read_student(path).recipe == recipe
    assert 0x80 in lengths


def test_a_preferred_step_count_is_the_default_and_comes_back(tmp_path: Path) -> None:
    assert RECIPE.default_steps == 4
    assert "preferred_steps" not in RECIPE.to_metadata()[HEADER_KEY]  # readers that do not know it read the file
    preferring = dataclasses.replace(RECIPE, preferred_steps=1)
    path = save_student(tmp_path / "student.safetensors", Student.from_state_dict(preferring, tensors(), alpha=4))
    read = read_student(path).recipe
    assert read == preferring
    assert read.default_steps == 1
    with pytest.raises(TDMError, match="preferred_steps must be one of 1, 4, got 2"):
        dataclasses.replace(RECIPE, preferred_steps=2)


def test_timesteps_of_ones_own_are_run_with_their_own_step_count() -> None:
    known = dataclasses.asdict(dataclasses.replace(RECIPE, preferred_steps=1))
    assert completed(known, None) == known
    assert completed(known, {"guidance_scale": 2.0}) == known | {"guidance_scale": 2.0}
    assert StudentRecipe.from_fields(completed(known, {"trained_timesteps": {2: [999.0, 499.0]}})).default_steps == 2
    overrides = {"trained_timesteps": {2: [999.0, 499.0], 3: [999.0, 666.0, 333.0]}, "preferred_steps": 2}
    assert StudentRecipe.from_fields(completed(known, overrides)).default_steps == 2


def test_a_file_comes_back_bit_equal(file: Path) -> None:
    recipe, read = read_student(file).recipe, load_file(file)
    assert recipe == RECIPE
    assert list(recipe.trained_timesteps) == [1, 4]
    assert recipe.default_steps == 4
    assert read.keys() == tensors().keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors().items())


def test_the_recipe_survives_its_header() -> None:
    assert StudentRecipe.from_metadata(RECIPE.to_metadata()) == RECIPE


def test_keys_gain_the_prefix_of_the_family(tmp_path: Path) -> None:
    unet = dataclasses.replace(RECIPE, family="sd15", prediction_type="epsilon", flow_shift=None)
    save_student(tmp_path / "s.safetensors", Student.from_state_dict(unet, tensors(prefix=""), alpha=4))
    assert load_file(tmp_path / "s.safetensors").keys() == tensors(prefix="unet.").keys()


@pytest.mark.parametrize("alpha", [4, 8, 0.5])
def test_alpha_over_rank_is_baked_into_lora_b(tmp_path: Path, alpha: float) -> None:
    save_student(tmp_path / "s.safetensors", Student.from_state_dict(RECIPE, tensors(), alpha=alpha))
    for key, tensor in load_file(tmp_path / "s.safetensors").items():
        scale = alpha / 4 if "lora_B" in key else 1
        assert torch.equal(tensor, tensors()[key] * scale)


def test_the_scale_is_applied_in_float32_before_the_cast(tmp_path: Path) -> None:
    half = {key: tensor.half() for key, tensor in tensors().items()}
    half["transformer.blocks.0.attn.to_q.lora_B.weight"][0, 0] = 60000  # twice this is infinite in float16
    save_student(tmp_path / "s.safetensors", Student.from_state_dict(RECIPE, half, alpha=8), dtype=torch.bfloat16)
    for key, tensor in load_file(tmp_path / "s.safetensors").items():
        scale = 2 if "lora_B" in key else 1
        assert torch.equal(tensor, (half[key].float() * scale).to(torch.bfloat16))


def test_the_header_tells_diffusers_that_alpha_is_the_rank_of_each_layer(tmp_path: Path) -> None:
    mixed = {**tensors(4), **{k: t for k, t in tensors(2).items() if ".1." in k}}
    mixed |= {k.replace(".0.", ".2."): t for k, t in tensors(4).items() if ".0." in k}
    save_student(tmp_path / "s.safetensors", Student.from_state_dict(RECIPE, mixed))
    config = json.loads(read_header(tmp_path / "s.safetensors")["lora_adapter_metadata"])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 4
    assert config["transformer.rank_pattern"] == config["transformer.alpha_pattern"] == {"^blocks.1.attn.to_q": 2}


# ---------------------------------------------------------------------- writing


def test_a_file_has_the_ordinary_permissions(file: Path) -> None:
    (file.parent / "other").touch()
    assert file.stat().st_mode == (file.parent / "other").stat().st_mode


def test_an_existing_file_stays_without_force(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(TDMError, match="force"):
        save_student(file, Student.from_state_dict(RECIPE, tensors(), alpha=8))
    assert file.read_bytes() == before
    save_student(file, Student.from_state_dict(RECIPE, tensors(), alpha=8), force=True)
    assert file.read_bytes() != before


def test_a_failed_write_leaves_the_old_file_and_nothing_else(file: Path) -> None:
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # the disk is full half-way
    try:
        with pytest.raises(TDMError, match=r"cannot write .* File too large; free some space"):
            save_student(file, Student.from_state_dict(RECIPE, tensors(), alpha=4), force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_several_that_write_one_file_leave_one_whole_file(file: Path) -> None:
    student, before = read_student(file), file.read_bytes()
    with ThreadPoolExecutor(8) as threads:  # as a run that ends and `tdm export` on its folder
        list(threads.map(lambda _: save_student(file, student, force=True), range(100)))
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_values_that_overflow_the_stored_dtype_are_refused(tmp_path: Path) -> None:
    big = {key: tensor * 1e5 for key, tensor in tensors().items()}
    with pytest.raises(TDMError, match="infinite"):
        save_student(tmp_path / "s.safetensors", Student.from_state_dict(RECIPE, big, alpha=4), dtype=torch.float16)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.clear(), "no LoRA tensors"),
        (lambda t: t.popitem(), "only one half"),
        (lambda t: t.update({"transformer.x.lora_A.default.weight": torch.zeros(4, 8)}), "not a diffusers LoRA key"),
        (lambda t: t.update({"lora_unet_x.lora_down.weight": torch.zeros(4, 8)}), "not a diffusers LoRA key"),
        (lambda t: next(iter(t.values())).fill_(torch.nan), "NaN"),
        (lambda t: t.update({next(iter(t)): torch.zeros(3, 8)}), "do not fit together"),
    ],
)
def test_what_is_no_lora_is_not_written(tmp_path: Path, change: Any, message: str) -> None:
    state = tensors()
    change(state)
    with pytest.raises(TDMError, match=message):
        save_student(tmp_path / "s.safetensors", Student.from_state_dict(RECIPE, state, alpha=4))
    assert not os.listdir(tmp_path)


def test_a_folder_is_not_a_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(TDMError, match="folder"):
        save_student(tmp_path, Student.from_state_dict(RECIPE, tensors(), alpha=4), force=True)


# ---------------------------------------------------------------------- reading


def test_files_that_are_no_students_are_named_in_one_line(tmp_path: Path, file: Path) -> None:
    (tmp_path / "short.safetensors").write_bytes(file.read_bytes()[:-20])
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    torch.save(tensors(), tmp_path / "new.ckpt")
    torch.save(tensors(), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name, message in {
        "short.safetensors": "truncated",
        "text.safetensors": "truncated or not",
        "empty.safetensors": "truncated or not",
        "new.ckpt": "pickle",
        "old.ckpt": "pickle",
        "absent.safetensors": "No such file",
        ".": "folder",
    }.items():
        for read in (read_student, read_header, *([] if message == "pickle" else [describe])):
            with pytest.raises(TDMError, match=message) as error:
                read(tmp_path / name)
            assert "\n" not in str(error.value)


def test_a_lora_without_metadata_is_no_student_file(tmp_path: Path) -> None:
    safetensors.torch.save_file(tensors(), tmp_path / "lora.safetensors")
    with pytest.raises(TDMError, match=r"lora.safetensors .*no recipe.*; write it with tdm convert"):
        read_student(tmp_path / "lora.safetensors")


def lora(rank: int = 2, inputs: int = 8, outputs: int = 6) -> Lora:
    return Lora(torch.ones(rank, inputs), torch.ones(outputs, rank))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "no LoRA layers"),
        ({"transformer": {}}, "no LoRA layers"),
        ({"unet": {"a": lora()}}, "'unet' is no component .* transformer, text_encoder"),
        ({"transformer": {"a": lora(), "b": lora(rank=0)}}, "'transformer.b': its LoRA has rank 0"),
        ({"transformer": {"a": Lora(torch.ones(2, 8), torch.ones(6, 3))}}, "do not fit together"),
        ({"text_encoder": {"a": lora().scaled(float("nan"))}}, "'text_encoder.a': lora_B .* NaN"),
    ],
)
def test_a_student_in_memory_is_checked_like_a_file(layers: Layers, message: str) -> None:
    with pytest.raises(TDMError, match=message):
        Student(RECIPE, layers)


def test_every_missing_field_is_listed(tmp_path: Path) -> None:
    path = with_header(tmp_path / "s.safetensors", {"version": 1, "family": "sd3", "height": 512, "width": None})
    missing = "base_model, prediction_type, trained_timesteps, guidance_scale, width;"
    with pytest.raises(TDMError, match=f"lacks: {missing}"):
        read_student(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": 2}, "newer than this tdm reads"),
        ({}, "a version"),
        ({"version": "1"}, "a version"),
        ([1], "a version"),
        ("{", "not valid JSON"),
        ({"version": 1, "step_embedding": "mu"}, "unknown student metadata: step_embedding"),
    ],
)
def test_headers_that_this_version_cannot_read_are_refused(tmp_path: Path, header: Any, message: str) -> None:
    with pytest.raises(TDMError, match=message):
        read_student(with_header(tmp_path / "s.safetensors", header))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_model", ""),
        ("base_model", 3),
        ("family", "sd9"),
        ("prediction_type", "noise"),
        ("trained_timesteps", {}),
        ("trained_timesteps", [999.0]),
        ("trained_timesteps", {4: [999.0]}),
        ("trained_timesteps", {"one": [999.0]}),
        ("trained_timesteps", {0: []}),
        ("trained_timesteps", {2: [499.0, 999.0]}),
        ("trained_timesteps", {2: [999.0, 999.0]}),
        ("trained_timesteps", {1: [-1.0]}),
        ("trained_timesteps", {1: [float("nan")]}),
        ("trained_timesteps", {1: ["999"]}),
        ("guidance_scale", float("inf")),
        ("guidance_scale", -1.0),
        ("guidance_scale", "1"),
        ("height", 0),
        ("width", 512.0),
        ("height", True),
        ("num_frames", 0),
        ("flow_shift", 0.0),
        ("solver_order", 3),
        ("notes", {"loss": 1}),
        ("notes", "text"),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(TDMError, match="family" if name == "family" else name):
        dataclasses.replace(RECIPE, **{name: value})


def test_a_model_without_flow_has_no_flow_shift() -> None:
    with pytest.raises(TDMError, match="flow_shift"):
        dataclasses.replace(RECIPE, prediction_type="epsilon")


# ---------------------------------------------------------------------- tdm info


def test_info_shows_the_recipe_and_the_lora(file: Path) -> None:
    text = describe(file)
    for expected in (
        "someone/base",
        "sd3",
        "flow_prediction",
        "1000, 900, 750, 500",
        "1 (none)",
        "768 x 512",
        "note: trained with TDM, 500 iterations",
        "4 (2 layers)",
        "128 parameters, float32",
    ):
        assert expected in text


def test_info_names_what_a_plain_lora_lacks(tmp_path: Path) -> None:
    safetensors.torch.save_file(tensors(), tmp_path / "lora.safetensors")
    text = describe(tmp_path / "lora.safetensors")
    assert "no TDM metadata" in text
    assert "trained_timesteps" in text
    assert "4 (2 layers)" in text
