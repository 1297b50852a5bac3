"""The pack as ComfyUI and its front end see it, and without ComfyUI."""

from __future__ import annotations

import asyncio
import re

import pytest
import tdm
from tdm.errors import TDMError

from .server import Server

NODES = ("TDMLoadStudent", "TDMSigmas", "TDMSampler", "TDMCogVideoXSampling", "TDMPixArtAlphaLatents")


def test_the_server_has_the_nodes_and_each_explains_itself(server: Server) -> None:
    known = server.get("object_info")
    assert {name for name, shown in known.items() if "tdm_pack" in shown["python_module"]} == set(NODES)
    for name in NODES:
        shown = known[name]
        assert "TDM " in shown["display_name"]
        assert shown["category"] == "sampling/TDM"
        assert shown["description"]
        assert shown["search_aliases"]
        groups = (shown["input"].get(kind, {}) for kind in ("required", "optional"))
        inputs = [each for group in groups for each in group.values()]
        assert inputs
        assert all(len(each) == 2 and each[1]["tooltip"] for each in inputs)
        assert all(shown["output_tooltips"])


def test_the_pack_imports_in_less_than_a_second(server: Server) -> None:
    """As ComfyUI measures it, beyond what it has imported itself."""
    (seconds,) = re.findall(r"([\d.]+) seconds.*tdm_pack", server.log.read_text())
    assert float(seconds) < 1


def test_students_are_chosen_by_name_and_those_of_other_methods_are_not_offered(server: Server) -> None:
    shown = server.get("object_info/TDMSigmas")["TDMSigmas"]["input"]["required"]["student"]
    assert "Luo-Yihong/TDM_sd3_lora" in shown[1]["options"]
    assert not [name for name in shown[1]["options"] if "LCM" in name or "Hyper" in name]


def test_outside_of_comfyui_the_entry_point_says_where_it_belongs() -> None:
    with pytest.raises(TDMError, match=r"the nodes run inside ComfyUI .* custom_nodes"):
        asyncio.run(tdm.comfy_entrypoint())  # type: ignore[attr-defined]
