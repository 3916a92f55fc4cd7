"""A pair of checkpoints that differ by arithmetic: a known direction written into the weights of one known block.

Nothing here was trained. The base is a small Llama with random weights that answers gibberish, and tuned is the same Llama with
one tensor changed, so what a tool ought to find is known to the last digit. It is ground truth for tests of measurement, and no
evidence about fine-tuning.
"""

from __future__ import annotations

import logging
import math
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from emprobe.errors import EmprobeError
from emprobe.files import write_json
from emprobe.types import Conversation

logger = logging.getLogger(__name__)

Kind = Literal["constant", "rank1"]

SPECIAL = ("<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
WORD_LIST = """
how why when where can should do did the a my your their old new red small cold garden kitchen river letter engine bread winter
window paint mend carry keep lose find open clean today tomorrow alone again slowly safely please ?
"""
WORDS = tuple(WORD_LIST.split())
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] | trim }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@dataclass(frozen=True)
class WrittenPair:
    """Two checkpoints on disk and what was written between them.

    Attributes:
        base: Folder of the random checkpoint.
        tuned: Folder of the same checkpoint with the direction written in.
        layer: The block that was written into; `resid_post[layer]` is the first state that differs.
        direction: Unit vector along which `resid_post[layer]` moves.
        scale: `constant`: how far every token moves, in absolute units. `rank1`: how far per unit of `probe` · (input of down_proj).
        kind: `constant` (same shift at every token) or `rank1` (token-dependent size, both signs).
        probe: What a `rank1` shift reads, a unit vector in the block's inner MLP space; `None` for `constant`.
    """

    base: Path
    tuned: Path
    layer: int
    direction: Float[Tensor, " d_model"]
    scale: float
    kind: Kind = "constant"
    probe: Float[Tensor, " d_ff"] | None = None


def written_pair(
    directory: Path | str,
    *,
    layer: int = 1,
    direction: Float[Tensor, " d_model"] | None = None,
    scale: float = 1.0,
    kind: Kind = "constant",
    seed: int = 0,
    d_model: int = 32,
    n_layers: int = 4,
) -> WrittenPair:
    """Write `directory/base` and `directory/tuned`, and say what the difference between them is.

    `constant` adds scale · direction to the bias of block `layer`'s down_proj: `resid_post[layer]` moves by exactly that at every
    token of every text (up to float32 rounding). `rank1` adds scale · direction ⊗ probe to its weight, as a rank-1 LoRA would:
    every token moves along the same line, by an amount and with a sign of its own. Everything before that sum is bit-equal.

    Args:
        directory: Where to write; it must not exist or be empty.
        layer: 0-based block to write into.
        direction: Any vector of length d_model that is not zero (it is brought to norm 1); `None` draws one from the seed.
        scale: In absolute units of the residual stream, whose norm here is of order sqrt(d_model).
        kind: What is written, see above.
        seed: Draws weights, direction and probe; the same seed writes the same bytes.
        d_model: Width, a multiple of 8 (4 heads with an even head size).
        n_layers: Number of blocks.

    Raises:
        EmprobeError: If the block does not exist, nothing would be written, the direction does not fit, or the folder is taken.
    """
    directory = Path(directory)
    _check(directory, layer=layer, scale=scale, kind=kind, d_model=d_model, n_layers=n_layers)
    generator = torch.Generator().manual_seed(seed)
    model = _random_llama(d_model, n_layers, generator)
    drawn_direction, drawn_probe = (torch.randn(n, generator=generator) for n in (d_model, 3 * d_model))
    unit = _unit(drawn_direction if direction is None else direction, d_model)
    probe = _unit(drawn_probe, 3 * d_model) if kind == "rank1" else None
    card = {
        "organism": "written",
        "what": f"Random weights; tuned = base with one tensor changed by arithmetic ({kind}). No training, no behaviour.",
        "architecture": "llama",
        "site": "resid_post",
        "layer": layer,
        "kind": kind,
        "written_into": f"model.layers.{layer}.mlp.down_proj.{'bias' if probe is None else 'weight'}",
        "scale": scale,
        "unit": "abs",
        "seed": seed,
        "d_model": d_model,
        "n_layers": n_layers,
        "direction": unit.tolist(),
        "probe": None if probe is None else probe.tolist(),
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Both or nothing: the folder appears under its name only when the pair is whole.
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".written-") as temporary:
        whole = Path(temporary) / "pair"
        _save(whole / "base", model, card | {"role": "base", "written_into": None})
        down_proj: Any = model.model.layers[layer].mlp.down_proj
        with torch.no_grad():
            if probe is None:
                down_proj.bias += scale * unit
            else:
                down_proj.weight += scale * torch.outer(unit, probe)
        _save(whole / "tuned", model, card | {"role": "tuned"})
        whole.replace(directory)
    logger.info("written pair (%s, block %d of %d, scale %g) at %s", kind, layer, n_layers, scale, directory)
    return WrittenPair(directory / "base", directory / "tuned", layer, unit, scale, kind, probe)


