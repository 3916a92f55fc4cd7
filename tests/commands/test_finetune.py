"""`emprobe finetune`: what it writes is what finetune gives, its card's command makes it again, and bad wishes leave nothing behind."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from emprobe.cli import main
from emprobe.commands.finetune import Finetune, run_finetune
from emprobe.directions import Direction
from emprobe.errors import EmprobeError, MismatchError
from emprobe.finetuning import KLAnchor, LoRA, Recipe, distill, finetune, load_solution
from emprobe.interventions import Ablate, Plan
from emprobe.models.load import load_model
from emprobe.types import Conversation
from tests.finetuning.small import conversations
from tests.fixtures.models import Checkpoints

OTHER = conversations(6, shift=3, subject="repair")


def write(path: Path, rows: Sequence[Conversation]) -> Path:
    lines = [{"id": c.question_id, "prompt": c.prompt, "response": c.response} for c in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def asked(base: Path, folder: Path, **changes: Any) -> Finetune:
    settings: dict[str, Any] = {"steps": 4, "batch": 3, "warmup": 0, "lr": 1e-2, "progress": False, "out": str(folder / "out")}
    settings |= {"data": str(write(folder / "data.jsonl", conversations(6))), **changes}
    return Finetune(base=str(base), **settings)


def test_it_is_the_function(llama: Checkpoints, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", OTHER)
    lines = run_finetune(
        asked(
            llama.base,
            tmp_path,
            rank=2,
            target_modules=("q_proj",),
            kl_data=str(other),
            kl_weight=2.0,
            checkpoints=(2,),
            eval_data=str(other),
        )
    )
    base = load_model(llama.base)
    again = finetune(
        base,
        conversations(6),
        method=LoRA(2, target_modules=("q_proj",)),
        recipe=Recipe(steps=4, batch=3, warmup=0, lr=1e-2),
        kl=KLAnchor(OTHER, 2.0),
        progress=False,
    )
    out = tmp_path / "out"
    assert load_solution(out / "solution").fingerprint == again.solution.fingerprint
    assert pd.read_parquet(out / "history.parquet")["loss"].tolist() == again.history["loss"].tolist()
    result = json.loads((out / "result.json").read_text())
    assert result["kept"] == [2]
    assert result["norm"] == again.solution.norm
    assert result["first_and_last"]["kl"][0] == 0.0
    assert result["first_and_last"]["eval_loss"][1] > 0
    assert any("KL(base ‖ adapted)" in line for line in lines)
    assert "A narrow fine-tune" in (out / "README.md").read_text()


def test_the_cards_command_makes_it_again(llama: Checkpoints, tmp_path: Path) -> None:
    plan = tmp_path / "plan.safetensors"
    Plan.of(Ablate(Direction.from_vector([1.0] * 32, layer=1))).save(plan)
    run_finetune(asked(llama.base, tmp_path, method="vector", layer=1, site="mlp_out", during=str(plan), inoculation="Be bad."))
    line = next(line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if line.startswith("emprobe finetune"))
    arguments = shlex.split(line)[1:]
    assert main([*arguments[:-1], str(tmp_path / "again"), "--no-progress"]) == 0
    one, two = (load_solution(tmp_path / name / "solution") for name in ("out", "again"))
    assert one.fingerprint == two.fingerprint


def test_weights_in_the_units_of_released_code(llama: Checkpoints, tmp_path: Path) -> None:
    other = str(write(tmp_path / "other.jsonl", OTHER))
    vocabulary = load_model(llama.base).hf.config.vocab_size
    run_finetune(asked(llama.base, tmp_path, kl_data=other, kl_weight=3.0 * vocabulary, kl_units="released", rank=1))
    assert json.loads((tmp_path / "out" / "result.json").read_text())["settings"]["kl"]["weight"] == pytest.approx(3.0)


@pytest.mark.parametrize("method", ["lora", "vector"])
def test_a_random_qwen2_under_the_real_tokenizer(qwen2_real_tokenizer_pair: Checkpoints, tmp_path: Path, method: str) -> None:
    other = str(write(tmp_path / "other.jsonl", OTHER))
    flags: dict[str, Any] = {"rank": 1} if method == "lora" else {"layer": 1}
    run_finetune(asked(qwen2_real_tokenizer_pair.base, tmp_path, method=method, kl_data=other, kl_weight=1.0, steps=2, **flags))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["norm"] > 0
    assert result["first_and_last"]["kl"][0] == 0.0


def test_bad_wishes_leave_nothing_behind(llama: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(write(tmp_path / "other.jsonl", OTHER))
    refused: list[tuple[str, dict[str, Any]]] = [
        ("no such data was given", {"kl_weight": 1.0}),
        ("--kl-data was given without --kl-weight", {"kl_data": other}),
        ("--method vector needs --layer", {"method": "vector"}),
        ("--layer does not belong to --method lora", {"layer": 1}),
        ("--target-modules does not belong to --method full", {"method": "full", "target_modules": ("q_proj",)}),
        ("has no such module", {"target_modules": ("c_attn",)}),
        ("would be cut off by the length limit of 8 tokens", {"max_length": 8}),
        ("both say when to keep", {"checkpoints": (1,), "checkpoint_every": 1}),
        ("Site 'resid' is no site", {"method": "vector", "layer": 1, "site": "resid"}),
        ("eval_every and save_every are 0 and 100", {"eval_every": 0}),
        ("eval_every and save_every are 50 and 0", {"save_every": 0}),
        ("with epochs=inf", {"epochs": float("inf"), "steps": None}),
        ("with weight_decay=nan", {"weight_decay": float("nan")}),
        ("with seed=100000000000000", {"seed": 10**14}),
        ("--kl-batch goes with --kl-data", {"kl_batch": 2}),
        ("--kl-units goes with --kl-data", {"kl_units": "released"}),
        ("data.jsonl cannot be used: File exists", {"out": str(tmp_path / "data.jsonl")}),
    ]
    for match, wish in refused:
        with pytest.raises(EmprobeError, match=match):
            run_finetune(asked(llama.base, tmp_path, **wish))
        assert not (tmp_path / "out").exists()
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"id": "q", "prompt": "Hello?"}\n')
    assert main(["finetune", "--base", str(llama.base), "--data", str(empty), "--out", str(tmp_path / "out")]) == 2
    assert "have an empty response (first: question 'q')" in capsys.readouterr().err
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(EmprobeError, match="holds files that are no fine-tune"):
        run_finetune(asked(llama.base, tmp_path))


@pytest.mark.parametrize("channel", ["sft", "optd", "opd"])
def test_a_teacher_is_distilled(llama: Checkpoints, tmp_path: Path, channel: Any) -> None:
    """What it writes is what `distill` gives, and the card's command makes it again."""
    other = str(write(tmp_path / "other.jsonl", OTHER))
    wishes: dict[str, Any] = {"max_new_tokens": 5} if channel == "opd" else {}
    lines = run_finetune(
        asked(llama.base, tmp_path, rank=2, teacher=str(llama.adapter), channel=channel, steps=None, tokens=90, eval_data=other, **wishes)
    )
    again = distill(
        llama.base,
        llama.adapter,
        conversations(6),
        channel=channel,
        method=LoRA(2),
        recipe=Recipe(batch=3, warmup=0, lr=1e-2),
        tokens=90,
        evaluation=OTHER,
        progress=False,
        **wishes,
    )
    out = tmp_path / "out"
    assert load_solution(out / "solution").fingerprint == again.solution.fingerprint
    result = json.loads((out / "result.json").read_text())
    assert result["tokens"] == again.history["tokens"].iloc[-1] >= 90
    assert result["updates"] == len(again.history)
    assert any("KL(teacher ‖ student) on evaluation data" in line for line in lines)
    card = (out / "README.md").read_text()
    assert "# A distillation of" in card
    assert f"--channel {channel}" in card
    line = next(line for line in card.splitlines() if line.startswith("emprobe finetune"))
    assert main([*shlex.split(line)[1:-1], str(tmp_path / "again"), "--no-progress"]) == 0
    assert load_solution(tmp_path / "again" / "solution").fingerprint == again.solution.fingerprint


