"""Directions out of other projects' files, one module per format, each with its index convention."""

from emprobe.directions.importers.load import import_direction, import_directions
from emprobe.directions.importers.registry import FORMATS

__all__ = ["FORMATS", "import_direction", "import_directions"]
