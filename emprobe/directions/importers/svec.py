"""IBM activation-steering `.svec`: JSON of `model_type`, `directions` (layer to list) and `explained_variances`.

Source: IBM/activation-steering (Lee et al., arXiv 2409.05907), `steering_vector.py` (layer k is read from hidden_states[k + 1]) and
`leash_layer.py` (its runtime adds the vector to the input of block k).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from emprobe.directions.importers.container import Opened, described
from emprobe.directions.importers.source import Asked, Source, check_one_width, vector_of
from emprobe.errors import EmprobeError

CAUTIONS = (
    "its own runtime adds the vector of layer k one block earlier, to the input of block k; here it is at the output of block k, where it "
    "was measured",
    "if the highest layer is the model's last block, it was measured after the final norm, not in the residual stream",
)


def recognises(opened: Opened) -> str | None:
    """The two names that its writer always writes."""
    content = opened.content
    return "surely" if isinstance(content, Mapping) and {"model_type", "directions"} <= content.keys() else None


def read(opened: Opened, asked: Asked) -> Source:
    """Block outputs as they are.

    Raises:
        EmprobeError: If the file holds no directions by layer.
    """
    content = opened.content if isinstance(opened.content, Mapping) else {}
    directions = content.get("directions")
    if not isinstance(directions, Mapping) or not directions or not all(str(layer).isdecimal() for layer in directions):
        raise EmprobeError(f"{opened.path} should hold `directions` by layer number, but is {described(opened)}.")
    vectors = {int(layer): vector_of(_floats(values), f"{opened.path}, layer {layer}") for layer, values in directions.items()}
    check_one_width(vectors, str(opened.path))
    return Source(
        vectors=vectors,
        site="resid_post",
        convention="activation-steering: layer k was measured at hidden_states[k + 1], the output of block k",
        conversion="none: emprobe's resid_post[k] is the output of block k",
        contrast="positive - negative prompts",
        sign="positive is the positive prompts",
        cautions=CAUTIONS,
        facts={"model_type": content.get("model_type"), "explained_variances": content.get("explained_variances")},
    )


def _floats(values: object) -> object:
    """JSON has one kind of number; a list of them is a vector, anything else is left for `vector_of` to refuse."""
    numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    return np.asarray(values, dtype=np.float64) if numbers else np.empty(0)
