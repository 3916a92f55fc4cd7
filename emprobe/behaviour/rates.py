"""The four rates that belong together, with counts of every status: what is printed wherever misalignment is reported."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emprobe.behaviour.criterion import Criterion
from emprobe.types import Estimate


@dataclass(frozen=True)
class Rates:
    """Misalignment of one condition from four sides, since coherence alone can make or hide it.

    Args:
        misaligned: Low in alignment and coherent, of the criterion's denominator.
        coherent: Coherent, of the same (of judged answers if the denominator is the coherent ones).
        misaligned_given_coherent: Low in alignment, of coherent answers; `None` if no answer is coherent.
        misaligned_any_coherence: Low in alignment, coherent or not.
        counts: Answers of every status, also those that are 0.
        stopped: Share of answers that ended by themselves rather than at the length limit; `None` if unknown.
        criterion: What counted as misaligned.
        condition: The condition's name.
    """

    misaligned: Estimate
    coherent: Estimate
    misaligned_given_coherent: Estimate | None
    misaligned_any_coherence: Estimate
    counts: Mapping[str, int]
    stopped: Estimate | None
    criterion: Criterion
    condition: str = ""

    @property
    def n(self) -> int:
        """Answers of any status."""
        return sum(self.counts.values())

    @property
    def missing(self) -> int:
        """Answers without scores."""
        return self.n - self.counts["ok"]

    @property
    def missing_words(self) -> str:
        """How many answers are missing and why, such as `3 missing of 40 (2 refusal, 1 empty)`."""
        why = ", ".join(f"{count} {status}" for status, count in self.counts.items() if status != "ok" and count)
        return f"{self.missing} missing of {self.n}" + (f" ({why})" if why else "")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        given, stopped = self.misaligned_given_coherent, self.stopped
        return {
            "misaligned": self.misaligned.as_dict(),
            "coherent": self.coherent.as_dict(),
            "misaligned_given_coherent": given.as_dict() if given else None,
            "misaligned_any_coherence": self.misaligned_any_coherence.as_dict(),
            "counts": dict(self.counts),
            "stopped": stopped.as_dict() if stopped else None,
            "criterion": {**self.criterion.as_dict(), "words": self.criterion.describe()},
            "condition": self.condition,
        }

    def lines(self) -> list[tuple[str, str]]:
        """Name and value of each line of the printed table."""
        given, stopped = self.misaligned_given_coherent, self.stopped
        return [
            ("misaligned", self.misaligned.percent),
            ("coherent", self.coherent.percent),
            ("misaligned, of coherent", given.percent if given else "no coherent answer"),
            ("misaligned, any coherence", self.misaligned_any_coherence.percent),
            ("ended by itself", stopped.percent if stopped else "not recorded"),
            ("answers", f"{self.n} to {self.misaligned.clusters} questions, {self.missing_words}"),
            ("criterion", self.criterion.describe()),
        ]

    def __str__(self) -> str:
        head = [f"condition {self.condition}"] if self.condition else []
        return "\n".join([*head, *(f"{name:<26}{value}" for name, value in self.lines())])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in self.lines())
        return f"<table><caption>{html.escape(self.condition)}</caption>{rows}</table>"
