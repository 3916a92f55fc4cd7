"""A subspace is its span: found by singular values, refused where rows cannot carry it, and the same after a trip through a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.decomposition import PCA, TruncatedSVD

from emprobe.activations import Activations, PairActivations
from emprobe.errors import EmprobeError, MismatchError
from emprobe.overlap import Subspace

RNG = np.random.default_rng(0)


@dataclass
class AsDirection:
    """What a direction shows of itself, without the neighbour's class."""

    vector: torch.Tensor
    layer: int = 3
    site: Any = "resid_post"
    positions: str = "last_prompt_token"
    provenance: dict[str, Any] = field(default_factory=lambda: {"base": {"name": "b", "fingerprint": "f0"}})


def projector(space: Subspace) -> np.ndarray:
    basis = space.basis.numpy()
    return basis.T @ basis


# ---- from rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 3}, "is no Subspace that can be read: share missing"),
        ({"more": 1}, "more missing, unknown"),
        ({"layer": "x", "provenance": 3}, "layer, provenance missing"),
        ({"record": "Direction"}, "holds no subspace. Was it written by Subspace.save"),
        ("[1]", "a card that is a list"),
        ('{"a":', "a card that is no JSON"),
    ],
)
def test_a_card_that_is_not_whole_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    space, path = Subspace.from_deltas(np.eye(4), k=2), tmp_path / "s.safetensors"
    card = change if isinstance(change, str) else json.dumps({**space.card(), **change})
    save_file({"basis": space.basis}, path, {"card": card})
    with pytest.raises(EmprobeError, match=message):
        Subspace.load(path)
    save_file({"other": space.basis}, path, {"card": json.dumps(space.card())})
    with pytest.raises(EmprobeError, match="basis, other missing, unknown"):
        Subspace.load(path)


def test_centred_is_sklearns_pca() -> None:
    rows = RNG.normal(size=(40, 12)) * np.linspace(3, 1, 12) + 5
    ours, theirs = Subspace.from_deltas(rows, k=4), PCA(4, svd_solver="full").fit(rows)
    assert np.allclose(projector(ours), theirs.components_.T @ theirs.components_, atol=1e-12)
    assert ours.share == pytest.approx(theirs.explained_variance_ratio_)
    assert np.allclose(ours.mean, rows.mean(axis=0))


def test_uncentred_is_the_plain_decomposition_and_holds_the_mean() -> None:
    rows = RNG.normal(size=(40, 12)) + 5
    ours, theirs = Subspace.from_deltas(rows, k=1, centred=False), TruncatedSVD(1, algorithm="arpack").fit(rows)
    assert abs(ours.basis[0].numpy() @ theirs.components_[0]) == pytest.approx(1, abs=1e-9)
    mean = rows.mean(axis=0) / np.linalg.norm(rows.mean(axis=0))
    assert abs(ours.basis[0].numpy() @ mean) > 0.99
    assert ours.mean is None


@given(share=st.floats(0.05, 1.0), n=st.integers(2, 12), d=st.integers(2, 30))
def test_a_share_takes_as_few_components_as_reach_it(share: float, n: int, d: int) -> None:
    space = Subspace.from_deltas(np.random.default_rng(n * d).normal(size=(n, d)), share=share, centred=False)
    assert sum(space.share) >= share - 1e-9
    assert sum(space.share[:-1]) < share


def test_more_columns_than_memory_would_hold_squared() -> None:
    # A d_model x d_model matrix would take 80 GB here.
    assert Subspace.from_deltas(RNG.normal(size=(3, 100_000)), k=2).d_model == 100_000


def test_a_basis_has_one_sign_whatever_the_rows_signs() -> None:
    rows = RNG.normal(size=(9, 5))
    assert torch.allclose(Subspace.from_deltas(rows, k=3, centred=False).basis, Subspace.from_deltas(-rows, k=3, centred=False).basis)


def pair_of(shift: np.ndarray) -> PairActivations:
    """Base rows about as large as a model's, and the same with a shift, as float32 keeps them."""
    rows = np.random.default_rng(0).normal(size=(40, 16)) * 10
    both = [
        Activations(
            torch.tensor(values, dtype=torch.float32)[:, None], (1,), "resid_post", "all_tokens", tuple((str(i), 0) for i in range(40)),
            ("t",) * 40, name, name, torch.zeros(1, 16, dtype=torch.float64), torch.ones(1), 40,
        )
        for name, values in (("base", rows), ("tuned", rows + shift))
    ]  # fmt: skip
    return PairActivations(*both)


