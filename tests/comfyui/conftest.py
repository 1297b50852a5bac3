"""One real ComfyUI server for all tests of the node pack."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from . import install
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
