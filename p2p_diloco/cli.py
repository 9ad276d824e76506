"""The command line. Checks what the user gave before anything is started, runs one command, and ends in an exit code.

    0    done; or a seed, peer, swarm or monitor stopped by Ctrl+C or SIGTERM
    1    something failed: network, disk, data; or doctor has found a problem
    2    a flag, file or address that the user can mend
    130, 143    any other command, interrupted

Whatever goes wrong is one line on stderr. Options of a command may also come from the environment,
``P2P_DILOCO_PEER_THREADS`` for one command and ``P2P_DILOCO_THREADS`` for all, and from a TOML file named by
``--config``; the command line comes before the environment, and that before the file.

torch takes seconds to import, so commands import what they need themselves.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from p2p_diloco import __version__
from p2p_diloco.config import cache_folder
from p2p_diloco.display import Checklist, join_line, live_table, plain
from p2p_diloco.errors import LocalError, Stopped, UsageError
from p2p_diloco.interruption import importing, interrupted, interruptible, run_cancellable, undisturbed
from p2p_diloco.options import (
    NODE,
    OUTPUT,
    Addresses,
    AtLeastOne,
    AtLeastZero,
    Flag,
    NodeOptions,
    Output,
    Patience,
    Probability,
    not_negative,
    settings,
)

if sys.version_info >= (3, 11):
    pass
else:
    pass

if TYPE_CHECKING:
    from p2p_diloco.config import PeerConfig
    from p2p_diloco.simulate import Simulation
    from p2p_diloco.study import Size
    from p2p_diloco.swarm import Swarm

log = logging.getLogger(__name__)

STDOUT = Console(highlight=False, soft_wrap=False)

app = App(
    name="p2p-diloco",
    version=__version__,
    help="Volunteers on the internet train one language model together.",
    help_format="plaintext",
    help_epilogue="Options may also come from the environment: P2P_DILOCO_PEER_THREADS=2 is --threads 2 of peer, "
    "P2P_DILOCO_THREADS=2 that of every command.",
    config=settings,
)


# -- commands ----------------------------------------------------------------------------------------------------------


@app.command(sort_key=1)
def seed(
    run_file: Path,
    /,
    *,
    initial_peers: Addresses = (),
    node: NodeOptions = NODE,
    output: Output = OUTPUT,
) -> None:
    """Publish a run, keep it findable, and print the line with which others join.

    Parameters
    ----------
    run_file
        RUN.toml: what to train, and how.
    initial_peers
        Peers of an existing network to be part of.
    """
    with importing("seed"):
        from p2p_diloco.identity import Identity
        from p2p_diloco.manifest import RunSpec

        RunSpec.load(run_file)
        config = peer_config(node, "seed", initial_peers)
        from p2p_diloco.config import Timeouts
        from p2p_diloco.genesis import start_run
        from p2p_diloco.swarm import Swarm
        from p2p_diloco.train import stop_signals

    manifest_path = start_run(run_file, config.folder, Identity.load_or_create(config.identity_path))
    timeouts = Timeouts().scaled(node.patience)
    with stop_signals(), Swarm.join(config, timeouts=timeouts, role="seed", manifest_path=manifest_path) as swarm:
        log.info("serving run %s from %s", swarm.manifest.run_id, swarm.folder)
        print_join_line(swarm)
        with live_table(swarm, STDOUT):
            swarm.serve()


@app.command(sort_key=2)
def peer(
    *,
    initial_peers: Addresses = (),
    run_id: str | None = None,
    client_mode: Flag = False,
    device: str = "auto",
    threads: AtLeastOne | None = None,
    data: Path | None = None,
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
    drop
        Probability that a contribution is dropped: for experiments.
    """
    require(initial_peers)
    check_run_id(run_id)
    if data is not None and not data.exists():
        raise UsageError(f"--data {data}: no such file or folder")
    with importing("peer"):
        config = peer_config(node, "peer", initial_peers, run_id=run_id, client_mode=client_mode)
        from p2p_diloco.config import Timeouts
        from p2p_diloco.model import pick_device
        from p2p_diloco.swarm import Swarm
        from p2p_diloco.train import TrainConfig, stop_signals, train

    pick_device(device)
    log.info("looking for the run at %s", ", ".join(initial_peers))
    with stop_signals() as stop, Swarm.join(config, timeouts=Timeouts().scaled(node.patience)) as swarm:
        print_join_line(swarm)
        with live_table(swarm, STDOUT):
            train(swarm, TrainConfig(device=device, threads=threads, data=data, drop=drop), stop)


