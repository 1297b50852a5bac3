"""Is the run going well? Ratios of the student's previews to the teacher's, and alarms over the lines of metrics.jsonl.

Every limit was set where healthy runs of the bundled teacher and of the mixture never came near; see the numbers
next to each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import quantiles

# On the student's previews over the teacher's. The bundled student stays within 0.95 to 1.01 in colours and at 0.85 to
# 1.2 in diversity; the base itself on the student's 4 steps, where a run begins, has contrast 0.9 and diversity 1.1.
LEAST_DIVERSITY = 0.5
MOST_SATURATION = 1.4
LEAST_BRIGHTNESS = 0.7
LEAST_CONTRAST = 0.5  # pictures that fade: an unlearned student blurs, so less is allowed than for brightness
# Power in an octave over the teacher's, at full size, of 8 previews of the bundled world. The teacher with other seeds
# has 0.88 to 1.04, the student that ships 0.92 to 1.17 at 1 to 8 steps, `tdm distill bundled` 0.92 to 1.04 after 50 to
# 200 updates, and with 25 times its rate 0.74 to 1.28. A run begins at 0.72 with 4 steps and at 0.58 with 2. The base
# in 4 steps with a guidance of 10 has 0.46, a student that learned the mean of the pictures 0.30. One that learned
# over-sharpened latents has 2.1 to 4.3 (tests/training/test_health.py).
LEAST_POWER = 0.5
MOST_POWER = 2.0
# With 1 step a run begins at 0.39. TDM then has 0.43, 0.53 and 0.69 in previews 10 updates apart, and regression onto
# the mean 0.39, 0.38 and 0.36 in previews 5 apart.
RISE = 1.05  # over PATIENCE previews; less is no progress

# On the critic. One line may be anything, since it may hold other stages than the next.
PATIENCE = 3  # lines, and previews, in a row
# A critic that predicts the student's sample no worse than the teacher does is at most twice as far from the teacher as
# that sample is. In 20 runs of 200 to 1200 updates no line had more than 1.03; on the mixture single lines have 2.2.
MOST_GAP = 3.0
LOSS_RISE = 3.0  # times what nine in ten earlier lines stayed below; in those 20 runs never more than 0.85
EARLIER = 8  # lines before there is anything to compare a loss with


@dataclass(frozen=True)
class Alarm:
    """Something that a person should look at: ``value`` is what was seen, ``message`` says it in one line."""

    name: str
    value: float
    message: str


@dataclass(frozen=True)
class Limit:
    """A limit on ratios of the previews, and the alarm that it raises. The worst of them counts."""

    alarm: str
    ratios: Mapping[str, str]  # by name in metrics.jsonl, what each is of in words
    remedy: str
    least: float = 0.0
    most: float = math.inf
    unlearned: str = ""  # the remedy for a student that never kept the limit, which then has time: `Monitor._learning`

    def worst(self, line: dict[str, float]) -> tuple[float, str] | None:
        """The ratio nearest to the limit or furthest beyond it, and what it is of; None if the line has none."""
        ratios = [(line[f"health/{name}"], of) for name, of in self.ratios.items() if f"health/{name}" in line]
        if not ratios:
            return None
        return max(ratios) if self.most < math.inf else min(ratios)

    def bad(self, ratio: float) -> bool:
        """Whether a ratio is beyond the limit."""
        return not self.least <= ratio <= self.most


# What `power_ratios` calls them.
DETAIL = {f"power_{band}": f"detail ({band[:-2]} px)" for band in ("2-4px", "4-8px", "8-16px")}
BLURRING = "regression and consistency can blur: go on with objective.name=matching"
LIMITS = (
    Limit(
        "collapse",
        {"diversity": "diversity"},
        "lower student.lr, or let the critic follow: raise critic.per_student",
        least=LEAST_DIVERSITY,
    ),
    Limit(
        "oversaturation",
        {"saturation": "saturation"},
        "lower objective.guidance_scale, or student.lr",
        most=MOST_SATURATION,
    ),
    Limit("darkening", {"brightness": "brightness"}, "lower student.lr", least=LEAST_BRIGHTNESS),
    Limit("darkening", {"contrast": "contrast"}, "lower student.lr", least=LEAST_CONTRAST),
    Limit(
        "blur",
        DETAIL,
        f"lower student.lr or objective.guidance_scale; {BLURRING}",
        least=LEAST_POWER,
        unlearned=f"raise updates or student.lr; {BLURRING}",
    ),
    Limit("oversharpening", DETAIL, "lower objective.guidance_scale, or student.lr", most=MOST_POWER),
)


class Monitor:
    """Reads the lines of metrics.jsonl one after another and says when something goes wrong, once until it is right
    again.

    All it knows is in those lines, so a resumed run that reads them again knows the same.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, float]] = []  # of the critic, by update
        self._gaps: dict[str, list[tuple[int, float]]] = {}  # per stage, the last PATIENCE
        self._fine: dict[str, str] = {}  # per limit on the previews, the last good value in words
        self._early: dict[str, list[float]] = {}  # per limit, the values of a stage before the first good one
        self._learnt: set[str] = set()  # limits that the student has kept in this stage
        self._standing: set[str] = set()

    def watch(self, line: dict[str, float]) -> list[Alarm]:
        """The alarms that this line raises. A line of a new stage forgets the critic: with another objective or grid it
        has other losses. The student may begin blurred again, with fewer steps.
        """
        if "stage" in line:
            self._losses, self._gaps, self._early, self._learnt = [], {}, {}, set()
            self._standing -= {"critic_loss", "gap"}
        raised = []
        for key, alarm in [*self._previews(line), *self._loss(line), *self._gap(line)]:
            if alarm is None:
                self._standing.discard(key)
            elif key not in self._standing:
                self._standing.add(key)
                raised.append(alarm)
        return raised

    def _previews(self, line: dict[str, float]) -> Iterator[tuple[str, Alarm | None]]:
        step = int(line["step"])
        for limit in LIMITS:
            worst = limit.worst(line)
            if worst is None:
                continue
            ratio, of = worst
            key = f"{limit.alarm}/{'/'.join(limit.ratios)}"
            if not limit.bad(ratio):
                self._fine[key] = f"{ratio:.2f} at update {step}"
                self._learnt.add(key)
                yield key, None
                continue
            if limit.unlearned and self._learning(key, ratio):
                continue
            remedy = limit.remedy if key in self._learnt else limit.unlearned or limit.remedy
            yield (
                key,
                Alarm(
                    limit.alarm,
                    ratio,
                    f"{limit.alarm}: at update {step} the student's previews have {ratio:.2f} of the teacher's "
                    f"{of} ({self._fine.get(key, 'no good preview before')}); {remedy}",
                ),
            )

    def _learning(self, key: str, ratio: float) -> bool:
        """Whether a student that never kept a limit in this stage still has time: its first previews, and as long as
        they come nearer.
        """
        values = self._early.setdefault(key, [])
        values.append(ratio)
        return key not in self._learnt and (len(values) < PATIENCE or ratio > RISE * values[-PATIENCE])

    def _loss(self, line: dict[str, float]) -> Iterator[tuple[str, Alarm | None]]:
        if "critic_loss" not in line:
            return
        self._losses.append((int(line["step"]), line["critic_loss"]))
        earlier, recent = self._losses[:-PATIENCE], self._losses[-PATIENCE:]
        if len(earlier) < EARLIER:
            return
        usual = quantiles([loss for _, loss in earlier], n=10)[-1]
        least = min(loss for _, loss in recent)
        alarm = Alarm(
            "critic_divergence",
            least,
            f"critic_divergence: since update {recent[0][0]} the critic's loss is at least {least:.3g}, where nine in "
            f"ten lines before had less than {usual:.3g}; lower critic.lr or critic.clip",
        )
        yield "critic_loss", alarm if least > LOSS_RISE * usual else None

    def _gap(self, line: dict[str, float]) -> Iterator[tuple[str, Alarm | None]]:
        step = int(line["step"])
        gaps = {name: line[name] for name in line if name.startswith("gap_")}
        for name, gap in gaps.items():
            self._gaps[name] = [*self._gaps.get(name, []), (step, gap)][-PATIENCE:]
        least = {name: min(g for _, g in recent) for name, recent in self._gaps.items() if len(recent) == PATIENCE}
        if not gaps or not least:
            return
        worst = max(least, key=lambda name: least[name])
        alarm = Alarm(
            "critic_divergence",
            least[worst],
            f"critic_divergence: since update {self._gaps[worst][0][0]} the critic of stage {worst[4:]} is at least "
            f"{least[worst]:.3g} times as far from the teacher as the student's sample; lower critic.lr",
        )
        yield "gap", alarm if least[worst] > MOST_GAP else None
