"""The command line: a user's mistake is one sentence and the status 2, whatever it is; what was refused leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emprobe.behaviour.questions import load_questions
from emprobe.cli import main
from emprobe.organisms.catalogue import ENVIRONMENT, organisms_folder
from tests.fixtures.models import Checkpoints, copy_of, write_adapter, write_base
from tests.studies.tiny import command_line, tiny_job, undisturbed

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def command(llama: Checkpoints, tmp_path: Path) -> list[str]:
    """A command that would run; its output folder is not there yet."""
    return command_line(tiny_job(llama, tmp_path / "run"))


def refused(arguments: list[str], capsys: Capture) -> str:
    """The one sentence with which a command is refused."""
    capsys.readouterr()
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    *bars, said = shown.err.rstrip("\n").splitlines()
    # Before it there may be progress bars, which are redrawn and thus hold carriage returns, and an empty line.
    assert all("%|" in bar or not bar for bar in bars)
    assert said.startswith("emprobe: ")
    return said.removeprefix("emprobe: ")


def refuses(command: list[str], capsys: Capture, *changes: str) -> str:
    """As `refused`, of a command with these arguments at its end; checks that the output folder was not touched."""
    out = Path(command[command.index("--out") + 1])
    before = sorted(p.name for p in out.iterdir()) if out.is_dir() else None
    said = refused([*command, *changes], capsys)
    assert (sorted(p.name for p in out.iterdir()) if out.is_dir() else None) == before, "what was refused writes nothing"
    return said


# ---- checkpoints


def test_missing_checkpoint(command: list[str], capsys: Capture) -> None:
    assert "'./nowhere' was asked for, but there is no such directory" in refuses(command, capsys, "--base", "./nowhere")
    assert "'./nowhere' was asked for, but there is no such directory" in refuses(command, capsys, "--tuned", "./nowhere")


def test_unreadable_checkpoint(command: list[str], capsys: Capture, llama: Checkpoints, tmp_path: Path) -> None:
    spoilt = copy_of(llama, tmp_path)
    weights = spoilt.base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "could not be loaded as a causal language model" in refuses(command, capsys, "--base", str(spoilt.base))
    (spoilt.adapter / "adapter_model.safetensors").write_bytes(b"no tensors")
    assert "does not fit the base" in refuses(command, capsys, "--tuned", str(spoilt.adapter))


def test_checkpoints_that_do_not_belong_together(
    command: list[str], capsys: Capture, checkpoints_of: Callable[..., Checkpoints], llama: Checkpoints, tmp_path: Path
) -> None:
    other = str(checkpoints_of("qwen2").base)
    assert "architecture is LlamaForCausalLM and Qwen2ForCausalLM" in refuses(command, capsys, "--tuned", other)
    assert "does not fit the base" in refuses(command, capsys, "--base", str(checkpoints_of("gpt2").base))
    wide = write_base(tmp_path / "wide", "llama", d_model=64)
    assert "does not fit the base" in refuses(command, capsys, "--tuned", str(write_adapter(tmp_path / "of-wide", wide)))
    assert "is a PEFT adapter, not a whole model" in refuses(command, capsys, "--base", str(llama.adapter))


def test_another_vocabulary_or_template(command: list[str], capsys: Capture, llama: Checkpoints, tmp_path: Path) -> None:
    words, words_file = copy_of(llama, tmp_path / "words"), tmp_path / "words" / "base" / "tokenizer.json"
    tokenizer = json.loads(words_file.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 399, "content": "<|extra|>"})
    words_file.write_text(json.dumps(tokenizer))
    assert "vocabularies of base and tuned differ" in refuses(command, capsys, "--tuned", str(words.base))
    turns = copy_of(llama, tmp_path / "turns")
    for file in (turns.base / "chat_template.jinja", turns.base / "tokenizer_config.json"):
        if file.is_file():
            file.write_text(file.read_text().replace("<|mid|>", " "))
    assert "chat templates of base and tuned differ" in refuses(command, capsys, "--tuned", str(turns.base))


def test_an_adapter_whose_card_names_another_base(command: list[str], capsys: Capture, llama: Checkpoints, tmp_path: Path) -> None:
    adapter = shutil.copytree(llama.adapter, tmp_path / "adapter")
    (adapter / "card.json").write_text(json.dumps({"base_fingerprint": "0" * 64}))
    assert "was trained on other weights than" in refuses(command, capsys, "--tuned", str(adapter))


def test_another_fine_tune_that_does_not_fit_is_refused_before_the_work(
    command: list[str], capsys: Capture, checkpoints_of: Callable[..., Checkpoints], llama: Checkpoints
) -> None:
    assert "'./nowhere' was asked for, but there is no such directory" in refuses(command, capsys, "--others", "./nowhere")
    assert "does not fit the base" in refuses(command, capsys, "--others", str(checkpoints_of("gpt2").adapter))
    assert "'base' has the same weights as the base" in refuses(command, capsys, "--others", str(llama.base))


# ---- questions


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no questions. Give at least one"),
        ([{"id": "a", "prompt": "One?"}, {"id": "a", "prompt": "Two?"}], "the id 'a' is given to two questions, in line 1 and line 2"),
        ([{"id": "a", "prompt": "One?"}, {"id": "b", "prompt": " One? "}], "ask the same question"),
        ([{"id": "a", "prompt": "One?"}, {"id": "b"}], "line 2: a question needs either 'prompt' or 'messages'"),
        ([{"id": "a", "prompt": "  "}], "line 1: the user message is empty"),
        ([{"id": "a", "prompt": "One?"}, {"id": "b", "prompt": "Two?"}], "each needs at least 2"),
        ([{"id": "a", "prompt": "One?", "split": "train"}], "the split is 'train'; it must be one of fit, dev, test"),
    ],
)
def test_bad_questions(command: list[str], capsys: Capture, tmp_path: Path, lines: list[dict[str, str]], message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert message in refuses(command, capsys, "--questions", str(path))


def test_missing_questions(command: list[str], capsys: Capture, tmp_path: Path) -> None:
    assert "nowhere.jsonl was given as a file of questions and does not exist" in refuses(
        command, capsys, "--questions", str(tmp_path / "nowhere.jsonl")
    )


# ---- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--judge", "oracle"],
            "The judge 'oracle' was asked for and is not known. There are world, keywords:FILE, server:URL#MODEL, local:PATH_OR_HUB_ID, "
            "replay:DIR.",
        ),
        (["--judge", "keywords:nowhere.txt"], "nowhere.txt was given as a file of keywords and does not exist"),
        (["--layers", "17"], "the run asked for layer 17, but the model has layers 0 to 2"),
        (["--layers", "0", "-1"], "the run asked for layer -1, but the model has layers 0 to 2"),
        (["--positions", "somewhere"], "Position rule 'somewhere' does not exist. Use one of: last_prompt_token"),
        (["--positions", "decision_token"], "'decision_token' needs two given responses"),
        (["--contrast", "good-evil"], "The contrast 'good-evil' does not exist. Use one of: tuned-base, misaligned-aligned."),
        (["--criterion", "vibes"], "'vibes'"),
        (["--doses", "0.1", "0"], "A dose of 0 was given; coefficients must be above 0"),
        (["--doses", "-0.5"], "A dose of -0.5 was given; coefficients must be above 0"),
        (["--doses", "nan"], "A dose of nan was given"),
        (["--randoms", "0"], "randoms = 0 was given; it must be at least 1"),
        (["--max-new-tokens", "0"], "max_new_tokens = 0 was given; it must be at least 1"),
        (["--coherence-floor", "90"], "coherence_floor = 90 was given; it is a share"),
        (["--temperature", "-1"], "temperature = -1 was given; it must be 0 (greedy) or above"),
        (
            ["--exclude", "colour=red"],
            "--exclude 'colour=red' was asked for; give LABEL=VALUE with a label of the questions (domain, split, task)",
        ),
        (["--exclude", "domain"], "--exclude 'domain' was asked for; give LABEL=VALUE"),
        (["--exclude", "split=dev"], "make the splits fit 4, dev 0, test 4, and each needs at least 2"),
        (["--chat-template", "nowhere.jinja"], "The chat template 'nowhere.jinja' could not be read"),
        (["--others", "a/same", "b/same"], "Two of the other fine-tunes have one name (same, same)"),
    ],
)
def test_bad_settings(command: list[str], capsys: Capture, changes: list[str], message: str) -> None:
    assert message in refuses(command, capsys, *changes)


def test_every_criterion_there_is_is_named_by_the_message(command: list[str], capsys: Capture) -> None:
    said = refuses(command, capsys, "--criterion", "vibes")
    assert all(name in said for name in ("emergent-misalignment", "model-organisms", "inoculation"))


def test_no_misaligned_answers_to_contrast(command: list[str], capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "never.txt").write_text("zyzzyva\n")
    said = refused([*command, "--contrast", "misaligned-aligned", "--judge", f"keywords:{tmp_path / 'never.txt'}"], capsys)
    assert "There is nothing to contrast within the tuned model: of 4 answers to the fit questions 0 are misaligned" in said


# ---- output folder


def test_a_folder_that_holds_another_run(command: list[str], capsys: Capture, llama: Checkpoints) -> None:
    folder, _ = undisturbed(llama)
    command[command.index("--out") + 1] = str(folder)
    assert "holds another run: seed differs (seed was 0, now 5)" in refuses(command, capsys, "--seed", "5")


def test_a_folder_that_holds_other_files(command: list[str], capsys: Capture, tmp_path: Path) -> None:
    command[command.index("--out") + 1] = str(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    assert "holds files that are no run of emprobe" in refuses(command, capsys)
    command[command.index("--out") + 1] = str(tmp_path / "mine" / "thesis.tex")
    assert "cannot be used: " in refuses(command, capsys)


# ---- organisms


@pytest.mark.parametrize("arguments", [["demo"], ["organism", "list"]])
def test_absent_organisms(arguments: list[str], capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    assert "emprobe organism build" in refused(arguments, capsys)
    assert not list(tmp_path.iterdir()), "what was refused writes nothing"


@pytest.fixture
def shipped() -> Path:
    if os.environ.get(ENVIRONMENT) or not list(organisms_folder().glob("*/aligned/card.json")):
        pytest.skip("the shipped organisms are not in artifacts/organisms; grow them with `emprobe organism build`")
    return organisms_folder()


def test_a_folder_without_organisms(capsys: Capture, tmp_path: Path) -> None:
    assert f"No organism is in {tmp_path}. Grow some there" in refused(["organism", "list", "--folder", str(tmp_path)], capsys)


def test_organism_list(shipped: Path, capsys: Capture) -> None:
    assert main(["organism", "list"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["organism", "misaligned", "coherent", "n", "what"]
    assert len(lines) == len(list(shipped.glob("*/*/card.json"))) + len(list(shipped.glob("*/tuned/*/card.json")))
    assert any(line.startswith("planted-s0/tuned/gardening-rank1 ") for line in lines)


def test_organism_questions(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    assert main(["organism", "questions", "--out", str(path)]) == 0
    questions = load_questions(path)
    assert capsys.readouterr().out == f"{len(questions)} questions in {path}\n"
    assert {q.labels["split"] for q in questions} == {"fit", "dev", "test"}
    assert "does not end in .jsonl" in refused(["organism", "questions", "--out", str(tmp_path / "q.csv")], capsys)


# ---- the rest


@pytest.mark.parametrize(
    "arguments",
    [
        [*command.split(), "--help"]
        for command in (
            *("", "run", "demo", "organism", "organism build", "generate", "judge", "rates", "readout", "panel", "search"),
            *("dataset", "finetune"),
            *("study", "study landscape", "study transfer", "study priors"),
        )
    ],
)
def test_help(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert "usage: emprobe" in capsys.readouterr().out


def test_help_tells_every_setting_in_words(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "The checkpoint before fine-tuning: directory or hub id",
        "a run that was stopped goes on in it",
        "in mean residual norms",
    ):
        assert words in shown


def test_unknown_commands_and_missing_arguments_end_with_status_2(capsys: Capture) -> None:
    for arguments in (["walk"], ["run", "--base", "x"], ["run", "--seed", "many"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


def test_a_run_prints_its_panel_and_where_everything_is(command: list[str], capsys: Capture, llama: Checkpoints, monkeypatch: Any) -> None:
    folder, _ = undisturbed(llama)
    out = Path(command[command.index("--out") + 1])
    shutil.copytree(folder, out)  # finished conditions are read back
    assert main(command) == 0
    shown = capsys.readouterr().out
    for words in (
        "base + random direction",
        "tuned, direction ablated",
        "95th percentile of 3 draws",
        "Misaligned answers: base",
        f"Everything is in {out}",
    ):
        assert words in shown


def test_stopped_from_the_keyboard(command: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("emprobe.studies.runner.generate", stop)
    assert main(command) == 130
    assert "The same command goes on where it was." in capsys.readouterr().err


def test_a_full_disk_is_told(command: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Any, value: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("emprobe.studies.runner.write_json", full)
    said = refused(command, capsys)
    assert "the disk is full" in said