@app.command(sort_key=3)
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
        from p2p_diloco import namespaces
        from p2p_diloco.children import names_of
        from p2p_diloco.faults import FaultPlan
        from p2p_diloco.local import run_local

    plan = FaultPlan() if faults is None else FaultPlan.load(faults, names_of(peers))
    if faults is not None and sys.platform != "linux":
        raise UsageError("--faults needs Linux")
    if plan.cuts:
        if (why := namespaces.why_not()) is not None:
            raise UsageError(f"{faults}: cut needs network namespaces: {why}")
        namespaces.as_root(*sys.argv[1:])
    return run_local(run_file, peers=peers, folder=folder, drop=drop, patience=patience, plan=plan)


@app.command(sort_key=4)
def status(
    *,
    initial_peers: Addresses = (),
    run_id: str | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="", show_default=False)] = False,
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
        from p2p_diloco import status as view
        from p2p_diloco.config import Timeouts

    found = run_cancellable(view.gather_status(initial_peers, run_id, Timeouts()))
    if as_json:
        print(json.dumps(view.as_json(found)))
    else:
        STDOUT.print(view.screen_of(found, STDOUT.width))


@app.command(sort_key=5)
def monitor(
    *,
    initial_peers: Addresses = (),
    run_id: str | None = None,
    listen: str = "127.0.0.1:9200",
    private_targets: Annotated[bool, Parameter(negative="", show_default=False)] = False,
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

    from p2p_diloco.config import PeerConfig
    from p2p_diloco.endpoint import Endpoint

    endpoint = Endpoint.parse(listen, "--listen")
    endpoint.check_free("--listen")
    config = PeerConfig(
        folder=own_folder(folder, "monitor"), initial_peers=tuple(initial_peers), run_id=run_id, client_mode=True
    )

    with importing("monitor"):
        from p2p_diloco.monitor import run_monitor

    run_monitor(config, endpoint, private_targets=private_targets)


@app.command(sort_key=6)
def export(
    *,
    to: Path,
    folder: Path | None = None,
    initial_peers: Addresses = (),
    run_id: str | None = None,
    step: AtLeastZero | None = None,
    output: Output = OUTPUT,
) -> None:
    """Write the trained model as a folder that transformers loads.

    Parameters
    ----------
    to
        The folder to write; an earlier export is replaced.
    folder
        A peer's folder, or that of one run in it. The peer may be running.
    initial_peers
        Instead of a folder: address of any peer that is in the run now.
    run_id
        Which run, where there are several.
    step
        Outer step to export; the newest by default. Only from a folder.
    """
    check_run_id(run_id)
    if (folder is None) == (not initial_peers):
        raise UsageError("give either --folder or --initial-peers")
    if folder is None and step is not None:
        raise UsageError("--step goes with --folder: a swarm serves its newest outer step")

    with importing("export"):
        from p2p_diloco.export import export_model, refuse_taken
        from p2p_diloco.stored import load_state

    refuse_taken(to)
    with run_of(folder, initial_peers, run_id) as run:
        manifest, state = load_state(run, step)
        export_model(manifest, state.theta, to, step=state.step, head=state.head)
    print(f"{to}: outer step {state.step} of run {manifest.spec.name} {manifest.run_id}, head {state.head.hex()}")


@app.command(sort_key=7)
def sample(
    *,
    export: Path | None = None,
    folder: Path | None = None,
    run_id: str | None = None,
    prompt: Annotated[str, Parameter(show_default=False)] = "",
    max_tokens: AtLeastOne = 200,
    temperature: Annotated[float, Parameter(validator=not_negative)] = 0.8,
    top_k: AtLeastOne | None = None,
    seed: AtLeastZero = 0,
    output: Output = OUTPUT,
) -> None:
    """Let a model write.

    Parameters
    ----------
    export
        A folder that p2p-diloco export wrote.
    folder
        Instead of that: a peer's folder, or that of one run in it.
    run_id
        Which run, where there are several.
    prompt
        Text to go on from.
    max_tokens
        Where to end, unless the model ends before.
    temperature
        0 takes the likeliest token every time.
    top_k
        Choose among so many tokens only.
    seed
        The same seed writes the same text.
    """
    check_run_id(run_id)
    if (folder is None) == (export is None):
        raise UsageError("give either --export or --folder")

    with importing("sample"):
        from p2p_diloco.sample import generate, load_export
        from p2p_diloco.stored import find_run, load_model

    if export is not None:
        model, tokenizer, _ = load_export(export)
    elif folder is not None:
        model, tokenizer = load_model(find_run(folder, run_id))
    for piece in generate(
        model, tokenizer, prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed
    ):
        print(plain(piece, keep="\n\t"), end="", flush=True)
    print()


@app.command(sort_key=8)
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
    from p2p_diloco.facts import check_run_file, facts_of

    check_run_id(run_id)
    if (source is None) == (not initial_peers):
        raise UsageError("give either a file or folder, or --initial-peers")

    if source is None:
        with importing("manifest"):
            from p2p_diloco.config import Timeouts
            from p2p_diloco.manifest import open_manifest
            from p2p_diloco.status import fetch_manifest

        require(initial_peers)
        signed = run_cancellable(fetch_manifest(initial_peers, run_id, Timeouts()))
        show(facts_of(open_manifest(signed, initial_peers[0])))
    elif source.suffix == ".toml":
        show(check_run_file(source))
    else:
        with importing("manifest"):
            from p2p_diloco.stored import find_run, read_manifest

        show(facts_of(read_manifest(find_run(source, run_id) if source.is_dir() else source)))


@app.command(sort_key=9)
def simulate(
    run_file: Path,
    /,
    *,
    replicas: AtLeastOne | None = None,
    folder: Path | None = None,
    recount: Path | None = None,
    drop: Probability | None = None,
    device: str = "auto",
    threads: AtLeastOne | None = None,
    output: Output = OUTPUT,
) -> int:
    """Train K replicas in this process, without a network: what a swarm of K peers would do.

    Parameters
    ----------
    run_file
        RUN.toml, perhaps with a table [simulate] of what only simulations vary.
    replicas
        How many; 4 by default, or what [simulate] says.
    folder
        What it leaves: checkpoint, summary.json, the trained model; a new folder in runs/ by default. The same folder
        goes on where the last start was interrupted.
    recount
        The folder of a swarm of this run: do what its peers did, and compare the heads.
    drop
        Probability that a contribution is dropped.
    device
        auto, cpu, cuda, cuda:1 or mps.
    threads
        Of the CPU.
    """
    with importing("simulate"):
        from p2p_diloco.recount import past_of
        from p2p_diloco.simulate import Simulation
        from p2p_diloco.simulation import SimulatedRun

    what = SimulatedRun.load(run_file).with_flags(replicas=replicas, drop=drop)
    past = None
    if recount is not None:
        manifest, past = past_of(recount)
        if manifest.spec != what.run:
            raise UsageError(f"--recount {recount}: a swarm of another run than {run_file}, or before that was changed")
    if folder is None:
        folder = Path("runs") / f"{what.run.name}-simulated-{time.strftime('%Y%m%d-%H%M%S')}"
    simulation = Simulation.open(what, folder, base=run_file.parent, device=device, threads=threads, past=past)
    count, step = len(simulation.replicas), simulation.state.step
    STDOUT.print(f"{what.run.name}: {count} replicas in {folder}, outer step {step}", soft_wrap=True)
    show_curve(simulation, STDOUT)
    if past is None:
        return 0
    differing = simulation.differing_heads()
    if not differing:
        made = simulation.state.step
        STDOUT.print(f"heads           those of {recount} at all {made} outer steps", soft_wrap=True)
        return 0
    print(f"error: other heads than in {recount} from outer step {differing[0]} on", file=sys.stderr)
    return 1


@app.command(sort_key=9)
def experiment(
    *names: str,
    quick: Flag = False,
    large: Flag = False,
    jobs: AtLeastOne | None = None,
    folder: Path = Path("runs/experiments"),
    device: str = "auto",
    threads: AtLeastOne | None = 1,
    output: Output = OUTPUT,
) -> None:
    """Make the simulations of studies, several at a time; write a table, a plot and the raw figures of each.

    Parameters
    ----------
    names
        Studies in peers/experiments/, or paths of some.
    quick
        Their small variant: at most ten minutes on two cores.
    large
        Their large variant: for a GPU.
    jobs
        Simulations at the same time; as many as there are processors by default.
    folder
        Where everything is kept; what is there is not made again.
    device
        auto, cpu, cuda, cuda:1 or mps.
    threads
        Of the CPU, for each simulation.
    """
    if quick and large:
        raise UsageError("give either --quick or --large")

    with importing("experiment"):
        from p2p_diloco.experiment import find_study, run_studies
        from p2p_diloco.study import Study

    if not names:
        raise UsageError("give the name of a study, like drop, or the path of one")
    size: Size = "quick" if quick else "large" if large else "full"
    studies = [Study.load(find_study(name), size) for name in names]
    run_studies(studies, folder, jobs=jobs or os.cpu_count() or 1, device=device, threads=threads, console=STDOUT)


@app.command(sort_key=8)
def doctor(
    *,
    initial_peers: Addresses = (),
    run_id: str | None = None,
    client_mode: Flag = False,
    host_maddrs: Addresses = ("/ip4/0.0.0.0/tcp/0",),
    announce_maddrs: Addresses = (),
    device: str = "auto",
    threads: AtLeastOne | None = None,
    data: Path | None = None,
    folder: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="", show_default=False)] = False,
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

    from p2p_diloco.config import Timeouts, default_folder
    from p2p_diloco.doctor import as_json as json_of

    with Checklist(None if as_json else STDOUT) as checklist:
        checklist.measure("starting")
        with undisturbed():  # not ``importing``: the checklist must give the terminal back
            from p2p_diloco.checkup import Checkup, Request

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
        checkup = Checkup(request=request, checklist=checklist, timeouts=Timeouts())
        run_cancellable(checkup.go())
    if as_json:
        print(json.dumps(json_of(checkup.manifest.run_id if checkup.manifest else "", checklist.findings)))
    return checklist.conclude()


