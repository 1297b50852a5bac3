"""The demo: `python app.py` is `tdm app`, from a clone that need not be installed.

Any other command works alike: `python app.py generate "a red star at night"`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def become_tdm() -> None:
    """Make this folder the package `tdm`, whatever it is called and whatever is installed."""
    spec = importlib.util.spec_from_file_location("tdm", Path(__file__).with_name("__init__.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules["tdm"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    become_tdm()
    from tdm.cli import main

    arguments = sys.argv[1:]
    named = bool(arguments) and not arguments[0].startswith("-")
    sys.exit(main(arguments if named else ["app", *arguments]))
