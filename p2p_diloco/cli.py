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

import difflib
import io
import json
import logging
import math
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import App, CycloptsError, Parameter
from cyclopts.argument import ArgumentCollection
from cyclopts.config import Dict
from cyclopts.validators import Number
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from p2p_diloco import __version__
from p2p_diloco.config import cache_folder
from p2p_diloco.display import MAX_NAME_CHARS, Checklist, join_line, live_table, plain
from p2p_diloco.errors import LocalError, Stopped, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from p2p_diloco.config import PeerConfig
    from p2p_diloco.manifest import RunManifest, RunSpec
    from p2p_diloco.simulate import Simulation
    from p2p_diloco.study import Size
    from p2p_diloco.swarm import Swarm

log = logging.getLogger(__name__)

ENVIRONMENT = "P2P_DILOCO_"
SERVING = {"seed", "peer", "swarm", "monitor"}
"""Commands that end when the user wants it: to be interrupted is no failure of theirs."""
STDOUT = Console(highlight=False, soft_wrap=False)

Result = TypeVar("Result")
AtLeastOne = Annotated[int, Parameter(validator=Number(gte=1))]
Probability = Annotated[float, Parameter(validator=Number(gte=0, lt=1))]
AtLeastZero = Annotated[int, Parameter(validator=Number(gte=0))]
Flag = Annotated[bool, Parameter(negative="", show_default=False)]
Patience = Annotated[float, Parameter(validator=Number(gte=0.1, lte=10))]
Addresses = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="", show_default=False)]


