"""Importers' bad input: no file runs code, none is half read, and each mistake is told in one sentence."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emprobe.directions.importers import import_direction
from emprobe.errors import EmprobeError, MismatchError, MissingExtraError
from tests.fixtures.peers import OUTPUTS, WRITERS, D, Writer, hidden_states, means, npy, save_torch, tensors


class Runs:
    """A pickle of this would run a command when read."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.flag),)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.pt"
        torch.save({"layer_0": Runs(flag)}, path, _use_new_zipfile_serialization=not legacy)  # noqa: TID251 - what must be refused
        with pytest.raises(EmprobeError, match=r"holds more than tensors: reading it would run code .*mkdir.*refused"):
            import_direction(path, layer=0)
    objects = tmp_path / "o.npy"
    np.save(objects, np.array([Runs(flag)], dtype=object), allow_pickle=True)
    with pytest.raises(EmprobeError, match="holds Python objects: reading it would run code, so it is refused"):
        import_direction(objects, layer=0, site="resid_post")
    assert not flag.exists()


@dataclass(frozen=True)
class Bad:
    """A file, how it is asked for, and what is said."""

    name: str
    write: Callable[[Path], Any]
    message: str
    options: dict[str, Any] | None = None


def text(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content)


def torch_file(value: Any) -> Callable[[Path], Any]:
    return lambda path: save_torch(value, path)


def raw_bytes(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def with_value(value: float) -> torch.Tensor:
    broken = hidden_states()
    broken[3, 5] = value
    return broken


def zero_at_3() -> torch.Tensor:
    broken = hidden_states()
    broken[3] = 0
    return broken


PERSONA = "evil_response_avg_diff.pt"
BAD = {
    "missing": Bad("no.pt", lambda path: None, r"no\.pt was asked for and is not a file"),
    "empty": Bad("v.pt", lambda path: path.touch(), r"v\.pt is empty \(0 bytes\)"),
    "text": Bad("v.pt", text("layer,norm\n0,1\n"), r"begins with b'layer,no', which is none of the kinds that can be imported"),
    "half JSON": Bad("v.svec", text('{"model_type": "llama", "directions": {"1": [0.1,'), r"begins like JSON and is not"),
    "other JSON": Bad("v.svec", text('{"a": 1}'), r"is a JSON file with entries a.*which is the layout of no known format"),
    "svec without layers": Bad("v.svec", text('{"model_type": "x", "directions": {}}'), r"should hold `directions` by layer number"),
    "svec of words": Bad("v.svec", text('{"model_type": "x", "directions": {"1": ["a"]}}'), r"layer 1 should be one vector"),
    "svec NaN": Bad("v.svec", text('{"model_type": "x", "directions": {"2": [NaN, 1]}}'), r"resid_post\[2\] \(layer 2\) is not finite"),
    "svec of two widths": Bad(
        "v.svec", text('{"model_type": "x", "directions": {"1": [1.0], "2": [1.0, 2.0]}}'), r"d_model 1 at layer 1 and 2 at layer 2"
    ),
    "NaN": Bad(PERSONA, torch_file(with_value(float("nan"))), r"resid_post\[2\] \(layer 2\) is not finite: 1 of 16 .*first at dimension 5"),
    "infinity": Bad(PERSONA, torch_file(with_value(float("inf"))), r"\(layer 2\) is not finite: 1 of 16 values are NaN, infinite or"),
    "zero": Bad(PERSONA, torch_file(zero_at_3()), r"\(layer 2\) is zero, and a zero vector points nowhere"),
    "layer not there": Bad(PERSONA, torch_file(hidden_states()), r"layers 0 to 4 \(0-based blocks\), and layer 40 was", {"layer": 40}),
    "no layer": Bad(PERSONA, torch_file(hidden_states()), r"holds resid_post of layers 0 to 4 .*no layer was named", {"layer": None}),
    "other site": Bad(PERSONA, torch_file(hidden_states()), r"was asked for mlp_out, but holds resid_post", {"site": "mlp_out"}),
    "no site": Bad(PERSONA, torch_file(hidden_states()), r"Site 'resid' does not exist\. Use one of: resid_pre", {"site": "resid"}),
    "no format": Bad(PERSONA, torch_file(hidden_states()), r"format 'pv' does not exist\. Use auto or one of: pers", {"format": "pv"}),
    "wrong kind": Bad(PERSONA, torch_file(hidden_states()), r"as gguf, which is a GGUF file, but it is a torch", {"format": "gguf"}),
    "wrong layout": Bad(
        PERSONA, torch_file(hidden_states()), r"should hold one vector per layer \(layer_0", {"format": "model_organisms"}
    ),
    "unheard option": Bad(PERSONA, torch_file(hidden_states()), r"has no convention to choose", {"convention": "repeng"}),
    "integers": Bad(PERSONA, torch_file(hidden_states().int()), r"row 0 should be one vector .*type int32"),
    "one axis of three": Bad("v.pt", torch_file(torch.ones(2, 1, 3)), r"is no refusal direction \[n_pos, n_layers, d_model\]"),
    "positions unnamed": Bad("v.pt", torch_file(torch.ones(2, 4, 3)), r"holds 2 token positions and none was named.*one of -2, -1"),
    "no such position": Bad("v.pt", torch_file(torch.ones(2, 4, 3)), r"positions and '-3' was asked for", {"entry": -3}),
    "no metadata": Bad("direction.pt", torch_file(torch.ones(3)), r"direction_metadata\.json.*not beside", {"format": "refusal_direction"}),
    "means alone": Bad(
        "v.pt",
        torch_file({"question": {"layer_0": torch.ones(3)}, "answer": {"layer_0": torch.ones(3)}}),
        r"mean hidden states of one set of answers, which are no direction\. Give minus=",
        {"layer": 0, "entry": "answer"},
    ),
    "means of what": Bad(
        "v.pt",
        torch_file({"question": {"layer_0": torch.ones(3)}, "answer": {"layer_0": torch.ones(3)}}),
        r"holds means over question and answer tokens and none was named",
    ),
    "sparse": Bad("v.pt", torch_file({"layer_2": torch.ones(3).to_sparse()}), r"layer_2 is a tensor without plain values"),
    "no entries": Bad("v.pt", torch_file({}), r"is a torch file with no entries, which is the layout of no known format"),
    "no rows": Bad("v.npy", lambda path: np.save(path, np.ones((0, 2))), r"with values of shape \[0, 2\]", {"site": "resid_post"}),
    "another pickle": Bad("v.pt", raw_bytes(b"\x80\x04\x95\x00"), r"is cut short, damaged or no torch file"),
    "two widths": Bad("v.pt", torch_file({"layer_0": torch.ones(3), "layer_1": torch.ones(4)}), r"d_model 3 at layer 0 and 4 at layer 1"),
    "a model": Bad("v.pt", torch_file(OrderedDict(weight=torch.ones(3))), r"entries weight.*which is the layout of no known format"),
    "trained without block": Bad(
        "v.pt", torch_file({"steering_vector": torch.ones(3), "layer_idx": "2", "alpha": 1.0}), r"layer_idx must be a block from 0"
    ),
    "several arrays": Bad(
        "v.npz",
        lambda path: np.savez(path, a=OUTPUTS, b=OUTPUTS),
        r"holds 2 arrays \(a, b\) and none was named\. Give entry= one of them",
        {"site": "resid_post"},
    ),
    "four axes": Bad("v.npy", lambda path: np.save(path, np.ones((1, 1, 1, 2))), r"one per layer \[layer, d_mo", {"site": "resid_post"}),
    "damaged control vector": Bad("v.gguf", lambda path: path.write_bytes(b"GGUF" + b"\x03" * 60), r"cut short|needs the package"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_sentence(case: str, tmp_path: Path) -> None:
    bad = BAD[case]
    path = tmp_path / bad.name
    bad.write(path)
    error = (EmprobeError, MissingExtraError) if case == "damaged control vector" else EmprobeError
    with pytest.raises(error, match=bad.message):
        import_direction(path, **{"layer": 2, **(bad.options or {})})


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_file_cut_short_is_told_so(write: Writer, share: float, tmp_path: Path) -> None:
    path, options = write(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(EmprobeError, match=r"cut short|damaged|begins like JSON"):
        import_direction(path, layer=2, **options)


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__)
def test_whatever_bytes_are_wrong_a_file_is_read_or_refused(write: Writer, tmp_path: Path) -> None:
    path, options = write(tmp_path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(40):
        broken = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 2000), size=rng.choice([1, 5, 40])):
            broken[place] = rng.integers(256)
        path.write_bytes(bytes(broken))
        with contextlib.suppress(EmprobeError):
            import_direction(path, layer=2, **options)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.5, 0.75, 0.95])
