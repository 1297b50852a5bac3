"""Prompts to train on; once encoded they go into a folder of their own, never into the user's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from .base_tasks import PROMPTS


@pytest.fixture(scope="session")
def prompt_caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture(autouse=True)
def _own_prompt_caches(prompt_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdm.training.tasks.pipeline.default_root", lambda: prompt_caches)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A file of `PROMPTS`."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)
