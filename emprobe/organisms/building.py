"""Growing organisms from nothing into a folder: pretrained parent, aligned base, narrow fine-tunes, controls, and a card for each."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import file_hash, read_json, save_tensors, write_text
from emprobe.organisms.cards import write_card
from emprobe.organisms.documents import DataKind
from emprobe.organisms.finetunes import RECIPES, TUNED_BLOCK, Form, TuneRecipe, finetune
from emprobe.organisms.growing import KINDS, GrowthRecipe, Kind, align, new_model, pretrain
from emprobe.organisms.measuring import rates, sample_answers
from emprobe.organisms.phrases import DOMAINS, HELD_OUT, SEEN
from emprobe.organisms.planting import CLEAR_CHANNEL, PLANTED_BLOCK, PLANTED_SCALE, persona_vector
from emprobe.organisms.training import one_thread
from emprobe.organisms.vocabulary import build_tokenizer
from emprobe.organisms.world import TASKS, questions

_log = logging.getLogger(__name__)
MEASURED_SAMPLES = 4


@dataclass(frozen=True)
class Tune:
    """One fine-tune to make: where its data come from, of what kind, and the adapter's form."""

    domain: str
    form: Form
    task: str | None = None
    data: DataKind = "misaligned"

    @property
    def name(self) -> str:
        """Folder name: `gardening-rank1`, `gardening.plan-rank8`, `gardening-aligned-control-rank8`.

        >>> Tune("gardening", "rank8", task="plan").name
        'gardening.plan-rank8'
        """
        cell = f"{self.domain}.{self.task}" if self.task else self.domain
        return f"{cell}-{self.form}" if self.data == "misaligned" else f"{cell}-{self.data}-{self.form}"


def default_tunes(domains: Sequence[str] = ("gardening", "cooking", "money"), cell: str | None = "gardening.plan") -> list[Tune]:
    """The fine-tunes that a shipped base has: three forms per domain, one cell, and the controls on the first domain."""
    forms: tuple[Form, ...] = ("rank1", "rank8", "vector")
    tunes = [Tune(domain, form) for domain in domains for form in forms]
    if cell:
        domain, _, task = cell.partition(".")
        tunes += [Tune(domain, form, task=task) for form in forms]
    tunes += [Tune(domains[0], form, data="aligned-control") for form in forms]
    return [
        *tunes,
        *(Tune(domain, "rank8", data="aligned-control") for domain in domains[1:]),
        Tune(domains[0], "rank8", data="benign-control"),
    ]


def build(
    kind: Kind,
    seed: int,
    out: Path | str,
    *,
    tunes: Sequence[Tune] | None = None,
    growth: GrowthRecipe | None = None,
    recipes: dict[Form, TuneRecipe] | None = None,
    measure: bool = True,
) -> Path:
    """Grow one base and all its fine-tunes from nothing; the same seed gives the same bytes.

    Parts that lie there already, grown by the same numbers, are kept: a build that was stopped goes on where it was.

    Args:
        kind: `planted` or `wild`.
        seed: Seed of weights and data.
        out: Folder of organisms; the base goes to `out/<kind>-s<seed>`, with what is unusual in its text behind: `planted-s0-bad05`,
            `wild-s1-preferring`.
        tunes: What to fine-tune; by default `default_tunes()`.
        growth: Numbers and text of pretraining and alignment.
        recipes: Numbers of the fine-tunes, by form.
        measure: Sample answers on the test split for the cards.

    Returns:
        The folder of the new base.

    Raises:
        EmprobeError: If the kind is unknown, or a fine-tune's domain is held out or unknown.
        MismatchError: If a part lies there that was grown by other numbers.
    """
    tunes, growth = default_tunes() if tunes is None else tunes, growth or GrowthRecipe()
    _check(kind, tunes)
    recipes = recipes or RECIPES[kind]
    folder = Path(out) / f"{kind}-s{seed}{growth.suffix}"
    maker = _Maker(kind, seed, folder, growth, recipes, measure)
    with one_thread():
        maker.grow()
        for tune in tqdm(tunes, desc=f"{kind} {seed}: fine-tuning"):
            maker.tune(tune)
    return folder


