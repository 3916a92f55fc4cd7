"""Files and requests for servers: their arithmetic, done here as the servers' sources say, is that of the hooks."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emprobe.errors import EmprobeError
from emprobe.interventions import Ablate, Add, Cap, MeanAblate, Operator, Plan, Rotate, SetProjection, When, Where, intervene
from emprobe.interventions.export import TARGETS, export
from emprobe.models import Checkpoint, load_model, load_pair
from emprobe.models.sites import hidden_of, with_hidden
from tests.fixtures.models import ARCHITECTURES, Architecture, Checkpoints, write_base
from tests.interventions.test_export import CheckpointsOf, direction, logits, off_by, part, subspace

Edit = Callable[[Tensor], Tensor]


def edited(model: Any, hooks: Mapping[Any, Edit], read: Callable[[], Tensor]) -> Tensor:
    """What is read while each module's output is changed."""
    with ExitStack() as stack:
        for module, edit in hooks.items():
            handle = module.register_forward_hook(lambda _, args, out, edit=edit: with_hidden(out, edit(hidden_of(out))))
            stack.callback(handle.remove)
        return read()


def as_lm_eval_does(entry: Mapping[str, Any]) -> Edit:
    vector, coefficient = entry["steering_vector"], entry["steering_coefficient"]
    assert entry["bias"] is None
    assert entry["head_index"] is None
    if entry["action"] == "add":
        return lambda h: h + vector * coefficient
    unit = vector / vector.norm()
    return lambda h: h + unit * (coefficient - (h * unit).sum(-1, keepdim=True))


LM_EVAL: dict[str, Callable[[Checkpoint], list[Operator]]] = {
    "add": lambda c: [Add(direction(c), 0.5), Add(direction(c, seed=4), 1.0, unit="abs"), Add(direction(c, 2, site="resid_pre"), 1.0)],
    "ablate": lambda c: [Ablate(direction(c), layers="all"), MeanAblate(direction(c, 0, site="attn_out"), mean=0.3)],
    "set": lambda c: [SetProjection(direction(c, 0, site="mlp_out"), 2.0, unit="abs")],
}


@pytest.mark.parametrize("kind", LM_EVAL)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lm_evals_file_does_what_hooks_do(checkpoints_of: CheckpointsOf, tmp_path: Path, name: Architecture, kind: str) -> None:
    checkpoint = load_model(checkpoints_of(name).base)
    plan = Plan.of(*LM_EVAL[kind](checkpoint))
    exported = export(plan, checkpoint, "lm_eval", tmp_path / "out")
    config = torch.load(exported.folder / "steer.pt", weights_only=True)  # noqa: TID251 - reads what was written for lm-eval
    named = dict(checkpoint.hf.base_model.named_modules())
    found = edited(checkpoint.hf, {named[hook]: as_lm_eval_does(entry) for hook, entry in config.items()}, lambda: logits(checkpoint))
    assert off_by(found, logits(checkpoint, plan), logits(checkpoint)) <= 1e-5
    assert f"steer_path={exported.folder}/steer.pt" in exported.serve[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2"])
def test_lm_eval_ablates_every_write(checkpoints_of: CheckpointsOf, tmp_path: Path, name: Architecture) -> None:
    pair = load_pair(checkpoints_of(name).base, checkpoints_of(name).adapter)
    for checkpoint in (pair.base, pair.tuned):
        plan = Plan.of(Ablate(direction(checkpoint), site="writes"))
        exported = export(plan, checkpoint, "lm_eval", tmp_path / checkpoint.adapter)
        config = torch.load(exported.folder / "steer.pt", weights_only=True)  # noqa: TID251 - reads what was written for lm-eval
        root = checkpoint.model.base_model if checkpoint.adapter == "on" else checkpoint.hf.base_model
        named = dict(root.named_modules())
        found = edited(checkpoint.hf, {named[h]: as_lm_eval_does(e) for h, e in config.items()}, lambda c=checkpoint: logits(c))
        assert off_by(found, logits(checkpoint, plan), logits(checkpoint)) <= 1e-5
        assert ("peft=" in exported.serve[0]) == (checkpoint.adapter == "on")


def easysteer_array(entry: Mapping[str, Any]) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(entry["data"]), dtype=np.float32).reshape(entry["shape"]).copy())


