"""Fixtures of the whole suite: tiny random checkpoints, made once per session, and the real Qwen2.5 tokenizer where it is at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.fixtures.models import ARCHITECTURES, Architecture, Checkpoints, write_checkpoints

# Torch's first call takes longer than hypothesis' default deadline, and a result must not hang on a machine's speed.
settings.register_profile("emprobe", deadline=None, derandomize=True, database=None)
settings.load_profile("emprobe")


@pytest.fixture(scope="session")
def checkpoints_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Architecture], Checkpoints]:
    """`checkpoints_of("gpt2")`: the session's random base and adapter of an architecture. Read only; `copy_of` them to change them."""
    made: dict[Architecture, Checkpoints] = {}

    def get(architecture: Architecture) -> Checkpoints:
        if architecture not in made:
            made[architecture] = write_checkpoints(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return get


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, checkpoints_of: Callable[[Architecture], Checkpoints]) -> Checkpoints:
    """Runs a test once per architecture, on its random base and adapter."""
    return checkpoints_of(request.param)


@pytest.fixture(scope="session")
def llama(checkpoints_of: Callable[[Architecture], Checkpoints]) -> Checkpoints:
    """The random Llama, for tests that one architecture serves."""
    return checkpoints_of("llama")


@pytest.fixture(scope="session")
def qwen25_tokenizer() -> Path:
    """Folder of the real Qwen2.5 tokenizer and chat template; skips where the data is absent."""
    asked = os.environ.get("EMPROBE_SHARED_DATA")
    root = Path(asked) if asked else Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = root / "tokenizers" / "qwen2.5"
    if not (folder / "vocab.json").is_file():
        pytest.skip(f"the real Qwen2.5 tokenizer is not at {folder}; point EMPROBE_SHARED_DATA at a folder with tokenizers/qwen2.5")
    return folder


@pytest.fixture(scope="session")
def qwen2_real_tokenizer_pair(qwen25_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """A random two-layer Qwen2 with the real tokenizer, template and vocabulary size, and an adapter (20 MB, float32)."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(qwen25_tokenizer)
    # Released Qwen2.5 models have more rows in the embedding than the tokenizer has tokens; so has this one.
    padded = (len(tokenizer) // 128 + 2) * 128
    return write_checkpoints(tmp_path_factory.mktemp("qwen2_real"), "qwen2", d_model=32, n_layers=2, tokenizer=tokenizer, d_vocab=padded)
