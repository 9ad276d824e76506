"""What ``doctor`` is asked about: the options with which somebody would start a peer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from p2p_diloco.core.listening import EVERYWHERE


@dataclass(frozen=True, kw_only=True)
class Request:
    """Is what the user would start a peer with."""

    initial_peers: tuple[str, ...]
    folder: Path
    run_id: str | None = None
    client_mode: bool = False
    host_maddrs: tuple[str, ...] = EVERYWHERE
    announce_maddrs: tuple[str, ...] = ()
    device: str = "auto"
    threads: int | None = None
    data: Path | None = None
