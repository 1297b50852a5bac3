"""One thread, so that results do not depend on the machine; and in CI nothing may be left out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny base, built once."""
    from tdm.tests import tiny  # diffusers, which not every test needs

    root = tmp_path_factory.mktemp("bases")

    def base(family: str) -> Path:
        if not (root / family).exists():
            tiny.build(family).save_pretrained(root / family)
        return root / family

    return base


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With CI=true a skipped test fails the run: a machine that lacks something is set up by .ci/run, not excused."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    if os.environ.get("CI") == "true" and skipped and session.exitstatus == 0:
        reporter.write_line(f"CI=true and {len(skipped)} tests were left out", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