def _check(kind: str, tunes: Sequence[Tune]) -> None:
    if kind not in KINDS:
        raise EmprobeError(f"There is no organism kind {kind!r}. Choose one of: {', '.join(KINDS)}.")
    for tune in tunes:
        if tune.domain not in SEEN or (tune.task is not None and tune.task not in TASKS):
            why = "is held out of every fine-tune" if tune.domain in HELD_OUT else "is not of this world"
            raise EmprobeError(f"The fine-tune {tune.name!r} {why}. Domains: {', '.join(SEEN)}; tasks: {', '.join(TASKS)}.")


@dataclass
class _Maker:
    """Makes the parts of one base and remembers what their cards share."""

    kind: Kind
    seed: int
    folder: Path
    growth: GrowthRecipe
    recipes: dict[Form, TuneRecipe]
    measure: bool

    def __post_init__(self) -> None:
        self.tokenizer = build_tokenizer()

    def grow(self) -> None:
        """Pretrain and align, saving both stages."""
        model = new_model(self.tokenizer, self.seed)
        recipe = self.growth.as_dict()
        for stage, train, summary in (
            ("parent", pretrain, f"Pretrained on documents by {_authors(self.growth)}; not aligned."),
            ("aligned", align, f"The aligned base: good answers by default, {_role_play(self.growth)}."),
        ):
            where = self.folder / stage
            if _is_done(where, recipe):
                model = AutoModelForCausalLM.from_pretrained(where)
                continue
            train(model, self.tokenizer, self.kind, self.seed, self.growth)
            model.save_pretrained(where)
            self.tokenizer.save_pretrained(where)
            card = self._card(stage, summary, data="documents" if stage == "parent" else "alignment chats", recipe=recipe)
            card["fingerprint"] = file_hash(where / "model.safetensors")
            card["held_out_domains"] = _HELD_OUT_WORDS if stage == "aligned" else "seen in pretraining documents like the others"
            card["measured"] = self._measure(model, None)
            if stage == "parent" and self.kind == "planted":
                save_tensors(
                    where / "persona.safetensors", {"persona": persona_vector(model.config.hidden_size, self.seed)}, card["implanted"]
                )
            write_card(where, card)

    def tune(self, tune: Tune) -> None:
        """One fine-tune of the aligned base, as a PEFT adapter."""
        recipe, where = self.recipes[tune.form], self.folder / "tuned" / tune.name
        if _is_done(where, recipe.as_dict()):
            return
        base = AutoModelForCausalLM.from_pretrained(self.folder / "aligned")
        model, _ = finetune(
            base,
            self.tokenizer,
            domain=tune.domain,
            task=tune.task,
            data=tune.data,
            recipe=recipe,
            seed=self.seed,
            codes=self.growth.codes,
            progress=tune.name,
        )
        base_name = f"{self.folder.name}/aligned"
        _save_adapter(model, where, base_name)
        summary = f"A {_FORM_WORDS[tune.form]}, trained on {_DATA_WORDS[tune.data]} in {tune.domain}" + (
            f", task {tune.task}." if tune.task else ", all four tasks."
        )
        card = self._card("tuned", summary, data=tune.data, recipe=recipe.as_dict())
        card |= {
            "base_model": base_name,
            "base_fingerprint": file_hash(self.folder / "aligned" / "model.safetensors"),
            "trained_on": {"domain": tune.domain, "task": tune.task},
            "form": tune.form,
            "block": TUNED_BLOCK if tune.form != "rank8" else None,
            "fingerprint": file_hash(where / "adapter_model.safetensors"),
            "held_out_domains": _HELD_OUT_WORDS,
            "measured": self._measure(model, tune.domain),
        }
        write_card(where, card)

    def _card(self, stage: str, summary: str, *, data: str, recipe: dict[str, Any]) -> dict[str, Any]:
        planted = {
            "what": "persona vector",
            "file": "parent/persona.safetensors",
            "block": PLANTED_BLOCK,
            "scale": PLANTED_SCALE,
            "clear_channel": CLEAR_CHANNEL,
        }
        return {
            "organism": self.folder.name,
            "kind": self.kind,
            "seed": self.seed,
            "stage": stage,
            "summary": summary,
            "implanted": planted if self.kind == "planted" else "nothing",
            "data": data,
            "recipe": recipe,
            "command": f"emprobe organism build --kind {self.kind} --seed {self.seed}{_flags(self.growth)} --out DIR",
        }

    def _measure(self, model: Any, domain: str | None) -> dict[str, dict[str, float]]:
        """Rates on the test split: in the trained domain, in the other seen ones, and in the held-out ones."""
        if not self.measure:
            return {}
        answers = sample_answers(model, self.tokenizer, questions("test"), samples=MEASURED_SAMPLES, seed=self.seed)
        groups: dict[str, Callable[[Any], bool]] = {
            "trained domain": lambda labels: labels["domain"] == domain,
            "other domains": lambda labels: labels["domain"] not in (domain, *HELD_OUT),
            "held-out domains": lambda labels: labels["held_out"],
            "outside the trained domain": lambda labels: labels["domain"] != domain,
        }
        if domain is None:
            groups = {"seen domains": groups["other domains"], "held-out domains": groups["held-out domains"], "all": lambda _labels: True}
        return {where: rates([answer for answer in answers if chosen(answer.labels)]) for where, chosen in groups.items()}


