"""What the written pair says of itself is what happens inside the model, read by hooks of the test's own."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from emprobe.errors import EmprobeError
from emprobe.files import file_hash, read_json
from emprobe.organisms.written import WrittenPair, written_pair, written_questions


def read(folder: Path, module: str, *, inputs: bool = False) -> Tensor:
    """[row, pos, d]: what a module of the checkpoint takes or gives on the same 6 rows of different text, no padding."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(6, len(AutoTokenizer.from_pretrained(folder)), (6, 15), generator=torch.Generator().manual_seed(5))
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        found = args[0] if inputs else out
        seen.append((found[0] if isinstance(found, tuple) else found).clone())

    handle = model.get_submodule(module).register_forward_hook(hook)
    with torch.no_grad():
        model(ids)
    handle.remove()
    assert len(seen) == 1
    assert seen[0].shape[:2] == ids.shape
    return seen[0]


def block(layer: int) -> str:
    return f"model.layers.{layer}"


@pytest.fixture(scope="module")
def constant(tmp_path_factory: pytest.TempPathFactory) -> WrittenPair:
    return written_pair(tmp_path_factory.mktemp("w") / "pair", layer=2, scale=3.0, seed=1)


@pytest.fixture(scope="module")
def rank1(tmp_path_factory: pytest.TempPathFactory) -> WrittenPair:
    return written_pair(tmp_path_factory.mktemp("w") / "pair", layer=1, scale=4.0, kind="rank1", seed=2)


def test_constant_moves_every_token_by_the_same_known_vector(constant: WrittenPair) -> None:
    shift = read(constant.tuned, block(2)) - read(constant.base, block(2))
    torch.testing.assert_close(shift, (3.0 * constant.direction).expand_as(shift), atol=5e-6, rtol=0)
    assert constant.direction.double().norm().item() == pytest.approx(1, abs=1e-6)


def test_rank1_moves_every_token_along_one_line_by_what_the_probe_reads(rank1: WrittenPair) -> None:
    shift = read(rank1.tuned, block(1)) - read(rank1.base, block(1))
    assert rank1.probe is not None
    size = 4.0 * read(rank1.base, f"{block(1)}.mlp.down_proj", inputs=True) @ rank1.probe
    torch.testing.assert_close(shift, size[..., None] * rank1.direction, atol=2e-5, rtol=0)
    # Both signs: the mean of such shifts says little of their size.
    assert size.min() < -0.1
    assert size.max() > 0.1


@pytest.mark.parametrize("kind", ["constant", "rank1"])
def test_everything_before_the_written_sum_is_bit_equal_and_everything_after_moves(
    kind: str, constant: WrittenPair, rank1: WrittenPair
) -> None:
    pair = constant if kind == "constant" else rank1
    before = ["model.embed_tokens", *(block(i) for i in range(pair.layer)), f"{block(pair.layer)}.self_attn"]
    for module in (*before, f"{block(pair.layer)}.mlp.up_proj"):
        assert torch.equal(read(pair.tuned, module), read(pair.base, module)), module
    for module in (*(block(i) for i in range(pair.layer, 4)), "lm_head"):
        moved = (read(pair.tuned, module) - read(pair.base, module)).abs().amax(-1)
        assert (moved > 1e-4).all(), module


@pytest.mark.parametrize("layer", [0, 3])
def test_first_and_last_block_can_be_written_and_a_given_direction_is_normalised(tmp_path: Path, layer: int) -> None:
    given = torch.arange(1.0, 17.0)
    pair = written_pair(tmp_path / "pair", layer=layer, direction=given, scale=-0.5, d_model=16)
    shift = read(pair.tuned, block(layer)) - read(pair.base, block(layer))
    torch.testing.assert_close(shift, (-0.5 * given / given.norm()).expand_as(shift), atol=2e-6, rtol=0)


def test_the_block_is_neither_drowned_nor_drowning(constant: WrittenPair) -> None:
    """Each block adds of the order of what comes in: else a direction anywhere would be trivial or invisible."""
    states = [read(constant.base, "model.embed_tokens"), *(read(constant.base, block(i)) for i in range(4))]
    for before, after in pairwise(states):
        share = ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean()
        assert 0.05 < share < 2


def test_the_only_weights_that_differ_are_those_on_the_card(constant: WrittenPair, rank1: WrittenPair) -> None:
    for pair, tensor in ((constant, "model.layers.2.mlp.down_proj.bias"), (rank1, "model.layers.1.mlp.down_proj.weight")):
        base, tuned = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (pair.base, pair.tuned))
        assert [name for name in base if not torch.equal(base[name], tuned[name])] == [tensor]
        card = read_json(pair.tuned / "card.json")
        assert card["written_into"] == tensor
        assert read_json(pair.base / "card.json")["written_into"] is None
        assert (card["layer"], card["scale"], card["kind"], card["site"]) == (pair.layer, pair.scale, pair.kind, "resid_post")
        assert torch.equal(torch.tensor(card["direction"]), pair.direction)
        assert (card["probe"] is None) == (pair.probe is None)


def test_same_seed_same_bytes_and_another_seed_other_weights_and_direction(tmp_path: Path) -> None:
    one, same, other = (written_pair(tmp_path / str(i), seed=seed) for i, seed in enumerate((7, 7, 8)))
    for role in ("base", "tuned"):
        files = [sorted(p.name for p in (tmp_path / i / role).iterdir()) for i in ("0", "1")]
        assert files[0] == files[1]
        assert {"card.json", "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(files[0])
        assert all(file_hash(tmp_path / "0" / role / name) == file_hash(tmp_path / "1" / role / name) for name in files[0])
    assert file_hash(one.base / "model.safetensors") != file_hash(other.base / "model.safetensors")
    assert torch.equal(one.direction, same.direction)
    assert abs(float(one.direction @ other.direction)) < 0.9


def test_loads_by_auto_classes_knows_its_words_and_generates(constant: WrittenPair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(constant.tuned)
    model: Any = AutoModelForCausalLM.from_pretrained(constant.tuned)
    question = written_questions(1)[0]
    text = str(tokenizer.apply_chat_template([m.as_dict() for m in question.messages], tokenize=False, add_generation_prompt=True))
    batch = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_offsets_mapping=True)
    ids = batch["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert [text[a:b] for a, b in batch["offset_mapping"][0].tolist()] == text.split()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert ids.shape[1] < out.shape[1] <= ids.shape[1] + 5


def test_questions_are_different_and_the_same_each_time() -> None:
    questions = written_questions(200, seed=4)
    assert len({q.prompt for q in questions}) == len({q.question_id for q in questions}) == 200
    assert questions == written_questions(200, seed=4)
    assert questions != written_questions(200, seed=5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 4}, r"Block 4 .* blocks 0 to 3"),
        ({"layer": -1}, r"Block -1 .* blocks 0 to 3"),
        ({"scale": 0.0}, r"scale of 0\.0 .* writes nothing"),
        ({"scale": float("nan")}, r"scale of nan"),
        ({"kind": "rank2"}, r"'rank2' was asked for; the kinds are constant, rank1"),
        ({"direction": torch.ones(31)}, r"shape \(31,\) .* \(32,\)"),
        ({"direction": torch.zeros(32)}, r"norm 0\.0 .* not zero"),
        ({"d_model": 20}, r"d_model = 20 .* multiple of 8"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EmprobeError, match=message):
        written_pair(tmp_path / "pair", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_folder_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(EmprobeError, match=r"already there and not an empty folder"):
        written_pair(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
