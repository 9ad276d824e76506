"""What commands were given, checked before anything is started: addresses, run ids, folders, a peer's options.

Everything here raises UsageError, which names the option.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from p2p_diloco.cli.options import NodeOptions
from p2p_diloco.core.errors import LocalError, UsageError, disk_failure

if TYPE_CHECKING:
    from p2p_diloco.core.config import PeerConfig


def require(initial_peers: Sequence[str]) -> None:
    """Raises UsageError where there is no address of a peer, or one is wrong."""
    from p2p_diloco.core.addresses import EXAMPLE, check_maddr

    if not initial_peers:
        raise UsageError(
            f"--initial-peers is empty: give the address of a peer that is in the run, like {EXAMPLE}/p2p/12D3KooW..."
        )
    for maddr in initial_peers:
        check_maddr(maddr)


def check_listening(host_maddrs: Sequence[str], announce_maddrs: Sequence[str]) -> None:
    """Raises UsageError for addresses at which no machine could listen, or be dialled."""
    from p2p_diloco.core.addresses import parse_host_maddr, parse_maddr

    for maddr in announce_maddrs:
        parse_maddr(maddr)
    if not host_maddrs:
        raise UsageError("--host-maddrs is empty: give an address to listen on, like /ip4/0.0.0.0/tcp/4001")
    for maddr in host_maddrs:
        parse_host_maddr(maddr)


def check_run_id(run_id: str | None) -> None:
    """Raises UsageError for what is no run id."""
    if run_id is not None and re.fullmatch("[0-9a-f]{40}", run_id) is None:
        raise UsageError(f"--run-id {run_id}: a run id has 40 hexadecimal digits")


def peer_config(
    node: NodeOptions,
    kind: str,
    initial_peers: Sequence[str],
    *,
    run_id: str | None = None,
    client_mode: bool = False,
) -> PeerConfig:
    """Returns what the options of a peer come to. Raises UsageError for whatever can be seen to be wrong before
    anything is started."""
    from p2p_diloco.core.addresses import METRICS_FLAG, Endpoint, check_host_maddrs, check_maddr
    from p2p_diloco.core.config import MIN_UPLOAD_BYTES_PER_S, PeerConfig, check_name

    for maddr in initial_peers:
        check_maddr(maddr)
    check_listening(node.host_maddrs, node.announce_maddrs)
    if not client_mode:
        check_host_maddrs(node.host_maddrs)
    try:
        check_name(node.name)
    except ValueError as error:
        raise UsageError(f"--name {node.name}: {error}") from error
    max_upload = None if node.max_upload is None else 1e6 * node.max_upload
    if max_upload is not None and not MIN_UPLOAD_BYTES_PER_S <= max_upload < math.inf:
        least = MIN_UPLOAD_BYTES_PER_S / 1e6
        raise UsageError(f"--max-upload {node.max_upload:g}: give megabytes per second, {least:g} or more")
    if node.metrics_addr:
        Endpoint.parse(node.metrics_addr, METRICS_FLAG).check_free(METRICS_FLAG)
    return PeerConfig(
        folder=own_folder(node.folder, kind),
        initial_peers=tuple(initial_peers),
        host_maddrs=node.host_maddrs,
        announce_maddrs=node.announce_maddrs,
        client_mode=client_mode,
        use_relay=node.use_relay,
        relay_service=node.relay_service,
        identity=node.identity,
        run_id=run_id,
        name=node.name,
        max_upload_bytes_per_s=max_upload,
        metrics_addr=node.metrics_addr,
    )


@contextmanager
def nothing_left(folder: Path | None, kind: str) -> Iterator[None]:
    """Removes the folder that ``own_folder`` has made in the block, where the block is refused with nothing in it."""
    from p2p_diloco.core.config import default_folder

    folder = default_folder() / kind if folder is None else folder
    fresh = not folder.exists()
    try:
        yield
    except LocalError:
        if fresh:
            with suppress(OSError):
                folder.rmdir()
        raise


def own_folder(folder: Path | None, kind: str) -> Path:
    """Returns ``folder``, or the default one of this kind, after making it. Raises UsageError when it cannot be
    written, LedgerError when the disk is full."""
    from p2p_diloco.core.config import default_folder, keep_cache_near

    folder = default_folder() / kind if folder is None else folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        full = disk_failure(error, f"--folder {folder}")
        raise full or UsageError(f"--folder {folder}: cannot be written ({error.strerror}); choose another") from error
    keep_cache_near(folder)
    return folder
