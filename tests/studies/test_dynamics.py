"""Laws of the measures of training dynamics: correlations clustered by run, max_diff, turning, change-points; and tables of runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from emprobe.cli import main
from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import read_json
from emprobe.overlap import cosine_null
from emprobe.studies.dynamics import (
    Columns,
    Dynamics,
    change_point,
    component_shares,
    local_cosines,
    max_diff,
    read_runs,
    relations_of,
    run_correlation,
    run_dynamics,
    trajectory,
    walk_cosines,
    walk_shares,
)
from emprobe.studies.dynamics.relation import midranks, spearman_of, within

# ---- correlations


def clustered(runs: int, rows: int, rho: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows whose runs and own parts both correlate by rho, so that all of them do."""
    rng = np.random.default_rng(seed)
    mix = np.linalg.cholesky([[1.0, rho], [rho, 1.0]]).T
    drawn = np.repeat(rng.standard_normal((runs, 2)) @ mix, rows, axis=0) + 0.7 * rng.standard_normal((runs * rows, 2)) @ mix
    return drawn[:, 0], drawn[:, 1], np.repeat(np.arange(runs), rows)


def test_an_exact_function_of_loss_correlates_exactly() -> None:
    loss = np.array([1.0, 1.5, 2.0, 4.0, 4.5])
    for sign in (1.0, -1.0):
        line = run_correlation(loss, sign * (3 * loss + 2), list("abcde"))
        assert (line.value, line.low, line.high) == pytest.approx((sign, sign, sign), abs=1e-6)
    bent = run_correlation(loss, np.exp(loss), list("abcde"), "spearman")
    assert bent.value == pytest.approx(1.0)
    assert max_diff(loss, np.exp(loss)).value == 0


def test_both_are_scipys() -> None:
    x, y, runs = clustered(20, 1, 0.5, 3)
    y[4] = y[7]  # a tie
    assert run_correlation(x, y, runs, draws=10).value == pytest.approx(scipy_stats.pearsonr(x, y)[0])
    assert run_correlation(x, y, runs, "spearman", draws=10).value == pytest.approx(scipy_stats.spearmanr(x, y)[0])


def test_weights_are_copies() -> None:
    x, y, _ = clustered(12, 1, 0.5, 1)
    x[3] = x[5]
    weights = np.random.default_rng(0).integers(0, 4, size=(3, 12)).astype(float)
    for of, row in zip(spearman_of(x, y, weights), weights.astype(int), strict=True):
        assert of == pytest.approx(scipy_stats.spearmanr(np.repeat(x, row), np.repeat(y, row))[0])
    assert midranks(x, np.ones((1, 12)))[0].tolist() == scipy_stats.rankdata(x).tolist()


@pytest.mark.parametrize(("runs", "rows", "rho"), [(24, 4, 0.0), (20, 3, 0.8)])
def test_intervals_hold_the_truth_where_rows_of_a_run_resemble_each_other(runs: int, rows: int, rho: float) -> None:
    held, small = 0, 0
    for seed in range(150):
        found = run_correlation(*clustered(runs, rows, rho, seed), draws=150, seed=seed)
        held += found.low <= rho <= found.high
        assert found.null is not None
        small += found.null.p < 0.2
        assert found.clusters == runs
    assert 0.87 < held / 150 < 0.995
    assert small > 100 if rho else 0.12 < small / 150 < 0.29


def test_rows_of_one_run_are_one_witness() -> None:
    x, y, runs = clustered(10, 1, 0.6, 2)
    copied = [np.repeat(values, 8) for values in (x, y, runs)]
    alone, eightfold = run_correlation(x, y, runs), run_correlation(*copied)
    assert eightfold.value == pytest.approx(alone.value)
    assert (eightfold.low, eightfold.high) == pytest.approx((alone.low, alone.high))
    assert within([1.0, 3.0, 5.0, 5.0], list("aabb")).tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_what_has_no_correlation_is_refused() -> None:
    with pytest.raises(EmprobeError, match="over 3 runs was asked for, and 4 are the fewest"):
        run_correlation([1, 2, 3, 4], [1, 2, 3, 5], list("aabc"))
    with pytest.raises(EmprobeError, match="The score is 2 in all 4 rows"):
        run_correlation([1, 2, 3, 4], [2, 2, 2, 2], list("abcd"))
    with pytest.raises(EmprobeError, match="missing or infinite"):
        run_correlation([1, 2, 3, np.nan], [1, 2, 3, 4], list("abcd"))