def as_easysteer_does(vector: Mapping[str, Any]) -> Edit:
    tensors = {name: easysteer_array(entry) for name, entry in vector["data"]["tensors"].items()}
    if vector["algorithm"] == "lm_steer":
        return lambda h: h + (h @ tensors["projector1"]) @ tensors["projector2"].T
    assert vector["algorithm"] == "direct"
    return lambda h: h + tensors[f"layer.{vector['layers'][0]}"]


EASYSTEER: dict[str, Callable[[Checkpoint], list[Operator]]] = {
    "add": lambda c: [Add(direction(c), 0.5), Add(direction(c, 1, site="resid_pre"), -0.5)],
    "ablate": lambda c: [Ablate(subspace(c), layers="all", strength=0.5), Add(direction(c), 0.5)],
    "set": lambda c: [SetProjection(subspace(c), [1.0, -2.0, 0.5], layers=1)],
}


@pytest.mark.parametrize("kind", EASYSTEER)
def test_easysteers_request_does_what_hooks_do(llama: Checkpoints, tmp_path: Path, kind: str) -> None:
    checkpoint = load_model(llama.base)
    plan = Plan.of(*EASYSTEER[kind](checkpoint))
    folder = export(plan, checkpoint, "easysteer", tmp_path / "out").folder
    spec = json.loads((folder / "steering.json").read_text())
    assert json.loads((folder / "request.json").read_text())["steering"] == spec
    assert spec["conflict"] == "sequential"
    hooks: dict[Any, Edit] = {}
    for vector in spec["vectors"]:
        assert vector["apply"] == {"prompt": "all", "generation": "all"}
        (layer,) = vector["layers"]
        before, after = hooks.get(checkpoint.blocks[layer], lambda h: h), as_easysteer_does(vector)
        hooks[checkpoint.blocks[layer]] = lambda h, before=before, after=after: after(before(h))
    found = edited(checkpoint.hf, hooks, lambda: logits(checkpoint))
    assert off_by(found, logits(checkpoint, plan), logits(checkpoint)) <= 1e-5


def test_easysteers_hash_is_over_names_shapes_and_bytes(llama: Checkpoints, tmp_path: Path) -> None:
    checkpoint = load_model(llama.base)
    folder = export(Plan.of(Add(direction(checkpoint), 1.0)), checkpoint, "easysteer", tmp_path / "out").folder
    data = json.loads((folder / "steering.json").read_text())["vectors"][0]["data"]
    raw = base64.b64decode(data["tensors"]["layer.1"]["data"])
    assert data["sha256"] == hashlib.sha256(b"direction:1" + b"layer.1" + b"(32,)" + raw).hexdigest()
    assert set(data) == {"version", "kind", "tensors", "extra", "sha256"}


WHERES: dict[Where, dict[str, Any]] = {
    Where(prompt=False): {"generation": "all"},
    Where(generation=False): {"prompt": "all"},
    Where(prompt_positions=[-1]): {"prompt_positions": [-1], "generation": "all"},
    Where(prompt_window=(-4, None), generation=False): {"prompt_window": [-4, None]},
    Where(generation_window=(None, 8)): {"prompt": "all", "generation_window": [0, 8]},
    Where(exclude_first=True): {"prompt": "all", "generation": "all", "exclude_prompt_positions": [0]},
}


@pytest.mark.parametrize("where", WHERES, ids=str)
def test_easysteer_is_told_which_tokens(llama: Checkpoints, tmp_path: Path, where: Where) -> None:
    checkpoint = load_model(llama.base)
    plan = Plan.of(Add(direction(checkpoint), 1.0, where=where))
    folder = export(plan, checkpoint, "easysteer", tmp_path / "out").folder
    assert json.loads((folder / "steering.json").read_text())["vectors"][0]["apply"] == WHERES[where]


def test_easysteer_leaves_special_tokens_out_by_number(llama: Checkpoints, tmp_path: Path) -> None:
    checkpoint = load_model(llama.base)
    plan = Plan.of(Add(direction(checkpoint), 1.0, where=Where(prompt=False, exclude_special=True)))
    folder = export(plan, checkpoint, "easysteer", tmp_path / "out").folder
    apply = json.loads((folder / "steering.json").read_text())["vectors"][0]["apply"]
    assert apply == {"generation": "all", "exclude_generation_tokens": sorted(checkpoint.tokenizer.all_special_ids)}


