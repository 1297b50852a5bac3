"""The configurations and settings that `tdm distill` and `tdm estimate` are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..training.config import DistillConfig


def read_settings(settings: Sequence[str]) -> DistillConfig:
    """Configurations, merged in their order, then the `key=value` settings; without any that says what is distilled,
    the bundled teacher.

    Raises:
        TDMError: what `load_config` refuses.
    """
    from ..training.config import load_config
    from ..training.presets import BEHIND

    configs = [text for text in settings if "=" not in text]
    if all(config in BEHIND for config in configs):
        configs = ["bundled", *configs]
    return load_config(configs, [text for text in settings if "=" in text])


def print_presets() -> None:
    """One line for each preset."""
    from ..training.presets import presets

    for name, line in presets().items():
        print(f"{name:10} {line}")
