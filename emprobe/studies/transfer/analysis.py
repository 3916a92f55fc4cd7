"""Everything that starts from a table of judged answers over trained and asked cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from emprobe.behaviour.criterion import Criterion
from emprobe.behaviour.score_table import ScoreTable
from emprobe.studies.transfer.agreement import grids_agree, learnt_and_spread
from emprobe.studies.transfer.cell_rates import Cell, cell_rates
from emprobe.studies.transfer.claims import claims_of
from emprobe.studies.transfer.covariate_tables import units_of
from emprobe.studies.transfer.covariates import covariate_effects
from emprobe.studies.transfer.decomposition import FEWEST, decompose
from emprobe.studies.transfer.judged import Judged, judged
from emprobe.studies.transfer.matrices import elsewhere, matrices
from emprobe.studies.transfer.settings import Transfer
from emprobe.studies.transfer.summary import by_replicate, differences, four_way

if TYPE_CHECKING:
    import pandas as pd


def analyse(table: ScoreTable, asked: Transfer, covariates: Sequence[pd.DataFrame] = ()) -> dict[str, Any]:
    """The whole analysis of one table.

    Args:
        table: Judged answers with `train_domain`, `train_task`, `eval_domain`, `eval_task` and `question_id`; `family` makes paraphrases
            one cluster, `organism` or `seed` tell apart fine-tunes of one cell, which are pooled.
        asked: Criterion, draws, permutations, seed, `eval_set`, `match_on` and `bins` are read.
        covariates: Tables as `emprobe.studies.transfer.units_of` takes them.

    Returns:
        Plain values: `summary` and `ratios` by relation, `differences`, `replicates`, `matrices`, `elsewhere`, `decomposition`,
        `reliability`, `covariates`, `claims`, `table` (counts), `warnings` and `criterion`. What cannot be had is `None` or says why.

    Raises:
        EmprobeError: A table without the columns of a grid, or covariates that do not fit it.
    """
    criterion, how = Criterion.named(asked.criterion), asked.resampling
    found = judged(table, criterion, asked.eval_set)
    units = units_of(found.grid, covariates, criterion) if covariates else None
    cells = cell_rates(found.grid, criterion)
    chance = {"permutations": asked.permutations, "seed": asked.seed}
    with _steps(asked, 6 + (units is not None)) as step:
        result: dict[str, Any] = step("four-way summary", lambda: four_way(found.grid, criterion, how))
        result["differences"] = step("differences", lambda: differences(found.grid, criterion, how))
        result["replicates"] = {name: by_replicate(found.grid, name, criterion, how) for name in found.replicates}
        result["matrices"] = step("matrices", lambda: matrices(found.grid, criterion, how))
        others = found.elsewhere
        result["elsewhere"] = step("other questions", lambda: None if others is None else elsewhere(others, criterion, how))
        result["decomposition"] = step("decomposition", lambda: decompose(cells, **chance).as_dict())
        result["decomposition"]["given_coherent"] = _of_coherent(found.grid, criterion, chance)
        spread = _rates_elsewhere(found, criterion)
        result["reliability"] = step("reliability", lambda: learnt_and_spread(cells, spread, **chance))
        if units is not None:
            made = step("covariates", lambda: covariate_effects(units, asked.match_on, bins=asked.bins, **chance))
            result["covariates"] = made
    result["claims"] = claims_of(result)
    result["table"] = _counts(found)
    result["warnings"] = [*found.warnings, *(result["covariates"]["warnings"] if units is not None else [])]
    result["criterion"] = {**criterion.as_dict(), "words": criterion.describe()}
    return result


def compared(first: ScoreTable, other: ScoreTable, asked: Transfer) -> dict[str, Any]:
    """Another model's table beside the first: its own summary and decomposition, and how far both grids agree.

    Raises:
        EmprobeError: As `analyse`.
        MismatchError: If the grids share too few cells.
    """
    criterion = Criterion.named(asked.criterion)
    theirs = judged(other, criterion, asked.eval_set)
    cells = cell_rates(theirs.grid, criterion)
    chance = {"permutations": asked.permutations, "seed": asked.seed}
    return {
        **four_way(theirs.grid, criterion, asked.resampling),
        "differences": differences(theirs.grid, criterion, asked.resampling),
        "decomposition": decompose(cells, **chance).as_dict(),
        "reliability": learnt_and_spread(cells, _rates_elsewhere(theirs, criterion), **chance),
        "agreement": grids_agree(cell_rates(judged(first, criterion, asked.eval_set).grid, criterion), cells, **chance),
        "table": _counts(theirs),
        "warnings": list(theirs.warnings),
    }


def _of_coherent(grid: ScoreTable, criterion: Criterion, chance: dict[str, int]) -> dict[str, Any] | None:
    """The terms among coherent answers alone, since a task that makes answers incoherent hides what is misaligned."""
    if not (grid.judged & criterion.coherent(grid.coherence)).any():
        return None
    cells = [cell for cell in cell_rates(grid, criterion.of("coherent")) if cell.n]
    return decompose(cells, **chance).as_dict()["terms"] if len(cells) >= FEWEST else None


def _rates_elsewhere(found: Judged, criterion: Criterion) -> dict[Cell, float]:
    """Each trained cell's rate on the questions outside the grid, all pooled."""
    sums: dict[Cell, list[float]] = {}
    for cell in cell_rates(found.elsewhere, criterion) if found.elsewhere is not None else []:
        if cell.n:
            own = sums.setdefault(cell.trained, [0.0, 0.0])
            own[0] += cell.rate * cell.n
            own[1] += cell.n
    return {name: hits / n for name, (hits, n) in sums.items()}


def _counts(found: Judged) -> dict[str, Any]:
    parts = {"grid": found.grid, **({"elsewhere": found.elsewhere} if found.elsewhere is not None else {})}
    made: dict[str, Any] = {
        name: {"answers": len(part), "counts": {status: count for status, count in part.counts.items() if count}}
        for name, part in parts.items()
    }
    made["trained"] = len({cell.trained for cell in cell_rates(found.grid, Criterion())})
    made["missing_cells"] = [{"trained": trained, "asked": asked} for trained, asked in found.missing]
    made["replicates"] = {name: [str(value) for value in values] for name, values in found.replicates.items()}
    return made


@contextmanager
def _steps(asked: Transfer, total: int) -> Iterator[Callable[[str, Callable[[], Any]], Any]]:
    """Run named steps with a bar."""
    with tqdm(total=total, desc="transfer", unit="step", disable=not asked.progress) as bar:

        def step(name: str, make: Callable[[], Any]) -> Any:
            bar.set_postfix_str(name)
            found = make()
            bar.update(1)
            return found

        yield step
