"""A running ComfyUI, and a client that talks to it as the front end does: over HTTP and a websocket."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import websocket
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from . import install

PACKS = {"tdm_pack": install.REPOSITORY, "tdm_test_networks": Path(__file__).parent / "networks_pack"}
Graph = dict[str, dict[str, Any]]  # a prompt in the API's format: node id -> {"class_type", "inputs"}


class PromptError(Exception):
    """A prompt that the server refused or that failed; the message is what a user reads in the front end."""


@dataclass
class Run:
    """One prompt that ran.

    Attributes:
        outputs: by node id, what the server's history says.
        events: every message of the websocket about this prompt, in order.
        previews: how many preview pictures came.
    """

    outputs: dict[str, Any]
    events: list[dict[str, Any]] = field(default_factory=list)
    previews: int = 0


class Server:
    """ComfyUI on a free port, this repository in its `custom_nodes`, with its own folders for models and pictures."""

    def __init__(
        self,
        folder: Path,
        packs: Mapping[str, Path] = PACKS,
        *,
        front_end: Path | None = None,
        models: Path | None = None,
    ) -> None:
        """Start it, and wait until it answers.

        Args:
            folder: where its models, outputs and log go; it is made.
            packs: what its `custom_nodes` has.
            front_end: the folder of its front end; None is the one that it is made with.
            models: another server's models, which it shares; None for a folder of its own.

        Raises:
            RuntimeError: the server ended or did not answer within five minutes; the message has its log.
        """
        self.folder, self.log = folder, folder / "server.log"
        (folder / "custom_nodes").mkdir(parents=True)
        for name, pack in packs.items():
            (folder / "custom_nodes" / name).symlink_to(pack, target_is_directory=True)
        for kind in ("input", "output", "temp", "user"):
            (folder / kind).mkdir()
        if models is None:
            (folder / "models").mkdir()
        else:
            (folder / "models").symlink_to(models, target_is_directory=True)
        self.models = folder / "models"
        self.output = folder / "output"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [install.python(), Path(__file__).with_name("launch.py"), "--cpu", "--listen", "127.0.0.1"]
        command += ["--port", self.address.split(":")[1], "--base-directory", folder, "--disable-api-nodes"]
        command += ["--use-pytorch-cross-attention", "--preview-method", "latent2rgb"]
        command += ["--database-url", f"sqlite:///{folder / 'comfyui.db'}"]
        command += [] if front_end is None else ["--front-end-root", front_end]
        self._log_file = self.log.open("w")
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=install.server_folder(),
            env={**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
        )
        end = time.monotonic() + 300
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.2)
        self.client = uuid.uuid4().hex
        self.socket = websocket.create_connection(f"ws://{self.address}/ws?clientId={self.client}", timeout=120)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self._log_file.close()

    def _answers(self) -> bool:
        try:
            self.get("system_stats")
        except OSError:
            return False
        return True

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}/{path}", timeout=60) as response:
            return json.load(response)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Raises PromptError where the server answers with an error."""
        request = urllib.request.Request(f"http://{self.address}/{path}", json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise PromptError(error.read().decode()) from None
        return json.loads(text) if text else None

    def run(
        self,
        graph: Graph,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        on_preview: Callable[[bytes], None] | None = None,
    ) -> Run:
        """Queue a prompt and wait until it has run.

        Args:
            graph: the prompt.
            on_event: called with each message about it.
            on_preview: called with each preview, the bytes of a picture.

        Raises:
            PromptError: the prompt was refused, a node failed, or it was interrupted.
        """
        prompt = self.post("prompt", {"prompt": graph, "client_id": self.client})["prompt_id"]
        run, failure = Run({}), None
        while True:
            message = self.socket.recv()
            if isinstance(message, bytes):
                picture = _preview(message)
                run.previews += picture is not None
                if picture is not None and on_preview is not None:
                    on_preview(picture)
                continue
            event = json.loads(message)
            if event["data"].get("prompt_id") != prompt:
                continue
            run.events.append(event)
            if on_event is not None:
                on_event(event)
            if event["type"] in ("execution_error", "execution_interrupted"):
                failure = PromptError(event["data"].get("exception_message", event["type"]))
            if event["type"] == "executing" and event["data"]["node"] is None:  # done with, and in the history
                if failure is not None:
                    raise failure
                run.outputs = self.get(f"history/{prompt}")[prompt]["outputs"]
                return run

    def latents(self, graph: Graph, *samples: list[Any]) -> list[Tensor]:
        """The latents that a graph makes, as SaveLatent writes them; `samples` are links [node id, output index]."""
        return self._saved(graph, "SaveLatent", "samples", samples, lambda files: load_file(files[0])["latent_tensor"])

    def pictures(self, graph: Graph, *images: list[Any]) -> list[Tensor]:
        """The pictures that a graph makes, (B, height, width, 3) of 0 to 255 each; `images` are links."""

        def read(files: list[Path]) -> Tensor:
            return torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])

        return self._saved(graph, "SaveImage", "images", images, read)

    def _saved(
        self, graph: Graph, saver: str, name: str, links: Sequence[list[Any]], read: Callable[[list[Path]], Tensor]
    ) -> list[Tensor]:
        folder = uuid.uuid4().hex
        nodes = {
            f"save {i}": {"class_type": saver, "inputs": {name: link, "filename_prefix": f"{folder}/{i}"}}
            for i, link in enumerate(links)
        }
        self.run({**graph, **nodes})
        try:
            return [read(sorted((self.output / folder).glob(f"{i}_*"))) for i in range(len(links))]
        finally:
            shutil.rmtree(self.output / folder)


def _preview(message: bytes) -> bytes | None:
    """The picture of a preview: event 1 has its format before it, event 4 its metadata. Others are a node's text."""
    event, size = struct.unpack(">II", message[:8])
    return {1: message[8:], 4: message[8 + size :]}.get(event)