# -- their parts -------------------------------------------------------------------------------------------------------


def show_curve(simulation: Simulation, console: Console) -> None:
    """To its end: a bar with the time that is left; without a terminal, a line for every point with an evaluation."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("outer step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=simulation.what.run.outer.steps, completed=simulation.state.step)
        for point in simulation.run():
            progress.advance(task)
            if point.held_out_loss is not None or point.step == simulation.what.run.outer.steps:
                progress.console.print(point.line(), soft_wrap=True)
    head, digest = simulation.state.head.hex(), simulation.state.digest().hex()
    console.print(f"head            {head}\ndigest          {digest}", soft_wrap=True)


def require(initial_peers: Sequence[str]) -> None:
    from p2p_diloco.addresses import EXAMPLE, check_maddr

    if not initial_peers:
        raise UsageError(
            f"--initial-peers is empty: give the address of a peer that is in the run, like {EXAMPLE}/p2p/12D3KooW..."
        )
    for maddr in initial_peers:
        check_maddr(maddr)


def check_listening(host_maddrs: Sequence[str], announce_maddrs: Sequence[str]) -> None:
    """Raises UsageError for addresses at which no machine could listen, or be dialled."""
    from p2p_diloco.addresses import parse_host_maddr, parse_maddr

    for maddr in announce_maddrs:
        parse_maddr(maddr)
    if not host_maddrs:
        raise UsageError("--host-maddrs is empty: give an address to listen on, like /ip4/0.0.0.0/tcp/4001")
    for maddr in host_maddrs:
        parse_host_maddr(maddr)


def check_run_id(run_id: str | None) -> None:
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
    """Raises UsageError for whatever can be seen to be wrong before anything is started."""
    from p2p_diloco.addresses import check_host_maddrs, check_maddr
    from p2p_diloco.config import MIN_UPLOAD_BYTES_PER_S, PeerConfig, check_name
    from p2p_diloco.endpoint import METRICS_FLAG, Endpoint

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


def own_folder(folder: Path | None, kind: str) -> Path:
    """``folder``, or the default one of this kind, made. Raises UsageError when it cannot be written."""
    from p2p_diloco.config import default_folder

    folder = default_folder() / kind if folder is None else folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"--folder {folder}: cannot be written ({error.strerror}); choose another") from error
    return folder


def print_join_line(swarm: Swarm) -> None:
    """Before the table is shown: whole, however narrow the terminal, so that it can be copied."""
    line = join_line(swarm.maddrs)
    if line:
        print(line, flush=True)


@contextmanager
def run_of(folder: Path | None, initial_peers: Sequence[str], run_id: str | None) -> Iterator[Path]:
    """The folder of a run: a peer's, or one that lasts as long as the block, with what a running swarm gives."""
    if folder is not None:
        from p2p_diloco.stored import find_run

        yield find_run(folder, run_id)
        return
    from p2p_diloco.config import PeerConfig
    from p2p_diloco.swarm import Swarm

    require(initial_peers)
    with tempfile.TemporaryDirectory(prefix="p2p-diloco-") as temporary:
        config = PeerConfig(
            folder=Path(temporary), initial_peers=tuple(initial_peers), run_id=run_id, client_mode=True, name="export"
        )
        with Swarm.join(config, role="seed") as swarm:
            run = swarm.folder
        yield run


