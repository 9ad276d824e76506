"""A node in a process of its own, told what to do in lines of JSON: ``python -m tests.support.caller FOLDER CONFIG``.

in      {"call": [PEER ID, [ADDRESS, ...]]}
out     {"at": [ADDRESS, ...]}                   whenever its addresses have changed
        {"came": IP, "relayed": BOOL}            for a stream that another one opens
        {"relayed": BOOL, "small": BOOL, "bulk": WHY NOT}, or {"error": WHY}, for a call
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from p2p_diloco.core.addresses import fitting
from p2p_diloco.core.config import PeerConfig, Timeouts
from p2p_diloco.core.errors import RemoteError
from p2p_diloco.core.identity import Identity
from p2p_diloco.peer.presence import MADDRS_BYTES
from p2p_diloco.wire.channel import Channel
from p2p_diloco.wire.daemon import private_socket_folder
from p2p_diloco.wire.messages import No
from p2p_diloco.wire.node import Node
from p2p_diloco.wire.round_messages import Contribute

PROTOCOL = "test/call"


def say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


async def on_call(channel: Channel) -> None:
    say(came=channel.remote_ip, relayed=channel.relayed)
    await channel.receive(No, timeout_s=10.0)
    await channel.send(No(reason="heard"))
    with contextlib.suppress(RemoteError):  # what is refused at the other end does not come; that ends with the stream
        await channel.receive(Contribute, timeout_s=10.0)


async def call(node: Node, peer_id: str, maddrs: list[str]) -> None:
    try:
        channel = await node.open(peer_id, maddrs, PROTOCOL)
        bulk = ""
        try:
            answer = await channel.request(No(reason=""), No)
            await channel.send(Contribute(round_id=bytes(32)))
        except RemoteError as error:
            bulk = error.reason
        finally:
            channel.close()
        say(relayed=channel.relayed, small=answer.reason == "heard", bulk=bulk)
    except RemoteError as error:
        say(error=error.reason)


async def main(folder: Path, config: dict[str, Any]) -> None:
    own = PeerConfig.model_validate({"folder": folder, **config})
    identity = Identity.load_or_create(own.identity_path)
    node = await Node.start(own, identity, Timeouts(), private_socket_folder(folder))
    await node.serve(PROTOCOL, on_call)
    lines: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin, lambda: lines.put_nowait(sys.stdin.readline()))
    told: list[str] = []
    try:
        while True:
            if (now := fitting(await node.maddrs(), MADDRS_BYTES)) != told:
                told = now
                say(at=told)
            try:
                line = await asyncio.wait_for(lines.get(), 1.0)
            except asyncio.TimeoutError:
                continue
            if not line:
                return
            await call(node, *json.loads(line)["call"])
    finally:
        loop.remove_reader(sys.stdin)
        await node.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
