"""What commands were given, checked before anything is started: addresses, run ids, folders, a peer's options.

Everything here raises UsageError, which names the option.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import Token as Word

from p2p_diloco.cli.options import FROM_ENVIRONMENT, SECRET_VARIABLES, NodeOptions
from p2p_diloco.core.errors import LocalError, UsageError, disk_failure

if TYPE_CHECKING:
    from p2p_diloco.core.config import PeerConfig
    from p2p_diloco.core.invitation import Token

MAX_SHOWN_CHARS = 40
"""Of what was given as the name of a token's file: a key in a token is longer."""


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
    from p2p_diloco.core.addresses import parse_maddr
    from p2p_diloco.core.listening import parse_host_maddr

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
    from p2p_diloco.core.addresses import METRICS_FLAG, Endpoint, check_maddr
    from p2p_diloco.core.config import MIN_UPLOAD_BYTES_PER_S, PeerConfig, check_name
    from p2p_diloco.core.listening import check_host_maddrs

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


def invitation_of(_type: object, words: Sequence[Word]) -> Token:
    """Returns the token that ``--invite`` names: a file, or ``-`` for standard input; in the environment stands the
    token itself. UsageError, which quotes nothing that could be a token, for anything else."""
    from p2p_diloco.core.invitation import MAX_TOKEN_CHARS, open_token
    from p2p_diloco.core.paths import at_home

    word = words[-1].value
    if words[-1].source == FROM_ENVIRONMENT:
        return open_token(word, f"environment variable {SECRET_VARIABLES[0]}")
    refuse_tokens([word])
    if word == "-":
        return open_token(sys.stdin.read(MAX_TOKEN_CHARS + 1), "--invite, standard input")
    shown = f"--invite {word}" if len(word) <= MAX_SHOWN_CHARS else "--invite"
    try:
        with at_home(word, "--invite").open(encoding="ascii") as file:
            return open_token(file.read(MAX_TOKEN_CHARS + 1), shown)
    except OSError as error:
        raise UsageError(f"{shown}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown}: not an invitation, which is text") from error


def refuse_tokens(words: Iterable[str]) -> None:
    """Raises UsageError where a word on the command line is a token itself."""
    from p2p_diloco.core.invitation import TOKEN_HEADER

    if any(TOKEN_HEADER in word for word in words):
        raise UsageError(
            "an invitation on the command line can be read by every user of this machine: ask for another one, and "
            "name its file, --invite FILE, or give it to standard input, --invite -"
        )


def pinned_run(run_id: str | None, invitation: Token | None) -> str | None:
    """Returns the id of the run to join: the one that was named, or that of the invitation. UsageError where these are
    two, or the invitation has expired."""
    if invitation is None:
        return run_id
    invited = invitation.invitation
    if run_id not in (None, invited.run_id):
        raise UsageError(f"--run-id {run_id}: the invitation is to another run, {invited.run_id}")
    if time.time() >= invited.expires_s:
        raise UsageError(f"--invite: the invitation {invited.name} has expired; ask the run's owner for another one")
    return invited.run_id


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
