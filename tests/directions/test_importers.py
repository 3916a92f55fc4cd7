"""Importers: each reads its peer's own layout, a planted block comes back as that block, and what is not in a file stays unknown."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emprobe.directions import Direction
from emprobe.directions.importers import FORMATS, import_direction, import_directions
from emprobe.errors import EmprobeError, MismatchError, MissingExtraError
from emprobe.files import file_hash
from emprobe.interventions import Ablate, Add, MeanAblate
from emprobe.interventions.changes import Affine
from tests.fixtures.peers import (
    LAYERS,
    OUTPUTS,
    WRITERS,
    D,
    Writer,
    chosen_direction,
    control_vector,
    hidden_states,
    llama_cpp,
    mean_diffs,
    means,
    npy,
    npz,
    persona_vectors,
    repeng,
    save_torch,
    svec,
)


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_the_output_of_block_2_comes_back_as_such_from_every_format(write: Writer, tmp_path: Path) -> None:
    path, options = write(tmp_path)
    found = import_direction(path, layer=2, **options)
    assert (found.layer, found.site) == (2, "resid_post")
    planted = torch.from_numpy(OUTPUTS[2]).double()
    torch.testing.assert_close(found.vector, planted / planted.norm(), rtol=0, atol=1e-6)
    assert found.raw_norm == pytest.approx(float(planted.norm()), rel=1e-6)
    assert found.provenance["imported"]["sha256"] == file_hash(path)
    assert found.provenance["imported"]["file"] == path.name


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_every_layer_is_where_it_was_planted_and_survives_a_file(write: Writer, tmp_path: Path) -> None:
    path, options = write(tmp_path)
    found = import_directions(path, **options)
    for layer, direction in found.items():
        assert float(direction.vector @ torch.from_numpy(OUTPUTS[layer]).double()) == pytest.approx(direction.raw_norm, rel=1e-6)
        direction.save(tmp_path / "saved.safetensors")
        loaded = Direction.load(tmp_path / "saved.safetensors")
        assert torch.equal(loaded.vector, direction.vector)
        assert loaded.card() == direction.card()


@pytest.mark.parametrize(
    ("write", "layers"),
    [
        (persona_vectors, range(5)),
        (mean_diffs, range(5)),
        (chosen_direction, [2]),
        (means, range(6)),
        (svec, range(6)),
        (npy, range(6)),
        (repeng, range(1, 6)),
        (llama_cpp, range(5)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_layers_of_each_format(write: Writer, layers: Sequence[int], tmp_path: Path) -> None:
    """Inputs say nothing of the last block's output, the last hidden state is no block's, and the two GGUF conventions differ by one."""
    path, options = write(tmp_path)
    assert list(import_directions(path, **options)) == list(layers)


def test_who_wrote_a_control_vector_is_asked_about(tmp_path: Path) -> None:
    path = control_vector(tmp_path, 0)
    silent, said = import_direction(path, layer=2), import_direction(path, layer=2, convention="repeng")
    assert any("nothing in the file says who wrote it" in c for c in silent.provenance["imported"]["cautions"])
    assert not any("nothing in the file says" in c for c in said.provenance["imported"]["cautions"])
    assert silent.provenance["imported"]["says"] == {"model_hint": "qwen2", "layer_count": LAYERS - 1}
    with pytest.raises(EmprobeError, match=r"The convention 'mine' does not exist\. Use one of: repeng, llama\.cpp"):
        import_direction(path, layer=2, convention="mine")


def test_control_vectors_need_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v.gguf").write_bytes(b"GGUF" + bytes(60))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'emprobe\[gguf\]'"):
        import_direction(tmp_path / "v.gguf", layer=1)


def test_embeddings_are_the_input_of_block_0(tmp_path: Path) -> None:
    for write in (persona_vectors, mean_diffs):
        path, options = write(tmp_path)
        found = import_direction(path, layer=0, site="resid_pre", **options)
        assert (found.layer, found.site, found.raw_norm) == (0, "resid_pre", pytest.approx(12.0))
    (tmp_path / "direction_metadata.json").write_text('{"pos": -2, "layer": 0}')
    chosen = import_direction(save_torch(torch.ones(D).double(), tmp_path / "direction.pt"))
    assert (chosen.layer, chosen.site, chosen.positions) == (0, "resid_pre", "prompt token -2")


def test_the_row_after_the_final_norm_is_refused_by_name(tmp_path: Path) -> None:
    path, _ = persona_vectors(tmp_path)
    with pytest.raises(EmprobeError, match=r"layers 0 to 4 .*layer 5 was asked for\. Layer 5 is left out: .*after the final norm"):
        import_direction(path, layer=5)


def test_a_trained_vector_carries_its_alpha_and_its_own_site(tmp_path: Path) -> None:
    saved = {"steering_vector": torch.from_numpy(OUTPUTS[2].copy()).bfloat16(), "layer_idx": 2, "alpha": 256.0}
    found = import_direction(save_torch(saved, tmp_path / "steering_vector.pt"))
    assert (found.layer, found.site, found.estimator) == (2, "mlp_out", "trained by gradient descent")
    assert found.raw_norm == pytest.approx(256 * float(saved["steering_vector"].double().norm()))


def test_what_no_file_brings_stays_unknown_and_is_refused_as_a_unit(tmp_path: Path) -> None:
    path, options = npz(tmp_path)
    found = import_direction(path, layer=2, **options)
    assert (found.resid_norm, found.base_projection, found.split_half, found.n, found.questions) == (None,) * 5
    assert (found.contrast, found.sign, found.estimator, found.positions) == ("unknown",) * 4
    assert "residual norm unknown" in repr(found)
    assert found.provenance["imported"]["says"]["metadata"] == {"direction_sign": "misaligned_minus_aligned"}
    with pytest.raises(EmprobeError, match=r"a unit without a norm: the mean residual norm at resid_post\[2\] is unknown"):
        Add(found, 1.0).edits(99)
    with pytest.raises(EmprobeError, match=r"needs the base's mean projection .* unknown.*Give mean="):
        MeanAblate(found).edits(99)
    assert Add(found, 2.0, unit="raw").edits(99)[0].change.shift[0] == pytest.approx(2 * found.raw_norm)
    assert Ablate(found).edits(99)[0].change == Affine((0.0,), -1.0)
    measured = replace(found, resid_norm=4.0, base_projection=0.5)
    assert Add(measured, 0.5).edits(99)[0].change.shift == (2.0,)
    assert MeanAblate(measured).edits(99)[0].change.shift == (0.5,)
    assert measured.relative_norm == pytest.approx(found.raw_norm / 4)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"d_model": 8}, r"was asked to fit d_model 8, but is of d_model 16"),
        ({"layer": 3}, r"was asked to fit layer 3, but is of layer 2"),
        ({"site": "resid_pre"}, r"was asked to fit site resid_pre, but is of site resid_post"),
        ({"fingerprint": "1f"}, r"was asked to fit fingerprint 1f, but is of fingerprint unknown"),
    ],
)
def test_a_direction_that_does_not_fit_is_refused(asked: dict[str, Any], message: str, tmp_path: Path) -> None:
    path, options = npy(tmp_path)
    import_direction(path, layer=2, **options).save(tmp_path / "d.safetensors")
    with pytest.raises(MismatchError, match=message):
        Direction.load(tmp_path / "d.safetensors", **asked)
    with pytest.raises(MismatchError, match="This direction " + message):
        Direction.load(tmp_path / "d.safetensors").check_fits(**asked)


def test_a_direction_that_fits_is_loaded(tmp_path: Path) -> None:
    path, options = npy(tmp_path)
    found = replace(import_direction(path, layer=2, **options), provenance={"base": {"fingerprint": "1f"}, "tuned": {"fingerprint": "2e"}})
    found.save(tmp_path / "d.safetensors")
    for fingerprint in ("1f", "2e"):
        Direction.load(tmp_path / "d.safetensors", d_model=D, layer=2, site="resid_post", fingerprint=fingerprint)
    with pytest.raises(MismatchError, match="fit fingerprint 3d, but is of fingerprint 1f and 2e"):
        Direction.load(tmp_path / "d.safetensors", fingerprint="3d")


# Recognition.


def test_a_name_does_not_make_a_format(tmp_path: Path) -> None:
    path, options = svec(tmp_path)
    renamed = path.rename(tmp_path / "evil_response_avg.pt")
    assert import_direction(renamed, layer=2, **options).provenance["imported"]["format"] == "svec"


@pytest.mark.parametrize(
    ("value", "candidates"),
    [
        (hidden_states(), r"persona_vectors \(row k is the input of block k\); array \(you name the site\)"),
        ({k: torch.ones(D) for k in range(3)}, r"model_organisms \(k is the output of block k\); array \(you name the site\)"),
        ([torch.ones(D)] * 3, r"model_organisms \(k is the output of block k\); array \(you name the site\)"),
    ],
)
def test_a_file_that_may_be_of_several_formats_is_not_guessed(value: Any, candidates: str, tmp_path: Path) -> None:
    path = save_torch(value, tmp_path / "vector.pt")
    with pytest.raises(EmprobeError, match=rf"may be any of: {candidates}.*give format= one of them"):
        import_direction(path, layer=1, site="resid_post")
    assert import_direction(path, format="array", layer=1, site="resid_post").layer == 1


def test_the_named_format_decides_what_a_row_is(tmp_path: Path) -> None:
    path = save_torch(hidden_states(), tmp_path / "vector.pt")
    as_inputs = import_direction(path, format="persona_vectors", layer=1)
    as_outputs = import_direction(path, format="array", layer=2, site="resid_post")
    assert torch.equal(as_inputs.vector, as_outputs.vector)
    assert (as_inputs.positions, as_outputs.positions) == ("unknown", "unknown")


def test_one_vector_needs_its_place_named(tmp_path: Path) -> None:
    for path in (tmp_path / "v.npy", save_torch(torch.ones(D), tmp_path / "v.pt")):
        np.save(tmp_path / "v.npy", OUTPUTS[0])
        found = import_direction(path, layer=9, site="attn_out")
        assert (found.layer, found.site) == (9, "attn_out")
        with pytest.raises(EmprobeError, match=r"does not say where in a block .*Name site="):
            import_direction(path, layer=9)
        with pytest.raises(EmprobeError, match=r"is one vector and does not say its layer\. Name layer="):
            import_direction(path, site="resid_post")
        with pytest.raises(EmprobeError, match=r"is one vector and does not say its layer\. Name layer="):
            import_directions(path, site="resid_post")


# Real tensors.


@pytest.fixture(scope="module")
def real() -> Path:
    asked = os.environ.get("EMPROBE_SHARED_DATA")
    folder = (Path(asked) if asked else Path(__file__).resolve().parents[3] / "shared" / "data") / "directions"
    if not folder.is_dir():
        pytest.skip(f"real directions are not at {folder}; point EMPROBE_SHARED_DATA at a folder with directions/")
    return folder


def test_real_persona_vectors(real: Path) -> None:
    evil, impolite = (import_direction(real / f"q3_4b_{trait}_response_avg.pt", layer=19) for trait in ("evil", "impolite"))
    assert evil.cosine(impolite) == pytest.approx(0.67, abs=0.005)
    assert evil.positions == "response_avg"
    assert 0.15 < evil.provenance["imported"]["top_5_energy"] < 0.27
    assert list(import_directions(real / "q3_4b_evil_response_avg.pt")) == list(range(35))
    with pytest.raises(EmprobeError, match=r"Layer 35 is left out: .*final norm"):
        import_direction(real / "q3_4b_evil_response_avg.pt", layer=35)
    with pytest.raises(EmprobeError, match=r"resid_pre\[0\] \(layer 0\) is zero"):
        # Every prompt ends in the same token, so that the embeddings at it do not differ.
        import_direction(real / "q3_4b_evil_prompt_last.pt", layer=0, site="resid_pre")


def test_real_array(real: Path) -> None:
    found = import_directions(real / "qwen2.5-14b_em_direction.npz", site="resid_post")
    assert [found[24].cosine(found[layer]) for layer in (16, 20, 28, 40)] == pytest.approx([0.62, 0.77, 0.81, 0.54], abs=0.006)
    shares = [found[layer].provenance["imported"]["rounding_share"] for layer in (16, 20, 24, 28, 40)]
    assert all(0.02 < share < 0.05 for share in shares)
    assert found[24].provenance["imported"]["says"]["metadata"]["direction_sign"] == "misaligned_minus_aligned"


def test_real_refusal_direction(real: Path) -> None:
    # Saved on a GPU: it is read on a machine without one.
    found = import_directions(real / "refdir_qwen-1_8b-chat.pt", entry=-1)
    assert list(found) == list(range(23))
    assert found[0].provenance["imported"]["says"]["shape"] == [5, 24, 2048]
    assert found[0].provenance["imported"]["rounding_share"] < 1e-9


def test_every_format_is_written_by_a_test() -> None:
    assert set(FORMATS) == {"persona_vectors", "model_organisms", "refusal_direction", "gguf", "svec", "array"}
