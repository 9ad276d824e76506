from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path

import pytest

from p2p_diloco.core.addresses import encode
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.identity import Identity
from p2p_diloco.wire.daemon import CIRCUIT, leads_through_relay, private_socket_folder, remove_dead_sockets

STRANGER = Identity.from_seed(b"s" * 32)


def test_a_relay_is_seen_in_the_address() -> None:
    """Also where its two bytes are a port by chance."""
    relay = f"/ip4/203.0.113.7/tcp/4001/p2p/{STRANGER.peer_id}/p2p-circuit"
    assert CIRCUIT in encode("/ip4/203.0.113.7/tcp/41474")
    assert not leads_through_relay(encode("/ip4/203.0.113.7/tcp/41474"))
    assert not leads_through_relay(encode("/ip4/203.0.113.7/tcp/4001"))
    assert leads_through_relay(encode(relay))
    assert leads_through_relay(encode(f"{relay}/p2p/{STRANGER.peer_id}"))


def test_socket_folder(tmp_path: Path) -> None:
    folder = private_socket_folder(tmp_path)
    assert folder == tmp_path / "s"
    assert folder.stat().st_mode & 0o777 == 0o700
    with closing(socket.socket(socket.AF_UNIX)) as alive, closing(socket.socket(socket.AF_UNIX)) as dead:
        alive.bind(str(folder / "p2pd-alive.sock"))
        alive.listen()
        dead.bind(str(folder / "p2pclient-dead.sock"))
        dead.close()
        assert private_socket_folder(tmp_path) == folder
        assert len(list(folder.iterdir())) == 2
        remove_dead_sockets(folder)
        assert [path.name for path in folder.iterdir()] == ["p2pd-alive.sock"]
    elsewhere = private_socket_folder(tmp_path / ("long" * 30))
    assert elsewhere.name.startswith("p2p-diloco-")
    elsewhere.rmdir()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be made"):
        private_socket_folder(tmp_path / "file")
