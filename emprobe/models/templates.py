"""The chat template that a user names on the command line."""

from __future__ import annotations

from pathlib import Path

from emprobe.errors import EmprobeError
from emprobe.models.chat import PLAIN_TEMPLATE


def named_template(asked: str | None) -> str | None:
    """The Jinja text of `plain` or of a file; None for the tokenizer's own.

    Raises:
        EmprobeError: If the file cannot be read.
    """
    if asked is None or asked == "plain":
        return PLAIN_TEMPLATE if asked else None
    try:
        return Path(asked).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EmprobeError(f"The chat template {asked!r} could not be read: {error}. Give a Jinja file, or 'plain'.") from error