def test_what_does_not_vary_but_for_rounding_does_not_vary() -> None:
    """A mean of equal numbers may miss them by a rounding: what is left of them within their runs is nothing all the same."""
    losses = np.repeat([0.1, 0.7, 1.3, 1.9, 2.6], 10)
    runs = np.repeat(list("abcde"), 10)
    assert np.ptp(within(losses, runs)) == 0
    frame = pd.DataFrame({"run": runs, "loss": losses, "score": np.random.default_rng(0).normal(size=50)})
    (found,) = relations_of(frame, Columns(("loss",), ("score",), "run"), draws=100)
    assert set(found["checkpoints"]) == {"rows", "all", "between"}


# ---- max_diff


@pytest.mark.parametrize("tolerance", [0.0, 0.3])
def test_max_diff_is_that_of_all_pairs(tolerance: float) -> None:
    for seed in range(20):
        x, y, _ = clustered(15, 1, 0.5, seed)
        x = x.round(1)  # ties
        pairs = [(y[i] - y[j], i, j) for i in range(15) for j in range(15) if x[i] <= x[j] + tolerance]
        found = max_diff(x, y, tolerance=tolerance, draws=20)
        assert found.value == pytest.approx(max(pairs)[0])
        assert y[found.better] - y[found.worse] == pytest.approx(found.value)
        assert x[found.better] <= x[found.worse] + tolerance
        assert 0 <= found.low <= found.value == found.high


def test_chance_of_max_diff() -> None:
    """Unrelated scores lie in their own null; a clean line lies below it; one run far above a line stands out from both lines' noise."""
    rng = np.random.default_rng(0)
    x, noise = np.linspace(1, 2, 30), rng.standard_normal(30)
    assert 0.01 < max_diff(x, noise, draws=400).nulls["unrelated"].p < 0.99
    line = max_diff(x, 40 * x + noise, draws=400)
    assert line.nulls["unrelated"].p > 0.99
    assert line.nulls["line"].p > 0.01
    # Every score dealt out at random, by hand.
    shuffles = [rng.permutation(noise) for _ in range(300)]
    by_hand = [max(one[i] - one[j] for i in range(30) for j in range(i, 30)) for one in shuffles]
    assert max_diff(x, noise, draws=400).nulls["unrelated"].mean == pytest.approx(np.mean(by_hand), rel=0.05)


# ---- the way of a direction


def test_the_local_cosine_of_a_planted_turn() -> None:
    a, b = np.eye(5)[:2]
    straight = np.stack([a * t for t in range(7)])
    assert local_cosines(straight)[1:-1] == pytest.approx([-1] * 5)
    back = np.concatenate([straight[:4], straight[2::-1]])
    assert local_cosines(back)[3] == pytest.approx(1.0)
    corner = np.stack([a * min(t, 3) + b * max(0, t - 3) for t in range(7)])
    for lag in (1, 2, 3):
        assert local_cosines(corner, lag)[3] == pytest.approx(0.0)
        assert np.isnan(local_cosines(corner, lag)[[0, -1]]).all()
    with pytest.raises(EmprobeError, match="Give at least 5"):
        local_cosines(straight[:4], 2)


def test_random_walks_turn_by_right_angles_and_have_a_first_component_all_the_same() -> None:
    rng = np.random.default_rng(0)
    moves = rng.standard_normal((40, 200))
    way = np.concatenate([np.zeros((1, 200)), np.cumsum(moves, axis=0)])
    found = local_cosines(way)[1:-1]
    assert abs(found.mean()) < 0.05
    assert (np.abs(found) < cosine_null(200, 0.999)).mean() > 0.9
    null = walk_cosines(moves, 500)
    assert abs(null.mean()) < 0.03
    assert np.quantile(np.abs(null), 0.95) < 0.5
    shares, walks = component_shares(way), walk_shares(way)
    assert 0.4 < shares[0] < 0.8  # 6 / pi^2 in the limit: a large share is no sign of a direction
    assert walks["mean"][0] == pytest.approx(shares[0], abs=0.15)
    assert component_shares(np.outer(np.arange(6), np.ones(4)))[0] == pytest.approx(1.0)


