"""The four exceptions of emprobe; every message says what was asked, what was found, and what to do."""

from __future__ import annotations


class EmprobeError(ValueError):
    """A user's mistake or unusable input, told in one message without a library's traceback."""


class MismatchError(EmprobeError):
    """Two things that must belong together (checkpoints, rows, files of one run) do not."""


class InterventionDidNotFire(EmprobeError):  # noqa: N818 - the field's word; it reads as a sentence
    """An intervention was asked for and did not happen as asked; the message says what was seen."""


class MissingExtraError(ImportError):
    """An optional dependency is absent; the message prints the line that installs it.

    Args:
        package: The distribution that could not be imported.
        extra: The extra of emprobe that brings it.
        purpose: What it was needed for.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}, which is not installed. Run: pip install 'emprobe[{extra}]'")
