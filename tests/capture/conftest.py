"""The backends that need a package of their own, by name."""

from __future__ import annotations

import pytest

from tests.capture.reading import PACKAGES, needs


@pytest.fixture(params=list(PACKAGES))
def other(request: pytest.FixtureRequest) -> str:
    """Each backend but `hooks`, by name."""
    needs(request.param)
    return str(request.param)
