"""How coarsely the means were rounded whose difference a stored vector is, read from the vector alone."""

from __future__ import annotations

import numpy as np

from emprobe.directions.importers.source import Vector


def rounding_share(vector: Vector) -> float:
    """About how large an error rounding left in a difference of two means (often bf16), as a share of its norm; about 0 if unrounded.

    A difference of two numbers rounded to steps of q is a multiple of q, so each entry's lowest set bit is q, 2 q, 4 q, … with chance
    1/2, 1/4, 1/8, …: on average one binary place above q. Each of the two rounding errors is uniform in ±q/2, of variance q²/12.
    Good to a factor of two or so from a per cent upwards; below, where entries are many steps long, it overstates.

    >>> round(rounding_share(np.array([3.0, 4.0])), 4)  # lowest bits 1 and 4, so steps of 1/2 and 2: sqrt((1/4 + 4) / 6) / 5
    0.1683
    """
    mantissa, exponent = np.frexp(vector)
    bits = np.abs(np.ldexp(mantissa, 53)).astype(np.int64)
    step = np.ldexp((bits & -bits).astype(np.float64), exponent - 53) / 2
    return float(np.sqrt((step**2).sum() / 6) / np.linalg.norm(vector))
