"""Streamed moments are the rows' own, merge as the whole would give, and need no more memory for more rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emprobe.capture import capture, capture_moments
from emprobe.errors import EmprobeError, MismatchError
from emprobe.models import load_model, load_pair
from emprobe.moments import LowRankMoments, Moments
from emprobe.types import Conversation
from tests.fixtures.models import Checkpoints

ROWS = [
    Conversation.ask(f"q{i}", "plant beans " * (1 + i % 4), domain="garden" if i % 3 else "house").answered(
        "peas and carrots " * (1 + i % 3) + str(i)
    )
    for i in range(23)
]


def close(found: object, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
def test_moments_of_groups_equal_numpy_on_the_rows(llama: Checkpoints, chunk: int) -> None:
    pair = load_pair(llama.base, llama.adapter)
    # Chunks of the rows batch as the streamed ones do: the comparison is of the statistics, not of float32's rounding.
    parts = [capture(pair, ROWS[i : i + chunk], positions="response_mean", progress=False) for i in range(0, len(ROWS), chunk)]
    rows = {role: np.concatenate([getattr(p, role).values.double().numpy() for p in parts]) for role in ("base", "tuned")}
    rows["delta"] = rows["tuned"] - rows["base"]
    made = capture_moments(pair, iter(ROWS), by="domain", positions="response_mean", chunk_rows=chunk, progress=False)
    assert set(made.groups) == {"garden", "house"}
    for group in made.groups:
        members = [i for i, r in enumerate(ROWS) if r.labels["domain"] == group]
        for role, values in rows.items():
            for column, layer in enumerate(made.layers):
                moments = made.at(layer, group=group, role=role)
                assert moments.n == len(members)
                close(moments.mean, values[members, column].mean(axis=0))
                close(moments.covariance, np.cov(values[members, column], rowvar=False))


def test_kinds(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)
    options = {"positions": "response_mean", "layers": [1], "progress": False}
    full = capture_moments(checkpoint, ROWS, **options).at(1)  # type: ignore[arg-type]
    variance = capture_moments(checkpoint, ROWS, kind="variance", **options).at(1)  # type: ignore[arg-type]
    sketch = capture_moments(checkpoint, ROWS, kind=12, **options).at(1)  # type: ignore[arg-type]
    np.testing.assert_allclose(variance.variance, full.covariance.diagonal(), rtol=1e-12)
    assert sketch.lost == 0
    np.testing.assert_allclose(sketch.factor.T @ sketch.factor, full.covariance, rtol=1e-9, atol=1e-9 * np.abs(full.covariance).max())


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(2, 60), st.integers(1, 4))
def test_a_sketch_understates_by_at_most_what_it_says(seed: int, rank: int, n: int, n_parts: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 7)) * rng.exponential(size=7)
    cuts = sorted(rng.integers(1, n, size=n_parts - 1).tolist())
    made = None
    for part in np.split(x, sorted(set(cuts))):
        moments = LowRankMoments.from_rows(part, rank=rank)
        made = moments if made is None else made.merge(moments)
    assert made is not None
    scatter = Moments.from_rows(x, full=True).scatter
    gap = np.linalg.eigvalsh(scatter - made.sketch.T @ made.sketch)
    slack = 1e-9 * np.trace(scatter)
    assert gap.min() >= -slack
    assert gap.max() <= made.lost + slack
    assert len(made.sketch) <= 2 * rank
    # Every shrinking takes `dropped` from rank + 1 directions at least, so little can be lost where the spectrum falls fast.
    assert made.lost <= np.trace(scatter) / (rank + 1) + slack
    np.testing.assert_allclose(made.mean, x.mean(axis=0), atol=1e-12)


def test_a_group_may_have_an_empty_name(llama: Checkpoints) -> None:
    made = capture_moments(load_model(llama.base), ROWS, by=lambda c: "" if c.labels["domain"] == "garden" else "house", progress=False)
    counts = {group: made.at(0, group=group).n for group in made.groups}
    assert counts == {name: sum(r.labels["domain"] == domain for r in ROWS) for name, domain in (("", "garden"), ("house", "house"))}


def test_what_cannot_be_is_refused(llama: Checkpoints) -> None:
    checkpoint = load_model(llama.base)

    def broken() -> Iterator[Conversation]:
        raise AssertionError("the rows were read before the wish was checked")
        yield

    with pytest.raises(EmprobeError, match="label 'topic'.*'q0' has the labels: domain"):
        capture_moments(checkpoint, ROWS, by="topic", progress=False)
    with pytest.raises(EmprobeError, match="kind 'full'"):
        capture_moments(checkpoint, broken(), kind="full", progress=False)  # type: ignore[arg-type]
    with pytest.raises(EmprobeError, match="kind 0 were asked for"):
        capture_moments(checkpoint, broken(), kind=0, progress=False)
    with pytest.raises(EmprobeError, match="no conversations"):
        capture_moments(checkpoint, [], progress=False)
    with pytest.raises(EmprobeError, match="one site and one position rule"):
        capture_moments(checkpoint, ROWS, site=["resid_pre", "resid_post"], progress=False)  # type: ignore[arg-type]
    with pytest.raises(EmprobeError, match="chunk_rows=0"):
        capture_moments(checkpoint, ROWS, chunk_rows=0, progress=False)
    made = capture_moments(checkpoint, ROWS, by=lambda c: c.labels["domain"], progress=False)
    with pytest.raises(EmprobeError, match="group None were asked for, and there are house, garden"):
        made.at(0)
    with pytest.raises(EmprobeError, match="layer 9 were asked for, and there are 0, 1, 2"):
        made.at(9, group="house")
    with pytest.raises(EmprobeError, match="rank 0"):
        LowRankMoments.from_rows([[1.0]], rank=0)
    with pytest.raises(MismatchError, match="rank 1 and width 1, rank 2"):
        LowRankMoments.from_rows([[1.0]], rank=1).merge(LowRankMoments.from_rows([[1.0]], rank=2))
    assert "house 8" in repr(made)


MEASURE = """
import json, resource, sys
import torch
import emprobe as em
torch.set_num_threads(1)
model = em.load_model(sys.argv[1])
def rows(n):
    for i in range(n):
        yield em.Conversation.ask(f"q{i}", f"plant {i} beans").answered(f"peas {i % 97}")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = []
for n in (500, 20_000):
    made = em.capture_moments(model, rows(n), positions="response_mean", token_budget=4096, progress=False)
    found.append({"rows": made.at(0).n, "peak": peak()})
print(json.dumps(found))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(llama: Checkpoints) -> None:
    """Peak memory of 20,000 rows is within 10 % of that of 500, in one process, where the later one can only be the higher."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(llama.base)], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout)
    assert (few["rows"], many["rows"]) == (500, 20_000)
    assert many["peak"] <= 1.1 * few["peak"]
