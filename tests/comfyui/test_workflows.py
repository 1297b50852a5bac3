"""The example workflows in the real front end, opened by a real browser as a user opens them, and run."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect
from safetensors.torch import save_file
from tdm.tests import tiny
from tdm.tests.browser import chromium
from tdm.tests.pipelines.lora_files import LAYOUTS, Update, tensors_of
from tdm.tests.pipelines.students import lora_for
from tdm.training.worlds.stickers.scene import Group, Scene
from tdm.training.worlds.stickers.verify import verify

from . import bundled_workflows, install, tiny_sd15
from .conftest import Checkpoint
from .front_end import FrontEnd
from .server import Graph, PromptError, Server
from .test_bridge import loaded
from .workflow import HUB
from .workflows import FOLDER, WORKFLOWS, stand_ins

STARS = Scene("night", (Group(2, "red", "star"), Group(1, "blue", "moon")), "above")
REDRAWN = Scene("night", (Group(2, "yellow", "star"), Group(1, "green", "moon")), "above")
BUNDLED = {name: REDRAWN if name == "tdm-image-to-image" else STARS for name in bundled_workflows.BUNDLED}
SYNTHESISED = [name for name, each in WORKFLOWS.items() if each.too_large is None and name not in BUNDLED]


class Opened(NamedTuple):
    """A workflow after it was opened.

    Attributes:
        complaints: what the front end shows a user about it.
        errors: what it wrote to the console.
        prompt: what Run would send.
    """

    complaints: str
    errors: list[str]
    prompt: Graph


Open = Callable[[str], Opened]


@pytest.fixture(scope="module")
def models(server: Server, checkpoint: Checkpoint) -> Path:
    """The server's, with small weights under the names that the workflows use; empty files where they cannot be."""
    stand_ins(server.models)
    small = server.models / "checkpoints" / checkpoint.file
    (server.models / "checkpoints" / "DreamShaper_7_pruned.safetensors").unlink()
    (server.models / "checkpoints" / "DreamShaper_7_pruned.safetensors").hardlink_to(small)
    (server.models / "loras" / "add_detail.safetensors").unlink()
    (server.models / "loras" / "add_detail.safetensors").hardlink_to(server.models / "loras" / checkpoint.style)
    pairs = tiny_sd15.lora(checkpoint.unet)
    student = [Update("unet", name, (name,), *pair) for name, pair in pairs.items()]
    torch.save(tensors_of(LAYOUTS["kohya"], student), server.models / "loras" / "tdm_dreamshaper.pt")
    video = tiny.build("cogvideox")
    video.save_pretrained(server.models / "diffusers" / "CogVideoX-2b")
    save_file(lora_for(video.transformer), server.models / "loras" / "tdm_cogvideox_2b_lora.safetensors")
    return server.models


@pytest.fixture(scope="module", params=["own", "newest"])
def front_end(request: pytest.FixtureRequest, server: Server, models: Path) -> Iterator[FrontEnd]:  # noqa: ARG001
    """The server's own front end, and the newest one."""
    at = server if request.param == "own" else request.getfixturevalue("newest_server")
    with chromium() as browser:
        yield FrontEnd(browser, at.address)


@pytest.fixture(scope="module", params=["own on the canvas", "newest in Nodes 2.0"])
def rendering(request: pytest.FixtureRequest, server: Server, models: Path) -> Iterator[FrontEnd]:  # noqa: ARG001
    nodes_2 = request.param.endswith("2.0")
    at = request.getfixturevalue("newest_server") if nodes_2 else server
    with chromium() as browser:
        yield FrontEnd(browser, at.address, nodes_2=nodes_2)


@pytest.fixture(scope="module")
def opened(front_end: FrontEnd) -> Open:
    """Opens each workflow once."""

    @functools.cache
    def open_template(name: str) -> Opened:
        front_end.errors.clear()
        complaints = front_end.open_template(name)
        return Opened(complaints, list(front_end.errors), front_end.prompt())

    return open_template


@pytest.mark.parametrize("name", WORKFLOWS)
def test_it_opens_without_a_complaint(opened: Open, name: str) -> None:
    """No node is missing, and no file: each is in the folder that the note names."""
    assert (opened(name).complaints, opened(name).errors) == ("", [])


@pytest.mark.parametrize("name", WORKFLOWS)
def test_run_would_send_the_prompt_that_it_was_made_of(opened: Open, name: str) -> None:
    made_of = WORKFLOWS[name].graph.items()
    assert opened(name).prompt == {
        number: {key: each[key] for key in ("class_type", "inputs")} for number, each in made_of
    }