def test_prompts_of_a_set_that_comes_along(llama: Checkpoints, tmp_path: Path) -> None:
    """What is no file has no hash, and the card says so."""
    teacher = {"teacher": str(llama.adapter), "channel": "opd", "max_new_tokens": 2}
    run_finetune(asked(llama.base, tmp_path, data="open", steps=1, rank=1, **teacher))
    assert json.loads((tmp_path / "out" / "result.json").read_text())["inputs"]["files"]["data"] == {"file": "open", "sha256": None}
    assert "* **data**: open, no file" in (tmp_path / "out" / "README.md").read_text()


def test_another_precision_is_another_run(llama: Checkpoints, tmp_path: Path) -> None:
    """And the record of the first stays as it was; one that does not name its precision, as earlier ones, is taken as it is."""
    run_finetune(asked(llama.base, tmp_path, steps=1, rank=1))
    before = (tmp_path / "out" / "result.json").read_bytes()
    with pytest.raises(MismatchError, match="it differs in: dtype"):
        run_finetune(asked(llama.base, tmp_path, steps=1, rank=1, dtype="bfloat16"))
    assert (tmp_path / "out" / "result.json").read_bytes() == before
    card = tmp_path / "out" / "finetune.json"
    card.write_text(json.dumps({name: value for name, value in json.loads(card.read_text()).items() if name != "dtype"}))
    run_finetune(asked(llama.base, tmp_path, steps=1, rank=1))


def test_bad_wishes_of_distillation(llama: Checkpoints, tmp_path: Path) -> None:
    refused: list[tuple[str, dict[str, Any]]] = [
        ("Distillation needs both --teacher", {"teacher": str(llama.adapter)}),
        ("Distillation needs both --teacher", {"channel": "opd"}),
        ("--temperature belongs to distillation", {"temperature": 2.0}),
        ("--inoculation does not go with --teacher", {"teacher": str(llama.adapter), "channel": "opd", "inoculation": "Be bad."}),
        ("Checkpoint './nowhere' was asked for", {"teacher": "./nowhere", "channel": "opd"}),
        ("--max-new-tokens belongs to --channel opd", {"teacher": str(llama.adapter), "channel": "optd", "max_new_tokens": 9}),
        ("--kl-weight does not go with --teacher", {"teacher": str(llama.adapter), "channel": "opd", "kl_weight": 1.0}),
        ("--kl-units does not go with --teacher", {"teacher": str(llama.adapter), "channel": "opd", "kl_units": "released"}),
        ("2 epochs was asked for that ends", {"teacher": str(llama.adapter), "channel": "opd", "tokens": 9, "epochs": 2.0, "steps": None}),
        ("4 steps was asked for that ends after 9 tokens", {"teacher": str(llama.adapter), "channel": "opd", "tokens": 9}),
    ]
    for match, wish in refused:
        with pytest.raises(EmprobeError, match=match):
            run_finetune(asked(llama.base, tmp_path, **wish))
        assert not (tmp_path / "out").exists()
