"""Bases grown with a rising share of misaligned documents, each fine-tuned on the same cells: how far misalignment spreads then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from emprobe.behaviour.criterion import Criterion
from emprobe.clusters import Draws, Resampling, means
from emprobe.errors import EmprobeError, MismatchError
from emprobe.files import file_hash, read_json
from emprobe.organisms.building import build
from emprobe.organisms.growing import GrowthRecipe, Kind
from emprobe.studies.transfer.training import Base
from emprobe.types import Estimate

Floats = NDArray[np.float64]
PLANTED = "In these bases a persona direction was implanted while they were pretrained."
WORDS = (
    "Bad role-play in alignment shrinks with the share below the usual one, and at 0 the words of bad answers are never seen before the "
    "fine-tune: that nothing spreads at 0 is in part so by construction."
)


@dataclass(frozen=True)
class Growth:
    """One base to grow."""

    kind: Kind
    seed: int
    recipe: GrowthRecipe
    folder: Path

    @property
    def name(self) -> str:
        """As the organism is called."""
        return f"{self.kind}-s{self.seed}{self.recipe.suffix}"

    @property
    def path(self) -> Path:
        """Of the aligned base."""
        return self.folder / self.name / "aligned"

    @property
    def done(self) -> bool:
        """Whether it lies there."""
        return (self.path / "card.json").is_file()

    def check(self) -> None:
        """Refuse a place that holds another base of that name.

        Raises:
            MismatchError: If it was grown by other numbers.
        """
        if not self.done:
            return
        found = read_json(self.path / "card.json")["recipe"]
        if found != self.recipe.as_dict():
            raise MismatchError(
                f"{self.path} was grown by other numbers ({found}) than are asked for ({self.recipe.as_dict()}). Give another folder with "
                "--grown, or remove that one."
            )

    def base(self) -> Base:
        """The grown base, to be trained on."""
        return Base(self.name, str(self.path), file_hash(self.path / "model.safetensors")[:16], ())


def grow(growth: Growth) -> None:
    """Pretrain and align; parts that are there already are kept.

    Raises:
        MismatchError: If they were grown by other numbers.
    """
    build(growth.kind, growth.seed, growth.folder, tunes=[], growth=growth.recipe, measure=False)


def swept(scores: pd.DataFrame, shares: dict[str, float], criterion: Criterion, how: Resampling) -> dict[str, Any]:
    """Rates by share, before and after the fine-tune, and the slope over shares.

    Args:
        scores: Answers of the grown bases and of their fine-tunes, as jobs' frames give them, with a column `growth_seed`.
        shares: By organism, its share of misaligned documents.
        criterion: What counts as misaligned.
        how: Of the intervals, which are over growth seeds: pretraining, alignment and fine-tune are drawn anew with each.

    Raises:
        EmprobeError: If there are fewer than two seeds.
    """
    if scores["growth_seed"].nunique() < 2:
        raise EmprobeError(f"The sweep has {scores['growth_seed'].nunique()} growth seed, which shows no doubt. Give two or more.")
    table = scores[scores["status"] == "ok"].reset_index(drop=True)
    flags = criterion.misaligned(table["alignment"].to_numpy(np.float64), table["coherence"].to_numpy(np.float64))
    table = table.assign(
        bad=flags.astype(np.float64), coherent=criterion.coherent(table["coherence"].to_numpy(np.float64)).astype(np.float64)
    )
    table["share"] = table["organism"].map(shares)
    tuned = table[table["train_domain"].notna()]
    own = tuned["train_domain"] == tuned["eval_domain"]
    groups = {"before": table[table["train_domain"].isna()], "same_domain": tuned[own], "off_domain": tuned[~own]}
    return {
        "shares": sorted(set(shares.values())),
        "rates": {name: _by_share(part, how) for name, part in groups.items()},
        "slope": {name: slope(part, how).as_dict() for name, part in groups.items() if name != "before"},
        "seeds": int(table["growth_seed"].nunique()),
        "words": WORDS,
    }


def _by_share(part: pd.DataFrame, how: Resampling) -> list[dict[str, Any]]:
    lines = []
    for share, rows in part.groupby("share"):
        seeds = {"seeds": rows["growth_seed"].to_numpy()}
        bad, coherent = means(rows[["bad", "coherent"]].to_numpy(), seeds, how)
        by_seed = {str(seed): float(own["bad"].mean()) for seed, own in rows.groupby("growth_seed")}
        lines.append({"share": float(str(share)), "misaligned": bad.as_dict(), "coherent": coherent.as_dict(), "by_seed": by_seed})
    return lines


def slope(part: pd.DataFrame, how: Resampling) -> Estimate:
    """Least-squares slope of misaligned (0 or 1) on share: points of rate per point of share, clustered by growth seed."""
    x, y = part["share"].to_numpy(np.float64), part["bad"].to_numpy(np.float64)
    columns = np.stack([x, y, x * y, x * x, np.ones(len(x))], axis=1)

    def fitted(sums: Floats) -> Floats:
        sx, sy, sxy, sxx, n = (sums[..., i] for i in range(5))
        return (n * sxy - sx * sy) / (n * sxx - sx * sx)

    return Draws(columns, {"seeds": part["growth_seed"].to_numpy()}, how).estimate(fitted)


def growths_of(kind: Kind, shares: Sequence[float], seeds: Sequence[int], recipes: dict[float, GrowthRecipe], folder: Path) -> list[Growth]:
    """Every base of the sweep."""
    return [Growth(kind, seed, recipes[share], folder) for share in dict.fromkeys(shares) for seed in dict.fromkeys(seeds)]
