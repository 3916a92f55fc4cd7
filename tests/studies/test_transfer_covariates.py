"""Covariates of transfer: a planted confounder goes under matching, a planted effect stays; joins, exchanges, and what is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from emprobe.behaviour.criterion import Criterion
from emprobe.errors import EmprobeError
from emprobe.studies.transfer import Units, covariate_effects, judged, match, units_of
from emprobe.studies.transfer.covariate_tables import read_covariates
from emprobe.studies.transfer.covariates import level_of
from emprobe.studies.transfer.exchange import Exchange
from emprobe.studies.transfer.slopes import slope
from tests.studies.grids import CELLS, grid_frame, table_of

CRITERION = Criterion()


def world(effect: float, *, seed: int = 0, items: int = 6, replicates: int = 1) -> Units:
    """Solvable prompts have more room and are answered badly more often; `effect` is what room itself does."""
    rng, rows = np.random.default_rng(seed), []
    own = {(a, i): (z := rng.uniform(), 2 * z + rng.normal(0, 0.5), rng.normal(0, 0.05)) for a in range(12) for i in range(items)}
    for c, trained in enumerate(CELLS):
        for a, asked in enumerate(CELLS):
            for i in range(items):
                z, room, noise = own[a, i]
                alike = 0.7 * rng.normal() + (trained[1] == asked[1])
                for r in range(replicates):
                    p = 0.05 + 0.25 * z + effect * room + noise + 0.01 * c + 0.3 * (trained[1] == asked[1])
                    rate = rng.binomial(2, min(max(p, 0), 1)) / 2
                    rows.append((a * items + i, c, *trained, *asked, f"{a}.{i}", rate, 2, r, z, room, 0.1 * c, alike))
    names = ["prompt", "cell", "train_domain", "train_task", "eval_domain", "eval_task", "question_id", "rate", "n", "replicate"]
    covariates = ("solvability", "room", "reliability", "similarity")
    return Units(pd.DataFrame(rows, columns=[*names, *covariates]), covariates, ())


# ---- matching


def test_a_planted_confounder_goes_under_matching_and_a_planted_effect_stays() -> None:
    biased, matched, held, p = [], [], [], []
    for seed in range(4):
        found = covariate_effects(world(0.0, seed=seed), "solvability", permutations=29)["effects"]["room"]
        biased.append(found["effects"]["alone"]["low"])
        matched.append(found["effects"]["matched"]["value"])
        held.append(found["effects"]["matched"]["low"] <= 0 <= found["effects"]["matched"]["high"])
        p.append(found["effects"]["matched"]["null"]["p"])
    assert min(biased) > 0
    assert abs(np.mean(matched)) < 0.03
    assert sum(held) >= 3
    assert np.mean(p) > 0.2
    true = covariate_effects(world(0.12, items=10), "solvability", permutations=99)["effects"]["room"]
    effect = true["effects"]["matched_main_effects"]
    assert effect["low"] < 0.12 * true["sd"] < effect["high"]
    assert effect["low"] > 0
    assert effect["null"]["p"] <= 0.02
    assert true["halves"]["matched"]["value"] > 0


def test_prompts_without_a_counterpart_are_dropped_and_named() -> None:
    found = covariate_effects(world(0.1), "solvability", permutations=0)["effects"]["room"]
    overlap = found["overlap"]
    assert found["level"] == "prompt"
    assert overlap["prompts_kept"] + overlap["prompts_dropped"] == found["prompts"] == 72
    assert overlap["prompts_dropped"] > 0
    assert overlap["dropped"]
    assert [line["kept"] for line in overlap["bins"]] == [min(b["prompts_above"], b["prompts_below"]) >= 2 for b in overlap["bins"]]
    assert abs(overlap["imbalance_after"]) < 0.3 < overlap["imbalance_before"]


def test_few_values_are_matched_exactly() -> None:
    values, high, prompts = np.array([0.0, 0, 0, 0, 1, 1, 1, 1]), np.array([True, True, False, False] * 2), np.arange(8)
    found = match(values, high, prompts)
    assert found.exact
    assert found.kept.all()
    assert found.imbalance == (0, 0)
    alone = match(values, values > 0, prompts)
    assert not alone.kept.any()
    assert alone.prompts == (0, 8)


def test_levels_are_found_and_what_main_effects_leave_nothing_of_says_so() -> None:
    units = world(0.0)
    levels = {name: level_of(units.frame, name) for name in units.covariates}
    assert levels == {"solvability": "prompt", "room": "prompt", "reliability": "cell", "similarity": "pair"}
    frame = units.frame.assign(task=(units.frame["eval_task"] == "plan").astype(float), flat=1.0)
    found = covariate_effects(Units(frame, ("task", "flat", "solvability"), ()), "solvability", permutations=19)
    assert "leaves nothing of it" in found["effects"]["task"]["effects"]["main_effects"]["why"]
    assert "one value in all 864 units" in found["effects"]["flat"]["why"]
    assert any("flat has no effect to report" in warning for warning in found["warnings"])


def test_what_whole_tasks_share_is_said() -> None:
    units = world(0.0, items=2)
    units.frame["admissible"] = units.frame["eval_task"].map({task: i for i, task in enumerate(units.frame["eval_task"].unique())})
    found = covariate_effects(Units(units.frame, ("admissible", "room"), ()), "solvability", permutations=9)
    said = [line for line in found["warnings"] if "one value in each" in line]
    assert len(said) == 1
    assert said[0].startswith("admissible has one value in each eval_task (4 of them)")


def test_sameness_takes_what_is_its_own() -> None:
    found = covariate_effects(world(0.0), "solvability", permutations=99)["effects"]["similarity"]["effects"]
    assert found["matched_main_effects"]["low"] > 0
    assert found["matched_main_and_same"]["low"] < 0 < found["matched_main_and_same"]["high"]
    assert found["matched_main_and_same"]["null"]["p"] > 0.05


def test_without_the_covariate_to_match_on_nothing_is_matched_and_that_is_said() -> None:
    found = covariate_effects(world(0.0), "difficulty", permutations=19)
    assert found["match_on"] is None
    assert set(found["effects"]["room"]["effects"]) == {"alone", "main_effects"}
    assert "No covariate is called difficulty" in found["warnings"][0]


# ---- slopes


def test_a_slope_is_that_of_least_squares_and_scales_with_its_columns() -> None:
    rng = np.random.default_rng(0)
    x, y, z, weights = rng.normal(size=60), rng.normal(size=60), rng.normal(size=60), rng.integers(1, 4, size=60).astype(float)
    held, clusters = np.column_stack([np.ones(60), z]), {"prompts": np.arange(60) // 3, "cells": np.arange(60) % 6}
    found = slope(x, y, held, clusters, weights)
    repeated = np.repeat(np.arange(60), weights.astype(int))
    expected = np.linalg.lstsq(np.column_stack([x, held])[repeated], y[repeated], rcond=None)[0][0]
    assert found.value == pytest.approx(expected)
    ten = slope(10 * x, y + 5 * z, held, clusters, weights)
    assert [10 * ten.value, 10 * ten.low, 10 * ten.high] == pytest.approx([found.value, found.low, found.high])
    assert set(found.intervals) == {"prompts", "cells", "both"}
    with pytest.raises(EmprobeError, match="leaves nothing of it"):
        slope(2 * z + 1, y, held, clusters, weights)
    with pytest.raises(EmprobeError, match="too few for an interval"):
        slope(x, y, held, {"cells": np.arange(60) % 2}, weights)


def test_intervals_of_a_cell_covariate_cover_over_cells() -> None:
    rng, held, inside = np.random.default_rng(1), np.ones((240, 1)), 0
    cells, prompts = np.repeat(np.arange(12), 20), np.tile(np.arange(20), 12)
    for _ in range(150):
        x, own = rng.normal(size=12), rng.normal(size=12)
        y = 0.3 * x[cells] + own[cells] + rng.normal(size=240)
        found = slope(x[cells], y, held, {"prompts": prompts, "cells": cells}, np.ones(240))
        inside += found.low <= 0.3 <= found.high
    assert 0.9 <= inside / 150 <= 0.995


# ---- exchanges


def test_exchanges_keep_families_strata_and_replicates_together() -> None:
    frame = world(0.0, replicates=2).frame
    rng, strata = np.random.default_rng(0), (frame["solvability"] > 0.5).to_numpy().astype(np.int64)
    room = frame["room"].to_numpy()
    given = Exchange(frame, "prompt", strata).draw(room, rng)
    assert not np.allclose(given, room)
    assert frame.assign(given=given).groupby("prompt")["given"].agg(np.ptp).max() < 1e-9
    for stratum in (0, 1):
        assert np.sort(given[strata == stratum]) == pytest.approx(np.sort(room[strata == stratum]))
    by_cell = Exchange(frame, "cell", strata).draw(frame["reliability"].to_numpy(), rng)
    assert sorted(set(np.round(by_cell, 6))) == pytest.approx(sorted(set(frame["reliability"])))
    similarity = frame["similarity"].to_numpy()
    pair = Exchange(frame, "pair", strata).draw(similarity, rng)
    for question in ("0.0", "7.3"):
        rows = (frame["question_id"] == question).to_numpy()
        assert np.sort(pair[rows]) == pytest.approx(np.sort(similarity[rows]))
    holed = Exchange(frame.iloc[1:], "pair", strata[1:]).draw(similarity[1:], rng)
    assert np.isfinite(holed).all()
    assert len(holed) == len(frame) - 1


# ---- joins


def questions_table(**columns: Any) -> pd.DataFrame:
    ids = grid_frame()["question_id"].unique()
    return pd.DataFrame({"question_id": ids, "room": np.arange(len(ids), dtype=float), **columns})


def test_tables_are_joined_by_the_keys_that_they_have(tmp_path: Path) -> None:
    grid = judged(table_of(grid_frame().assign(organism="a"), tmp_path), CRITERION).grid
    cells = pd.DataFrame([(*cell, i) for i, cell in enumerate(CELLS)], columns=["train_domain", "train_task", "reliability"])
    found = units_of(grid, [questions_table().head(30).assign(organism="a"), cells], CRITERION)
    assert found.covariates == ("room", "reliability")
    assert found.frame["n"].sum() == len(grid)
    one = found.frame[(found.frame["question_id"] == "garden.list.1") & (found.frame["train_task"] == "plan")]
    assert one["room"].unique().tolist() == [4.0]
    assert one["reliability"].tolist() == [2, 6, 10]
    assert "room is unknown for 72 of 432" in found.warnings[0]


def test_true_and_false_count_as_one_and_zero(tmp_path: Path) -> None:
    grid = judged(table_of(grid_frame(prompts=2), tmp_path), CRITERION).grid
    table = questions_table().drop(columns="room")
    found = units_of(grid, [table.assign(room=table["question_id"].str.endswith("0"))], CRITERION)
    effects = covariate_effects(found, "none", permutations=19)["effects"]["room"]
    assert effects["mean"] == pytest.approx(0.5)
    assert effects["effects"]["alone"]["low"] < effects["effects"]["alone"]["high"]


@pytest.mark.parametrize(
    ("tables", "match_words"),
    [
        ([questions_table().drop(columns="question_id")], "has 36 rows, the keys \\[\\]"),
        ([questions_table(room=["much"] * 36)], "the covariate room is no number"),
        ([questions_table(room=np.inf)], "the covariate room is infinite"),
        ([pd.concat([questions_table(), questions_table()])], "36 rows repeat the keys question_id"),
        ([questions_table(), questions_table()], "room is there already"),
        ([questions_table(organism="a")], "the answers have no organism"),
        ([questions_table().assign(question_id="other").head(1)], "name nothing that was asked"),
    ],
)
def test_tables_that_cannot_be_joined_are_refused(tmp_path: Path, tables: list[pd.DataFrame], match_words: str) -> None:
    grid = judged(table_of(grid_frame(), tmp_path), CRITERION).grid
    with pytest.raises(EmprobeError, match=match_words):
        units_of(grid, tables, CRITERION)


def test_a_covariate_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(EmprobeError, match="is not a file"):
        read_covariates(tmp_path / "none.parquet")
