"""The endpoints, called by the real clients."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import math
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from safetensors.torch import load_file
from tdm.cli import main
from tdm.pipelines.bases import bundled_path
from tdm.pipelines.students.file import Student, read_student, save_student
from tdm.tests.app.conftest import App

PROMPT = "a green heart on the beach"


def bundled() -> dict[int, list[float]]:
    """The grids of the student that ships."""
    recipe = read_student(bundled_path() / "student.safetensors").recipe
    assert recipe is not None
    return recipe.trained_timesteps


@pytest.fixture(scope="module")
def client(app: App) -> Client:
    return Client(app.url, verbose=False)


def test_info_says_what_is_served(client: Client) -> None:
    info = client.predict(api_name="/info")
    assert (info["base"], info["default_steps"], info["students"][0]) == ("bundled", 4, "bundled")
    assert info["trained_timesteps"] == {str(k): grid for k, grid in bundled().items()}


def test_the_endpoints_are_named_and_explained(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(endpoints) == {"/generate", "/compare", "/explore", "/trajectory", "/info"}
    assert "few-step TDM student" in endpoints["/generate"]["description"]


def test_a_seed_gives_the_picture_of_tdm_generate(client: Client, tmp_path: Path) -> None:
    path, record = client.predict(PROMPT, 7, 2, api_name="/generate")
    assert main(["generate", PROMPT, "--seed", "7", "--steps", "2", "--out", str(tmp_path / "a.png")]) == 0
    ours, theirs = Image.open(path), Image.open(tmp_path / "a.png")
    assert ours.tobytes() == theirs.tobytes()
    assert (record["calls"], record["steps"], record["width"]) == (2, 2, 64)
    settings, written = json.loads(ours.info["tdm"]), json.loads(theirs.info["tdm"])
    assert ours.info["prompt"] == PROMPT
    assert settings.items() >= written.items()


def test_a_student_with_fresh_noise_draws_the_picture_of_tdm_generate(
    client: Client, students: Path, tmp_path: Path
) -> None:
    recipe, tensors = (
        read_student(bundled_path() / "student.safetensors").recipe,
        load_file(bundled_path() / "student.safetensors"),
    )
    assert recipe is not None
    file = students / "fresh.safetensors"
    save_student(file, Student.from_state_dict(dataclasses.replace(recipe, stochastic_sampling=True), tensors))
    drawn = [client.predict(PROMPT, 7, student="students/fresh.safetensors", api_name="/generate")[0] for _ in "ab"]
    plain, _ = client.predict(PROMPT, 7, api_name="/generate")
    assert main(["generate", PROMPT, "--seed", "7", "--student", str(file), "--out", str(tmp_path / "a.png")]) == 0
    first, repeated, ours, other = (Image.open(path).tobytes() for path in (*drawn, tmp_path / "a.png", plain))
    assert first == repeated == ours != other


def test_more_variety_is_the_picture_of_tdm_generate_base_first(client: Client, tmp_path: Path) -> None:
    path, record = client.predict(PROMPT, 7, base_first=True, api_name="/generate")
    plain, _ = client.predict(PROMPT, 7, api_name="/generate")  # which leaves nothing of it behind
    ours, theirs = tmp_path / "a.png", tmp_path / "b.png"
    assert main(["generate", PROMPT, "--seed", "7", "--base-first", "--out", str(ours)]) == 0
    assert main(["generate", PROMPT, "--seed", "7", "--out", str(theirs)]) == 0
    assert Image.open(path).tobytes() == Image.open(ours).tobytes()
    assert Image.open(plain).tobytes() == Image.open(theirs).tobytes() != Image.open(ours).tobytes()
    assert (record["calls"], record["base_first"]) == (4, True)
    with pytest.raises(AppError, match="so that one is left for the student"):
        client.predict(PROMPT, 7, 1, base_first=True, api_name="/generate")


def test_every_step_is_streamed(client: Client) -> None:
    job = client.submit(PROMPT, 1, 8, api_name="/generate")
    job.result()
    assert [record["step"] for picture, record in job.outputs() if picture is None] == list(range(1, 9))


def test_compare_has_the_student_before_the_teacher_begins(client: Client) -> None:
    job = client.submit(PROMPT, 3, api_name="/compare")
    student, teacher, record = job.result()
    states = [(record.get("teacher_calls", 0), done) for done, _, record in job.outputs()]
    assert any(calls <= 6 and done for calls, done in states)  # at step 3 of the teacher, or before
    assert (record["student_calls"], record["teacher_calls"]) == (4, 100)
    assert record["student_seconds"] < record["teacher_seconds"]
    assert Image.open(student).tobytes() != Image.open(teacher).tobytes()


def test_explore_and_trajectory_give_one_sheet(client: Client) -> None:
    table, record = client.predict([PROMPT], [1, 4], 2, 5, api_name="/explore")
    assert record == {"prompts": [PROMPT], "steps": [1, 4], "seeds": [5, 6]}
    assert Image.open(table).width > 2 * 128
    strip, record = client.predict(PROMPT, 0, api_name="/trajectory")
    assert record["timesteps"] == pytest.approx(bundled()[4], abs=1e-3)
    assert Image.open(strip).width > 5 * 128


@pytest.mark.parametrize(
    ("endpoint", "arguments", "message"),
    [
        ("/generate", ["x" * 10_000], "10,000 characters; at most 2,000"),
        ("/generate", ["  "], "the prompt is empty"),
        ("/generate", [None], "the prompt is empty"),
        ("/generate", ["a \x00 star"], "control characters"),
        ("/generate", [PROMPT, -1], "seed must be 0 to"),
        ("/generate", [PROMPT, 2**60], "seed must be 0 to"),
        ("/generate", [PROMPT, 0.5], "seed must be a whole number"),
        ("/generate", [PROMPT, "seven"], "seed must be a whole number, not 'seven'"),
        ("/generate", [PROMPT, True], "seed must be a whole number"),
        ("/generate", [PROMPT, 0, 0], "steps must be 1 to 50"),
        ("/generate", [PROMPT, 0, 4, 60], "multiples of 8"),
        ("/generate", [PROMPT, 0, 4, 65536, 65536], "width must be"),
        ("/generate", [PROMPT, 0, 4, 136, 136], "too large here"),
        ("/generate", [PROMPT, 0, 4, 64, 64, "/etc/passwd"], "no student '/etc/passwd' here"),
        ("/generate", [PROMPT, 0, 4, 64, 64, {"a": 1}], "no student"),
        ("/compare", [PROMPT, 0, 51], "steps must be 1 to 50"),
        ("/explore", [[PROMPT], [1, 2, 3, 4, 5, 6, 7, 8, 9], 8], "72 pictures are too many"),
        ("/explore", [[PROMPT, PROMPT], [1, 2]], "not both"),
        ("/explore", [[], [1]], "a prompt at least"),
        ("/trajectory", [PROMPT, 0, 99], "steps must be 1 to 50"),
    ],
)
def test_a_wrong_value_gets_one_clear_line(client: Client, endpoint: str, arguments: list[Any], message: str) -> None:
    with pytest.raises(AppError) as refused:
        client.predict(*arguments, api_name=endpoint)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number_at_all_is_told_so(app: App, value: float) -> None:
    """Python's own client refuses to send a missing number; other clients do send it."""
    body = json.dumps({"data": [PROMPT, value, None, None, None, None, False]}).encode()
    request = urllib.request.Request(f"{app.url}/gradio_api/call/generate", body, {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request))["event_id"]
    answer = urllib.request.urlopen(f"{app.url}/gradio_api/call/generate/{event}").read().decode()
    assert "event: error" in answer
    assert f"seed must be a whole number, not '{value}'" in answer


def test_a_language_model_draws_through_mcp(app: App) -> None:
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def call() -> tuple[dict[str, Any], Any, Any]:
        url = f"{app.url}/gradio_api/mcp/"
        async with streamablehttp_client(url) as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            drawn = await session.call_tool("generate", {"prompt": PROMPT, "seed": 7, "steps": 2})
            return tools, drawn, await session.call_tool("generate", {"prompt": ""})

    results: list[Any] = []  # in a thread: the browser's client has a loop in this one
    thread = threading.Thread(target=lambda: results.append(asyncio.run(call())))
    thread.start()
    thread.join()
    ((tools, drawn, refused),) = results
    assert set(tools) >= {"generate", "compare", "explore", "trajectory", "info"}
    assert "at most 2,000 characters" in json.dumps(tools["generate"].inputSchema)
    image = next(part for part in drawn.content if part.type == "image")
    assert Image.open(io.BytesIO(base64.b64decode(image.data))).size == (64, 64)
    assert refused.isError
    assert "the prompt is empty" in refused.content[0].text
