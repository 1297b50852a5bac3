"""What an example workflow is, and the nodes that all of them have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tdm.pipelines.bases import bundled_path
from tdm.pipelines.students.file import read_student
from tdm.pipelines.students.released import PRESETS

from .graphs import node
from .server import Graph

Link = list[Any]

HUB = "https://huggingface.co/"
_IN_REPOSITORY = "/resolve/main/"


def hub_file(repository: str, file: str) -> str:
    """The address of a file in a repository."""
    return f"{HUB}{repository}{_IN_REPOSITORY}{file}"


def released_file(repository: str) -> str:
    """The address of a released student's file, or of its repository where the file's name is not known."""
    file = PRESETS[repository].file
    return hub_file(repository, file) if file else f"{HUB}{repository}"


@dataclass(frozen=True)
class Workflow:
    """One example workflow.

    Attributes:
        title: the heading of its note.
        text: what its note says, in Markdown.
        columns: from left to right on the canvas, each a heading -> the nodes below it.
        files: path in ComfyUI's `models` folder -> the address of the file, or of the repository of a folder.
        too_large: why no test can run it, if none can.
    """

    title: str
    text: str
    columns: list[dict[str, Graph]]
    files: dict[str, str] = field(default_factory=dict)
    too_large: str | None = None

    @property
    def graph(self) -> Graph:
        """The prompt, its nodes numbered from left to right."""
        boxes = [box for column in self.columns for box in column.values()]
        nodes = {name: each for box in boxes for name, each in box.items()}
        number = {name: str(i) for i, name in enumerate(nodes, 1)}

        def linked(value: Any) -> Any:
            return [number[value[0]], value[1]] if isinstance(value, list) else value

        return {
            number[name]: {**each, "inputs": {key: linked(value) for key, value in each["inputs"].items()}}
            for name, each in nodes.items()
        }

    @property
    def models(self) -> list[dict[str, str]]:
        """The files that the front end can fetch, as `properties.models` of a loader has them."""
        paths = {path: url for path, url in self.files.items() if _IN_REPOSITORY in url}
        return [
            {"name": path.rpartition("/")[2], "url": url, "directory": path.partition("/")[0]}
            for path, url in paths.items()
        ]

    @property
    def note(self) -> str:
        """The note at its left."""
        repositories = {path: url.partition(_IN_REPOSITORY)[0] for path, url in self.files.items()}
        files = "\n".join(f"- **{path}**, from [{url.removeprefix(HUB)}]({url})" for path, url in repositories.items())
        return f"## {self.title}\n\n{self.text}" + (f"\n\n### Files, in `ComfyUI/models`\n\n{files}" if files else "")


def student_node(model: Link, file: str, released_as: str = "by its header or name", **more: Any) -> Graph:
    settings = {"file": file, "released_as": released_as, "strength": 1.0, "strict": True}
    return {"student": node("TDMLoadStudent", model=model, **settings, **more)}


def prompt_node(text: str, clip: Link, title: str = "Prompt") -> dict[str, Any]:
    return {**node("CLIPTextEncode", clip=clip, text=text), "_meta": {"title": title}}


def empty_latent(kind: str, side: int, batch_size: int = 1) -> dict[str, Any]:
    return node(kind, width=side, height=side, batch_size=batch_size)


def steps_nodes(name: str = "", seed: int = 7, denoise: float = 1.0, student: str = "timesteps below") -> Graph:
    """Noise, and timesteps and order of the recipe of node "student"; their names begin with `name`."""
    settings = {"student": student, "timesteps": _grid(student), "recipe": ["student", 2]}
    return {
        f"{name}noise": node("RandomNoise", noise_seed=seed),
        f"{name}sigmas": node("TDMSigmas", model=["student", 0], steps=0, denoise=denoise, **settings),
        f"{name}sampler": node("TDMSampler", order=[f"{name}sigmas", 2]),
    }


def _grid(student: str) -> str:
    """What its recipe says, for people: the link decides."""
    if student in PRESETS:
        (grid,) = PRESETS[student].fields["trained_timesteps"].values()
    else:
        grid = read_student(bundled_path() / "student.safetensors").recipe.trained_timesteps[4]
    return ", ".join(f"{timestep:g}" for timestep in grid)


def sampling_nodes(vae: Link, name: str = "") -> Graph:
    """The latent and the prompt of this name to a picture, with the steps of this name."""
    links = {part: [f"{name}{part}", 0] for part in ("noise", "guider", "sampler")}
    sigmas, latent = [f"{name}sigmas", 1], [f"{name}latent", 0]
    return {
        f"{name}guider": node("BasicGuider", model=[f"{name}sigmas", 0], conditioning=[f"{name}prompt", 0]),
        f"{name}samples": node("SamplerCustomAdvanced", **links, sigmas=sigmas, latent_image=latent),
        f"{name}pixels": node("VAEDecode", samples=[f"{name}samples", 0], vae=vae),
    }


def saved_box(images: Link, file: str) -> dict[str, Graph]:
    return {"Picture": {"picture": node("SaveImage", images=images, filename_prefix=f"TDM/{file}")}}
