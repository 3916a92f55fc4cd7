"""From many conversations to a dataset: filters, removal of near copies, splits by a seed, and counts of all that was dropped."""

from emprobe.behaviour.dataset.curation import Curated, Wishes, curate
from emprobe.behaviour.dataset.embedding import Embedder, embedder
from emprobe.behaviour.dataset.entries import Entry, load_entries
from emprobe.behaviour.dataset.near import GRID, Deduplicated, choose_threshold, closest, deduplicate, near_pairs
from emprobe.behaviour.dataset.rules import Rule
from emprobe.behaviour.dataset.splitting import families, split

__all__ = [
    "GRID",
    "Curated",
    "Deduplicated",
    "Embedder",
    "Entry",
    "Rule",
    "Wishes",
    "choose_threshold",
    "closest",
    "curate",
    "deduplicate",
    "embedder",
    "families",
    "load_entries",
    "near_pairs",
    "split",
]
