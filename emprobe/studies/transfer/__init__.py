"""How misalignment spreads over a grid of domains and tasks from the cell that was trained (arXiv 2605.12798)."""

from emprobe.studies.transfer.settings import Transfer

__all__ = ["Transfer"]
