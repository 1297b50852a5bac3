"""The pack as ComfyUI and its front end see it, and without ComfyUI."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tdm
from tdm.errors import TDMError

from . import install
from .server import Server

NODES = (
    "TDMLoadStudent",
    "TDMLoadDiffusers",
    "TDMSigmas",
    "TDMSampler",
    "TDMGenerate",
    "TDMCompare",
    "TDMCogVideoXSampling",
    "TDMPixArtAlphaLatents",
)


def test_the_server_has_the_nodes_and_each_explains_itself(server: Server) -> None:
    known = server.get("object_info")
    assert {name for name, shown in known.items() if "tdm_pack" in shown["python_module"]} == set(NODES)
    for name in NODES:
        shown = known[name]
        assert shown["display_name"] != name
        assert shown["category"] == "model/sampling/TDM"
        assert shown["description"]
        assert shown["search_aliases"]
        groups = (shown["input"].get(kind, {}) for kind in ("required", "optional"))
        inputs = [each for group in groups for each in group.values()]
        assert inputs
        assert all(len(each) == 2 and each[1]["tooltip"] for each in inputs)
        assert all(shown["output_tooltips"])


def test_students_are_chosen_by_name_and_those_of_other_methods_are_not_offered(server: Server) -> None:
    shown = server.get("object_info/TDMSigmas")["TDMSigmas"]["input"]["required"]["student"]
    assert "Luo-Yihong/TDM_sd3_lora" in shown[1]["options"]
    assert not [name for name in shown[1]["options"] if "LCM" in name or "Hyper" in name]


def test_the_nodes_are_there_at_once_and_without_what_only_the_loaders_need(server: Server) -> None:
    """A user whose ComfyUI has not got it, or a broken one, has these nodes; the loaders say what they need.

    That the pack imports nothing but ComfyUI's own is also what makes its import quick.
    """
    code = f"""
import asyncio, importlib.util, sys
sys.argv = ["main.py", "--cpu"]
sys.path[:1] = [{str(install.server_folder())!r}, {str(Path(__file__).parent)!r}]
import torchvision_ops
for name in ("diffusers", "peft", "accelerate", "matplotlib"):
    sys.modules[name] = None
import comfy.options
comfy.options.enable_args_parsing()
import comfy_api.latest, comfy_execution.graph_utils, comfy_extras.nodes_custom_sampler, nodes, server
before = set(sys.modules)
folder = {str(server.folder / "custom_nodes" / "tdm_pack")!r}
spec = importlib.util.spec_from_file_location("pack", folder + "/__init__.py", submodule_search_locations=[folder])
pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
extension = asyncio.run(pack.comfy_entrypoint())
nodes = {{node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}}
print(*nodes)
print(*{{name.split(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names))
calls = {{
    "TDMLoadStudent": (None, "student.safetensors", "", 1.0),
    "TDMLoadDiffusers": ("bundled",),
    "TDMGenerate": ("bundled", "bundled", "by its header or name", "", 0, 0, 0, 1),
}}
for name, inputs in calls.items():
    try:
        nodes[name].execute(*inputs)
    except ValueError as error:
        print(error)
"""
    command = [install.python(), "-c", code]
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    nodes, imported, student, pipeline, generate = done.stdout.splitlines()
    assert tuple(nodes.split()) == NODES
    assert imported == "pack"
    assert student.startswith("Load TDM Student needs diffusers and peft")
    assert pipeline.startswith("Load Diffusers Pipeline needs diffusers")
    assert generate.startswith("the bundled student needs diffusers and peft (pip install -r requirements.txt)")


def test_outside_of_comfyui_the_entry_point_says_where_it_belongs() -> None:
    with pytest.raises(TDMError, match="put this folder into its custom_nodes"):
        asyncio.run(tdm.comfy_entrypoint())  # type: ignore[attr-defined]


@pytest.mark.parametrize("lacks", ["comfy_api", "io", "a part of ComfyUI"])
def test_an_older_comfyui_is_named(monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    """Some have `comfy_api.latest` and no `io` in it; others have that and lack what a node imports."""
    latest = types.ModuleType("comfy_api.latest")
    latest.ComfyExtension = object  # type: ignore[attr-defined]
    if lacks == "a part of ComfyUI":
        latest.io = latest.ui = types.SimpleNamespace(ComfyNode=object)  # type: ignore[attr-defined]
    if lacks != "comfy_api":
        monkeypatch.setitem(sys.modules, "comfy_api", types.ModuleType("comfy_api"))
        monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    with pytest.raises(TDMError, match=r"ComfyUI 0\.30 or newer"):
        asyncio.run(tdm.comfy_entrypoint())  # type: ignore[attr-defined]
