"""p2p-diloco: volunteers on the internet train one language model together. Start reading in ``learn/train.py``.

What can be imported from here is the library, for a training loop of one's own: ``docs/library.md`` explains it, and
``peers/custom_loop.py`` uses all that a loop needs. Everything else may change from one version to the next.

A name is looked up when it is first used. So this import loads nothing else: the network process, which imports it,
too, starts without torch, and what needs torch loads it.
"""

TYPE_CHECKING = False  # as in typing, which is not imported yet
if TYPE_CHECKING:
    from p2p_diloco.core.config import PeerConfig, Timeouts
    from p2p_diloco.core.errors import LocalError, NetworkError, UsageError
    from p2p_diloco.core.manifest import RunManifest
    from p2p_diloco.core.runfile import RunSpec
    from p2p_diloco.learn.data import Corpus
    from p2p_diloco.learn.export import export_model
    from p2p_diloco.learn.model import losses_of, model_of
    from p2p_diloco.learn.swarm import Swarm
    from p2p_diloco.learn.train import evaluate_theta, open_run_corpus
    from p2p_diloco.ledger.folder import load_run
    from p2p_diloco.peer.control import OuterResult

__version__ = "0.1.0"

__all__ = [
    "Corpus",
    "LocalError",
    "NetworkError",
    "OuterResult",
    "PeerConfig",
    "RunManifest",
    "RunSpec",
    "Swarm",
    "Timeouts",
    "UsageError",
    "evaluate_theta",
    "export_model",
    "load_run",
    "losses_of",
    "model_of",
    "open_run_corpus",
]

_HOMES = {
    "Corpus": "learn.data",
    "LocalError": "core.errors",
    "NetworkError": "core.errors",
    "OuterResult": "peer.control",
    "PeerConfig": "core.config",
    "RunManifest": "core.manifest",
    "RunSpec": "core.runfile",
    "Swarm": "learn.swarm",
    "Timeouts": "core.config",
    "UsageError": "core.errors",
    "evaluate_theta": "learn.train",
    "export_model": "learn.export",
    "load_run": "ledger.folder",
    "losses_of": "learn.model",
    "model_of": "learn.model",
    "open_run_corpus": "learn.train",
}
"""The file of each name."""


def __getattr__(name: str) -> object:
    """Returns what ``name`` of the library is, and keeps it here. AttributeError for any other name."""
    if name not in _HOMES:
        raise AttributeError(f"module 'p2p_diloco' has no attribute {name!r}; docs/library.md lists what it has")
    from importlib import import_module

    found = globals()[name] = getattr(import_module(f"p2p_diloco.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
