"""One real ComfyUI server for all tests of the node pack."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from tdm.pipelines.loras.pairs import state_dict_of
from tdm.pipelines.students.file import Student, save_student
from tdm.pipelines.students.recipe import StudentRecipe

from . import install, tiny_sd15
from .server import Server


@pytest.fixture(scope="session")
def comfyui_installed() -> None:
    if not install.installed():
        reason = "no ComfyUI in the cache: `make .venv/comfyui` installs one (2.1 GB, some minutes)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def server(comfyui_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:  # noqa: ARG001
    server = Server(tmp_path_factory.mktemp("comfyui") / "server")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def newest_server(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same server with the newest front end, and the same models."""
    folder = tmp_path_factory.mktemp("comfyui") / "newest"
    newest = Server(folder, front_end=install.newest_front_end(), models=server.models)
    yield newest
    newest.stop()


@dataclass(frozen=True)
class Checkpoint:
    """A small SD1.5 among the server's checkpoints, and LoRAs of it.

    Attributes:
        file: its name in models/checkpoints.
        style: the name of a LoRA in models/loras that is no student.
    """

    server: Server
    unet: UNet2DConditionModel
    file: str = "small_sd15.safetensors"
    style: str = "small_style.safetensors"

    def student(self, name: str = "small_student.safetensors", **changes: Any) -> str:
        """The name in models/loras of a student, which is written there with these changes of its recipe."""
        fields = {"base_model": "me/small", "family": "sd15", "prediction_type": "epsilon", "guidance_scale": 1.0}
        grid = {"trained_timesteps": {4: [899.0, 674.0, 449.0, 224.0]}, "solver_order": 2, "height": 64, "width": 64}
        recipe = StudentRecipe.from_fields({**fields, **grid, **changes})
        layers = state_dict_of(tiny_sd15.lora(self.unet))
        save_student(self.server.models / "loras" / name, Student.from_state_dict(recipe, layers), force=True)
        return name


@pytest.fixture(scope="session")
def checkpoint(server: Server) -> Checkpoint:
    checkpoint = Checkpoint(server, tiny_sd15.build())
    for folder in ("checkpoints", "loras"):
        (server.models / folder).mkdir(exist_ok=True)
    save_file(tiny_sd15.checkpoint(checkpoint.unet), server.models / "checkpoints" / checkpoint.file)
    names = {f"{name}.weight": pair for name, pair in tiny_sd15.lora(checkpoint.unet, seed=2).items()}
    style = {f"diffusion_model.{tiny_sd15.original_name(name)}": pair for name, pair in names.items()}
    layers = {name.removesuffix(".weight"): pair for name, pair in style.items()}
    save_file(state_dict_of(layers), server.models / "loras" / checkpoint.style)
    return checkpoint


@pytest.fixture(scope="module")
def folder(server: Server, bases: Callable[[str], Path]) -> Callable[[str], Path]:
    """Puts a family's tiny base where the server finds it, under the family's name."""

    def put(name: str) -> Path:
        path = server.models / "diffusers" / name
        if not path.exists():
            shutil.copytree(bases(name), path)
        return path

    return put
