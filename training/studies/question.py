"""A question: variants of one configuration, trained with several seeds on equal budgets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ...errors import TDMError
from ..config import DistillConfig
from ..cost import mean_passes, passes_after
from ..from_plain import from_dict
from ..settings import load_config

FOLDER = Path(__file__).parent / "questions"


@dataclass(frozen=True)
class Further:
    """A further measure of a question; see `Question`."""

    higher_is_better: bool
    reach: float | None = None


@dataclass(frozen=True)
class Question:
    """What is asked, and how it is answered.

    Attributes:
        name: of its file.
        asks: the question, in one line.
        configs: that all variants share, as for ``tdm distill``.
        settings: likewise, ``key=value``.
        variants: by name, what each changes; the first one is what the others are compared with.
        updates: that each variant gets; and as many more as it needs for the network passes of the first one.
        passes_only: a variant gets those passes and no more: a dearer one fewer updates.
        every: updates between two evaluations of the first variant, a divisor of `updates`; those of a dearer one are
            more often.
        seeds: of training.
        measure: of the task, that is compared.
        higher_is_better: of the measure.
        reach: a value of the measure; who gets there first?
        further: measures that get a table and a plot of their own.
    """

    name: str
    asks: str
    configs: tuple[str, ...]
    settings: tuple[str, ...]
    variants: dict[str, Any]
    updates: int
    every: int
    measure: str
    higher_is_better: bool
    seeds: tuple[int, ...] = (0, 1, 2)
    reach: float | None = None
    passes_only: bool = False
    further: dict[str, Further] = field(default_factory=dict)

    def config(self, variant: str, seed: int) -> DistillConfig:
        """The configuration of one run: at least the passes of the first variant and, unless `passes_only`, at least
        `updates`.
        """
        texts = self.variants[variant]
        configs = [*self.configs, *(text for text in texts if "=" not in text)]
        settings = [*self.settings, *(text for text in texts if "=" in text), f"seed={seed}"]
        config = load_config(configs, settings)
        share = 1.0
        if variant != self.first:
            share = mean_passes(self.config(self.first, seed)) / mean_passes(config)
        often = self.every * min(1.0, share)
        every = max(n for n in range(1, self.every + 1) if self.updates % n == 0 and n <= max(1.0, often))
        wanted = self.updates * (share if self.passes_only else max(1.0, share))
        updates = math.ceil(wanted / every) * every
        quiet = replace(config.output, preview_every=0, checkpoint_every=0, evaluate_every=every, log_every=every)
        return replace(config, updates=updates, output=quiet)

    @property
    def first(self) -> str:
        """The variant that the others are compared with."""
        return next(iter(self.variants))

    def budget(self) -> float:
        """The network passes per sample that all variants have at least."""
        return passes_after(self.config(self.first, self.seeds[0]), self.updates)

    def runs(self) -> list[tuple[str, int]]:
        """All (variant, seed), one seed of each variant first: half an answer is then one about all of them."""
        return [(variant, seed) for seed in self.seeds for variant in self.variants]


def is_of(stored: dict[str, Any], config: DistillConfig) -> bool:
    """Whether a run whose configuration was `stored` is one of this configuration. A setting that is younger than the
    run counts as what it was before there was a choice: its default.
    """
    return _fits(stored, asdict(config), asdict(DistillConfig()))


def _fits(stored: Any, wanted: Any, default: Any) -> bool:
    if isinstance(wanted, dict) and isinstance(stored, dict) and isinstance(default, dict):
        known = all(_fits(stored.get(key, default.get(key)), wanted[key], default.get(key)) for key in wanted)
        return known and set(stored) <= set(wanted)
    if isinstance(wanted, tuple | list):
        return isinstance(stored, tuple | list) and list(stored) == list(wanted)
    return bool(stored == wanted)


def questions() -> list[str]:
    """The names of all that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_question(name: str) -> Question:
    """The question of that name, or in that file.

    Raises:
        TDMError: there is none, or it is not sound.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise TDMError(f"there is no question {name}; there are {', '.join(questions())}")
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or not isinstance(data.get("variants"), dict) or not data["variants"]:
        raise TDMError(f"{path} must hold a question with its variants, see training/studies/question.py")
    question = from_dict(Question, {"name": path.stem, **data})
    for variant, texts in question.variants.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TDMError(f"{path}: variant {variant} must be a list of presets and key=value settings, not {texts!r}")
    if question.updates < 1 or question.every < 1 or question.updates % question.every:
        raise TDMError(f"{path}: updates must be a multiple of every, not {question.updates} and {question.every}")
    for variant in question.variants:
        question.config(variant, 0)  # refuses what cannot be trained, before anything is
    return question