def test_last_digits_of_float32_are_no_dimension() -> None:
    one = np.linspace(1, 2, 40)[:, None] * np.linspace(-1, 1, 16)
    assert Subspace.from_deltas(pair_of(one), layer=1, share=1.0).k == 1
    with pytest.raises(EmprobeError, match=r"3 components were asked of deltas at layer 1 of rank 1 after centring \(40 rows\)"):
        Subspace.from_deltas(pair_of(one), layer=1, k=3)
    constant = pair_of(np.full((40, 16), 0.3))
    assert Subspace.from_deltas(constant, layer=1, share=1.0, centred=False).k == 1
    with pytest.raises(EmprobeError, match="All 40 deltas at layer 1 are equal but for rounding, so nothing is left after centring"):
        Subspace.from_deltas(constant, layer=1, k=1)
    with pytest.raises(EmprobeError, match="All 40 deltas at layer 1 are zero"):
        Subspace.from_deltas(pair_of(np.full((40, 16), 1e-9)), layer=1, k=1, centred=False)


def test_a_pair_s_deltas_bear_its_names_or_those_that_are_given() -> None:
    pair = pair_of(np.random.default_rng(1).normal(size=(40, 16)))
    assert Subspace.from_deltas(pair, layer=1, k=2).made_from == "tuned - base, centred"
    assert Subspace.from_deltas(pair, layer=1, k=2, made_from="gardening").made_from == "gardening, centred"


NAN = RNG.normal(size=(5, 4))
NAN[3, 1] = np.nan


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (np.zeros((0, 4)), {"k": 1}, r"shape \(0, 4\), in which there is nothing to span"),
        (np.zeros((2, 3, 4)), {"k": 1}, r"shape \(2, 3, 4\)"),
        (NAN, {"k": 1}, r"row 3 of 5 holds 1 NaN or infinite"),
        (np.where(np.isnan(NAN), np.inf, NAN), {"k": 1}, r"row 3 of 5"),
        (NAN[:3], {}, "exactly one of k= .* and share="),
        (NAN[:3], {"k": 1, "share": 0.9}, "exactly one of k= .* and share="),
        (NAN[:3], {"k": 0}, "k = 0 dimensions was asked for in d_model 4. Give 1 <= k <= 4"),
        (NAN[:3], {"k": 5}, "k = 5 dimensions was asked for in d_model 4"),
        (NAN[:3], {"k": 2.5}, "k = 2.5 dimensions was asked for in d_model 4. Give 1 <= k <= 4, a whole number"),
        ([[1.0, 2.0], [3.0]], {"k": 1}, "no rows of numbers of one length"),
        ([["a", "b"]], {"k": 1}, "not real numbers"),
        (NAN[:3], {"k": 4}, "4 components were asked of 3 deltas"),
        (NAN[:3], {"k": 3}, "of rank 2 after centring .3 rows.. Ask for at most 2"),
        (np.ones((5, 1)) * [[1.0, 2.0]], {"k": 1}, "All 5 deltas are equal, so nothing is left after centring"),
        (np.zeros((5, 2)), {"k": 1, "centred": False}, "All 5 deltas are zero.*same weights"),
        (np.outer([1, 2, 3], [1, 1, 1]), {"k": 2, "centred": False}, "of rank 1 .3 rows.. Ask for at most 1"),
        (NAN[:3], {"share": 1.5}, r"share=1.5 was asked for; the explained share lies in \(0, 1\]"),
        (NAN[:3], {"share": 0.0}, "share=0.0"),
    ],
)
def test_rows_that_cannot_carry_it(rows: np.ndarray, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EmprobeError, match=message):
        Subspace.from_deltas(rows, **options)


# ---- from directions


def test_directions_span_their_span_and_say_where_they_agree() -> None:
    made = [AsDirection(torch.tensor(v)) for v in ([1.0, 0, 0], [0.6, 0.8, 0])]
    space = Subspace.from_directions(made)
    assert np.allclose(projector(space), np.diag([1, 1, 0]), atol=1e-12)
    assert (space.layer, space.site, space.positions, space.provenance["base"]["fingerprint"]) == (
        3,
        "resid_post",
        "last_prompt_token",
        "f0",
    )
    made[1].layer = 4
    assert Subspace.from_directions(made).layer is None


def test_dependent_directions_name_the_rank() -> None:
    v = torch.from_numpy(RNG.normal(size=(2, 6)))
    with pytest.raises(EmprobeError, match="3 directions were given, but they span only 2 dimension"):
        Subspace.from_directions([v[0], v[1], v[0] - 2 * v[1]])


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([], "no directions"),
        ([torch.ones(3), torch.ones(4)], r"\(3,\), \(4,\)"),
        ([torch.ones(3), torch.zeros(3)], "Direction 1 of 2 is zero"),
        ([torch.ones(3), torch.tensor([1.0, float("nan"), 0])], "row 1 of 2 holds 1 NaN"),
    ],
)
def test_directions_that_span_nothing(vectors: list[torch.Tensor], message: str) -> None:
    with pytest.raises(EmprobeError, match=message):
        Subspace.from_directions(vectors)


