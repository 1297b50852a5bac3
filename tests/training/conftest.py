"""Prompts to train on. Encoded prompts and teachers' pictures go into a folder of the tests, never into the user's
cache.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .base_tasks import PROMPTS


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def _own_caches(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A file of `PROMPTS`."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)
