"""The model card: README.md next to a student, with front matter for the hub.

Facts of the run only; what is not known is left out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from ..errors import TDMError
from ..files import replacing
from ..pipelines.bases import BUNDLED, base_folder
from ..pipelines.families import Family, family_of_name
from ..pipelines.scheduler import TDMScheduler
from ..pipelines.students.recipe import StudentRecipe
from .export import FinishedRun, Format, stage_notes
from .extraction import EXTRACTION_FILE
from .log import read_metrics
from .measure import EXPLAINED
from .objectives import method_of
from .stages import stage_of_update, stages_of

CARD_FILE = "README.md"

_CITATION = """\
```bibtex
@article{luo2025tdm,
  title   = {Learning Few-Step Diffusion Models by Trajectory Distribution Matching},
  author  = {Luo, Yihong and Hu, Tianyang and Sun, Jiacheng and Cai, Yujun and Tang, Jing},
  journal = {arXiv preprint arXiv:2503.06674},
  year    = {2025}
}
```"""


def write_card(run: FinishedRun, path: Path, form: Format, *, force: bool = False) -> Path:
    """Write the card next to an exported student, with the curves and the last previews if they are not there yet.

    Args:
        run: what was exported.
        path: the student's file, or the merged pipeline's folder.
        form: which of these.
        force: replace a README.md that is there, and its pictures; otherwise they stay as they are.
    """
    folder = path if form == "merged" else path.parent
    card = folder / CARD_FILE
    if card.exists() and not force:
        return card
    for picture in (*_last_previews(run), *_curves(run)):
        target = folder / picture
        stays = target.is_file() and target.stat().st_size > 0 and not force  # a full disk may have left nothing in it
        if not stays and not (target.exists() and target.samefile(run.folder / picture)):
            with replacing(target, shared=True) as file:
                file.write((run.folder / picture).read_bytes())
    with replacing(card, shared=True) as file:
        file.write(model_card(run, path.name, form).encode())
    return card


def model_card(run: FinishedRun, name: str, form: Format) -> str:
    """The text of the card.

    Args:
        run: the student and its run.
        name: of the exported file or folder.
        form: what was exported.
    """
    recipe, family = run.recipe, family_of_name(run.recipe.family)
    base = _base_name(recipe.base_model)
    what = "a pipeline with the student in its weights" if form == "merged" else f"a LoRA (`{name}`)"
    licence = _licence(recipe.base_model)
    licence_text = (
        f"The base states the licence `{licence['license']}`, and a student is derived from its base."
        if licence
        else "The base's folder states no licence. A student is derived from its base: check the base's licence before "
        "you publish or use this."
    )
    sections = [
        f"# TDM student of {'the bundled teacher' if base == BUNDLED else base.rsplit('/', 1)[-1]}, "
        f"{recipe.default_steps} steps",
        f"A {recipe.default_steps}-step student of `{base}` ({recipe.family}), distilled by "
        f"{_linked(method_of(run.config))} from prompts alone: {what}.",
        *(f"![the last previews]({picture})" for picture in _last_previews(run)),
        "## Use",
        *_use(recipe, family, name, form),
        "## Recipe",
        "What the student was trained on, and how to sample it. The file's own header says the same.",
        _table(_recipe_rows(recipe)),
        "## Training",
        _table(_training_rows(run)),
        f"<details><summary>All settings</summary>\n\n```yaml\n{_settings(run)}```\n\n</details>",
        *(f"![curves]({picture})" for picture in _curves(run)),
    ]
    if measures := _last_evaluation(run):
        step = int(measures.pop("step"))
        sections += ["## Measures", f"After {step} updates, on the run's mean weights:"]
        sections.append(_table([(_explained(key.removeprefix("eval/")), f"{v:.4g}") for key, v in measures.items()]))
    sections += ["## Licence", licence_text, "## Citation", _CITATION]
    front = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        base_model_relation=("finetune" if form == "merged" else "adapter") if _is_hub_id(base) else None,
        library_name="diffusers",
        pipeline_tag="text-to-video" if family.video else "text-to-image",
        tags=["tdm", "few-step", *([] if form == "merged" else ["lora"])],
        **(licence or {"license": "other"}),
    )
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _linked(text: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


# ---------------------------------------------------------------------- how to use it


def _use(recipe: StudentRecipe, family: Family, name: str, form: Format) -> list[str]:
    base = json.dumps(_base_name(recipe.base_model))
    out = "frames[0]" if family.video else "images[0]"
    call = {
        "num_inference_steps": recipe.default_steps,
        **family.guidance(recipe.guidance_scale),
        "height": recipe.height,
        "width": recipe.width,
        **({"num_frames": recipe.num_frames} if recipe.num_frames else {}),
    }
    arguments = ", ".join(f"{key}={value!r}" for key, value in call.items())
    ours = f'"{name}"' if form == "merged" else f'{base}, student="{name}"'
    lines = [
        "With the package `tdm`, which samples it exactly as it was trained:",
        f"```python\nfrom tdm import TDMPipeline\n\npipe = TDMPipeline.from_pretrained({ours})\n"
        f'result = pipe("a prompt").{out}\n```',
    ]
    if form == "merged" and _stock_can_draw(recipe, family):
        lines += [
            "With diffusers, where `tdm` is installed for its scheduler:",
            f"```python\nfrom diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{name}")\nresult = pipe("a prompt", {arguments}).{out}\n```',
        ]
    if form == "merged":
        return lines
    lines.append(f'On the command line: `tdm generate "a prompt" --model {base} --student {name}`.')
    pipeline_class: Any = family.pipeline_class()
    if family.home is None and hasattr(pipeline_class, "load_lora_weights") and _stock_can_draw(recipe, family):
        shift = "" if recipe.flow_shift is None else f", flow_shift={recipe.flow_shift!r}"
        noise = ", stochastic_sampling=True" if recipe.stochastic_sampling else ""
        noise += "" if recipe.eta == 1 else f", eta={recipe.eta!r}"
        lines += [
            "With diffusers' own pipeline, and the scheduler of `tdm`:",
            f"```python\nfrom diffusers import {family.pipeline}\nfrom tdm import TDMScheduler\n\n"
            f"pipe = {family.pipeline}.from_pretrained({base})\n"
            f'pipe.load_lora_weights("{name}")\n'
            f"grid = {recipe.trained_timesteps!r}\n"
            f"pipe.scheduler = TDMScheduler.from_config(pipe.scheduler.config, trained_timesteps=grid{shift}{noise})\n"
            f'result = pipe("a prompt", {arguments}).{out}\n```',
        ]
    return lines + _comfyui(recipe, name, form)


def _stock_can_draw(recipe: StudentRecipe, family: Family) -> bool:
    """Whether the stock pipeline gives a scheduler the generator that fresh noise is drawn from, if that is taken."""
    return not recipe.stochastic_sampling or hasattr(family.pipeline_class(), "prepare_extra_step_kwargs")


def _comfyui(recipe: StudentRecipe, name: str, form: Format) -> list[str]:
    """ComfyUI's own nodes, where they load the file, and `euler` on the trained noise levels is TDM's sampler, or `lcm`
    that of a student with fresh noise, from another generator.

    That is so where the grid starts at the model's highest noise level: ComfyUI scales the first noise otherwise.
    """
    loads = {"sd15": "kohya", "sdxl": "kohya", "sd3": "student", "flux": "student"}.get(recipe.family)
    if loads is None or recipe.eta != 1:  # no sampler of core mixes the two noises in this way
        return []
    try:
        config = TDMScheduler.load_config(base_folder(recipe.base_model), subfolder="scheduler", local_files_only=True)
    except (OSError, TDMError):
        return []
    shift = {} if recipe.flow_shift is None else {"flow_shift": recipe.flow_shift}
    scheduler: Any = TDMScheduler.from_config(config, trained_timesteps=recipe.trained_timesteps, **shift)
    scheduler.set_timesteps(recipe.default_steps)
    levels = scheduler.sigmas.tolist()
    highest = scheduler.schedule.last_timestep
    if recipe.trained_timesteps[recipe.default_steps][0] != highest or not math.isfinite(levels[0]):
        return []
    guidance = f"`FluxGuidance` {recipe.guidance_scale:g}, " if recipe.family == "flux" else ""
    sampler = "lcm" if recipe.stochastic_sampling else "euler"
    written = ", ".join(f"{level:.6g}" for level in levels)
    text = (
        f"In ComfyUI, with its own nodes: `LoraLoaderModelOnly` at strength 1.0, {guidance}`SamplerCustom` with "
        f"cfg 1.0, `KSamplerSelect` {sampler}, and `ManualSigmas`\n\n    {written}\n\n"
        "Another scheduler of ComfyUI is not the grid that this student was trained on."
    )
    if loads == "kohya" and form != "kohya":
        text += (
            f" ComfyUI does not load the names in `{name}` for this family: `tdm export --format kohya` writes those."
        )
    return [text]


# ---------------------------------------------------------------------- facts


def _curves(run: FinishedRun) -> list[Path]:
    """The picture of the curves, in the run's folder, if there is one."""
    return [Path("curves.png")] if (run.folder / "curves.png").is_file() else []


