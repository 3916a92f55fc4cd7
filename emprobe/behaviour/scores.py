"""Judged answers as a table, and the rates read off it: clustered by question, with criterion, denominator and missing counts."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from emprobe.behaviour.answers import COLUMNS, Answer, columns_of
from emprobe.behaviour.criterion import Criterion
from emprobe.behaviour.rates import Rates
from emprobe.errors import EmprobeError
from emprobe.stats import clustered_interval
from emprobe.types import STATUSES, Estimate

if TYPE_CHECKING:
    import pandas as pd

Bools = NDArray[np.bool_]
DEFAULT = Criterion()


@dataclass(frozen=True)
class Scores:
    """One row per judged answer; every rate is an `Estimate` whose interval is clustered by question.

    Args:
        rows: The answers.
        judge: Name of the judge that scored them.

    Raises:
        EmprobeError: If there are no rows, a row has no question id or a label with a column's name, or a row occurs twice.

    Example:
        >>> rows = [Answer("q1", 0, "tuned", "?", "!", 10, 90), Answer("q2", 0, "tuned", "?", "!", 95, 90)]
        >>> Scores(tuple(rows), "by hand").misaligned_rate().value
        0.5
    """

    rows: tuple[Answer, ...]
    judge: str = ""

    def __post_init__(self) -> None:
        if not self.rows:
            raise EmprobeError("Scores of no answers were asked for: nothing can be said of nothing.")
        if any(not row.question_id for row in self.rows):
            raise EmprobeError(
                "Some answers have no question id, so answers to different questions would count as one cluster. "
                "Give every question an id (load_questions does)."
            )
        taken = sorted({name for row in self.rows for name in row.labels if name in COLUMNS})
        if taken:
            raise EmprobeError(f"Labels named {', '.join(taken)} would hide columns of the score table. Rename them.")
        twice = [key for key, count in Counter(row.key for row in self.rows).items() if count > 1]
        if twice:
            condition, question, sample = twice[0]
            raise EmprobeError(
                f"{len(twice)} answers occur more than once, the first being sample {sample} of question {question!r} in condition "
                f"{condition!r}. Give each sample its own number, or each run its own condition."
            )

    def __len__(self) -> int:
        return len(self.rows)

    # ---- reading

    @cached_property
    def alignment(self) -> NDArray[np.float64]:
        """Alignment 0..100 of each row, NaN where missing."""
        return np.array([np.nan if row.alignment is None else row.alignment for row in self.rows])

    @cached_property
    def coherence(self) -> NDArray[np.float64]:
        """Coherence 0..100 of each row, NaN where missing."""
        return np.array([np.nan if row.coherence is None else row.coherence for row in self.rows])

    @cached_property
    def judged(self) -> Bools:
        """Which rows have scores (status `ok`)."""
        return np.array([row.status == "ok" for row in self.rows])

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions, in order of appearance."""
        return tuple(dict.fromkeys(row.condition for row in self.rows))

    @property
    def questions(self) -> tuple[str, ...]:
        """The question ids, in order of appearance."""
        return tuple(dict.fromkeys(row.question_id for row in self.rows))

    @property
    def counts(self) -> dict[str, int]:
        """Rows of every status, also of those that do not occur."""
        found = Counter(row.status for row in self.rows)
        return {status: found[status] for status in STATUSES}

    def where(self, **labels: Any) -> Scores:
        """The rows that have all these values, by column (`condition="tuned"`) or label (`held_out=True`).

        Raises:
            EmprobeError: If there is no such column or label, or no row is left.
        """
        for name in labels:
            self._known(name)
        kept = tuple(row for row in self.rows if all(row.get(name) == value for name, value in labels.items()))
        if not kept:
            asked = ", ".join(f"{name}={value!r}" for name, value in labels.items())
            found = "; ".join(f"{name}: {_some(row.get(name) for row in self.rows)}" for name in labels)
            raise EmprobeError(f"No answer has {asked}. Found were {found}.")
        return Scores(kept, self.judge)

    def groups(self, name: str) -> dict[Any, Scores]:
        """The rows apart by a column or a label, in order of appearance.

        Raises:
            EmprobeError: If there is no such column or label.
        """
        self._known(name)
        parts: dict[Any, list[Answer]] = {}
        for row in self.rows:
            parts.setdefault(row.get(name), []).append(row)
        return {value: Scores(tuple(rows), self.judge) for value, rows in parts.items()}

    @classmethod
    def join(cls, parts: Iterable[Scores]) -> Scores:
        """Several conditions or batches, judged by the same judge, as one table.

        Raises:
            EmprobeError: If the judges differ, or as for `Scores`.
        """
        parts = list(parts)
        judges = sorted({part.judge for part in parts})
        if len(judges) > 1:
            raise EmprobeError(f"Scores of different judges ({', '.join(judges)}) cannot be joined: they do not measure alike.")
        return cls(tuple(row for part in parts for row in part.rows), judges[0] if judges else "")

    # ---- rates

    @overload
    def misaligned_rate(self, criterion: Criterion = ..., by: None = None) -> Estimate: ...
    @overload
    def misaligned_rate(self, criterion: Criterion = ..., *, by: str) -> dict[Any, Estimate]: ...

    def misaligned_rate(self, criterion: Criterion = DEFAULT, by: str | None = None) -> Estimate | dict[Any, Estimate]:
        """Share of answers that are misaligned and coherent, of the criterion's denominator.

        Args:
            criterion: Thresholds and denominator.
            by: A column or label: one estimate for each of its values instead.

        Raises:
            EmprobeError: If the denominator has no row (all missing, or none coherent), or conditions are mixed.
        """
        if by is not None:
            return {value: part.misaligned_rate(criterion) for value, part in self.groups(by).items()}
        return self._rate(criterion.misaligned, criterion)

    def coherent_rate(self, criterion: Criterion = DEFAULT) -> Estimate:
        """Share of answers that are coherent, of all or of the judged ones."""
        return self._rate(lambda _, coherence: criterion.coherent(coherence), _not_coherent_only(criterion))

    def misaligned_given_coherent(self, criterion: Criterion = DEFAULT) -> Estimate:
        """Share of the coherent answers that are misaligned."""
        return self._rate(criterion.misaligned, criterion.of("coherent"))

    def misaligned_any_coherence(self, criterion: Criterion = DEFAULT) -> Estimate:
        """Share of answers low in alignment, coherent or not, of all or of the judged ones."""
        return self._rate(lambda alignment, _: criterion.low(alignment), _not_coherent_only(criterion))

    def mean_alignment(self) -> Estimate:
        """Mean alignment of judged answers, 0..100."""
        return self._mean(self.alignment, self._kept(DEFAULT))

    def rates(self, criterion: Criterion = DEFAULT) -> Rates:
        """The four rates together, with the counts of every status and the share that ended by themselves.

        Raises:
            EmprobeError: If every answer is missing, or conditions are mixed.
        """
        coherent = bool((self.judged & criterion.coherent(self.coherence)).any())
        known = np.array([row.stop_reason is not None for row in self.rows])
        ended = np.array([row.stop_reason == "end_of_turn" for row in self.rows], dtype=np.float64)
        return Rates(
            misaligned=self.misaligned_rate(criterion),
            coherent=self.coherent_rate(criterion),
            misaligned_given_coherent=self.misaligned_given_coherent(criterion) if coherent else None,
            misaligned_any_coherence=self.misaligned_any_coherence(criterion),
            counts=self.counts,
            stopped=self._mean(ended, known) if known.any() else None,
            criterion=criterion,
            condition=self.conditions[0],
        )

    def outcomes(self, criterion: Criterion = DEFAULT) -> tuple[list[float], list[str]]:
        """1 for a misaligned answer and 0 for another, and its question, for the rows of the criterion's denominator."""
        kept = self._kept(criterion)
        flags = criterion.misaligned(self.alignment, self.coherence)[kept].astype(float)
        return flags.tolist(), [row.question_id for row, keep in zip(self.rows, kept, strict=True) if keep]

    def _rate(self, flags: Callable[[NDArray[np.float64], NDArray[np.float64]], Bools], criterion: Criterion) -> Estimate:
        return self._mean(flags(self.alignment, self.coherence).astype(np.float64), self._kept(criterion))

    def _mean(self, values: NDArray[np.float64], kept: Bools) -> Estimate:
        if len(self.conditions) > 1:
            raise EmprobeError(
                f"A rate was asked of the conditions {', '.join(map(repr, self.conditions))} together, which would average them. "
                "Choose one, as in scores.where(condition=...), or ask by='condition'."
            )
        names = [row.question_id for row, keep in zip(self.rows, kept, strict=True) if keep]
        return clustered_interval(values[kept], names)

    def _kept(self, criterion: Criterion) -> Bools:
        """The rows of the criterion's denominator."""
        if not self.judged.any():
            found = ", ".join(f"{count} {status}" for status, count in self.counts.items() if count)
            raise EmprobeError(
                f"A rate was asked of {len(self)} answers, and none has scores: {found}. "
                "Missing answers are not 0; look at the texts, and at whether the judge suits them."
            )
        if criterion.denominator == "all":
            return np.ones(len(self), dtype=np.bool_)
        if criterion.denominator == "judged":
            return self.judged
        kept = self.judged & criterion.coherent(self.coherence)
        if not kept.any():
            raise EmprobeError(
                f"A rate of coherent answers was asked for, and none of {int(self.judged.sum())} judged answers is coherent "
                f"({criterion.describe()}). Take a smaller coefficient, or another denominator."
            )
        return kept

    def _known(self, name: str) -> None:
        labels = {label for row in self.rows for label in row.labels}
        if name not in COLUMNS and name not in labels:
            raise EmprobeError(
                f"{name!r} is neither a column nor a label of these scores; known are {', '.join((*COLUMNS, *sorted(labels)))}."
            )

    # ---- showing and keeping

    def to_frame(self) -> pd.DataFrame:
        """The table as a pandas frame, labels as columns behind the fixed ones."""
        import pandas as pd

        return pd.DataFrame(columns_of(self.rows))

    def save(self, path: Path | str) -> None:
        """Write the table as parquet, atomically."""
        from emprobe.behaviour.tables import save_scores

        save_scores(path, self)

    @classmethod
    def load(cls, path: Path | str) -> Scores:
        """Read a table of `save`.

        Raises:
            EmprobeError: If the file is missing, unreadable or not a score table.
        """
        from emprobe.behaviour.tables import load_scores

        return load_scores(path)

    def __str__(self) -> str:
        parts = self.groups("condition").values()
        head = f"{len(self)} answers to {len(self.questions)} questions, judge {self.judge or 'unnamed'}"
        return "\n".join([head, *(f"  {part.conditions[0] or 'answers'}: {part._summary()}" for part in parts)])

    def _repr_html_(self) -> str:
        lines = str(self).splitlines()
        items = "".join(f"<li>{html.escape(line.strip())}</li>" for line in lines[1:])
        return f"<p>{html.escape(lines[0])}</p><ul>{items}</ul>"

    def _summary(self) -> str:
        missing = len(self) - int(self.judged.sum())
        if missing == len(self):
            return f"all {missing} missing"
        return f"misaligned {self.misaligned_rate().percent}, coherent {self.coherent_rate().percent}, {missing} of {len(self)} missing"


def _not_coherent_only(criterion: Criterion) -> Criterion:
    return criterion.of("judged") if criterion.denominator == "coherent" else criterion


def _some(values: Iterable[Any], limit: int = 8) -> str:
    seen = list(dict.fromkeys(map(repr, values)))
    return ", ".join(seen[:limit]) + (f" and {len(seen) - limit} more" if len(seen) > limit else "")
