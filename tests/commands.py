"""Commands that must end with one clear line."""

from __future__ import annotations

import pytest
from tdm.cli import main


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that must end with exit code 2."""
    capsys.readouterr()
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("tdm: ")
    return printed.err
