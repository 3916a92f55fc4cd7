"""Whole numbers, whatever they were given as."""

from __future__ import annotations

import operator
from typing import Any


def whole(value: Any) -> int:
    """Any kind of whole number (NumPy's, a tensor's) as Python's.

    Raises:
        TypeError: For 1.7 and the like, and for True, which Python takes for 1 and which hardly means block 1.

    Example:
        >>> import numpy as np
        >>> whole(np.int64(3))
        3
    """
    if isinstance(value, bool):
        raise TypeError(f"{value} is no number")
    return operator.index(value)
