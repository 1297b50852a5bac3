"""What ComfyUI's registry and manager take: metadata, and an archive that is the pack by itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pathspec import PathSpec
from PIL import Image

from ..test_package import tracked
from . import install
from .graphs import node
from .server import Server
from .test_pack import NODES

ROOT = install.REPOSITORY
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that `comfy node publish` packs, in the folder that a manager unpacks them into."""
    folder = tmp_path_factory.mktemp("registry") / PROJECT["name"]
    ignored = PathSpec.from_lines("gitignore", (ROOT / ".comfyignore").read_text().splitlines())
    for name in tracked():
        if not ignored.match_file(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def installed(comfyui_installed: None, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:  # noqa: ARG001
    server = Server(tmp_path_factory.mktemp("comfyui") / "server", {archive.name: archive})
    yield server
    server.stop()


def test_the_archive_alone_has_all_nodes_their_help_and_the_bundled_model(installed: Server, archive: Path) -> None:
    assert not [name for name in ("tests", "training", "cli", "docs", "examples", ".ci") if (archive / name).exists()]
    known = installed.get("object_info")
    ours = [name for name, shown in known.items() if shown["python_module"] == f"custom_nodes.{archive.name}"]
    assert tuple(ours) == NODES
    assert set(installed.get("i18n")["zh"]["nodeDefs"]) == set(NODES)
    assert installed.get("workflow_templates")[archive.name]
    beginner = {"checkpoint": "bundled", "student": "bundled", "released_as": "by its header or name"}
    size = {"seed": 0, "width": 0, "height": 0, "batch_size": 1}
    graph = {"drawn": node("TDMGenerate", prompt="two red stars above a blue moon at night", **beginner, **size)}
    (picture,) = installed.pictures(graph, ["drawn", 0])
    assert picture.shape == (1, 64, 64, 3)
    assert picture.to(torch.float32).std() > 20


def test_comfyui_reads_our_metadata_and_the_tests_run_the_oldest_version_that_it_promises(installed: Server) -> None:
    code = "import json, sys; from comfy_config.config_parser import extract_node_configuration as read\n"
    code += "print(json.dumps(read(sys.argv[1]).model_dump()))"
    command = [install.python(), "-c", code, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=install.server_folder(), check=True)
    read = json.loads(done.stdout)
    project, comfy = read["project"], read["tool_comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", project["name"])
    assert "comfy" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"]["text"] == "Apache-2.0"
    assert project["supported_os"] == ["OS Independent"]
    assert comfy["display_name"]
    version = installed.get("system_stats")["system"]["comfyui_version"]
    assert project["supported_comfyui_version"] == f">={version}"


def test_the_manager_installs_what_the_package_needs_but_no_other_torch() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == [each for each in PROJECT["dependencies"] if not each.startswith("torch>")]


def test_icon_and_banner_have_the_registrys_shapes() -> None:
    icon, banner = (Image.open(ROOT / "docs" / f"{name}.png").size for name in ("icon", "banner"))
    assert icon[0] == icon[1] <= 400
    assert banner[0] * 9 == banner[1] * 21


def test_the_archive_has_no_eval_no_exec_and_installs_nothing(archive: Path) -> None:
    """The checks of `comfy node validate`, and the registry's standards."""
    rules = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "S102,S307,S602,S603,E702", archive]
    checked = subprocess.run(rules, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
