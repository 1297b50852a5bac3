"""Lets torchvision import with a CPU torch.

It registers its operators from a library built for CUDA, which does not load, and then fails because two of them have
no schema. ComfyUI imports it without condition and samples without it: schemas are enough.
"""

import torch

if torch.version.cuda is None:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
