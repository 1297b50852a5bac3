"""Run in the server's folder by the server's Python: `python launch.py main.py <its arguments>`, or another script.

torchvision registers its operators from a library that does not load beside a CPU torch, and then fails to import
because two of them have no schema. The server imports it without condition and samples without it: schemas are enough.
"""

import os
import runpy
import sys
import threading

import torch

if torch.version.cuda is None:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def end_with_the_tests() -> None:
    """However they end, their end of this pipe closes."""
    sys.stdin.read()
    os._exit(0)


threading.Thread(target=end_with_the_tests, daemon=True).start()
sys.path[0] = os.getcwd()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
