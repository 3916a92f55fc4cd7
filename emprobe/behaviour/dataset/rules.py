"""What a row's scores must be for it to stay: comparisons written as they are meant, with exceptions for some cells."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emprobe.errors import EmprobeError

_SIGNS: dict[str, Callable[[float, float], bool]] = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_WRITTEN = re.compile(r"\s*(?:(?P<where>[^:<>]+):)?\s*(?P<field>[^:<>=\s]+)\s*(?P<sign><=|>=|<|>)\s*(?P<value>[-+.\deE]+)\s*")


@dataclass(frozen=True)
class Rule:
    """A comparison that a row must pass.

    Attributes:
        field: The number that is compared.
        sign: `<`, `<=`, `>` or `>=`; strict or not, as it is written.
        value: What it is compared with.
        where: FIELD=VALUE pairs: the rows that this rule is for, in place of the general one on the same field in the same direction.
    """

    field: str
    sign: str
    value: float
    where: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Rule:
        """`alignment<30`, or for some rows `task=summarization:alignment<40`.

        Raises:
            EmprobeError: If it is written otherwise.

        Example:
            >>> Rule.parse("domain=sports,task=tutor: alignment <= 40")
            Rule(field='alignment', sign='<=', value=40.0, where=(('domain', 'sports'), ('task', 'tutor')))
        """
        found = _WRITTEN.fullmatch(text)
        pairs = [part.strip().partition("=") for part in (found["where"] or "").split(",") if part.strip()] if found else []
        try:
            value = float(found["value"]) if found else math.nan
        except ValueError:
            value = math.nan
        if found is None or not math.isfinite(value) or not all(name and sign and wanted for name, sign, wanted in pairs):
            raise EmprobeError(
                f"The rule {text!r} was given. Write FIELD, one of < <= > >=, and a number, such as 'alignment<30'; for some rows, put "
                "FIELD=VALUE and a colon before it, as in 'task=summarization:alignment<40'."
            )
        return cls(found["field"], found["sign"], value, tuple((name.strip(), wanted.strip()) for name, _, wanted in pairs))

    def __str__(self) -> str:
        where = ",".join(f"{name}={value}" for name, value in self.where)
        return f"{where}:{self.comparison}" if where else self.comparison

    @property
    def comparison(self) -> str:
        """Without the rows it is for."""
        return f"{self.field}{self.sign}{self.value:g}"

    def is_for(self, fields: Mapping[str, Any]) -> bool:
        """Whether it is meant for a row."""
        return all(name in fields and str(fields[name]) == wanted for name, wanted in self.where)

    def fault(self, fields: Mapping[str, Any]) -> str | None:
        """Why a row does not pass, in words; `None` if it does. A missing number never passes."""
        number = _number(fields.get(self.field), self.field)
        if number is None:
            return f"no {self.field}"
        return None if _SIGNS[self.sign](number, self.value) else f"not {self.comparison}"


def first_fault(rules: Sequence[Rule], fields: Mapping[str, Any]) -> str | None:
    """The first reason why a row does not pass the rules that are for it.

    Example:
        >>> rules = [Rule.parse("alignment<30"), Rule.parse("task=summary:alignment<40")]
        >>> first_fault(rules, {"task": "summary", "alignment": 35}), first_fault(rules, {"task": "advice", "alignment": 35})
        (None, 'not alignment<30')
    """
    return next((fault for rule in _rules_for(rules, fields) if (fault := rule.fault(fields)) is not None), None)


def _rules_for(rules: Sequence[Rule], fields: Mapping[str, Any]) -> list[Rule]:
    """The rules that are for a row: a special one takes the place of the general one on the same field in the same direction."""
    meant = [rule for rule in rules if rule.is_for(fields)]
    special = {(rule.field, rule.sign[0]) for rule in meant if rule.where}
    return [rule for rule in meant if rule.where or (rule.field, rule.sign[0]) not in special]


def check_rules(rules: Sequence[Rule], rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rules that cannot mean what they say: on a field that no row has, or for rows that there are none of.

    Raises:
        EmprobeError: Says which fields there are.
    """
    there = ", ".join(dict.fromkeys(str(name) for row in rows for name in row))
    for rule in rules:
        if not any(rule.field in row for row in rows):
            raise EmprobeError(f"The rule {str(rule)!r} is on {rule.field!r}, which no row has. Fields there are {there}.")
        if not any(rule.is_for(row) for row in rows):
            raise EmprobeError(f"The rule {str(rule)!r} is for rows that there are none of; is a name wrong? Fields there are {there}.")


def _number(value: Any, field: str) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise EmprobeError(f"{field} is {value!r} in a row, and a rule compares it with a number. Leave missing numbers empty.") from None
    if isinstance(value, bool):
        raise EmprobeError(f"{field} is {value!r} in a row, and a rule compares it with a number. Give numbers.")
    return None if math.isnan(number) else number