def show(facts: Mapping[str, str]) -> None:
    for name, value in facts.items():
        print(f"{name:<12} {plain(value)}")


# -- around them -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # torch makes this folder when it is imported, by default in the temporary folder, and leaves it there.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "torchinductor"))
    command, output = "", OUTPUT
    received: list[int] = []
    try:
        function, bound, _ = app.parse_args(
            sys.argv[1:] if argv is None else argv, exit_on_error=False, print_error=False, verbose=False
        )
        command, output = function.__name__, bound.arguments.get("output", OUTPUT)
        set_up_logging(command, verbose=output.verbose)
        with interruptible() as received:
            result = function(*bound.args, **bound.kwargs)
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return interrupted(command, received)
    except CycloptsError as error:
        return fail(str(error), 2)
    except Stopped as error:
        log.info("%s", error)
        return error.exit_code
    except LocalError as error:
        return fail(str(error), error.exit_code, debug=output.debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on; so that exit is silent
        return 1
    except Exception as error:
        if received:  # some imports turn an interruption into an error of their own
            return interrupted(command, received)
        what = f"internal error: {type(error).__name__}: {error}; run again with --debug and report it"
        return fail(what, 1, debug=output.debug)


def fail(message: str, exit_code: int, *, debug: bool = False) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {plain(' '.join(message.split()))}", file=sys.stderr)
    return exit_code


class PlainFormatter(logging.Formatter):
    """Log lines quote what other peers say."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record), keep="\n\t")


def set_up_logging(command: str, *, verbose: bool) -> None:
    """Ours from INFO on, everybody else's from WARNING on. To stderr, or above the live table."""
    handler: logging.Handler
    if command in ("seed", "peer") and STDOUT.is_terminal:
        handler = RichHandler(console=STDOUT, show_path=False, highlighter=NullHighlighter(), log_time_format="%X")
        handler.setFormatter(PlainFormatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    quietly = logging.ERROR if command == "doctor" else logging.INFO  # its findings say it all
    logging.getLogger("p2p_diloco").setLevel(logging.DEBUG if verbose else quietly)
    logging.captureWarnings(True)
