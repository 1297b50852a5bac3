"""Where the nodes of an example workflow stand on the canvas: in boxes, below and beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .workflows import Workflow

Node = dict[str, Any]  # as the front end saves it

# In the units of the canvas. A node's title lies above its position, and a box's heading above its nodes.
_WIDTH = {"TDMLoadStudent": 420, "CLIPTextEncode": 360, "SaveImage": 480, "SaveVideo": 480}
_HEIGHT = {"TDMLoadStudent": 250, "CLIPTextEncode": 160, "SaveImage": 560, "SaveVideo": 560}
_NOTE, _LINE, _LETTERS = 440, 14, 85
_TITLE, _HEADING, _GAP, _MARGIN, _TALLEST = 30, 50, 25, 20, 850


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
    number = iter(workflow.graph)
    boxes = [_Box(heading, [nodes[next(number)] for _ in part]) for heading, part in workflow.columns.items()]
    note = _note(workflow.note, len(nodes) + 1)
    below_note = note["size"][1] + _MARGIN

    columns: list[list[_Box]] = [[]]
    y = below_note
    for box in boxes:
        if y + box.height > _TALLEST:
            columns.append([])
            y = -_TITLE
        columns[-1].append(box)
        y += box.height + _MARGIN

    groups = []
    x, y = 0, below_note
    for i, column in enumerate(columns):
        width = max([_NOTE if i == 0 else 0, *(box.width for box in column)])
        for box in column:
            groups.append({"id": len(groups) + 1, **box.at(x, y, width)})
            y += box.height + _MARGIN
        x, y = x + width + 3 * _MARGIN, -_TITLE
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
