"""The one door to nnsight: a model's twin wrapped for tracing here, and the model as NDIF knows it."""

from __future__ import annotations

import copy
import copyreg
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from emprobe.errors import EmprobeError, MissingExtraError
from emprobe.models.blocks import decoder_of
from emprobe.models.load import Checkpoint
from emprobe.models.twin import twin_of, wrapped_twin
from emprobe.types import Site


def import_nnsight(asked: str) -> Any:
    """The package nnsight.

    Args:
        asked: What the user said, such as `backend='nnsight'`; for refusals.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nnsight
    except ImportError as error:
        raise MissingExtraError("nnsight", "nnsight", asked) from error
    return nnsight


def traced_decoder(checkpoint: Checkpoint, asked: str) -> Any:
    """The twin's inner model, without a head, under nnsight.

    Raises:
        MissingExtraError: If nnsight is not installed.
        EmprobeError: As `wrapped_twin`.
    """
    nnsight = import_nnsight(asked)
    return wrapped_twin(checkpoint, "nnsight", asked, lambda twin: nnsight.NNsight(decoder_of(twin)))


def traced_model(checkpoint: Checkpoint, asked: str) -> Any:
    """The whole twin under nnsight, so that it can generate.

    Raises:
        MissingExtraError: If nnsight is not installed.
        EmprobeError: As `wrapped_twin`.
    """
    return wrapped_twin(checkpoint, "nnsight, whole", asked, partial(_whole, import_nnsight(asked), checkpoint))


def remote_model(checkpoint: Checkpoint, asked: str) -> Any:
    """The model as NDIF knows it: the twin's modules give the paths, the hub id says which weights.

    Raises:
        MissingExtraError: If nnsight is not installed.
        EmprobeError: If there is no NDIF key.
    """
    nnsight = import_nnsight(asked)
    if not nnsight.CONFIG.API.APIKEY:
        raise EmprobeError(
            "remote=True was asked for, but nnsight knows no NDIF key. Call nnsight.login() once, or set the environment variable "
            "NDIF_API_KEY before Python starts."
        )
    with checkpoint.active() as model:
        twin = twin_of(model)
        if checkpoint.adapter == "off":
            from nnsight.modeling.peft import detach

            detach(twin)  # NDIF's base has no modules of an adapter that is not on.
        made = _whole(nnsight, checkpoint, twin)
    made.repo_id = _base_name(checkpoint)
    made.peft = checkpoint.name if checkpoint.adapter == "on" else None
    return made


def check_remote(checkpoint: Checkpoint, sites: Sequence[Site]) -> None:
    """Refuse what NDIF cannot be asked for.

    Raises:
        EmprobeError: An intervention is active, model or adapter have no hub id, or a site cannot be proved without the weights.
    """
    if checkpoint.interventions:
        raise EmprobeError(
            f"An intervention is active on {checkpoint.name!r}, and NDIF would run it unsteered. Leave the intervene block first."
        )
    names = [_base_name(checkpoint), *([checkpoint.name] if checkpoint.adapter == "on" else [])]
    for name in names:
        if Path(name).expanduser().exists() or name.count("/") != 1:
            raise EmprobeError(
                f"remote=True was asked for {name!r}, which is no hub id (owner/name): NDIF runs one model, with at most one adapter, "
                "as they lie on the hub. Give hub ids, or leave remote out."
            )
    inside = [site for site in sites if site not in ("resid_pre", "resid_post")]
    if inside and any(parameter.is_meta for parameter in checkpoint.hf.parameters()):
        raise EmprobeError(
            f"Site {inside[0]!r} was asked of {checkpoint.name!r}, whose weights are not here (device 'meta'), so where its blocks have "
            "that site cannot be proved. Use resid_pre or resid_post, or load the weights."
        )


@contextmanager
def shipped_by_value() -> Iterator[None]:
    """While the block lasts, traces take emprobe's own code along, which is not installed on NDIF."""
    from cloudpickle import register_pickle_by_value, unregister_pickle_by_value

    package = sys.modules[__name__.partition(".")[0]]
    register_pickle_by_value(package)
    # Up to Python 3.11 a cached property holds a lock, which does not travel.
    copyreg.pickle(cached_property, lambda found: (cached_property, (found.func,), {"attrname": found.attrname}))
    try:
        yield
    finally:
        copyreg.dispatch_table.pop(cached_property, None)
        unregister_pickle_by_value(package)


def ndif_failure(checkpoint: Checkpoint, error: Exception) -> EmprobeError:
    """Whatever fails at NDIF (queue, network, versions) comes back as some library's exception; in one message."""
    why = (str(error).strip() or repr(error)).splitlines()[0]
    return EmprobeError(f"NDIF did not run {checkpoint.name!r}: {why} nnsight.ndif_status() lists the models that it serves.")


def _whole(nnsight: Any, checkpoint: Checkpoint, twin: Any) -> Any:
    tokenizer = copy.deepcopy(checkpoint.tokenizer)  # nnsight sets its padding side.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nnsight.TransformersModel(twin, tokenizer=tokenizer, task="text-generation", device=twin.device)


def _base_name(checkpoint: Checkpoint) -> str:
    return checkpoint.name if checkpoint.adapter == "none" else str(checkpoint.hf.name_or_path)