def test_a_planted_way_is_read_off() -> None:
    rng = np.random.default_rng(0)
    target, steps = np.eye(32)[3], list(range(0, 55, 5))
    size = np.array([0, 0, 0, 0, 1, 3, 6, 9, 10, 10, 10.0])
    deltas = size[:, None, None] * target + 0.5 * rng.standard_normal((11, 80, 32)) * (np.arange(11) > 0)[:, None, None]
    found = trajectory(steps, deltas, [f"q{i // 2}" for i in range(80)])
    assert found["appears"] == 20
    assert found["saturates"] in (35, 40)
    assert found["cosine_to_last"][0] is None
    assert found["cosine_to_last"][-1] == pytest.approx(1.0)
    assert abs(found["reliability"][2]) < 0.4
    assert found["reliability"][-1] > 0.99
    with pytest.raises(EmprobeError, match="has not moved any activation"):
        trajectory(steps, np.zeros((11, 4, 3)), list("abcd"))


# ---- change-points


def test_a_planted_jump_is_found_where_it_is() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(0, 80, 5)
    for place in (4, 8, 11):
        found = change_point(steps, 2 * (np.arange(16) >= place) + 0.01 * steps + 0.1 * rng.standard_normal(16))
        assert found.found
        assert found.between == (steps[place - 1], steps[place])
        assert found.low is not None
        assert found.high is not None
        assert found.low <= steps[place - 1] < steps[place] <= found.high
        assert found.step == pytest.approx(2.0, abs=0.3)


def test_no_jump_is_found_where_there_is_none() -> None:
    rng = np.random.default_rng(1)
    steps = np.arange(12)
    assert change_point(steps, 3.0 * steps).kind == "none"
    assert change_point(steps, np.full(12, 4.0)).between is None
    assert change_point(steps, 100 * np.exp(-steps / 3)).kind == "curved"
    p = np.array([change_point(steps, 2 * steps + rng.standard_normal(12), draws=1000).p for _ in range(200)])
    assert scipy_stats.kstest(p, "uniform").pvalue > 0.01
    with pytest.raises(EmprobeError, match="7 checkpoints are the fewest"):
        change_point(range(5), range(5))


# ---- tables


def write_table(path: Path, runs: int = 8, checkpoints: int = 1, **changes: Any) -> Path:
    """Runs whose harmlessness is a line of their loss with a little noise."""
    rng = np.random.default_rng(0)
    rows = [
        {"run": f"r{run}", "step": step, "train_loss": 2 - 0.1 * run - 0.01 * step, "lr": run % 2}
        for run in range(runs)
        for step in range(checkpoints)
    ]
    frame = pd.DataFrame(rows)
    frame["harmless"] = 30 * frame["train_loss"] + rng.standard_normal(len(frame))
    for name, value in changes.items():
        frame[name] = value
    frame.to_csv(path, index=False)
    return path


def asked(path: Path, out: Path, **changes: Any) -> Dynamics:
    given: dict[str, Any] = {"runs": str(path), "loss": ("train_loss",), "score": ("harmless",), "out": str(out), "draws": 200}
    return Dynamics(**(given | changes))


def test_a_table_of_runs_from_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "runs.csv")
    flags = ["--runs", str(table), "--loss", "train_loss", "--score", "harmless", "--out", str(tmp_path / "out"), "--draws", "200"]
    assert main(["study", "dynamics", *flags]) == 0
    assert "training loss, harmless" in capsys.readouterr().out
    result = read_json(tmp_path / "out" / "result.json")
    frame = pd.read_csv(table)
    assert result["pearson"]["value"] == pytest.approx(frame["train_loss"].corr(frame["harmless"]))
    assert result["spearman"]["value"] == pytest.approx(frame["train_loss"].corr(frame["harmless"], "spearman"))
    assert result["pearson"]["low"] < result["pearson"]["value"] < result["pearson"]["high"]
    assert result["max_diff"]["value"] == max_diff(frame["train_loss"], frame["harmless"]).value
    card = (tmp_path / "out" / "README.md").read_text()
    assert "emprobe study dynamics --runs" in card
    assert "--base" not in card
    assert (tmp_path / "out" / "dynamics.png").stat().st_size > 10_000
    with pytest.raises(MismatchError, match="tolerance"):
        run_dynamics(asked(table, tmp_path / "out", tolerance=0.5))


def test_the_published_runs(tmp_path: Path) -> None:
    folder = os.environ.get("EMPROBE_SHARED_DATA")
    path = Path(folder or Path(__file__).resolve().parents[3] / "shared" / "data") / "scores" / "qwen2.5-32b_finance_runs.csv"
    if not path.is_file():
        pytest.skip(f"the published runs are not at {path}; point EMPROBE_SHARED_DATA at a folder with scores/")
    columns = Columns(("train_loss", "eval_loss"), ("harmless", "alignment", "coherence"), "run")
    found = {(one["loss"], one["score"]): one for one in relations_of(read_runs(path, columns), columns, draws=200)}
    first = found["train_loss", "harmless"]
    assert (round(first["pearson"]["value"], 2), round(first["spearman"]["value"], 2)) == (0.82, 0.75)
    assert first["runs"] == 35
    published = {("train_loss", "harmless"): 17.0, ("train_loss", "alignment"): 16.1, ("eval_loss", "harmless"): 18.6}
    for key, value in (published | {("eval_loss", "alignment"): 18.8}).items():
        assert round(found[key]["max_diff"]["value"], 1) == value
    assert len(found) == 6


