"""What a peer chooses alone: its addresses, folders, device and limits. Nothing here need be known to other peers."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import platformdirs
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.listening import EVERYWHERE

log = logging.getLogger(__name__)

MIN_UPLOAD_BYTES_PER_S = 100_000.0
"""A donor that sent more slowly would be taken for gone before a chunk of 1 MiB is through."""
HEARTBEATS = 3
"""Words of a peer within ``request_s``, after which one that waits for its answer takes it for dead."""
MAX_NAME_CHARS = 32
MAX_NAME_BYTES = 64
"""A record has room for no more."""


def check_name(name: str) -> str:
    """Returns ``name``. ValueError for one that does not fit into a record, or is no text: bytes of another
    encoding."""
    if not name.isprintable() and any("\ud800" <= char <= "\udfff" for char in name):
        raise ValueError("not text in UTF-8")
    if len(name) > MAX_NAME_CHARS:
        raise ValueError(f"longer than {MAX_NAME_CHARS} characters")
    if len(name.encode(errors="replace")) > MAX_NAME_BYTES:
        raise ValueError(f"longer than {MAX_NAME_BYTES} bytes")
    return name


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Every wait of the network side, in seconds. ``scaled`` makes all of them longer, for slow links, or shorter."""

    connect_s: float = 8.0
    """Until a stream to a peer is open."""
    request_s: float = 10.0
    """For one small answer: a manifest, a record, a list of heads."""
    write_s: float = 15.0
    """Until a peer takes what we write: longer than ``part_s``, since a reducer reads no further while it waits."""
    part_s: float = 10.0
    """How long a reducer waits for one sender's next part."""
    reduced_part_s: float = 25.0
    """How long a sender waits for a reducer's next part: longer than ``part_s``, since a reducer waits for others."""
    least_wait_s: float = 2.0
    """How long a round waits at least for what somebody owes it, however short such waits were in recent rounds
    (``core.recent``); the constants here are the longest."""
    late_s: float = 0.2
    """How long a reducer waits at least, in all, for senders that were late in an earlier round."""
    again_s: float = 0.8
    """How long a reducer waits for the second stream of a sender whose first one has closed at once."""
    settle_s: float = 10.0
    """How long a leader waits for receipts, and then for the commit to be taken."""
    round_s: float = 60.0
    """For reduce and settle together, beyond ``min_rate_bytes_per_s``."""
    min_rate_bytes_per_s: float = 32_768.0
    """A round may take this much longer for every byte it moves."""
    slow_rate_bytes_per_s: float = 500_000.0
    """A sender that is slower than this, less ``part_s``, is left out of what a reducer still makes; what a first donor
    that is slower owes is asked from another one, too, when there is nothing else."""
    dht_s: float = 5.0
    """One look-up or store in the DHT."""
    first_message_s: float = 10.0
    """An accepted stream that says nothing for this long is closed."""
    probe_s: float = 20.0
    """For all that one peer measures with us on one stream: a dial back, or some transfers."""
    p2pd_start_s: float = 60.0
    discover_s: float = 30.0
    """How long a new peer looks for a run at the addresses it was given."""
    record_every_s: float = 8.0
    """A peer publishes its record this often, and whenever its outer step changes."""
    record_life_s: float = 30.0
    """A record that is older than this is a peer that is gone."""
    refresh_s: float = 2.5
    """A peer reads the records of the others this often."""
    leave_s: float = 4.0
    """For saying goodbye; after that the processes end anyway."""

    @property
    def heartbeat_s(self) -> float:
        """Returns the seconds between two words of a peer that is still here to one that waits for its answer."""
        return self.request_s / HEARTBEATS

    def round_limit_s(self, vector_bytes: int) -> float:
        """Returns the longest time that reduce and settle of a vector may take."""
        return self.round_s + vector_bytes / self.min_rate_bytes_per_s

    def scaled(self, factor: float) -> Timeouts:
        """Returns time-outs that are ``factor`` times as long, and rates as much lower."""
        waits = {name: wait_s * factor for name, wait_s in vars(self).items()}
        rates = {name: rate / factor for name, rate in vars(self).items() if name.endswith("_bytes_per_s")}
        return Timeouts(**waits | rates)


class PeerConfig(BaseModel):
    """Holds what a peer chooses alone: its folder, addresses, name and limits. It never leaves this machine as such."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    """This peer's own: identity, ledger, inner state, event log."""
    initial_peers: tuple[str, ...] = ()
    """Multiaddrs, each ending in /p2p/PEER-ID. Empty for the first peer of a run."""
    host_maddrs: tuple[str, ...] = EVERYWHERE
    announce_maddrs: tuple[str, ...] = ()
    """What others shall dial, where that differs from what we listen on (port forwarding)."""
    client_mode: bool = False
    """Accept no connections: contribute and receive, but reduce nothing and lead nothing. So it is without this, too,
    as long as this machine has no address that others can dial."""
    use_relay: bool = True
    """Reach, and be reached by, peers behind NATs through relays."""
    relay_service: bool = False
    """Be a relay for others."""
    identity: Path | None = None
    """Key file; ``identity.key`` in the folder by default."""
    run_id: str | None = None
    """Join this run and no other."""
    name: Annotated[str, AfterValidator(check_name)] = ""
    """Shown to others beside the peer id."""
    max_upload_bytes_per_s: Annotated[float, Field(ge=MIN_UPLOAD_BYTES_PER_S, allow_inf_nan=False)] | None = None
    """For all that others download from this peer to catch up, together. Rounds are not limited."""
    metrics_addr: str = ""
    """Where metrics are served to Prometheus, as ``addresses.Endpoint`` parses it; nowhere, if empty."""

    @property
    def identity_path(self) -> Path:
        return self.identity or self.folder / "identity.key"


def default_folder() -> Path:
    """Returns where a peer's folder lies by default. UsageError for a user without a home."""
    folder = platformdirs.user_data_path("p2p-diloco")
    if not folder.is_absolute():
        raise UsageError("this user has no home folder; give --folder")
    return folder


def cache_folder() -> Path:
    """Returns the folder of tokenized texts, which all peers of a user share and which is safe to delete: in the
    temporary folder for a user without a home."""
    folder = platformdirs.user_cache_path("p2p-diloco")
    return folder if folder.is_absolute() else temporary_cache()


def temporary_cache() -> Path:
    """Returns this user's own folder in the temporary folder."""
    return Path(tempfile.gettempdir()) / f"p2p-diloco-{os.getuid()}"


def compiled_folder() -> Path:
    """Returns where torch keeps what it compiles: beside the tokens, or in the temporary folder where that cannot be
    made."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
    except OSError:
        return temporary_cache() / "torchinductor"
    return cache_folder() / "torchinductor"


def keep_cache_near(folder: Path) -> None:
    """Moves the cache into ``folder`` where the user's own cannot be written (a service without a home, a container
    that is read-only), for this process and those that it starts; torch's and the hub's, too, if they are not imported
    yet."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_folder()).close()
    except OSError as error:
        near = folder.absolute() / "cache"
        log.info("%s: cannot be written (%s); tokens are kept in %s", cache_folder(), error.strerror, near)
        os.environ["XDG_CACHE_HOME"] = str(near)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled_folder())
