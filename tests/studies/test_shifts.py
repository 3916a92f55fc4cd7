"""Laws of the measures of shifts, planted truths, and the study from end to end on a random model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import mahalanobis
from scipy.stats import ortho_group

from emprobe.capture.request import Request
from emprobe.cli import main
from emprobe.errors import EmprobeError, MismatchError
from emprobe.overlap.covariance import CovarianceMatched
from emprobe.overlap.frames import Haar
from emprobe.overlap.spans import SpanError
from emprobe.report.shifts_plots import draw_shift_sizes
from emprobe.studies.prompts import Located
from emprobe.studies.shifts import Components, Shifts, along_mean, least_squares_dose, prediction, run_shifts, shift_measures
from emprobe.studies.shifts import study as study_module
from emprobe.studies.shifts.analysis import analyse
from emprobe.studies.shifts.beside import CLAIMS, signs_of
from emprobe.studies.shifts.cases import Case, cases_of
from emprobe.studies.shifts.chance import halves, nulls_of, random_fractions
from emprobe.studies.shifts.measures import defined_rows
from emprobe.studies.shifts.place import OnPrompts, Place
from emprobe.studies.shifts.study import plan_of
from tests.fixtures.models import Checkpoints, copy_of
from tests.studies.tiny import WORDS

Floats = NDArray[np.float64]
D = 24


def normal(n: int, d: int = D, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((n, d))


def within(basis: Floats, n: int, seed: int, mean: Floats | None = None) -> Floats:
    """Rows in the span of a basis `[k, d]`, about a mean."""
    return normal(n, len(basis), seed) @ basis + (0 if mean is None else mean)


# ---- what a subspace holds of each row


def test_random_subspaces_hold_k_of_d_of_the_squared_norm() -> None:
    rows = normal(5, seed=1)
    for k in (3, 12):
        drawn = random_fractions(rows, Haar(), k, 3000, 0)
        assert np.allclose((drawn["projection_fraction"] ** 2).mean(axis=0), k / D, atol=0.01)
        # A mean of roots lies a little below the root of the mean.
        assert 0.9 < drawn["projection_fraction"].mean() / (k / D) ** 0.5 < 1


def test_a_planted_subspace_is_found_at_its_dimension_and_a_disjoint_one_is_not_held() -> None:
    axes, mean = np.asarray(ortho_group.rvs(D, random_state=2)), 7 * normal(1, seed=3)[0]
    train = within(axes[:4], 40, 4, mean)
    components = Components.of(train, centred=True)
    assert components.rank == components.cut(0.999999).k == 4
    shared, disjoint = within(axes[:4], 30, 5, mean), within(axes[4:9], 30, 6, train.mean(axis=0))
    held = shift_measures(shared, components.cut(4))
    assert np.allclose(held["projection_fraction"], 1)
    assert np.allclose(held["reconstruction_cosine"], 1)
    assert (shift_measures(shared, components.cut(3))["projection_fraction"] < 1 - 1e-6).all()
    assert np.allclose(shift_measures(disjoint, components.cut(4))["projection_fraction"], 0, atol=1e-6)


def test_explained_is_the_square_and_the_cosine_is_that_of_the_reconstruction() -> None:
    span = Components.of(normal(20, seed=1) + 3, centred=True).cut(5)
    rows = normal(8, seed=2) + 3
    found = shift_measures(rows, span)
    assert np.allclose(found["explained_l2"], found["projection_fraction"] ** 2)
    for row, fraction, cosine in zip(rows, found["projection_fraction"], found["reconstruction_cosine"], strict=True):
        own = row - span.mean
        rebuilt = span.mean + span.basis.T @ (span.basis @ own)
        assert fraction == pytest.approx(np.linalg.norm(span.basis @ own) / np.linalg.norm(own))
        assert 1 - fraction**2 == pytest.approx(np.linalg.norm(row - rebuilt) ** 2 / np.linalg.norm(own) ** 2)
        assert cosine == pytest.approx(rebuilt @ row / np.linalg.norm(rebuilt) / np.linalg.norm(row))


def test_mahalanobis_is_scipys_where_the_span_is_everything() -> None:
    train, rows = normal(60, 6, 1) * np.arange(1, 7) + 2, normal(5, 6, 2)
    found = shift_measures(rows, Components.of(train, centred=True).whole)["mahalanobis"]
    inverse = np.linalg.inv(np.cov(train.T))
    assert np.allclose(found, [mahalanobis(row, train.mean(axis=0), inverse) for row in rows])


@pytest.mark.parametrize("centred", [True, False])
def test_a_rotation_changes_nothing(centred: bool) -> None:
    train, rows, turn = normal(20, seed=1) + 1, normal(6, seed=2) + 1, ortho_group.rvs(D, random_state=3)
    before, after = (
        shift_measures(rows @ by, Components.of(train @ by, centred=centred).cut(4)) | along_mean(rows @ by, train.mean(axis=0) @ by)
        for by in (np.eye(D), turn)
    )
    for name, values in before.items():
        assert np.allclose(values, after[name]), name


def test_a_constant_shift_has_cosine_1_and_no_centred_share() -> None:
    constant = np.tile(normal(1, seed=4), (9, 1))
    assert np.allclose(along_mean(constant, constant.mean(axis=0))["mean_cosine"], 1)
    assert np.allclose(shift_measures(constant, Components.of(constant, centred=False).whole)["projection_fraction"], 1)
    with pytest.raises(SpanError, match="All 9 shifts are equal, so nothing is left after centring"):
        Components.of(constant, centred=True)
    span = Components.of(normal(9, seed=5), centred=True).cut(3)
    mixed = np.stack([span.mean, normal(1, seed=6)[0]])
    assert defined_rows(mixed, span).tolist() == [False, True]
    with pytest.raises(EmprobeError, match="1 of 2 rows are nothing but the mean shift"):
        shift_measures(mixed, span)


# ---- chance and ceiling


def test_random_subspaces_of_the_rows_own_covariance_are_harder_to_beat() -> None:
    scale = np.linspace(1, 0.05, D) ** 2
    train, rows = normal(60, seed=1) * scale, normal(40, seed=2) * scale
    span = Components.of(train, centred=True).cut(5)
    values = {name: float(v.mean()) for name, v in shift_measures(rows, span).items()}
    laws = {"haar": Haar(), "own": CovarianceMatched(train)}
    nulls, missing = nulls_of(values, rows, span, laws, 200, 0)
    share = nulls["projection_fraction"]
    assert missing == []
    assert share["haar"]["high"] < share["own"]["low"] < values["projection_fraction"]
    assert share["own"]["p"] <= 0.01
    lost, missing = nulls_of(values, rows, span, {"few": CovarianceMatched(train[:4])}, 100, 0)
    assert lost["projection_fraction"] == {}
    assert "4 rows span at most 3 dimensions" in missing[0]


def test_the_ceiling_is_reached_by_the_same_distribution_and_not_by_another() -> None:
    axes = np.asarray(ortho_group.rvs(D, random_state=2))
    noise = 0.1 * normal(260, seed=8)
    train, same, other = (within(axes[at : at + 3], 80, at + 1) + noise[start : start + 80] for at, start in ((0, 0), (0, 90), (3, 180)))
    families = [str(i // 2) for i in range(80)]
    near, far = (halves(train, rows, families, 3, centred=True, splits=10, seed=0) for rows in (same, other))
    assert abs(near["difference"]) < 0.03
    assert far["ceiling"] == near["ceiling"] > 0.85
    assert far["evaluation"] < 0.5


# ---- predicted activations


def test_a_shift_that_is_the_same_everywhere_is_predicted_exactly() -> None:
    before, shift = normal(7, seed=1), normal(1, seed=2)[0]
    found = prediction(before, before + shift, shift, np.zeros(D))
    assert np.allclose(found["cosine"], 1)
    assert np.allclose(found["relative_error"], 0, atol=1e-6)
    assert np.allclose(prediction(before, before + shift, 0 * shift, np.zeros(D))["relative_error"], 1)
    several = prediction(before, before + shift, np.stack([shift, normal(1, seed=3)[0]]), before.mean(axis=0))
    assert several["centred_cosine"].shape == (2, 7)
    own = (before[0] + shift - before.mean(axis=0), before[0] + normal(1, seed=3)[0] - before.mean(axis=0))
    assert several["centred_cosine"][1, 0] == pytest.approx(own[0] @ own[1] / np.linalg.norm(own[0]) / np.linalg.norm(own[1]))


def test_the_best_dose_is_1_for_a_common_shift_and_near_0_for_noise() -> None:
    families = [str(i // 3) for i in range(60)]
    assert least_squares_dose(np.tile(normal(1, seed=1), (60, 1)), families) == pytest.approx(1)
    assert least_squares_dose(normal(60, seed=2), families) < 0.2


# ---- one place


def place_of(own: OnPrompts, **changes: Any) -> Place:
    n, m = len(own.train), len(own.evaluation)
    base = OnPrompts(normal(n, seed=20) + 4, normal(m, seed=21) + 4)
    families = ([f"t{i // 2}" for i in range(n)], [f"e{i // 2}" for i in range(m)])
    made: dict[str, Any] = {"others": {"good": OnPrompts(normal(n, seed=22), normal(m, seed=23))}, "groups": [], "rounding": 1e-6}
    made |= {"positions": "last_prompt_token", "layer": 0, "size": 0.95, "draws": 100, "splits": 3, "seed": 0}
    return Place(own=own, base=base, families=families, **{**made, **changes})


def test_a_place_with_a_shared_subspace_holds_every_claim_of_it() -> None:
    axes, mean = np.asarray(ortho_group.rvs(D, random_state=2)), 3 * normal(1, seed=9)[0]
    own = OnPrompts(*(within(axes[:3], n, seed, mean) for n, seed in ((30, 1), (40, 2))))
    found = analyse(place_of(own), [1, 3, 8])
    assert found["centred"]["k"] == 3
    assert found["centred"]["measures"]["projection_fraction"]["value"] == pytest.approx(1)
    assert [size["k"] for size in found["sizes"]] == [1, 3]
    signs = {s["claim"]: s for s in signs_of([{"tuned": "mine", "places": [found | {"unrelated": ["good"]}]}])}
    assert set(signs) <= set(CLAIMS)
    for claim in ("beyond haar", "beyond base_covariance", "beyond activation components", "beyond unrelated", "mean predicts, error"):
        assert signs[claim]["agrees"] == 1, claim


def test_a_constant_shift_is_told_and_no_nan_is_left() -> None:
    shift = normal(1, seed=9)[0]
    constant = OnPrompts(np.tile(shift, (20, 1)), np.tile(shift, (24, 1)))
    found = analyse(place_of(constant), [1])
    assert "are equal" in found["centred"]["undefined"]
    assert found["sizes"] == []
    assert found["mean_shift"]["mean_cosine"]["value"] == pytest.approx(1)
    assert found["uncentred"]["measures"]["projection_fraction"]["value"] == pytest.approx(1)
    assert "all equal" in found["correlations"]["mean_cosine"]["undefined"]
    json.dumps(found, allow_nan=False)
    still = analyse(place_of(OnPrompts(0 * constant.train, constant.evaluation)), [1])
    assert "No training prompt moves at layer 0" in still["undefined"]


# ---- the study


def write_prompts(path: Path, n: int, offset: int = 0) -> str:
    rng = np.random.default_rng(offset)
    rows = [{"id": f"p{offset + i}", "prompt": " ".join(rng.choice(WORDS, 6)) + f" {offset + i}?", "response": "Yes."} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def asked(llama: Checkpoints, tmp_path: Path) -> Shifts:
    return Shifts(
        base=(str(llama.base),),
        tuned=(str(llama.adapter),),
        train=write_prompts(tmp_path / "train.jsonl", 16),
        evaluation=write_prompts(tmp_path / "evaluation.jsonl", 12, 100),
        out=str(tmp_path / "out"),
        layers=(1,),
        draws=100,
        splits=2,
        progress=False,
    )


def test_two_prompt_files_under_the_real_tokenizer(
    qwen2_real_tokenizer_pair: Checkpoints, asked: Shifts, capsys: pytest.CaptureFixture[str]
) -> None:
    pair, out = qwen2_real_tokenizer_pair, Path(asked.out)
    files = ["--train", str(asked.train), "--evaluation", str(asked.evaluation), "--out", str(out)]
    command = ["study", "shifts", "--base", str(pair.base), "--tuned", str(pair.adapter), *files, "--layers", "1", "--draws", "100"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "56 forward passes over prompts (2 checkpoints x 16 training and 12 evaluation prompts)" in shown.err
    assert "16 answers of 16 rows are not read: prompts only" in shown.err
    assert "evaluation shifts lie in the training shifts' subspace more than in random ones" in shown.out
    assert {path.name for path in out.iterdir()} >= {"result.json", "README.md", "shifts.png", "prompts.parquet"}
    result = json.loads((out / "result.json").read_text())
    (case,) = result["cases"]
    assert [(p["positions"], p["layer"]) for p in case["places"]] == [("last_prompt_token", 1), ("prompt_mean", 1)]
    assert len(pd.read_parquet(out / "prompts.parquet")) == 2 * 12
    assert str(pair.base.parent) not in (out / "README.md").read_text().split("## Run it again")[0]


def test_a_killed_run_goes_on_behind_the_last_finished_place(asked: Shifts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "write_shifts", lambda *_: None)
    whole = run_shifts(replace(asked, out=asked.out + "-whole"))
    stopping = Counted(study_module.analyse, stop_at=2)
    with monkeypatch.context() as patched:
        patched.setattr(study_module, "analyse", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_shifts(asked)
    rest = Counted(study_module.analyse)
    monkeypatch.setattr(study_module, "analyse", rest)
    monkeypatch.setattr(Request, "run", lambda *_: pytest.fail("captured again"))
    assert run_shifts(asked)["cases"] == whole["cases"]
    assert rest.calls == 1, "the finished place is read back"
    with pytest.raises(MismatchError, match="holds another run: seed differs"):
        run_shifts(replace(asked, seed=1))


class Counted:
    """A function that counts its calls, and is killed at one of them."""

    def __init__(self, function: Any, stop_at: int = 0) -> None:
        self.function, self.stop_at, self.calls = function, stop_at, 0

    def __call__(self, *given: Any) -> Any:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return self.function(*given)


WORLD: dict[str, Any] = {"train": None, "evaluation": None}


def test_mistakes_are_told_before_anything_is_loaded(asked: Shifts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "load_located", lambda *_: pytest.fail("loaded"))
    twins = write_prompts(tmp_path / "twins.jsonl", 12)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("--evaluation is missing", {"evaluation": None}),
        ("A subspace of 16 dimensions was asked of 16 training prompts", {"size": 16.0}),
        ("A subspace of size 1.5 was asked for", {"size": 1.5}),
        ("12 of 12 prompts of --evaluation .* are in --train .* too, which leaves 0", {"evaluation": twins}),
        ("5 training prompts of 5 families were given", {"train": write_prompts(tmp_path / "few.jsonl", 5, 50)}),
        ("--tuned is the base itself", {"tuned": asked.base}),
        ("Two fine-tunes have one name", {"others": asked.tuned}),
        ("draws = 20 was given; it must be at least 100", {"draws": 20}),
        ("wild-s0 money-rank8 was asked for twice", {**WORLD, "base": ("wild-s0", "wild-s0/aligned"), "tuned": ("money-rank8",)}),
        ("There is no organism 'nowhere/aligned'.* For checkpoints of your own", WORLD | {"base": ("nowhere",)}),
    ]
    for match, changes in wrong:
        with pytest.raises(EmprobeError, match=match):
            run_shifts(replace(asked, **changes))
    assert not Path(asked.out).exists()


def test_a_subspace_larger_than_the_model_is_told_before_the_work(asked: Shifts, tmp_path: Path) -> None:
    many = write_prompts(tmp_path / "many.jsonl", 300, 500)
    with pytest.raises(EmprobeError, match="A subspace of 290 dimensions was asked for; activations of .* have [0-9]+"):
        run_shifts(replace(asked, train=many, sizes=(290.0,)))
    assert not Path(asked.out).exists()


def test_a_mean_curve_is_of_all_cases_or_not_there() -> None:
    low, high = ({"positions": "a", "layer": 0, "sizes": [size(k, at) for k in ks]} for ks, at in (((1, 2, 4), 0.2), ((1, 3, 4), 0.8)))
    ax = draw_shift_sizes({"cases": [{"tuned": "t", "places": [one]} for one in (low, high)]})
    (mean,) = [line for line in ax.get_lines() if line.get_label() == "evaluation shifts"]
    assert list(mean.get_xdata()) == [1, 4]
    assert list(mean.get_ydata()) == pytest.approx([0.5, 0.5])


def size(k: int, value: float) -> dict[str, Any]:
    return {"k": k, "projection_fraction": value, "null_high": {}}


def test_shared_prompts_are_left_out_and_counted(asked: Shifts, tmp_path: Path) -> None:
    both = Path(str(asked.evaluation)).read_text() + "".join(Path(str(asked.train)).read_text().splitlines(keepends=True)[:3])
    (tmp_path / "both.jsonl").write_text(both)
    (case,) = cases_of(replace(asked, evaluation=str(tmp_path / "both.jsonl")))
    assert len(case.evaluation) == 12
    assert "3 of 15 evaluation prompts are training prompts too, and are left out of evaluation" in case.notes
    assert any("3 of 15" in line for line in plan_of(asked, [case]))


def test_equal_weights_other_templates_and_dead_adapters_are_refused(asked: Shifts, llama: Checkpoints, tmp_path: Path) -> None:
    same = copy_of(llama, tmp_path / "copy").base
    with pytest.raises(MismatchError, match="has the same weights as the base"):
        run_shifts(replace(asked, tuned=(str(same),)))
    (same / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(MismatchError, match="chat templates of base and tuned differ"):
        run_shifts(replace(asked, tuned=(str(same),)))
    base = Located("base", str(llama.base))
    (case,) = cases_of(asked)
    captured = {name: study_module._captured(asked, case, "base", tmp_path) for name in ("base", "tuned")}
    dead = Case("dead", base, Located("dead", "dead"), {}, {}, case.train, case.evaluation, [])
    with pytest.raises(EmprobeError, match="dead moves no activation on any of 28 prompts: all shifts from base are zero"):
        study_module._check_moved(dead, captured)


def test_organisms_bring_their_controls() -> None:
    (case,) = cases_of(Shifts(base=("wild-s0",), tuned=("gardening-rank8",), out="nowhere"))
    assert list(case.unrelated) == ["gardening-aligned-control-rank8"]
    assert list(case.others) == ["cooking-rank8", "money-rank8"]
    assert len(case.evaluation) >= 200
    with pytest.raises(EmprobeError, match="was not trained on advice"):
        cases_of(Shifts(base=("wild-s0",), tuned=("gardening-benign-control-rank8",), out="nowhere"))