# ---- from a LoRA


def adapter(folder: Path, b: torch.Tensor, module: str = "mlp.down_proj", **config: Any) -> Path:
    name = f"base_model.model.model.layers.2.{module}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{name}.lora_A.weight": torch.ones(b.shape[1], 7), f"{name}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base", **config}))
    return folder


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_a_lora_spans_the_columns_of_b(tmp_path: Path, fan_in_fan_out: bool) -> None:
    b = torch.from_numpy(RNG.normal(size=(6, 2)))
    space = Subspace.from_lora(adapter(tmp_path / "a", b, fan_in_fan_out=fan_in_fan_out), module="down_proj", layer=2)
    q = np.linalg.qr(b.numpy())[0]
    assert np.allclose(projector(space), q @ q.T, atol=1e-12)
    assert (space.site, space.layer, space.n, space.provenance["base_name"]) == ("mlp_out", 2, 2, "some/base")


@pytest.mark.parametrize(
    ("module", "layer", "message"),
    [
        ("down_proj", 1, "no B matrix of 'down_proj' at layer 1. It holds mlp.down_proj at layers 2 to 2"),
        ("proj", 2, "no B matrix of 'proj' at layer 2"),
        ("o_proj", 2, "no B matrix of 'o_proj'"),
    ],
)
def test_a_lora_without_that_matrix(tmp_path: Path, module: str, layer: int, message: str) -> None:
    folder = adapter(tmp_path / "a", torch.ones(6, 1))
    with pytest.raises(EmprobeError, match=message):
        Subspace.from_lora(folder, module=module, layer=layer)


def test_an_untrained_or_misplaced_lora(tmp_path: Path) -> None:
    with pytest.raises(EmprobeError, match="2 columns of B of down_proj at layer 2 were given, but they span only 0"):
        Subspace.from_lora(adapter(tmp_path / "zero", torch.zeros(6, 2)), module="down_proj", layer=2)
    with pytest.raises(EmprobeError, match="does not write to the residual stream"):
        Subspace.from_lora(adapter(tmp_path / "q", torch.ones(6, 1), "self_attn.q_proj"), module="q_proj", layer=2)
    with pytest.raises(EmprobeError, match="there is no such file"):
        Subspace.from_lora(tmp_path / "nowhere", module="q_proj", layer=2)


# ---- the record and its file


def test_a_trip_through_a_file_changes_nothing(tmp_path: Path) -> None:
    made = Subspace.from_deltas(RNG.normal(size=(9, 5)), k=2, layer=4, site="resid_post", positions="all_tokens", provenance={"seed": 0})
    made.save(tmp_path / "s.safetensors")
    back = Subspace.load(tmp_path / "s.safetensors", d_model=5, layer=4, site="resid_post")
    assert torch.equal(back.basis, made.basis)
    assert back.mean is not None
    assert torch.equal(back.mean, made.mean)
    assert back.card() == made.card()
    assert repr(back) == repr(made)
    assert "2 of d_model 5" in repr(made)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"d_model": 4096}, "fit d_model 4096, but is of d_model 5"),
        ({"layer": 1}, "fit layer 1, but is of layer 4"),
        ({"site": "mlp_out"}, "fit site mlp_out, but is of site unknown"),
        ({"fingerprint": "abc"}, "fit fingerprint abc, but is of fingerprint f1"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    provenance = {"base": {"name": "b", "fingerprint": "f1"}}
    Subspace.from_deltas(RNG.normal(size=(9, 5)), k=2, layer=4, provenance=provenance).save(tmp_path / "s.safetensors")
    with pytest.raises(MismatchError, match=message):
        Subspace.load(tmp_path / "s.safetensors", **asked)


@pytest.mark.parametrize(
    ("basis", "share", "message"),
    [
        (torch.ones(2, 3), (0.5, 0.5), "orthonormal rows, but these are off by 3"),
        (torch.ones(4, 3), (0.25,) * 4, r"1 <= k <= d_model, but got shape \(4, 3\)"),
        (torch.eye(3)[:2], (1.0,), "2 dimensions came with 1 explained shares"),
        (torch.full((1, 3), float("nan")), (1.0,), "finite basis"),
    ],
)
def test_a_basis_that_is_none(basis: torch.Tensor, share: tuple[float, ...], message: str) -> None:
    with pytest.raises(EmprobeError, match=message):
        Subspace(basis, share, "by hand")