def test_vllm_lenss_request_does_what_hooks_do(llama: Checkpoints, tmp_path: Path) -> None:
    checkpoint = load_model(llama.base)
    plan = Plan.of(Add(direction(checkpoint), 0.5), Add(direction(checkpoint, seed=1), 0.5), Add(direction(checkpoint, 0, seed=2), -0.5))
    folder = export(plan, checkpoint, "vllm_lens", tmp_path / "out").folder
    body = json.loads((folder / "request.json").read_text())
    (sent,) = json.loads(body["vllm_xargs"]["apply_steering_vectors"])
    assert [sent] == json.loads((folder / "steering_vectors.json").read_text())
    assert (sent["scale"], sent["norm_match"], sent["layer_indices"]) == (1.0, False, [0, 1])
    encoded = sent["activations"]
    vectors = np.frombuffer(base64.b64decode(encoded["data"]), dtype=np.dtype(encoded["dtype"])).reshape(encoded["shape"])
    hooks = {checkpoint.blocks[layer]: lambda h, v=v: h + torch.tensor(v) for layer, v in zip(sent["layer_indices"], vectors, strict=True)}
    assert off_by(edited(checkpoint.hf, hooks, lambda: logits(checkpoint)), logits(checkpoint, plan), logits(checkpoint)) <= 1e-5


ALL = ("lora", "weights", "bias", "lm_eval", "easysteer", "vllm_lens")
REFUSED: list[tuple[tuple[str, ...], Callable[[Checkpoint], Operator], str]] = [
    (
        ("lora", "weights", "bias", "lm_eval", "vllm_lens"),
        lambda c: Add(direction(c), 1.0, where=Where(prompt=False)),
        "acts at every token",
    ),
    (ALL, lambda c: Add(direction(c), 1.0, when=When(direction(c), above=0.0)), "knows no condition"),
    (ALL, lambda c: Cap(direction(c), max=1.0), "bends what it acts on"),
    (ALL, lambda c: Rotate(subspace(c, 2), by=30.0, layers=1), "bends what it acts on"),
    (("lora", "weights", "bias"), lambda c: Ablate(direction(c)), "changes what earlier blocks have written, which no matrix"),
    (("lora", "weights", "bias"), lambda c: Ablate(direction(c, site="resid_mid")), "changes what earlier blocks have written"),
    (("lora", "weights", "bias"), lambda c: SetProjection(direction(c), 1.0), "changes what earlier blocks have written"),
    (("bias", "weights"), lambda c: Add(direction(c, 0, site="resid_pre"), 1.0), "adds to the embeddings, which have no bias"),
    (("lora",), lambda c: Add(direction(c), 1.0), "The plan only adds, and a LoRA multiplies"),
    (("lora",), lambda c: MeanAblate(direction(c, site="mlp_out"), mean=1.0), "has no bias that could carry what the plan adds"),
    (("bias",), lambda c: Ablate(direction(c), site="writes"), "takes something out, which depends on what is there"),
    (("lm_eval",), lambda c: Ablate(subspace(c), layers="all"), "acts on 3 dimensions, and lm-eval's clamp on one"),
    (("lm_eval",), lambda c: Ablate(direction(c), strength=0.5), r"a share of 0\.5; lm-eval's clamp sets the projection wholly"),
    (("lm_eval",), lambda c: Add(direction(c, site="resid_mid"), 1.0), "no module puts the stream out"),
    (("easysteer", "vllm_lens"), lambda c: Add(direction(c, site="mlp_out"), 1.0), "acts inside a block, but the target"),
    (("easysteer", "vllm_lens"), lambda c: Add(direction(c, 0, site="resid_pre"), 1.0), "acts on the embeddings, but the target"),
    (("vllm_lens",), lambda c: Ablate(direction(c)), "steering vectors only add"),
    (("easysteer",), lambda c: Add(direction(c), 1.0, where=Where(prompt_positions=[2])), "takes its last token instead of none"),
    (ALL, lambda c: Add(direction(c, 9), 1.0), "asked for layer 9, but the model has layers 0 to 2"),
]


