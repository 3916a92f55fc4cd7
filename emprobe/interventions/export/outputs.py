"""Places as servers see them that steer at the output of a block, and nowhere else."""

from __future__ import annotations

from emprobe.errors import EmprobeError
from emprobe.interventions.edit import Edit


def output_layer(edit: Edit, target: str) -> int:
    """The block at whose output an edit acts; a block's input is the output of the one before.

    Raises:
        EmprobeError: If it acts inside a block, or on the embeddings.
    """
    if edit.site == "resid_post":
        return edit.layer
    if edit.site == "resid_pre" and edit.layer > 0:
        return edit.layer - 1
    where = "on the embeddings" if edit.site == "resid_pre" else "inside a block"
    raise EmprobeError(
        f"{edit} acts {where}, but the target {target!r} acts at the output of blocks. Use resid_post; or the target lora or weights for "
        "Ablate(…, site='writes')."
    )
