"""The study: from scores alone, or from models that are fine-tuned first; one result, its card and its figures."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from emprobe.behaviour.table_files import choose, load_table, renames
from emprobe.files import file_hash, locked_folder, write_json
from emprobe.report.transfer_card import write_transfer
from emprobe.studies.flags import as_given
from emprobe.studies.folder import claim_folder
from emprobe.studies.transfer.analysis import analyse, compared
from emprobe.studies.transfer.cell_rates import ASKED, TRAINED
from emprobe.studies.transfer.covariate_tables import read_covariates
from emprobe.studies.transfer.settings import Transfer, check


def run_transfer(asked: Transfer) -> dict[str, Any]:
    """Run the study; write `result.json`, the card and the figures, and return the result.

    Raises:
        EmprobeError: Unusable input, before anything is written; or a fine-tune that diverges.
        MismatchError: A folder that holds another run, or grids that share too few cells.
    """
    check(asked)
    if asked.scores:
        return _from_scores(asked)
    from emprobe.studies.transfer.grid import run_grid  # which writes its result with the functions below

    return run_grid(asked)


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """`result.json`, `README.md` and the figures."""
    write_json(folder / "result.json", result)
    write_transfer(folder, result)


def given(asked: Transfer) -> dict[str, Any]:
    """The flags that were set, for the command line that makes the result again."""
    usual = {field.name: field.default for field in fields(asked) if field.default is not MISSING}
    return {name: value for name, value in as_given(asked).items() if name not in ("out", "progress") and value != usual.get(name, ...)}


def _from_scores(asked: Transfer) -> dict[str, Any]:
    tables = [choose(load_table(path, rename=renames(asked.columns), needed=(*TRAINED, *ASKED)), asked.where) for path in asked.scores]
    covariates = [read_covariates(path) for path in asked.covariates]
    files = {
        kind: [{"name": Path(path).name, "hash": file_hash(path)[:16]} for path in paths]
        for kind, paths in (("scores", asked.scores), ("covariates", asked.covariates))
    }
    result = analyse(tables[0], asked, covariates)
    result["others"] = [
        {"name": file["name"], **compared(tables[0], table, asked)} for file, table in zip(files["scores"][1:], tables[1:], strict=True)
    ]
    result = {"record": "Transfer", **result, "world": False, "inputs": {"command": given(asked), "files": files}}
    folder = claim_folder(Path(asked.out).expanduser(), {**asked.plain(), "files": files})
    with locked_folder(folder):
        write_result(folder, result)
    return result
