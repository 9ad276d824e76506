"""Commands that make a swarm: seed, peer, and several of them on this machine."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from p2p_diloco.cli.arguments import check_run_id, invitation_of, nothing_left, peer_config, pinned_run, require
from p2p_diloco.cli.options import (
    NODE,
    OUTPUT,
    Addresses,
    AtLeastOne,
    Flag,
    NodeOptions,
    Output,
    Patience,
    Probability,
)
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.interruption import importing, stop_signals
from p2p_diloco.core.invitation import Token
from p2p_diloco.look.display import STDOUT, live_table
from p2p_diloco.look.ways_in import join_line, join_note

if TYPE_CHECKING:
    from p2p_diloco.learn.swarm import Swarm

log = logging.getLogger(__name__)

Invited = Annotated[
    Token | None,
    Parameter(
        converter=invitation_of,
        metavar="FILE",
        n_tokens=1,
        accepts_keys=False,
        allow_leading_hyphen=True,
        negative="",
        show_default=False,
    ),
]


def seed(
    run_file: Path | None = None,
    /,
    *,
    initial_peers: Addresses = (),
    run_id: str | None = None,
    invite: Invited = None,
    node: NodeOptions = NODE,
    output: Output = OUTPUT,
) -> None:
    """Publish a run, keep it findable, and print the line with which others join.

    Without a run file it mirrors a run that is there: it follows it, and gives its state to newcomers, as anybody with
    a public machine can. It averages nothing, and has no vote.

    Parameters
    ----------
    run_file
        RUN.toml: what to train, and how. None for a mirror.
    initial_peers
        Peers of an existing network to be part of; a mirror: of the run.
    run_id
        For a mirror: of this run and no other.
    invite
        For a mirror: file with an invitation of the run's owner, or - for standard input; once is enough.
    """
    if run_file is not None and (run_id, invite) != (None, None):
        raise UsageError("--run-id and --invite are for a mirror, which has no run file: the run file says which run")
    if run_file is None and not initial_peers:
        raise UsageError("name a run file, to publish a run, or --initial-peers, to mirror one that is there")
    check_run_id(run_id)
    run_id = pinned_run(run_id, invite)
    with nothing_left(node.folder, "seed"):
        with importing("seed"):
            from p2p_diloco.core.identity import Identity
            from p2p_diloco.core.runfile import RunSpec

            if run_file is not None:
                RunSpec.load(run_file)
            config = peer_config(node, "seed", initial_peers, run_id=run_id)
            from p2p_diloco.core.config import Timeouts
            from p2p_diloco.learn.genesis import start_run
            from p2p_diloco.learn.swarm import Swarm
            from p2p_diloco.ledger.seats import take_seat

        manifest_path = None
        if run_file is not None:
            owner = Identity.load(config.identity_path) or Identity.generate()
            manifest_path = start_run(run_file, config.folder, owner, config.identity_path)
        if invite is not None:
            take_seat(config.folder, Identity.load_or_create(config.identity_path), invite)
    timeouts = Timeouts().scaled(node.patience)
    with stop_signals(), Swarm.join(config, timeouts=timeouts, role="seed", manifest_path=manifest_path) as swarm:
        log.info("serving run %s from %s", swarm.manifest.run_id, swarm.folder)
        print_join_line(swarm)
        with live_table(swarm, STDOUT):
            swarm.serve()


def peer(
    *,
    initial_peers: Addresses = (),
    run_id: str | None = None,
    client_mode: Flag = False,
    device: str = "auto",
    threads: AtLeastOne | None = None,
    data: Path | None = None,
    invite: Invited = None,
    drop: Probability = 0.0,
    node: NodeOptions = NODE,
    output: Output = OUTPUT,
) -> None:
    """Join a run and train. The first Ctrl+C saves and leaves, the second one ends at once.

    Parameters
    ----------
    initial_peers
        Address of any peer that is in the run now; several are better.
    run_id
        Join this run and no other.
    client_mode
        Accept no connections: for a peer that nobody can reach.
    device
        auto, cpu, cuda, cuda:1 or mps.
    threads
        Of the CPU, for training.
    data
        Own text to train on, for runs without built-in text: a file or folder.
    invite
        File with an invitation of the run's owner, or - for standard input; once is enough.
    drop
        Probability that a contribution is dropped: for experiments.
    """
    require(initial_peers)
    check_run_id(run_id)
    run_id = pinned_run(run_id, invite)
    if data is not None and not data.exists():
        raise UsageError(f"--data {data}: no such file or folder")
    with nothing_left(node.folder, "peer"):
        with importing("peer"):
            config = peer_config(node, "peer", initial_peers, run_id=run_id, client_mode=client_mode)
            from p2p_diloco.core.config import Timeouts
            from p2p_diloco.core.identity import Identity
            from p2p_diloco.learn.model import pick_device
            from p2p_diloco.learn.swarm import Swarm
            from p2p_diloco.learn.train import TrainConfig, require_text, train
            from p2p_diloco.ledger.seats import take_seat

        pick_device(device)
        if invite is not None:
            take_seat(config.folder, Identity.load_or_create(config.identity_path), invite)
        log.info("looking for the run at %s", ", ".join(initial_peers))
        with stop_signals() as stop, Swarm.find(config, timeouts=Timeouts().scaled(node.patience)) as swarm:
            require_text(swarm.manifest, data)
            swarm.wait_for_state()
            print_join_line(swarm)
            with live_table(swarm, STDOUT):
                train(swarm, TrainConfig(device=device, threads=threads, data=data, drop=drop), stop)
    stop.check()  # it ends with the same line wherever it was asked to


def swarm(
    run_file: Path,
    /,
    *,
    peers: AtLeastOne,
    folder: Path | None = None,
    drop: Probability = 0.0,
    faults: Path | None = None,
    patience: Patience = 1.0,
    output: Output = OUTPUT,
) -> int:
    """Run a seed and several peers on this machine, to look and to test.

    Parameters
    ----------
    run_file
        RUN.toml: what to train, and how.
    peers
        How many of them train.
    folder
        Everything that they write, and the trained model; a new folder in runs/ by default.
    drop
        Probability that a peer's contribution to an outer step is dropped, as in the paper's ablation.
    faults
        FAULTS.toml: what shall happen to whom, and when; Linux only.
    patience
        Factor on every time-out, 0.1 to 10.
    """
    with importing("swarm"):
        from p2p_diloco.lab import namespaces
        from p2p_diloco.lab.children import names_of
        from p2p_diloco.lab.faults import FaultPlan
        from p2p_diloco.lab.local import run_local

    plan = FaultPlan() if faults is None else FaultPlan.load(faults, names_of(peers))
    if faults is not None and sys.platform != "linux":
        raise UsageError("--faults needs Linux")
    if plan.cuts:
        if (why := namespaces.why_not()) is not None:
            raise UsageError(f"{faults}: cut needs network namespaces: {why}")
        namespaces.as_root(*sys.argv[1:])
    return run_local(run_file, peers=peers, folder=folder, drop=drop, patience=patience, plan=plan)


def print_join_line(swarm: Swarm) -> None:
    """Prints the line with which others join, before the table is shown: whole, however narrow the terminal, so that it
    can be copied. For whom it does not work is said in a comment of the shell's."""
    line, note = join_line(swarm.maddrs), join_note(swarm.maddrs)
    if line:
        print(line, flush=True)
    if note:
        print(f"# {note}", flush=True)