def _last_previews(run: FinishedRun) -> list[Path]:
    """The last picture of previews, in the run's folder, if there is one."""
    return [picture.relative_to(run.folder) for picture in sorted((run.folder / "previews").glob("*.png"))[-1:]]


def _last_evaluation(run: FinishedRun) -> dict[str, float]:
    """The run's last line with measures of its task, {} without one."""
    lines = read_metrics(run.folder / "metrics.jsonl")
    evaluations = [line for line in lines if any(key.startswith("eval/") for key in line)]
    last = evaluations[-1] if evaluations else {}
    return {key: value for key, value in last.items() if key == "step" or key.startswith("eval/")}


def _explained(measure: str) -> str:
    """A measure's name, with what it is where the name does not say it; ``frechet/2_steps`` is a measure, too."""
    meaning = EXPLAINED.get(measure.partition("/")[0])
    return f"{measure} ({meaning})" if meaning else measure


def _recipe_rows(recipe: StudentRecipe) -> Iterable[tuple[str, str]]:
    yield "base", f"`{_base_name(recipe.base_model)}`"
    yield "prediction type", recipe.prediction_type
    for steps, grid in recipe.trained_timesteps.items():
        yield f"timesteps, {steps} steps", ", ".join(f"{t:g}" for t in grid)
    yield "guidance scale", f"{recipe.guidance_scale:g}"
    yield "size", f"{recipe.width} x {recipe.height}" + (f", {recipe.num_frames} frames" if recipe.num_frames else "")
    if recipe.flow_shift is not None:
        yield "flow shift", f"{recipe.flow_shift:g}"
    yield "solver order", str(recipe.solver_order)
    if recipe.stochastic_sampling:
        yield "noise", f"{'fresh' if recipe.eta == 1 else f'eta {recipe.eta:g}'} at each step but the last"
    if "load_beside" in recipe.notes:
        yield "load with it", recipe.notes["load_beside"]


