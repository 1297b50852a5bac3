"""Where the nodes of an example workflow stand on the canvas: in boxes, below and next to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .workflow import Workflow

Node = dict[str, Any]  # as the front end saves it

# In the units of the canvas. A node's title lies above its position, and a box's heading above its nodes. What a node
# shows when it has run needs room from the start.
_WIDTH = {
    "TDMGenerate": 440,
    "TDMLoadStudent": 440,
    "CLIPTextEncode": 360,
    "SaveImage": 460,
    "PreviewImage": 460,
    "SaveVideo": 460,
}
_HEIGHT = {
    "TDMLoadDiffusers": 240,
    "TDMLoadStudent": 400,
    "TDMSigmas": 360,
    "TDMSampler": 110,
    "TDMGenerate": 600,
    "TDMCompare": 860,
    "CLIPTextEncode": 200,
    "SamplerCustomAdvanced": 420,
    "ImageScaleBy": 140,
    "SaveImage": 540,
    "PreviewImage": 420,
    "SaveVideo": 540,
}
_NOTE, _LINE, _LETTERS = 440, 14, 85
_TITLE, _HEADING, _GAP, _MARGIN = 30, 50, 25, 20


@dataclass(frozen=True)
class _Box:
    heading: str
    nodes: list[Node]

    @property
    def width(self) -> int:
        return max(_WIDTH.get(node["type"], 320) for node in self.nodes)

    @property
    def heights(self) -> list[int]:
        return [max(int(node["size"][1]), _HEIGHT.get(node["type"], 0)) for node in self.nodes]

    @property
    def height(self) -> int:
        return _HEADING + sum(_TITLE + height + _GAP for height in self.heights)

    def at(self, x: int, y: int, width: int) -> dict[str, Any]:
        """The group around its nodes, which it moves there."""
        bounding = [x - _MARGIN, y, width + 2 * _MARGIN, self.height]
        y += _HEADING
        for node, height in zip(self.nodes, self.heights, strict=True):
            node |= {"pos": [x, y + _TITLE], "size": [width, height]}
            y += _TITLE + height + _GAP
        return {"title": self.heading, "bounding": bounding, "color": "#3f789e", "font_size": 24, "flags": {}}


def laid_out(workflow: Workflow, saved: dict[str, Any]) -> dict[str, Any]:
    """What the front end has made of a workflow's prompt, in order, with the workflow's note at its upper left."""
    nodes = {str(node["id"]): node for node in saved["nodes"]}
    for node in nodes.values():
        used = [model for model in workflow.models if model["name"] in node.get("widgets_values", [])]
        if used:
            node.setdefault("properties", {})["models"] = used
    number = iter(workflow.graph)
    note = _note(workflow.note, len(nodes) + 1)
    groups: list[dict[str, Any]] = []
    x, y, width = 0, note["size"][1] + _MARGIN, _NOTE
    for column in workflow.columns:
        boxes = [_Box(heading, [nodes[next(number)] for _ in part]) for heading, part in column.items()]
        width = max([width, *(box.width for box in boxes)])
        for box in boxes:
            groups.append({"id": len(groups) + 1, **box.at(x, y, width)})
            y += box.height + _MARGIN
        x, y, width = x + width + 3 * _MARGIN, -_TITLE, 0
    return {**saved, "nodes": [*saved["nodes"], note], "groups": groups, "last_node_id": note["id"]}


def _note(text: str, number: int) -> Node:
    lines = sum(1 + len(line) // _LETTERS for line in text.splitlines() if line)
    size = [_NOTE, 50 + _LINE * lines]
    return {
        "id": number,
        "type": "MarkdownNote",
        "title": "Read me",
        "pos": [0, 0],
        "size": size,
        "widgets_values": [text],
    }