@pytest.mark.parametrize("name", WORKFLOWS)
def test_its_note_names_all_of_its_files(name: str) -> None:
    nodes = WORKFLOWS[name].graph.values()
    texts = [value for each in nodes for value in each["inputs"].values() if isinstance(value, str)]
    named = {Path(text).name for text in texts if text.endswith((".safetensors", ".ckpt", ".pt"))}
    (note,) = (node for node in saved(name)["nodes"] if node["type"] == "MarkdownNote")
    assert {Path(file).name for file in WORKFLOWS[name].files} >= named
    assert all(f"**{file}**" in note["widgets_values"][0] for file in WORKFLOWS[name].files)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_node_covers_another(rendering: FrontEnd, name: str) -> None:
    """This also holds after a run, when the nodes show their texts and pictures."""
    rendering.open(saved(name))
    if name in BUNDLED:
        rendering.run()
        rendering.page.wait_for_timeout(1000)
    boxes = rendering.boxes()
    assert len(boxes) == len(saved(name)["nodes"])
    for (one, (x, y, width, height)), (other, (left, top, w, h)) in itertools.combinations(boxes.items(), 2):
        beside = x + width <= left or left + w <= x
        below = y + height <= top or top + h <= y
        assert beside or below, f"nodes {one} and {other}"


def test_what_the_nodes_say_stays_and_is_there_when_they_come_from_the_cache(rendering: FrontEnd) -> None:
    rendering.open(saved("tdm-compare"))
    prompt = rendering.prompt()
    for _ in range(2):
        rendering.run()
        rendering.page.wait_for_timeout(1000)
        texts = "\n".join(rendering.texts())
        for message in (
            "PixArtAlphaPipeline",
            "66 layers matched",
            "timesteps 1000, 857.143",
            "student: 4 network calls",
        ):
            assert texts.count(message) == 1, message
        rendering.open(rendering.saved())  # as a page that was loaded again: the loaders are in the server's cache
    after = rendering.prompt()
    for number, node in prompt.items():
        node["inputs"].pop("seed", None)
        after[number]["inputs"].pop("seed", None)
    assert after == prompt
    assert "network calls" not in json.dumps([node.get("widgets_values") for node in rendering.saved()["nodes"][:-1]])


def test_prompt_weights_that_are_not_applied_are_said_on_the_prompts_node(rendering: FrontEnd, server: Server) -> None:
    tiny.build("sana").save_pretrained(server.models / "diffusers" / "sana")
    graph = loaded("sana")
    graph["prompt"]["inputs"]["text"] = "a (red:1.3) cube"
    graph["save"] = {"class_type": "SaveLatent", "inputs": {"samples": ["samples", 0], "filename_prefix": "brackets"}}
    rendering.from_prompt(graph)
    widgets = "app.graph._nodes.find(node => node.type === 'CLIPTextEncode').widgets"
    for _ in range(2):  # the second from the server's cache
        rendering.run()
        rendering.page.wait_for_timeout(1000)
        text = "The text encoder of sana has no prompt weights: it reads '(red:1.3)' as text."
        assert rendering.texts().count(text) == 1
        assert rendering.page.evaluate(f"{widgets}.map(each => each.value)") == ["a (red:1.3) cube", text]
    (prompt,) = (each for each in rendering.saved()["nodes"] if each["type"] == "CLIPTextEncode")
    assert prompt["widgets_values"] == ["a (red:1.3) cube"]
    assert "prompt weights" not in json.dumps(rendering.prompt())
    rendering.page.evaluate(f"{widgets}[0].value = 'a red cube'")
    rendering.run()
    rendering.page.wait_for_timeout(1000)
    assert not [text for text in rendering.texts() if "prompt weights" in text]
    assert rendering.page.evaluate(f"{widgets}.map(each => each.value)") == ["a red cube"]


@pytest.mark.parametrize("name", [name for name, each in WORKFLOWS.items() if each.files])
def test_the_front_end_can_fetch_its_files(name: str) -> None:
    """Each loader knows the address of its file. The front end makes a download button of it."""
    nodes = saved(name)["nodes"]
    known = [model for node in nodes for model in node["properties"].get("models", [])]
    files = [Path(file).name for file, url in WORKFLOWS[name].files.items() if "/resolve/main/" in url]
    if name in ("tdm-sd3", "tdm-cogvideox-2b"):  # whose student's file has a name that we do not know
        assert not any(file.startswith("tdm_") for file in files)
        assert "There is no download button for it" in WORKFLOWS[name].note
    assert sorted(model["name"] for model in known) == sorted(files)
    for model in known:
        assert f"{model['directory']}/{model['name']}" in WORKFLOWS[name].files
        assert re.fullmatch(rf"{HUB}[^/]+/[^/]+/resolve/main/.+", model["url"])
    for node in nodes:
        names = [model["name"] for model in node["properties"].get("models", [])]
        assert names == [
            value for value in node.get("widgets_values", []) if value in {model["name"] for model in known}
        ]