def test_checkpoints_are_clustered_by_run(tmp_path: Path) -> None:
    table = write_table(tmp_path / "runs.csv", checkpoints=5)
    columns = Columns(("train_loss",), ("harmless",), "run", "step", None, "lr")
    (found,) = relations_of(read_runs(table, columns), columns, draws=200)
    frame = pd.read_csv(table)
    last = frame[frame["step"] == 4]
    assert found["runs"] == 8
    assert found["row_of_run"] == "the last step"
    assert found["pearson"]["value"] == pytest.approx(last["train_loss"].corr(last["harmless"]))
    along = found["checkpoints"]
    assert along["rows"] == 40
    assert along["all"]["pearson"]["clusters"] == 8
    means = frame.groupby("run")[["train_loss", "harmless"]].mean()
    assert along["between"]["pearson"]["value"] == pytest.approx(means["train_loss"].corr(means["harmless"]))
    inner = frame[["train_loss", "harmless"]] - frame.groupby("run")[["train_loss", "harmless"]].transform("mean")
    assert along["within"]["pearson"]["value"] == pytest.approx(inner["train_loss"].corr(inner["harmless"]))
    assert found["within_given"]["values"] == 2
    plain = Columns(("train_loss",), ("harmless",), "run")
    (meant,) = relations_of(read_runs(table, plain), plain, draws=200)
    assert meant["row_of_run"] == "the mean of its rows"
    assert meant["pearson"]["value"] == pytest.approx(along["between"]["pearson"]["value"])


def test_missing_numbers_are_counted_and_sets_kept_apart(tmp_path: Path) -> None:
    table = write_table(tmp_path / "runs.csv", runs=12, set=["fpq"] * 6 + ["hbp"] * 6)
    frame = pd.read_csv(table)
    frame.loc[1, "harmless"] = np.nan
    frame.to_csv(table, index=False)
    result = run_dynamics(asked(table, tmp_path / "out", set="set"))
    assert [(one["set"], one["rows"], one["left_out"]) for one in result["relations"]] == [("fpq", 5, 1), ("hbp", 6, 0)]
    assert "1 rows lack a number" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("table", "changes", "said"),
    [
        ({}, {"score": ("kind",)}, "has no column kind; it has run, step, train_loss, lr, harmless"),
        ({}, {"score": ("run",)}, "The column run was given for two things"),
        ({"runs": 3}, {}, "train_loss against harmless: A relation over 3 runs"),
        ({"harmless": 5.0}, {}, "The score is 5 in all 8 rows"),
        ({"harmless": "good"}, {}, "harmless is no finite number in 8 of 8 rows, the first being 'good'"),
        ({"run": ["a", "a", *"bcdefg"]}, {"step": "lr"}, None),
        ({"run": ["a", "a", *"bcdefg"], "lr": 0}, {"step": "lr"}, "2 rows are given twice, the first being run a, lr 0"),
        ({"run": [None, *"abcdefg"]}, {}, "1 of 8 rows have no run"),
        ({"lr": [None, *[1e-3] * 7]}, {"given": "lr"}, "1 of 8 rows have no lr"),
        ({"run": ["a", "a", *"bcdefg"], "lr": [1, 2] + [1] * 6}, {"given": "lr"}, "Run a has several values of lr"),
        ({}, {"score": ()}, "--runs was given without --score"),
        ({}, {"base": "planted-s0"}, "--base was given with --runs"),
        ({}, {"tolerance": -1.0}, "--tolerance -1 was given"),
        ({}, {"runs": "nothing.csv"}, "nothing.csv was asked for and is not a file"),
    ],
)
def test_tables_that_cannot_be_used_are_told(table: dict[str, Any], changes: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    path = write_table(tmp_path / "runs.csv", **table)
    if said is None:
        assert run_dynamics(asked(path, tmp_path / "out", **changes))["relations"][0]["runs"] == 7
        return
    with pytest.raises(EmprobeError, match=said):
        run_dynamics(asked(path, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