def not_negative(_type: Any, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("Must be 0 or more.")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Output:
    """Of every command."""

    verbose: Flag = False
    """Tell more in the log."""
    debug: Flag = False
    """Show where an error came from."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """Of every command that becomes a lasting part of the network."""

    folder: Path | None = None
    """Identity, ledger and event log of this peer; the same folder takes up where the last start ended."""
    host_maddrs: Addresses = ("/ip4/0.0.0.0/tcp/0",)
    """Where to listen; all of this machine's addresses by default. Port forwarding needs a fixed port."""
    announce_maddrs: Addresses = ()
    """What others shall dial, where it differs from that."""
    use_relay: bool = True
    """Reach, and be reached by, peers behind NATs through relays."""
    relay_service: Flag = False
    """Be a relay for others."""
    identity: Path | None = None
    """Key file; identity.key in the folder by default."""
    name: Annotated[str, Parameter(show_default=False)] = ""
    """Shown to others beside the peer id."""
    max_upload: float | None = None
    """Megabytes per second for what others download to catch up; rounds are not limited."""
    metrics_addr: Annotated[str, Parameter(show_default=False)] = ""
    """Serve metrics for Prometheus on this port of this machine alone, or on HOST:PORT; 0.0.0.0:9100 is for all."""
    patience: Patience = 1.0
    """Factor on every time-out, 0.1 to 10: below 1 in a fast network, above 1 over slow links."""
    config: Path | None = None
    """TOML file with options of this command."""


NODE, OUTPUT = NodeOptions(), Output()


def settings(_app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """cyclopts calls this after it has read the command line."""
    if not commands:
        return
    options = {a.name.removeprefix("--"): a for a in arguments if a.name.startswith("--")}
    table: dict[str, Any] = {}
    # The prefix of the command is the longer one, so it comes second, and wins.
    for prefix, strict in ((ENVIRONMENT, False), (f"{ENVIRONMENT}{'_'.join(commands).upper()}_", True)):
        for variable in sorted(os.environ):
            if variable.startswith(prefix) and (value := os.environ[variable].strip()):
                name = option_name(variable[len(prefix) :])
                if name in options:
                    table[name] = value.split() if options[name].token_count()[1] else value
                elif strict:
                    raise UsageError(f"unknown environment variable {variable}; {hint(name, options, environment)}")
    Dict(table, source="environment")(_app, (), arguments)
    if "config" in options and options["config"].tokens:
        path = Path(options["config"].tokens[-1].value)
        file = {option_name(key): (key, value) for key, value in read_toml(path).items()}
        known = [name for name in options if name != "config"]
        for name, (key, _) in file.items():
            if name not in known:
                raise UsageError(f"{path}: unknown key {key!r}; {hint(name, known, str)}")
        Dict({name: value for name, (_, value) in file.items()}, source=str(path))(_app, (), arguments)


def option_name(text: str) -> str:
    return text.lower().replace("_", "-")


def environment(option: str) -> str:
    return ENVIRONMENT + option.upper().replace("-", "_")


def hint(name: str, known: Sequence[str] | Mapping[str, Any], spell: Callable[[str], str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {spell(nearest[0])}?" if nearest else f"known: {', '.join(map(spell, known))}"


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise UsageError(f"--config {path}: no such file") from None
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        raise UsageError(f"--config {path}: not a text file in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {path}: not valid TOML: {error}") from error


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
    from p2p_diloco.identity import Identity
    from p2p_diloco.manifest import RunSpec

    RunSpec.load(run_file)
    config = peer_config(node, "seed", initial_peers)

    with importing("seed"):
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
    config = peer_config(node, "peer", initial_peers, run_id=run_id, client_mode=client_mode)

    with importing("peer"):
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
    STDOUT.print(
        f"{what.run.name}: {len(simulation.replicas)} replicas in {folder}, outer step {simulation.state.step}"
    )
    show_curve(simulation, STDOUT)
    if past is None:
        return 0
    differing = simulation.differing_heads()
    if not differing:
        STDOUT.print(f"heads           those of {recount} at all {simulation.state.step} outer steps")
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
                progress.console.print(point.line())
    console.print(f"head            {simulation.state.head.hex()}\ndigest          {simulation.state.digest().hex()}")


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
    from p2p_diloco.config import MIN_UPLOAD_BYTES_PER_S, PeerConfig
    from p2p_diloco.endpoint import METRICS_FLAG, Endpoint

    for maddr in initial_peers:
        check_maddr(maddr)
    check_listening(node.host_maddrs, node.announce_maddrs)
    if not client_mode:
        check_host_maddrs(node.host_maddrs)
    if len(node.name) > MAX_NAME_CHARS:
        raise UsageError(f"--name {node.name}: longer than {MAX_NAME_CHARS} characters")
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


def facts_of(manifest: RunManifest) -> dict[str, str]:
    """What ``manifest`` shows of a manifest whose signature is valid."""
    facts = spec_facts(manifest.spec, manifest.n_params, manifest.transformers_config["model_type"])
    tokenizer = "of the run, in the manifest" if manifest.tokenizer_json else "bytes"
    return {
        "run": manifest.spec.name,
        "run id": manifest.run_id,
        "owner": manifest.owner,
        "signature": "valid: the owner's",
        "protocol": str(manifest.protocol),
        **facts,
        "tokenizer": f"{tokenizer}, {manifest.vocab_size} tokens",
        "layout": manifest.layout_digest,
        "genesis": manifest.genesis,
    }


def check_run_file(path: Path) -> dict[str, str]:
    """What a run file would start, without starting it. Raises UsageError that names file and key."""
    from p2p_diloco.data import load_tokenizer_json, open_tokenizer
    from p2p_diloco.hub import check_data_set
    from p2p_diloco.manifest import RunSpec

    spec, base = RunSpec.load(path), path.parent
    if spec.data.source == "hub":
        check_data_set(spec.data, base)
    elif spec.data.path is not None and not (base / spec.data.path).exists():
        raise UsageError(f"{path}: key 'data.path': no such file or folder: {base / spec.data.path}")
    tokenizer = open_tokenizer(load_tokenizer_json(spec.data, base))

    with importing("manifest"):
        import torch

        from p2p_diloco.model import build_model, context_tokens, layout_of, resolve_config

    config = resolve_config(spec.model, base=base, vocab_size=tokenizer.vocab_size)
    with torch.device("meta"):
        model = build_model(config, seed=None)
    longest = context_tokens(model)
    if longest is not None and spec.data.seq_len > longest:
        raise UsageError(
            f"{path}: key 'data.seq_len': {spec.data.seq_len}, but the model sees at most {longest} tokens"
        )
    facts = spec_facts(spec, layout_of(model).n, config["model_type"])
    return {"run file": f"{path}: sound", "run": spec.name, **facts}


def spec_facts(spec: RunSpec, n_params: int, model_type: str) -> dict[str, str]:
    inner, outer, data = spec.inner, spec.outer, spec.data
    tokens = outer.steps * inner.steps * spec.tokens_per_inner_step
    return {
        "model": f"{model_type}, {n_params} parameters" + (f", from {spec.model.path}" if spec.model.path else ""),
        "data": f"{data.path or 'built-in text'}, {data.seq_len} tokens in a sequence",
        "inner steps": f"{inner.steps} of {spec.tokens_per_inner_step} tokens, learning rate {inner.lr:g}",
        "outer steps": f"{outer.steps}, learning rate {outer.lr:g}, momentum {outer.momentum:g}, codec {outer.codec}",
        "group": f"{spec.round.min_group} to {spec.round.max_group} peers, gathered for {spec.round.gather_s:g} s",
        "tokens": f"{tokens} for every peer that trains from start to end",
    }


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
    with interruptible() as received:
        try:
            function, bound, _ = app.parse_args(
                sys.argv[1:] if argv is None else argv, exit_on_error=False, print_error=False, verbose=False
            )
            command, output = function.__name__, bound.arguments.get("output", OUTPUT)
            set_up_logging(command, verbose=output.verbose)
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


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """SIGTERM as Ctrl+C: KeyboardInterrupt, wherever the command is. Yields the signals that came."""
    received: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def importing(command: str) -> Iterator[None]:
    """For imports, before there is anything to tidy up: a signal ends this process there and then. An exception in the
    midst of torch's, which is also hivemind's, would end it with a page of C++."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        os._exit(interrupted(command, [number]))

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[list[int]]:
    """Signals wait until the end of the block. Yields those that wait."""
    waiting: list[int] = []
    before = {
        number: signal.signal(number, lambda received, _frame: waiting.append(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield waiting
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if waiting:
        signal.raise_signal(waiting[0])


def run_cancellable(work: Coroutine[Any, Any, Result]) -> Result:
    """As ``asyncio.run``, but a signal cancels ``work`` and comes through when that has tidied up: KeyboardInterrupt in
    the midst of the loop's own work may lose a process that is being started."""
    import asyncio

    async def cancellable(waiting: list[int]) -> Result:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def on_signal(number: int, _frame: FrameType | None) -> None:
            waiting.append(number)
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        if waiting:
            task.cancel()
        return await work

    with undisturbed() as waiting:
        try:
            return asyncio.run(cancellable(waiting))
        except asyncio.CancelledError:
            pass
    raise KeyboardInterrupt


def interrupted(command: str, received: Sequence[int]) -> int:
    return 0 if command in SERVING else 128 + (received[-1] if received else signal.SIGINT)


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