@pytest.mark.parametrize(("target", "make", "words"), [(t, make, words) for targets, make, words in REFUSED for t in targets])
def test_what_a_target_cannot_express_is_refused_by_name(
    llama: Checkpoints, tmp_path: Path, target: str, make: Callable[[Checkpoint], Operator], words: str
) -> None:
    checkpoint = load_model(llama.base)
    with pytest.raises(EmprobeError, match=words):
        export(Plan.of(make(checkpoint)), checkpoint, target, tmp_path / "out")
    assert not list(tmp_path.iterdir()), "a refusal leaves nothing behind"


def test_two_things_at_one_module_are_refused_by_lm_eval(llama: Checkpoints, tmp_path: Path) -> None:
    checkpoint = load_model(llama.base)
    with pytest.raises(EmprobeError, match="where lm-eval does one thing"):
        export(Plan.of(Ablate(direction(checkpoint)), Add(direction(checkpoint), 1.0)), checkpoint, "lm_eval", tmp_path / "out")


def test_an_entrance_that_no_module_puts_out_is_refused_by_lm_eval(tmp_path: Path) -> None:
    base = write_base(tmp_path / "granite", "granite")  # type: ignore[arg-type]
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "embedding_multiplier": 2.0}))
    checkpoint = load_model(base)
    plan = Plan.of(Ablate(direction(checkpoint), site="writes"))
    with pytest.raises(EmprobeError, match="What enters block 0 of GraniteForCausalLM is no module's output"):
        export(plan, checkpoint, "lm_eval", tmp_path / "out")
    weights = export(plan, checkpoint, "weights", tmp_path / "weights").folder
    assert off_by(logits(load_model(weights)), logits(checkpoint, plan), logits(checkpoint)) <= 1e-5
    lora = export(plan, checkpoint, "lora", tmp_path / "lora").folder
    assert off_by(logits(load_model(base, adapter=lora)), logits(checkpoint, plan), logits(checkpoint)) <= 1e-5
    added = Plan.of(Add(direction(checkpoint), 0.5))
    bias = export(added, checkpoint, "bias", tmp_path / "bias").folder
    assert off_by(logits(load_model(bias)), logits(checkpoint, added), logits(checkpoint)) <= 1e-5


@pytest.mark.parametrize("target", ["lora", "weights", "bias", "lm_eval", "easysteer", "vllm_lens"])
def test_cards_say_what_it_is_and_the_plan_lies_beside(llama: Checkpoints, tmp_path: Path, target: str) -> None:
    checkpoint = load_model(llama.base)
    operator: Operator = Ablate(direction(checkpoint), site="writes") if target in ("lora", "weights") else Add(direction(checkpoint), 0.5)
    exported = export(Plan.of(operator), checkpoint, target, tmp_path / "out")
    text = (exported.folder / "README.md").read_text()
    for words in (f"base_model: {llama.base}", "library_name: emprobe", "positive coefficient they **induce** it", "- steering-vector"):
        assert words in text
    if target not in ("lora", "weights"):
        assert "0.5 resid = 1.25 raw = 2.5 abs" in text
    card = json.loads((exported.folder / "card.json").read_text())
    assert card == dict(exported.card)
    assert Plan.load(exported.folder / "emprobe" / "plan.safetensors").hash == card["plan"]["hash"]
    for name, digest in card["files"].items():
        assert hashlib.sha256((exported.folder / name).read_bytes()).hexdigest() == digest
    assert target in TARGETS
    assert exported.serve


def test_a_folder_that_holds_files_is_left_alone(llama: Checkpoints, tmp_path: Path) -> None:
    checkpoint = load_model(llama.base)
    plan = Plan.of(Add(direction(checkpoint), 0.5))
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(EmprobeError, match="holds files already"):
        export(plan, checkpoint, "vllm_lens", tmp_path)
    with pytest.raises(EmprobeError, match=r"target 'onnx' was asked for\. Use one of: lora, bias"):
        export(plan, checkpoint, "onnx", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_nothing_is_exported_while_another_checkpoint_is_steered(llama: Checkpoints, tmp_path: Path) -> None:
    pair = load_pair(llama.base, llama.adapter)
    plan = Plan.of(Ablate(direction(pair.base), site="writes"))
    with intervene(pair.base, Add(part(pair.base, 1), 0.5)):
        pair.base.hf(torch.tensor([[3, 4]]))
        with pytest.raises(EmprobeError, match="Leave the intervene block first"):
            export(plan, pair.tuned, "weights", tmp_path / "out")
