"""The page: theme, head and tabs."""

from __future__ import annotations

from html import escape
from pathlib import Path

import gradio as gr

from ..training.worlds.stickers.scene import BACKGROUNDS, KINDS, MAX_STICKERS
from .api import endpoints
from .cards import plural
from .distil import DistilTab
from .engine import Engine
from .explore import ExploreTab
from .generate import GenerateTab
from .models import ModelsTab
from .pictures import Pictures
from .runs import Runs

HERE = Path(__file__).parent
WELCOME = """
<h1>A picture in {student} steps, not {teacher}</h1>
<p>{model}</p>
<p>A few-step <b>student</b>, distilled by Trajectory Distribution Matching, next to its <b>teacher</b>.
<a href="https://arxiv.org/abs/2503.06674" target="_blank" rel="noopener">Paper</a>
<a href="https://github.com/Luo-Yihong/TDM" target="_blank" rel="noopener">Authors' code</a></p>
"""


# On a phone Gradio hides the link to the API, but not the dot after it.
FOOTER = "@media (max-width: 640px) { footer .divider { display: none !important; } }"


def theme() -> gr.themes.Base:
    """The colours and fonts of the page. The fonts are the system's, so that nothing is loaded from elsewhere."""
    return gr.themes.Default(
        primary_hue=gr.themes.colors.indigo,
        secondary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"),
        font_mono=("ui-monospace", "SFMono-Regular", "Consolas", "monospace"),
    ).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
    )


def base_name(engine: Engine) -> str:
    """The base's name, without where a folder lies."""
    if engine.base == "bundled":
        return "the bundled model"
    return Path(engine.base).name if Path(engine.base).exists() else engine.base


def about_model(engine: Engine) -> str:
    """Say in one sentence which model this is and what it can draw."""
    recipe = engine.recipe()
    size = f"{recipe.width} x {recipe.height}"
    if engine.base == "bundled":
        kinds, places = (f"{', '.join(names[:-1])} and {names[-1]}" for names in (KINDS, BACKGROUNDS))
        return (
            f"The small bundled model draws {size} pictures of up to {MAX_STICKERS} coloured stickers ({kinds}) "
            f"in front of {places}."
        )
    return f"The model {base_name(engine)} ({recipe.family}) draws what you describe, best at {size} pixels."


def build(engine: Engine, pictures: Pictures, runs: Runs | None) -> gr.Blocks:
    """Build the page over an engine; without `runs` it has no tab to distil."""
    title = f"TDM: {base_name(engine)}, {plural(engine.recipe().default_steps, 'step')}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        steps = {"student": engine.recipe().default_steps, "teacher": engine.teacher_call.steps}
        gr.HTML(WELCOME.format(**steps, model=escape(about_model(engine))), elem_id="welcome")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Generate", id="generate"):
                generate = GenerateTab(engine, pictures)
            with gr.Tab("Explore", id="explore"):
                ExploreTab(engine, pictures, generate.controls.student)
            with gr.Tab("Models", id="models"):
                ModelsTab(engine, generate, tabs)
            if runs is not None:
                with gr.Tab("Distil", id="distil"):
                    DistilTab(runs, generate, tabs)
        endpoints(engine, pictures)
        generate.opened(page)
    return page


def head() -> str:
    """HTML for the page's head: its script, and the style of what lies outside the blocks."""
    return f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script><style>{FOOTER}</style>"


def css() -> str:
    """The style of the page."""
    return (HERE / "page.css").read_text(encoding="utf-8")
