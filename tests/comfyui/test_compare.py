"""TDM Compare: both pictures are those of the workflows that it stands for, and its counts are those of the network."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from .conftest import Checkpoint
from .graphs import SEED, node, student_graph
from .server import Graph, PromptError, Server
from .test_generate import from_file, long

TEACHER = {"steps": 6, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def compared(graph: Graph, teacher: list[Any], positive: list[Any], negative: list[Any], **options: Any) -> Graph:
    """`graph` has the nodes "sigmas", "sampler", "latent" and "base"."""
    links = {"teacher": teacher, "student": ["sigmas", 0], "positive": positive, "negative": negative}
    links |= {"vae": ["base", 2], "latent_image": ["latent", 0]}
    links |= {"student_sampler": ["sampler", 0], "student_sigmas": ["sigmas", 1]}
    return {**graph, "both": node("TDMCompare", **{**links, **TEACHER, "student_cfg": 1.0, "seed": SEED, **options})}


def on_the_formula(checkpoint: Checkpoint, *, seconds: float = 0.0, **options: Any) -> Graph:
    """A teacher that is its own student, and costs nothing; the pictures are the VAE's."""
    graph = {**student_graph("epsilon", timesteps=[899, 674, 449, 224], seconds=seconds), "base": from_file(checkpoint)}
    graph["other"] = node("TestModel", kind="epsilon", shift=1.0, context=0.5, seconds=0.0)
    return compared(graph, ["model", 0], ["model", 1], ["other", 1], **options)


def report(server: Server, graph: Graph) -> str:
    return str(server.run({**graph, "look": node("PreviewAny", source=["both", 3])}).outputs["look"]["text"][0])


def test_both_pictures_are_those_of_the_two_workflows(server: Server, checkpoint: Checkpoint) -> None:
    graph = long(from_file(checkpoint), checkpoint.student(), 64, 64, batch_size=2, seed=SEED)
    graph["nothing"] = node("CLIPTextEncode", clip=["base", 1], text="")
    prompts = {"positive": ["prompt", 0], "negative": ["nothing", 0]}
    graph["alone"] = node("KSampler", model=["base", 0], latent_image=["latent", 0], seed=SEED, **TEACHER, **prompts)
    graph["teacher"] = node("VAEDecode", samples=["alone", 0], vae=["base", 2])
    graph = compared(graph, ["base", 0], *prompts.values())
    links = [["both", 0], ["both", 1], ["both", 2], ["teacher", 0], ["drawn", 0]]
    teacher, student, both, expected_teacher, expected_student = server.pictures(graph, *links)
    assert torch.equal(teacher, expected_teacher)
    assert torch.equal(student, expected_student)
    assert torch.equal(both, torch.cat([teacher, student], dim=2))
    assert not torch.equal(teacher, student)
    lines = r"teacher: 12 network calls, \d+\.\d\d s per picture\nstudent: 4 network calls, \d+\.\d\d s per picture"
    assert re.fullmatch(lines, report(server, graph))


def test_the_bundled_student_is_compared_with_its_teacher(server: Server) -> None:
    graph = long(node("TDMLoadDiffusers", pipeline="bundled"), "bundled", 64, 64, seed=SEED)
    graph["nothing"] = node("CLIPTextEncode", clip=["base", 1], text="")
    graph = compared(graph, ["base", 0], ["prompt", 0], ["nothing", 0], scheduler="simple", steps=50)
    teacher, student, drawn = server.pictures(graph, ["both", 0], ["both", 1], ["drawn", 0])
    assert torch.equal(student, drawn)
    assert teacher.shape == student.shape == (1, 64, 64, 3)
    lines = r"teacher: 100 network calls, \d+\.\d\d s\nstudent: 4 network calls, \d+\.\d\d s"
    assert re.fullmatch(lines, report(server, graph))


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"steps": 50}, (100, 4)),
        ({"cfg": 1.0}, (6, 4)),
        ({"sampler_name": "heun"}, (22, 4)),  # two evaluations in each step except the last
        ({"denoise": 0.5, "latent_image": ["picture", 0]}, (12, 4)),  # 6 of 12 steps
        ({"student_cfg": 2.0}, (12, 8)),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_every_call_of_the_network_is_counted(
    server: Server, checkpoint: Checkpoint, options: dict[str, Any], calls: tuple[int, int]
) -> None:
    graph = on_the_formula(checkpoint, **options)
    graph["picture"] = graph["samples"]
    counts = re.findall(r"(\d+) network calls", report(server, graph))
    assert tuple(map(int, counts)) == calls


def test_seconds_are_those_of_the_sampling(server: Server, checkpoint: Checkpoint) -> None:
    graph = on_the_formula(checkpoint, seconds=0.1)
    graph["latent"]["inputs"]["batch_size"] = 1
    teacher, student = map(float, re.findall(r"([\d.]+) s", report(server, graph)))
    assert teacher >= 0.6  # 6 steps, prompt and negative prompt in one batch
    assert student >= 0.4


def test_progress_previews_and_the_report_are_shown(server: Server, checkpoint: Checkpoint) -> None:
    graph = on_the_formula(checkpoint, seed=99)
    graph |= {"shown": node("PreviewImage", images=["both", 2]), "look": node("PreviewAny", source=["both", 3])}
    run = server.run(graph)
    assert run.outputs["both"]["text"] == run.outputs["look"]["text"]  # what the node shows
    steps = [e["data"]["value"] for e in run.events if e["type"] == "progress" and e["data"]["node"] == "both"]
    assert steps == [1, 2, 3, 4, 5, 6, 1, 2, 3, 4]
    assert run.previews >= 10


def test_it_can_be_interrupted(server: Server, checkpoint: Checkpoint) -> None:
    graph = on_the_formula(checkpoint, seconds=0.2, steps=100)

    def stop(event: dict[str, Any]) -> None:
        if event["type"] == "progress" and event["data"]["value"] == 2:
            server.post("interrupt", {})

    with pytest.raises(PromptError, match="interrupted"):
        server.run({**graph, "shown": node("PreviewImage", images=["both", 2])}, stop)
    assert report(server, on_the_formula(checkpoint))


def test_two_models_that_cannot_be_compared_are_refused(server: Server, checkpoint: Checkpoint) -> None:
    graph = on_the_formula(checkpoint)
    graph["video"] = node("TestModel", kind="cogvideox", shift=1.0, context=0.0, seconds=0.0)
    graph["both"]["inputs"]["teacher"] = ["video", 0]
    with pytest.raises(PromptError, match="must be of one base; these are a CogVideoX and a BaseModel"):
        report(server, graph)