def test_files_that_are_missing_have_buttons(comfyui_installed: None, tmp_path: Path) -> None:  # noqa: ARG001
    server = Server(tmp_path / "server", front_end=install.newest_front_end())
    try:
        with chromium() as browser:
            front_end = FrontEnd(browser, server.address)
            complaint = front_end.open_template("tdm-sd3.5-medium")
            assert "issues found" in complaint.lower()
            front_end.page.get_by_test_id("error-overlay").get_by_role("button", name="View details").click()
            expect(front_end.page.get_by_text("Download all")).to_be_visible()
    finally:
        server.stop()


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_model_draws_what_the_prompt_says(server: Server, name: str) -> None:
    for picture in pictures(server, WORKFLOWS[name].graph):
        small = torch.from_numpy(picture[::6, ::6]).permute(2, 0, 1)  # they were enlarged six times
        halves = small.split(64, dim=2)  # teacher and student, side by side
        assert all(verdict.correct for verdict in verify(torch.stack(halves), [BUNDLED[name]] * len(halves)))


@pytest.mark.parametrize("name", SYNTHESISED)
def test_it_runs_on_weights_of_its_kind(server: Server, models: Path, name: str) -> None:  # noqa: ARG001
    """The weights are random and small, in the right layout and under the right names."""
    prompt = copy.deepcopy(WORKFLOWS[name].graph)
    for each in prompt.values():
        sizes = {"width": 64, "height": 64, "length": 9}
        each["inputs"] |= {key: size for key, size in sizes.items() if key in each["inputs"]}
    if name == "tdm-cogvideox-2b":
        (video,) = files(server, prompt)
        assert video.suffix == ".mp4"
        return
    (picture,) = pictures(server, prompt)
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 1
    without = copy.deepcopy(prompt)
    (student,) = (each for each in without.values() if each["class_type"] == "TDMLoadStudent")
    student["inputs"]["strength"] = 0.0
    assert not np.array_equal(picture, pictures(server, without)[0])


@pytest.mark.parametrize("name", [name for name, each in WORKFLOWS.items() if each.too_large])
def test_the_server_takes_it_and_gets_as_far_as_the_weights(server: Server, models: Path, name: str) -> None:  # noqa: ARG001
    """These weights cannot be made small (`Workflow.too_large` says why), so they are empty files here."""
    with pytest.raises(PromptError, match="header"):
        server.run(WORKFLOWS[name].graph)


def test_the_template_browser_shows_all_with_their_pictures(server: Server, front_end: FrontEnd) -> None:
    assert sorted(server.get("api/workflow_templates")["tdm_pack"]) == sorted(WORKFLOWS)
    assert {file.name for file in FOLDER.iterdir()} == {
        f"{name}{end}" for name in WORKFLOWS for end in (".json", ".jpg")
    }
    front_end.browse_templates()
    cards = front_end.page.locator("[data-testid^=template-workflow-tdm-]")
    expect(cards).to_have_count(len(WORKFLOWS))
    shown = [card.get_attribute("data-testid") for card in cards.all()]
    first, *others = [name.removeprefix("template-workflow-") for name in shown if name]
    assert first == "tdm-first-picture"
    assert others == sorted(others)
    for name in WORKFLOWS:
        card = front_end.page.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()
        thumbnail = card.locator("img").first
        front_end.page.wait_for_function("img => img.complete", arg=thumbnail.element_handle())
        with Image.open(FOLDER / f"{name}.jpg") as picture:
            assert thumbnail.evaluate("img => [img.naturalWidth, img.naturalHeight]") == list(picture.size)
        assert (FOLDER / f"{name}.jpg").stat().st_size < 150_000
    front_end.page.keyboard.press("Escape")


def saved(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def files(server: Server, prompt: Graph) -> list[Path]:
    """What the nodes that save write."""
    outputs = server.run(prompt).outputs.values()
    records = [file for output in outputs for key in ("images", "video") for file in output.get(key, [])]
    return [server.output / file["subfolder"] / file["filename"] for file in records if file["type"] == "output"]


def pictures(server: Server, prompt: Graph) -> list[np.ndarray]:
    return [np.array(Image.open(file).convert("RGB")) for file in files(server, prompt)]
