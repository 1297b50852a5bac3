"""A server that lives on: after an interrupted run, from one workflow to the next, and over many prompts."""

from __future__ import annotations

import itertools
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import Checkpoint
from .graphs import SEED, node, student_graph
from .server import Graph, PromptError, Server
from .test_generate import from_file, long

GRID: list[float] = [899, 674, 449, 224]
_nonces = itertools.count()


def fresh(graph: Graph) -> Graph:
    """The same workflow, sampled again although the server has its result."""
    renewed = node("TestFresh", latent=["latent", 0], nonce=next(_nonces))
    sampler = graph["samples"]
    return {**graph, "again": renewed, "samples": node(**_with(sampler, latent_image=["again", 0]))}


def _with(original: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    return {"class_type": original["class_type"], **original["inputs"], **inputs}


def sampled(server: Server, graph: Graph) -> Tensor:
    return server.latents(fresh(graph), ["samples", 0])[0]


def stock(kind: str) -> Graph:
    """The same MODEL without our nodes."""
    return {
        "model": student_graph(kind)["model"],
        "latent": node("EmptyLatentImage", width=64, height=64, batch_size=2),
        "samples": node(
            "KSampler",
            model=["model", 0],
            positive=["model", 1],
            negative=["model", 1],
            latent_image=["latent", 0],
            seed=SEED,
            steps=4,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
    }


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction"])
def test_workflows_leave_nothing_in_each_other(server: Server, kind: str) -> None:
    """One MODEL stays in memory: a stock workflow, ours on two grids, and both repeated."""
    ours = student_graph(kind, timesteps=GRID)
    first = sampled(server, stock(kind)), sampled(server, ours)
    sampled(server, student_graph(kind, timesteps=[499, 249], order=2))
    second = sampled(server, stock(kind)), sampled(server, ours)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(*first)


def test_cutting_a_schedule_again_is_cutting_it_once(server: Server) -> None:
    """A second TDM Sigmas on the MODEL of a first one may begin above it."""
    for kind in ("epsilon", "flow_prediction"):
        graph = student_graph(kind, timesteps=GRID)
        (once,) = server.latents(graph, ["samples", 0])
        graph["before"] = node(**_with(graph["sigmas"], timesteps="499, 249"))
        graph["sigmas"]["inputs"]["model"] = ["before", 0]
        (twice,) = server.latents(graph, ["samples", 0])
        assert torch.equal(once, twice)


def test_an_interrupted_run_ends_at_once_and_the_next_one_is_whole(server: Server) -> None:
    expected = sampled(server, student_graph("epsilon", timesteps=GRID))
    progress: list[int] = []

    def stop(event: dict[str, Any]) -> None:
        if event["type"] == "progress":
            progress.append(event["data"]["value"])
            if len(progress) == 1:
                server.post("interrupt", {})

    slow = student_graph("epsilon", timesteps=list(range(900, 100, -20)), seconds=0.2)
    slow["end"] = node("SaveLatent", samples=["samples", 0], filename_prefix="interrupted")
    with pytest.raises(PromptError, match="interrupted"):
        server.run(slow, stop)
    assert 1 <= progress[-1] < 20
    assert torch.equal(sampled(server, student_graph("epsilon", timesteps=GRID)), expected)


def test_out_of_memory_fails_one_prompt(server: Server, checkpoint: Checkpoint) -> None:
    """Torch is refused the memory in the midst of a real network; ComfyUI reports it, and goes on."""
    graph = long(from_file(checkpoint), checkpoint.student("memory.safetensors"), 64, 64)
    expected = sampled(server, graph)
    huge = {**graph, "latent": node("EmptyLatentImage", width=4096, height=4096, batch_size=1)}
    pid, kind = server.process.pid, resource.RLIMIT_AS
    before = resource.prlimit(pid, kind)
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, kind, (used + 200_000_000, before[1]))  # one feature map is 335 MB
    try:
        with pytest.raises(PromptError, match="can't allocate memory: you tried to allocate 335544320 bytes"):
            sampled(server, huge)
    finally:
        resource.prlimit(pid, kind, before)
    assert torch.equal(sampled(server, graph), expected)


def test_two_hundred_prompts_take_no_more_memory(server: Server) -> None:
    def resident() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])  # kB

    def prompts(count: int) -> None:
        for i in range(count):
            sampled(server, student_graph(("epsilon", "flow_prediction")[i % 2], timesteps=GRID, order=2))

    prompts(20)
    before = resident()
    prompts(200)
    assert resident() - before < 20_000
