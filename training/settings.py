"""The configurations and settings that `tdm distill`, `tdm estimate` and the demo are given."""

from __future__ import annotations

from collections.abc import Sequence

from .config import DistillConfig, load_config
from .presets import BEHIND


def read_settings(settings: Sequence[str]) -> DistillConfig:
    """Configurations, merged in their order, then the `key=value` settings; without any that says what is distilled,
    the bundled teacher.

    Raises:
        TDMError: what `load_config` refuses.
    """
    configs = [text for text in settings if "=" not in text]
    if all(config in BEHIND for config in configs):
        configs = ["bundled", *configs]
    return load_config(configs, [text for text in settings if "=" in text])