def _training_rows(run: FinishedRun) -> Iterable[tuple[str, str]]:
    stages = stages_of(run.config)
    c = stage_of_update(stages, run.step).config
    yield "updates", str(run.step)
    if run.config.stages:
        for i, text in enumerate(stage_notes(stages, run.step), 1):
            yield f"stage {i}", text
    yield "samples per update", str(c.batch_size)
    if run.config.start_from is not None:
        yield "started from", f"`{_without_paths(run.config.start_from)}`{_extraction(run)}"
    yield "prompts", run.recipe.notes["prompts"]
    if "weights" in run.recipe.notes:
        yield "weights", run.recipe.notes["weights"]
    yield "teacher guidance", c.objective.teacher_guidance
    if run.recipe.teacher_negative_prompt is not None:
        yield "teacher's negative prompt", run.recipe.teacher_negative_prompt
    norm = run.recipe.teacher_guidance_norm or family_of_name(run.recipe.family).own_guidance_norm
    if norm is not None:
        yield "teacher's guidance norm", norm
    for name, role in (("student", c.student), ("critic", c.critic)):
        adapter = "whole weights" if c.full_weights else f"LoRA, rank {role.rank}, alpha {role.alpha or role.rank:g}"
        yield name, f"{adapter}; AdamW, learning rate {role.lr:g}"
    yield "critic target", c.critic.target
    yield "running mean", f"decay {c.ema.decay:g}"
    yield "precision", c.precision
    yield "seed", str(c.seed)


def _extraction(run: FinishedRun) -> str:
    """What the student's adapter left of a distilled checkpoint that the run started from, if it did."""
    file = run.folder / EXTRACTION_FILE
    return f": {json.loads(file.read_text(encoding='utf-8'))['summary']['student']}" if file.is_file() else ""


def _settings(run: FinishedRun) -> str:
    """The run's configuration as YAML, with names for the paths of this machine."""
    settings = json.loads(json.dumps(dataclasses.asdict(run.config)))
    settings["task"] = _without_paths(settings["task"])
    settings["start_from"] = _without_paths(settings["start_from"])
    return yaml.safe_dump(settings, sort_keys=False)


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    here = isinstance(value, str) and os.path.exists(value.rpartition("@")[0] or value)  # a LoRA may have @strength
    return Path(value).name if here else value


def _base_name(model: str) -> str:
    """The base as others know it: a hub id, "bundled", or the name of a local folder without its place here."""
    return f"path/to/{Path(model).name}" if model != BUNDLED and not _is_hub_id(model) else model


def _is_hub_id(model: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not os.path.exists(model)


def _licence(model: str) -> dict[str, Any]:
    """What the base's own card says of its licence, as far as it is on this machine: {} if it says nothing."""
    card: Any = Path(base_folder(model)) / CARD_FILE
    if _is_hub_id(model):
        card = try_to_load_from_cache(model, CARD_FILE)
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return {}
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except ValueError:  # a README.md without front matter that can be read
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if "license" in data and key in data}


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])