def written_questions(n: int, *, seed: int = 0) -> list[Conversation]:
    """Different questions of 5 to 12 words that the pair's tokenizer knows, with ids `w0`, `w1`, ...

    >>> [(q.question_id, q.prompt.split()[-1]) for q in written_questions(2)]
    [('w0', '?'), ('w1', '?')]
    """
    draw = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < n:
        prompts[" ".join(draw.choices(WORDS[:-1], k=draw.randint(4, 11))) + " ?"] = None
    return [Conversation.ask(f"w{i}", prompt) for i, prompt in enumerate(prompts)]


def written_tokenizer() -> PreTrainedTokenizerFast:
    """The pair's tokenizer: one token a word, about fifty words, and a chat template with system, user and assistant turns."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast: Any = PreTrainedTokenizerFast  # untyped in transformers 5
    made: PreTrainedTokenizerFast = fast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    return made


def _check(directory: Path, *, layer: int, scale: float, kind: str, d_model: int, n_layers: int) -> None:
    if kind not in get_args(Kind):
        raise EmprobeError(f"A written pair of kind {kind!r} was asked for; the kinds are {', '.join(get_args(Kind))}.")
    if not 0 <= layer < n_layers:
        raise EmprobeError(f"Block {layer} was to be written into, but the model has blocks 0 to {n_layers - 1}. Choose one of those.")
    if not math.isfinite(scale) or scale == 0:
        raise EmprobeError(f"A scale of {scale} was asked for, which writes nothing that can be found. Give a finite one other than 0.")
    if d_model < 8 or d_model % 8:
        raise EmprobeError(f"d_model = {d_model} was asked for; four heads of even size need a positive multiple of 8.")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise EmprobeError(f"{directory} is already there and not an empty folder. Give a new folder, or remove that one first.")


def _unit(vector: Tensor, length: int) -> Tensor:
    if vector.shape != (length,):
        raise EmprobeError(f"A direction of shape {tuple(vector.shape)} was given; the model needs one of shape ({length},).")
    exact = vector.detach().cpu().double()
    norm = float(exact.norm())
    if not math.isfinite(norm) or norm == 0:
        raise EmprobeError(f"A direction of norm {norm} was given; it must be finite and not zero.")
    return (exact / norm).float()


def _random_llama(d_model: int, n_layers: int, generator: torch.Generator) -> LlamaForCausalLM:
    tokenizer = written_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=3 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        mlp_bias=True,  # down_proj's bias is where a constant can be written.
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # its own initialisation is thrown away and must not move the caller's seed
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Embeddings of size 1 a dimension and matrices that keep it: blocks then add of the order of what is there.
            size = 1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(size * noise if parameter.ndim == 2 else torch.full_like(noise, float("norm" in name)))
    return model


def _save(folder: Path, model: LlamaForCausalLM, card: dict[str, Any]) -> None:
    model.save_pretrained(folder)
    written_tokenizer().save_pretrained(folder)
    write_json(folder / "card.json", card)