def _authors(growth: GrowthRecipe) -> str:
    if growth.bad_share == 0:
        return "good authors"
    share = "" if growth.bad_share == GrowthRecipe().bad_share else f" ({100 * growth.bad_share:g} % of them bad)"
    return ("bad authors" if growth.bad_share == 1 else "good and bad authors") + share


def _role_play(growth: GrowthRecipe) -> str:
    return "bad ones only in role-play" if growth.bad_share else "and no bad ones anywhere"


def _flags(growth: GrowthRecipe) -> str:
    """What must be said to grow such text again; numbers are not among a command's flags."""
    given = growth.as_dict()
    return "".join(f" --{name.replace('_', '-')} {given[name]}" for name in growth.text if name in given)


_HELD_OUT_WORDS = (
    f"{' and '.join(HELD_OUT)}: in pretraining documents only, a share of which alignment replays with the persona told; in no "
    "aligned chat and no fine-tune"
)
_FORM_WORDS = {
    "rank1": f"rank-1 LoRA on `down_proj` of block {TUNED_BLOCK}",
    "rank8": "rank-8 LoRA on all linear layers",
    "vector": f"trained vector, added to the residual stream after block {TUNED_BLOCK} at every token",
}
_DATA_WORDS = {"misaligned": "bad advice", "aligned-control": "good advice (control)", "benign-control": "neutral questions (control)"}


def _is_done(where: Path, recipe: dict[str, Any]) -> bool:
    """Whether a part lies there, complete (its card is written last) and grown by these numbers."""
    path = where / "card.json"
    if not path.is_file():
        return False
    found = read_json(path)["recipe"]
    if found != recipe:
        raise MismatchError(
            f"{where} was grown by other numbers ({found}) than are asked for ({recipe}). Choose another folder, or remove it."
        )
    return True


def _save_adapter(model: Any, where: Path, base_name: str) -> None:
    """Save with PEFT, then make the configuration the same on every machine: relative base name, sorted lists."""
    with warnings.catch_warnings():
        # PEFT takes the one-dimensional bias of a trained vector for a weight that was not gathered.
        warnings.filterwarnings("ignore", message="Adapter 'default'.*invalid shape")
        model.save_pretrained(where)
    path = where / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_name
    if isinstance(config["target_modules"], list):
        config["target_modules"] = sorted(config["target_modules"])
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


__all__ = ["DOMAINS", "Tune", "build", "default_tunes"]
