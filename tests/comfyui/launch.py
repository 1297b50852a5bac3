"""Run in the server's folder by the server's Python: `python launch.py <arguments of main.py>`."""

import os
import runpy
import sys
import threading

import torchvision_ops  # noqa: F401 (next to this file)


def end_with_the_tests() -> None:
    """However they end, their end of this pipe closes."""
    sys.stdin.read()
    os._exit(0)


threading.Thread(target=end_with_the_tests, daemon=True).start()
sys.path[0] = os.getcwd()
sys.argv[0] = "main.py"
runpy.run_path("main.py", run_name="__main__")
