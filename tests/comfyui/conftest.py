"""One real ComfyUI server for all tests of the node pack."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from . import install
from .server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not install.installed():
        reason = "no ComfyUI in the cache: `make .venv/comfyui` installs one (2.1 GB, some minutes)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    server = Server(tmp_path_factory.mktemp("comfyui") / "server")
    yield server
    server.stop()
