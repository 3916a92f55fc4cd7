"""Scores that chance deals out: families change places, so that what paraphrases share is kept and what prompts tell is lost."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from emprobe.errors import EmprobeError
from emprobe.studies.priors.folds import Rows

LEAST_MOVED = 0.8


def permuted(scores: NDArray[np.float64], families: Rows, draws: int, seed: int = 0) -> Float[NDArray[np.float64], "row draw"]:
    """Scores with whole families exchanged, and those of a family shuffled within it.

    Families change places with others of their size only, since a family's scores have to fill another's rows. If families are
    exchangeable, so are these draws, and a p taken from them is uniform.

    Args:
        scores: One a prompt.
        families: The number of each prompt's family.
        draws: Columns.
        seed: Same seed, same draws.

    Raises:
        EmprobeError: If more than a fifth of the prompts stand in families whose size no other has.
    """
    members = exchangeable(families)
    rng = np.random.default_rng(seed)
    made = np.empty((len(scores), draws))
    for same in members.values():
        places = np.stack(same)
        for draw in range(draws):
            taken = rng.permuted(places[rng.permutation(len(places))], axis=1)
            made[places.ravel(), draw] = scores[taken.ravel()]
    return made


def exchangeable(families: Rows) -> dict[int, list[Rows]]:
    """The rows of each family, by its size.

    Raises:
        EmprobeError: As `permuted`.
    """
    members: dict[int, list[Rows]] = {}
    for family in np.unique(families):
        rows = np.flatnonzero(families == family)
        members.setdefault(len(rows), []).append(rows)
    alone = sum(size for size, same in members.items() if len(same) == 1)
    if alone > (1 - LEAST_MOVED) * len(families):
        raise EmprobeError(
            f"{alone} of {len(families)} prompts are in families whose size no other family has, so that chance cannot exchange them. Give "
            "families of equal sizes (leave surplus paraphrases out), or no permutations."
        )
    return members
