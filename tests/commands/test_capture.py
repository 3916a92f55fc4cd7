"""`emprobe capture`: what it writes is what capture gives, its card's command makes it again, and bad wishes leave nothing behind."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import emprobe as em
from emprobe.cli import main
from emprobe.commands.capture import Capture, run_capture
from emprobe.errors import EmprobeError
from tests.capture.test_capture import ROWS
from tests.fixtures.models import Checkpoints


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"id": r.question_id, "prompt": r.prompt, "response": r.response, "kind": "even" if i % 2 else "odd"} for i, r in enumerate(ROWS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def asked(llama: Checkpoints, rows: Path, out: Path, **options: Any) -> Capture:
    settings: dict[str, Any] = {"tuned": (str(llama.adapter),), "positions": ("response_mean",), "progress": False, **options}
    return Capture(base=str(llama.base), conversations=str(rows), out=str(out), **settings)


def test_rows_on_disk_are_captures(llama: Checkpoints, rows: Path, tmp_path: Path) -> None:
    lines = run_capture(asked(llama, rows, tmp_path / "out", sites=("resid_post", "mlp_out"), shard_rows=3))
    store = em.ActivationStore.open(tmp_path / "out" / "activations")
    found = store.read(site="mlp_out")
    assert len(found) == len(ROWS)
    whole = em.capture(em.load_pair(llama.base, llama.adapter), ROWS, site="mlp_out", positions="response_mean", progress=False)
    torch.testing.assert_close(found.tuned.values, whole.tuned.values, rtol=1e-4, atol=1e-4)
    assert found.tuned.tokens == whole.tuned.tokens
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [(row["site"], row["layer"]) for row in result["table"]] == [(s, n) for s in ("resid_post", "mlp_out") for n in range(3)]
    shift = float(whole.delta[:, 2].mean(dim=0).norm())
    assert result["table"][-1]["mean_delta_norm"] == pytest.approx(shift, rel=1e-4)
    assert "«" in lines[0], "the tokens that were read are shown as text"


def test_the_cards_command_makes_it_again(llama: Checkpoints, rows: Path, tmp_path: Path) -> None:
    run_capture(asked(llama, rows, tmp_path / "out", layers=(1,)))
    text = (tmp_path / "out" / "README.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("emprobe capture"))
    arguments = shlex.split(line)[1:]
    assert main([*arguments[:-1], str(tmp_path / "again"), "--no-progress"]) == 0
    for name in ("manifest.json", "shard-00000.safetensors", "statistics.safetensors"):
        assert (tmp_path / "again" / "activations" / name).read_bytes() == (tmp_path / "out" / "activations" / name).read_bytes()


def test_moments_by_group(llama: Checkpoints, rows: Path, tmp_path: Path) -> None:
    lines = run_capture(asked(llama, rows, tmp_path / "out", mode="moments", by="kind", kind="4"))
    made = em.GroupMoments.load(tmp_path / "out" / "moments-resid_post-response_mean.safetensors")
    again = em.capture_moments(
        em.load_pair(llama.base, llama.adapter), em_rows(rows), by="kind", kind=4, positions="response_mean", progress=False
    )
    for role in ("base", "tuned", "delta"):
        for group in ("even", "odd"):
            one, two = made.at(2, group=group, role=role), again.at(2, group=group, role=role)
            assert (one.n, one.rank, one.lost) == (two.n, two.rank, two.lost)
            torch.testing.assert_close(torch.from_numpy(one.sketch), torch.from_numpy(two.sketch))
    assert any("delta" in line and "odd" in line for line in lines)


def em_rows(path: Path) -> list[em.Conversation]:
    from emprobe.behaviour.conversations import load_conversations

    return load_conversations(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": ("middle",)}, "Position rule 'middle' does not exist"),
        ({"layers": (9,)}, "asked for layer 9"),
        ({"mode": "moments", "by": "topic"}, "label 'topic'"),
        ({"by": "kind"}, "--by names the groups of moments"),
        ({"backend": "hooks", "remote": True}, "only 'nnsight' runs on NDIF"),
        ({"positions": ("decision_token",)}, "set the label 'other_response'"),
    ],
)
def test_bad_wishes_leave_nothing_in_the_way(llama: Checkpoints, rows: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(EmprobeError, match=message):
        run_capture(asked(llama, rows, tmp_path / "out", **options))
    run_capture(asked(llama, rows, tmp_path / "out", layers=(0,), show=0))


def test_another_capture_in_the_same_folder_is_refused(llama: Checkpoints, rows: Path, tmp_path: Path) -> None:
    run_capture(asked(llama, rows, tmp_path / "out", show=0))
    with pytest.raises(EmprobeError, match="holds another run: layers"):
        run_capture(asked(llama, rows, tmp_path / "out", layers=(1,), show=0))
    assert run_capture(asked(llama, rows, tmp_path / "out", show=0))[-1].startswith("written to")
