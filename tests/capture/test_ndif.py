"""`remote=True`: what is sent to NDIF, and what is refused before anything is. Nothing here leaves this machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from emprobe.capture.backends import backend_of
from emprobe.capture.backends.hooks import Hooks
from emprobe.capture.plan import Padding
from emprobe.errors import EmprobeError
from emprobe.models import Checkpoint, load_model, load_pair
from emprobe.types import Site
from tests.capture.reading import apart, batch_of, both, needs, read, weightless
from tests.fixtures.models import Checkpoints

# What transformer-lens and nnsight warn of when imported and used is theirs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def on_the_hub(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint under a hub id."""
    name = {"none": "someone/tuned", "off": "someone/base", "on": "someone/adapter"}[checkpoint.adapter]
    checkpoint.hf.name_or_path = "someone/base"
    return replace(checkpoint, name=name)


@dataclass
class Ndif:
    """A stand-in for NDIF's servers: what was asked of them, and the model that they hold where the client has none."""

    asked: list[tuple[Any, str, str | None]] = field(default_factory=list)
    held: Any = None


@pytest.fixture
def ndif(monkeypatch: pytest.MonkeyPatch) -> Ndif:
    """Traces go through nnsight's serialisation, with emprobe and the tests out of reach, and are run in this process."""
    needs("nnsight")
    import nnsight
    from nnsight.intervention.backends.local import LocalSimulationBackend
    from nnsight.modeling.mixins.remotable import Remotable

    server = Ndif()

    def backend(self: Any, remote: Any, *_: Any) -> Any:
        server.asked.append((remote, self.repo_id, self._remoteable_get_env().get("peft")))
        if server.held is not None:
            for name, module in server.held.named_modules():
                mine = self._module.get_submodule(name)
                mine._parameters, mine._buffers = module._parameters, module._buffers
        return LocalSimulationBackend(self)

    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "a key")
    monkeypatch.setattr(Remotable, "_remote_backend", backend)
    return server


@pytest.mark.parametrize("padding", ["right", "left"])
def test_remote_reaches_the_server_and_its_readings_come_back(architecture: Checkpoints, ndif: Ndif, padding: Padding) -> None:
    checkpoint = on_the_hub(load_model(architecture.base))
    assert both("nnsight", [checkpoint], batch_of(padding), remote=True) < 1e-5
    assert ndif.asked == [(True, "someone/tuned", None)]


def test_remote_pairs_name_base_and_adapter(llama: Checkpoints, ndif: Ndif) -> None:
    pair = load_pair(llama.base, llama.adapter)
    assert both("nnsight", [on_the_hub(c) for c in (pair.base, pair.tuned)], remote=True) < 1e-5
    assert ndif.asked == [(True, "someone/base", None), (True, "someone/base", "someone/adapter")]


def test_remote_works_without_weights(architecture: Checkpoints, ndif: Ndif) -> None:
    """The server holds the weights; the client has modules without any."""
    places: tuple[tuple[Site, ...], list[int]] = ("resid_pre", "resid_post"), [0, 2]
    real = load_model(architecture.base)
    ndif.held = real.hf
    found = read(backend_of("nnsight", [weightless(architecture)], *places, remote=True), batch_of(), 1)[0]
    assert apart(read(Hooks([real], *places), batch_of(), 1)[0], found) < 1e-5
    assert ndif.asked == [(True, "someone/large", None)]


def test_sites_inside_a_block_need_the_weights(llama: Checkpoints, ndif: Ndif) -> None:
    with pytest.raises(EmprobeError, match=r"'mlp_out' was asked of 'someone/large', whose weights are not here"):
        backend_of("nnsight", [weightless(llama)], ("resid_post", "mlp_out"), [0], remote=True)


def test_what_is_not_on_the_hub_is_refused_for_remote(llama: Checkpoints, ndif: Ndif) -> None:
    with pytest.raises(EmprobeError, match=r"remote=True was asked for .*base', which is no hub id"):
        backend_of("nnsight", [load_model(llama.base)], ("resid_post",), [0], remote=True)


def test_a_missing_key_is_named_before_any_work(llama: Checkpoints, ndif: Ndif, monkeypatch: pytest.MonkeyPatch) -> None:
    import nnsight

    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    with pytest.raises(EmprobeError, match="knows no NDIF key.*NDIF_API_KEY"):
        backend_of("nnsight", [on_the_hub(load_model(llama.base))], ("resid_post",), [0], remote=True)
    assert not ndif.asked


def test_what_fails_at_the_server_is_told_in_one_message(llama: Checkpoints, ndif: Ndif, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight.intervention.backends.local import LocalSimulationBackend
    from nnsight.intervention.backends.remote import RemoteError

    def fail(*_: Any) -> None:
        raise RemoteError("Model is not served.\nTraceback ...")

    monkeypatch.setattr(LocalSimulationBackend, "__call__", fail)
    backend = backend_of("nnsight", [on_the_hub(load_model(llama.base))], ("resid_post",), [0], remote=True)
    with pytest.raises(EmprobeError, match=r"NDIF did not run 'someone/tuned': Model is not served\. nnsight\.ndif_status"):
        backend.run(batch_of(), [lambda *_: None])