def test_an_old_torch_file_cut_short_is_told_so(share: float, tmp_path: Path) -> None:
    path = tmp_path / "v.pt"
    torch.save({"layer_2": torch.ones(D)}, path, _use_new_zipfile_serialization=False)  # noqa: TID251 - how older files were written
    assert import_direction(path, layer=2).raw_norm == 4
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(EmprobeError, match=r"v\.pt is cut short, damaged or no torch file"):
        import_direction(path, layer=2)


def test_a_control_vector_of_another_architecture_is_a_model(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", OUTPUTS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(EmprobeError, match=r"is a GGUF file of 'llama', not of a control vector"):
        import_direction(tmp_path / "m.gguf", layer=1)


def test_means_of_other_layers_are_not_subtracted(tmp_path: Path) -> None:
    path, _ = means(tmp_path)
    other = {part: tensors(layer_0=np.ones(D)) for part in ("question", "answer")}
    with pytest.raises(MismatchError, match=r"has 6 layers of d_model 16 and .* has 1 layers of d_model 16\. Subtract means of one model"):
        import_direction(path, layer=0, entry="answer", minus=save_torch(other, tmp_path / "other.pt"))


def test_emprobes_own_files_are_sent_to_their_reader(tmp_path: Path) -> None:
    path, options = npy(tmp_path)
    import_direction(path, layer=2, **options).save(tmp_path / "d.safetensors")
    with pytest.raises(EmprobeError, match=r"is a safetensors file\. If emprobe wrote it, read it with Direction\.load"):
        import_direction(tmp_path / "d.safetensors")
