"""Commands that look: at a swarm from outside, at a machine that wants to be in one, at what a run is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from p2p_diloco.cli.arguments import check_listening, check_run_id, own_folder, require
from p2p_diloco.cli.options import OUTPUT, Addresses, AtLeastOne, Flag, JsonFlag, Output
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.interruption import importing, run_cancellable, undisturbed
from p2p_diloco.core.listening import EVERYWHERE
from p2p_diloco.look.display import STDOUT, plain
from p2p_diloco.look.findings import Checklist, Report

if TYPE_CHECKING:
    from p2p_diloco.look.request import Request


def status(
    *,
    initial_peers: Addresses = (),
    run_id: str | None = None,
    as_json: JsonFlag = False,
    output: Output = OUTPUT,
) -> None:
    """Show a running swarm, from outside.

    Parameters
    ----------
    initial_peers
        Address of any peer that is in the run now.
    run_id
        Which run, where there are several.
    as_json
        One JSON object on stdout.
    """
    require(initial_peers)
    check_run_id(run_id)

    with importing("status"):
        from p2p_diloco.core.config import Timeouts
        from p2p_diloco.look import status as view

    found = run_cancellable(view.gather_status(initial_peers, run_id, Timeouts()))
    if as_json:
        print(view.to_json(found))
    else:
        STDOUT.print(view.screen_of(found, STDOUT.width))


def monitor(
    *,
    initial_peers: Addresses = (),
    run_id: str | None = None,
    listen: str = "127.0.0.1:9200",
    private_targets: Flag = False,
    folder: Path | None = None,
    output: Output = OUTPUT,
) -> None:
    """Follow a running swarm: metrics of everybody for Prometheus, and a status page.

    Parameters
    ----------
    initial_peers
        Address of any peer that is in the run now; several are better.
    run_id
        Which run, where there are several.
    listen
        Port or HOST:PORT to serve on; a port is for this machine alone, 0.0.0.0:9200 is for all.
    private_targets
        List peers at private addresses and host names for Prometheus, too: for a swarm in a network of your own.
    folder
        Identity of the monitor, and its history of the run.
    """
    require(initial_peers)
    check_run_id(run_id)

    from p2p_diloco.core.addresses import Endpoint
    from p2p_diloco.core.config import PeerConfig

    endpoint = Endpoint.parse(listen, "--listen")
    endpoint.check_free("--listen")
    config = PeerConfig(
        folder=own_folder(folder, "monitor"), initial_peers=tuple(initial_peers), run_id=run_id, client_mode=True
    )

    with importing("monitor"):
        from p2p_diloco.look.monitor import run_monitor

    run_monitor(config, endpoint, private_targets=private_targets)


def doctor(
    *,
    initial_peers: Addresses = (),
    run_id: str | None = None,
    client_mode: Flag = False,
    host_maddrs: Addresses = EVERYWHERE,
    announce_maddrs: Addresses = (),
    device: str = "auto",
    threads: AtLeastOne | None = None,
    data: Path | None = None,
    folder: Path | None = None,
    as_json: JsonFlag = False,
    output: Output = OUTPUT,
) -> int:
    """Check, before or instead of joining, whether this machine can train in a run: give it the options of peer.

    Parameters
    ----------
    initial_peers
        Address of any peer that is in the run now; several are better.
    run_id
        Which run, where there are several.
    client_mode
        Accept no connections: for a peer that nobody can reach.
    host_maddrs
        Where the peer would listen.
    announce_maddrs
        What others would dial, where it differs from that.
    device
        auto, cpu, cuda, cuda:1 or mps.
    threads
        Of the CPU, for training.
    data
        Own text to train on: a file or folder.
    folder
        Where the peer would keep its ledger.
    as_json
        One JSON object on stdout, at the end.
    """
    require(initial_peers)
    check_run_id(run_id)
    check_listening(host_maddrs, announce_maddrs)

    from p2p_diloco.core.config import default_folder
    from p2p_diloco.look.request import Request

    request = Request(
        initial_peers=tuple(maddr.strip() for maddr in initial_peers),
        folder=folder or default_folder() / "peer",
        run_id=run_id,
        client_mode=client_mode,
        host_maddrs=host_maddrs,
        announce_maddrs=announce_maddrs,
        device=device,
        threads=threads,
        data=data,
    )
    return examine(request, as_json=as_json)


def examine(request: Request, *, as_json: bool) -> int:
    """Measures what was requested, shows the findings, and returns the exit code."""
    from p2p_diloco.core.config import Timeouts

    with Checklist(None if as_json else STDOUT) as checklist:
        checklist.measure("starting")
        with undisturbed():  # not ``importing``: the checklist must give the terminal back
            from p2p_diloco.look.doctor import Checkup

        checkup = Checkup(request=request, checklist=checklist, timeouts=Timeouts())
        run_cancellable(checkup.go())
    if as_json:
        print(Report.of(checkup.manifest.run_id if checkup.manifest else "", checklist.findings).to_json())
    return checklist.conclude()


def manifest(
    source: Path | None = None,
    /,
    *,
    initial_peers: Addresses = (),
    run_id: str | None = None,
    output: Output = OUTPUT,
) -> None:
    """Show what all peers of a run agree on, and check its owner's signature; or check a run file.

    Parameters
    ----------
    source
        A manifest, the folder of a run or of a peer, or RUN.toml.
    initial_peers
        Instead of that: address of any peer that is in the run now.
    run_id
        Which run, where there are several.
    """
    from p2p_diloco.cli.description import describe_run, describe_run_file

    check_run_id(run_id)
    if (source is None) == (not initial_peers):
        raise UsageError("give either a file or folder, or --initial-peers")

    if source is None:
        with importing("manifest"):
            from p2p_diloco.core.config import Timeouts
            from p2p_diloco.core.manifest import open_manifest
            from p2p_diloco.look.status import fetch_manifest

        require(initial_peers)
        signed = run_cancellable(fetch_manifest(initial_peers, run_id, Timeouts()))
        show(describe_run(open_manifest(signed, initial_peers[0])))
    elif source.suffix == ".toml":
        show(describe_run_file(source))
    else:
        with importing("manifest"):
            from p2p_diloco.ledger.folder import find_run, read_manifest

        show(describe_run(read_manifest(find_run(source, run_id) if source.is_dir() else source)))


def show(description: Mapping[str, str]) -> None:
    """Prints a line for each entry."""
    for name, value in description.items():
        print(f"{name:<12} {plain(value)}")
