"""What is known of each prompt, and every predictor that is made of it: activations at each place, random directions, cheap baselines."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emprobe.errors import EmprobeError
from emprobe.studies.priors.baselines import Words, length, one_hot
from emprobe.studies.priors.features import Block, PCAProjections, RandomProjections, fixed, most_directions

Read = Mapping[str, Mapping[str, NDArray[np.float64]]]
"""Activations by whose they are (`base`, `pretrained`) and where they are read (`last_prompt_token`, ...): `[prompt, layer, d_model]`."""


@dataclass(frozen=True, eq=False)
class PromptTable:
    """Everything that is known of each prompt, a row each.

    Attributes:
        scores: Of the fine-tuned model.
        families: Paraphrases of one question share a name.
        activations: Before fine-tuning, on the prompt alone.
        embeddings: What the prompt's tokens are before any block, `[prompt, d_model]`; `None` leaves that baseline out.
        texts: The prompts' words.
        tokens: Their lengths.
        labels: What the prompts are known to be, such as domain and task.
        base_scores: The base model's own score on the prompt, one or several columns; `None` leaves that baseline out.
        corpus: Activations on the prompts trained on, in the same form; then directions are theirs, and not the training folds'.
        layers: Which layers the activations hold; none means the first ones, from 0.
    """

    scores: NDArray[np.float64]
    families: Sequence[Hashable]
    activations: Read
    embeddings: NDArray[np.float64] | None = None
    texts: Sequence[str] = ()
    tokens: Sequence[int] = ()
    labels: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    base_scores: NDArray[np.float64] | None = None
    corpus: Read | None = None
    layers: Sequence[int] = ()

    def __post_init__(self) -> None:
        found: dict[str, Any] = {"families": self.families, "texts": self.texts, "tokens": self.tokens, **self.labels}
        found |= {f"{who}, {where}": values for who, by in self.activations.items() for where, values in by.items()}
        wrong = {name: len(values) for name, values in found.items() if len(values) not in (len(self.scores), 0)}
        if wrong:
            name, rows = next(iter(wrong.items()))
            raise EmprobeError(f"{len(self.scores)} scores were given, but {name} has {rows} rows. Give one row for each prompt.")
        if not self.activations:
            raise EmprobeError("No activations were given, so there is nothing to compare the baselines with.")

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return int(next(iter(next(iter(self.activations.values())).values())).shape[2])


@dataclass(frozen=True)
class Predictor:
    """One way to predict scores.

    Attributes:
        name: As results call it.
        group: `activations`, `random` or `baseline`.
        blocks: Its features; for `random` one predictor is several draws, which `draws` holds instead.
        draws: A block for each draw of random directions.
        place: Of activations: `source`, `positions`, `layer`, `squared`.
    """

    name: str
    group: str
    blocks: tuple[Block, ...] = ()
    draws: tuple[Block, ...] = ()
    place: Mapping[str, Any] = field(default_factory=dict)


def baselines(table: PromptTable, k: int) -> list[Predictor]:
    """The mean, and every cheap predictor that the table has data for; last, all of them together."""
    found: dict[str, Block] = {}
    if len(table.tokens):
        found["prompt length"] = length(table.tokens)
    for name, values in table.labels.items():
        found[name] = one_hot([values])
    if len(table.labels) > 1:
        # Every combination of labels has its own column, too: scores may hang on the cell and not on the sum of its parts.
        cells = [" / ".join(map(str, row)) for row in zip(*table.labels.values(), strict=True)]
        found[" x ".join(table.labels)] = one_hot([*table.labels.values(), cells])
    if len(table.texts):
        found["words (TF-IDF)"] = Words(tuple(table.texts))
    if table.base_scores is not None:
        found["base model's score"] = fixed(table.base_scores)
    if table.embeddings is not None:
        found["embeddings"] = PCAProjections(table.embeddings, k)
    # The widest one-hot holds the others.
    single = {name for name in table.labels if len(table.labels) > 1}
    together = tuple(block for name, block in found.items() if name not in single)
    made = [Predictor("mean", "baseline", (fixed(np.zeros((len(table.scores), 0))),))]
    made += [Predictor(name, "baseline", (block,)) for name, block in found.items()]
    return [*made, Predictor("all baselines", "baseline", together)] if together else made


def activation_predictors(table: PromptTable, k: int, random_seeds: int) -> Iterator[Predictor]:
    """At every source, position rule and layer: principal and random directions, as they are and squared."""
    for source, by_rule in table.activations.items():
        for positions, values in by_rule.items():
            for column, layer in enumerate(table.layers or range(values.shape[1])):
                rows = np.asarray(values[:, column], dtype=np.float64)
                other = None if table.corpus is None else np.asarray(table.corpus[source][positions][:, column], dtype=np.float64)
                for squared in (False, True):
                    place = {"source": source, "positions": positions, "layer": layer, "squared": squared}
                    where = f"{source}, {positions}, layer {layer}{', squared' if squared else ''}"
                    yield Predictor(f"PCA: {where}", "activations", (PCAProjections(rows, k, squared, other),), place=place)
                    draws = tuple(RandomProjections(rows, k, squared, other, seed) for seed in range(random_seeds))
                    yield Predictor(f"random: {where}", "random", draws=draws, place=place)


def directions_for(table: PromptTable, k: int | None, fewest: int) -> int:
    """The number of directions: as asked, or a tenth of the prompts; no more than training rows (or a corpus) have principal directions.

    Args:
        table: The prompts.
        k: As asked.
        fewest: Rows of the smallest training part.

    Raises:
        EmprobeError: If it is below 1 or above what there are.
    """
    rows = fewest if table.corpus is None else len(next(iter(next(iter(table.corpus.values())).values())))
    most = min(table.d_model, rows - 1)
    if k is None:
        return min(most_directions(len(table.scores), table.d_model), most)
    if not 1 <= k <= most:
        raise EmprobeError(
            f"{k} directions were asked for, of activations of width {table.d_model} on {rows} prompts, in which there are {most}. "
            f"Give 1 to {most}."
        )
    return k
