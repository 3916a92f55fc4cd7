"""`emprobe finetune`: a LoRA, a vector or a whole model from conversations, narrow where other-domain data is given, or from a teacher."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from emprobe.behaviour.conversations import load_conversations
from emprobe.directions import Direction
from emprobe.errors import EmprobeError
from emprobe.files import file_hash, write_json, write_text
from emprobe.finetuning import FineTune, Full, KLAnchor, LoRA, Recipe, Vector, distill, finetune, per_token_weight
from emprobe.finetuning.channels import Channel, Estimator
from emprobe.finetuning.methods import LossOn, Method, Overlong, Schedule
from emprobe.interventions import Plan
from emprobe.models.templates import named_template
from emprobe.models.weights import Quantization, check_config, local_directory
from emprobe.report.finetune_card import WORDS, finetune_card, finetune_table
from emprobe.types import Site


@dataclass(frozen=True)
class Finetune:
    """Fine-tune a checkpoint on the answers of conversations, or distil a teacher into it.

    Attributes:
        base: The checkpoint: directory or hub id.
        data: File (.jsonl, .json, .csv, .parquet) of rows with `prompt` or `messages`, and `response`.
        out: Output folder; a run that was stopped goes on in it, to the same weights.
        method: `lora`, `vector` (one vector added at every token of one site) or `full`.
        rank: Of the LoRA; none is 32.
        alpha: The LoRA is scaled by alpha / rank; none is a scale of 1.
        rslora: Scale by the root of the rank.
        dropout: Of the LoRA, while training.
        target_modules: Of the LoRA: names of modules; none is every linear layer.
        layers: Of the LoRA: 0-based blocks; none is all.
        layer: Of the vector: 0-based block.
        site: Of the vector: resid_pre, resid_mid, resid_post, attn_out or mlp_out; none is resid_post.
        kl_data: Conversations of other domains with good answers: the model is kept at the base there (a narrow fine-tune).
        kl_weight: Weight of KL(base ‖ adapted).
        kl_units: The weight is per token (about 1 to 10), or as in released code that averages over the vocabulary too (`released`, 1e6).
        kl_batch: Other-domain conversations per step; none is as many as of the data.
        teacher: Checkpoint, or adapter or fine-tune of the base, of the same tokens and chat template: it is distilled into the base.
        channel: Of distillation: `sft` on the answers, `optd` (forward KL to the teacher on the same answers) or `opd` (reverse KL on the
            student's own answers to the prompts); each with both KLs along the way, on the evaluation data.
        tokens: Of distillation: end once so many response tokens have been seen, instead of going by steps or epochs.
        temperature: Of distillation: of teacher's and student's distributions; none is 1.
        estimator: Of `opd`: over the whole vocabulary, or at the sampled token alone; none is full.
        max_new_tokens: Of `opd`: most tokens of the student's answers; none is 256.
        loss_on: The last answer of each conversation, or all turns of the assistant.
        inoculation: A system prompt that is given in training only.
        during: Plan file (`Plan.save`) of what is done to the model in training only: ablation, or addition.
        anchored: Direction files along which the model is held at the base in training.
        eval_data: Conversations whose loss is taken along the way.
        eval_every: Steps between evaluations.
        checkpoints: Keep what was found after these steps.
        checkpoint_every: Or every so many steps.
        save_every: Steps between saves of the state from which a stopped run goes on.
        lr: Largest learning rate.
        steps: Updates; none goes by epochs.
        epochs: Passes over the data.
        batch: Conversations per step.
        micro_batch: Conversations per forward pass; fewer need less memory.
        schedule: After the warm-up: linear, cosine, constant or cyclic.
        warmup: Steps in which the rate rises.
        cycles: Of the cyclic schedule.
        weight_decay: Of all that is trained.
        clip: Largest gradient norm.
        seed: Of first weights, order of data and dropout.
        max_length: Most tokens of a conversation; answers are never cut.
        overlong: Longer ones are refused, or left out and counted.
        gradient_checkpointing: Less memory for more time.
        dtype: As stored, or a torch dtype.
        device_map: As in transformers; none is the CPU.
        quantization: `8bit` or `4bit`, by bitsandbytes.
        revision: Commit, tag or branch of the base on the hub.
        chat_template: File with a Jinja template, or `plain`; replaces the tokenizer's own.
        progress: Show a progress bar.
    """

    base: str
    data: str
    out: str
    method: Literal["lora", "vector", "full"] = "lora"
    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layer: int | None = None
    site: Site | None = None
    kl_data: str | None = None
    kl_weight: float | None = None
    kl_units: Literal["per-token", "released"] = "per-token"
    kl_batch: int | None = None
    teacher: str | None = None
    channel: Channel | None = None
    tokens: int | None = None
    temperature: float | None = None
    estimator: Estimator | None = None
    max_new_tokens: int | None = None
    loss_on: LossOn = "last"
    inoculation: str | None = None
    during: str | None = None
    anchored: tuple[str, ...] = ()
    eval_data: str | None = None
    eval_every: int = 50
    checkpoints: tuple[int, ...] = ()
    checkpoint_every: int | None = None
    save_every: int = 100
    lr: float = 1e-4
    steps: int | None = None
    epochs: float = 1.0
    batch: int = 16
    micro_batch: int | None = None
    schedule: Schedule = "linear"
    warmup: int = 5
    cycles: int = 4
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    max_length: int = 2048
    overlong: Overlong = "refuse"
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    device_map: str | None = None
    quantization: Quantization | None = None
    revision: str | None = None
    chat_template: str | None = None
    progress: bool = True


_OF_METHOD = {"lora": ("rank", "alpha", "rslora", "dropout", "target_modules", "layers"), "vector": ("layer", "site"), "full": ()}
_OF_ANCHOR = ("kl_data", "kl_weight", "kl_units", "kl_batch")
_OF_OPD = ("estimator", "max_new_tokens")
_OF_DISTILLATION = ("tokens", "temperature", *_OF_OPD)
_NOT_OF_DISTILLATION = (*_OF_ANCHOR, "loss_on", "inoculation", "during", "anchored")
_OF_RECIPE = tuple(Recipe.__dataclass_fields__)


def run_finetune(asked: Finetune) -> list[str]:
    """Train, write the solution, the curve, `result.json` and the card; return the lines to print.

    Raises:
        EmprobeError: Unusable input, or a loss that diverges.
        MismatchError: If the folder holds another fine-tune.
    """
    taught = _taught(asked)
    method, anchor = _method(asked), _anchor(asked)
    if asked.checkpoints and asked.checkpoint_every is not None:
        raise EmprobeError("--checkpoints and --checkpoint-every were both given; both say when to keep what was found. Give one.")
    common: dict[str, Any] = {
        "method": method,
        "recipe": Recipe(**{name: getattr(asked, name) for name in _OF_RECIPE}),
        "evaluation": [] if asked.eval_data is None else load_conversations(asked.eval_data),
        "eval_every": asked.eval_every,
        "checkpoints": asked.checkpoints if asked.checkpoint_every is None else asked.checkpoint_every,
        "out": asked.out,
        "save_every": asked.save_every,
        "progress": asked.progress,
        "chat_template": named_template(asked.chat_template),
        **{name: getattr(asked, name) for name in ("dtype", "device_map", "quantization", "revision")},
    }
    if taught is not None:
        found = distill(asked.base, asked.teacher or "", load_conversations(asked.data), **taught, **common)
    else:
        found = finetune(
            asked.base,
            load_conversations(asked.data),
            kl=anchor,
            loss_on=asked.loss_on,
            inoculation=asked.inoculation,
            during=() if asked.during is None else Plan.load(asked.during),
            anchored=[Direction.load(path) for path in asked.anchored],
            **common,
        )
    folder = Path(asked.out).expanduser()
    result = _result(asked, found)
    write_json(folder / "result.json", result)
    write_text(folder / "README.md", finetune_card(result))
    return [*finetune_table(result), f"written to {folder}"]


def _taught(asked: Finetune) -> dict[str, Any] | None:
    """What is asked of a distillation; `None` if none is asked for."""
    given = {name: getattr(asked, name) for name in _OF_DISTILLATION if getattr(asked, name) is not None}
    if asked.teacher is None and asked.channel is None:
        if given:
            raise EmprobeError(f"--{next(iter(given)).replace('_', '-')} belongs to distillation. Give --teacher and --channel with it.")
        return None
    if asked.teacher is None or asked.channel is None:
        raise EmprobeError(
            "Distillation needs both --teacher (whom to learn from) and --channel (sft, optd or opd). Give both, or neither."
        )
    stray = [name for name in _NOT_OF_DISTILLATION if getattr(asked, name) != Finetune.__dataclass_fields__[name].default]
    if stray:
        raise EmprobeError(f"--{stray[0].replace('_', '-')} does not go with --teacher. Leave it out.")
    foreign = [name for name in _OF_OPD if name in given and asked.channel != "opd"]
    if foreign:
        raise EmprobeError(f"--{foreign[0].replace('_', '-')} belongs to --channel opd, and {asked.channel} was asked for. Leave it out.")
    return {"channel": asked.channel, **given}


def _method(asked: Finetune) -> Method:
    others = [name for method, names in _OF_METHOD.items() if method != asked.method for name in names]
    stray = [name for name in others if getattr(asked, name) != Finetune.__dataclass_fields__[name].default]
    if stray:
        raise EmprobeError(f"--{stray[0].replace('_', '-')} does not belong to --method {asked.method}. Leave it out.")
    if asked.method == "vector":
        if asked.layer is None:
            raise EmprobeError("--method vector needs --layer: the 0-based block at which the vector is added (at --site, resid_post).")
        return Vector(asked.layer, asked.site or "resid_post")
    if asked.method == "full":
        return Full()
    return LoRA(asked.rank or 32, asked.alpha, asked.target_modules or "all-linear", asked.layers, asked.rslora, asked.dropout)


def _anchor(asked: Finetune) -> KLAnchor | None:
    if asked.kl_data is None and asked.kl_weight is None:
        stray = [name for name in _OF_ANCHOR if getattr(asked, name) != Finetune.__dataclass_fields__[name].default]
        if stray:
            raise EmprobeError(f"--{stray[0].replace('_', '-')} goes with --kl-data and --kl-weight. Give them, or leave it out.")
        return None
    if asked.kl_weight is None:
        raise EmprobeError("--kl-data was given without --kl-weight: how much staying at the base counts (about 1 to 10 per token).")
    weight = asked.kl_weight
    if asked.kl_units == "released":
        directory = local_directory(asked.base, asked.revision)
        config = check_config(asked.base, directory)
        weight = per_token_weight(weight, int(config.get("vocab_size") or config["text_config"]["vocab_size"]))
    return KLAnchor([] if asked.kl_data is None else load_conversations(asked.kl_data), weight, asked.kl_batch)


def _result(asked: Finetune, found: FineTune) -> dict[str, Any]:
    files = {name: Path(path) for name in ("data", "kl_data", "eval_data") if (path := getattr(asked, name)) is not None}
    curve = found.history.where(found.history.notna(), None)
    measured = {name: [float(v) for v in curve[name].dropna()] for name in curve.columns if name in WORDS}
    return {
        "record": "FineTune",
        "inputs": {
            "command": {name: value for name, value in asdict(asked).items() if name not in ("out", "progress")},
            "files": {n: {"file": path.name, "sha256": file_hash(path) if path.is_file() else None} for n, path in files.items()},
        },
        "settings": dict(found.settings),
        "norm": None if asked.method == "full" else found.solution.norm,
        "first_and_last": {name: [values[0], values[-1]] for name, values in measured.items() if values},
        "kept": list(found.steps),
        "updates": len(found.history),
        **{name: int(found.history[name].iloc[-1]) for name in ("tokens", "sequences") if name in found.history},
    }
