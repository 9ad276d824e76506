"""Options that several commands have, and where values come from: the command line before the environment, that before
a TOML file named by ``--config``."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from cyclopts import App, Parameter
from cyclopts.argument import Argument, ArgumentCollection
from cyclopts.config import Dict
from cyclopts.validators import Number

from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.listening import EVERYWHERE
from p2p_diloco.core.paths import at_home
from p2p_diloco.core.toml import read_toml

ENVIRONMENT = "P2P_DILOCO_"
SECRET_VARIABLES = ("P2P_DILOCO_PEER_INVITE", "P2P_DILOCO_INVITE")
"""Taken out of the environment, which child processes inherit. They hold an invitation itself, not the name of its
file."""

FROM_ENVIRONMENT = "environment"

AtLeastOne = Annotated[int, Parameter(validator=Number(gte=1))]
Probability = Annotated[float, Parameter(validator=Number(gte=0, lt=1))]
AtLeastZero = Annotated[int, Parameter(validator=Number(gte=0))]
Flag = Annotated[bool, Parameter(negative="", show_default=False)]
JsonFlag = Annotated[bool, Parameter(name="--json", negative="", show_default=False)]
Patience = Annotated[float, Parameter(validator=Number(gte=0.1, lte=10))]
Addresses = Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="", show_default=False)]


def not_negative(_type: Any, value: float) -> None:
    """Raises ValueError for a number below 0, or none at all."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("Must be 0 or more.")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Output:
    """Holds the options of every command."""

    verbose: Flag = False
    """Tell more in the log."""
    debug: Flag = False
    """Show where an error came from."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """Holds the options of every command that becomes a lasting part of the network."""

    folder: Path | None = None
    """Identity, ledger and event log of this peer; the same folder takes up where the last start ended."""
    host_maddrs: Addresses = EVERYWHERE
    """Where to listen; all addresses of this machine, IPv4 and IPv6, by default. Port forwarding needs a fixed port."""
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
    """Fills in options from the environment and from a file; cyclopts calls this after it has read the command line."""
    if not commands:
        return
    environment = dict(os.environ)
    for variable in SECRET_VARIABLES:
        os.environ.pop(variable, None)
    options = {a.name.removeprefix("--"): a for a in arguments if a.name.startswith("--")}
    table: dict[str, str | list[str]] = {}
    # The prefix of the command is the longer one, so it comes second, and wins.
    for prefix, strict in ((ENVIRONMENT, False), (f"{ENVIRONMENT}{'_'.join(commands).upper()}_", True)):
        for variable in sorted(environment):
            if variable.startswith(prefix) and (value := environment[variable].strip()):
                name = option_name(variable[len(prefix) :])
                if name in options:
                    table[name] = value.split() if options[name].token_count()[1] else value
                elif strict:
                    raise UsageError(
                        f"unknown environment variable {variable}; {hint(name, options, spelt_with(prefix))}"
                    )
    Dict(table, source=FROM_ENVIRONMENT)(_app, (), arguments)
    if "config" in options and options["config"].tokens:
        path = at_home(options["config"].tokens[-1].value, "--config")
        try:
            written = read_toml(path, "file")
        except UsageError as error:
            raise UsageError(f"--config {error}") from error
        file = {option_name(key): (key, value) for key, value in written.items()}
        known = [name for name in options if name != "config"]
        for name, (key, _) in file.items():
            if name not in known:
                raise UsageError(f"{path}: unknown key {key!r}; {hint(name, known, str)}")
        Dict({name: value for name, (_, value) in file.items()}, source=str(path))(_app, (), arguments)
    expand_homes(arguments)


def option_name(text: str) -> str:
    """Returns how an option is spelt on the command line."""
    return text.lower().replace("_", "-")


def spelt_with(prefix: str) -> Callable[[str], str]:
    """Returns what tells how an option is spelt in the environment, behind ``prefix``."""
    return lambda option: prefix + option.upper().replace("-", "_")


def hint(name: str, known: Sequence[str] | Mapping[str, object], spell: Callable[[str], str]) -> str:
    """Returns what somebody may have meant by a name that is not known."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {spell(nearest[0])}?" if nearest else f"known: {', '.join(map(spell, known))}"


def expand_homes(options: Iterable[Argument]) -> None:
    """Replaces ``~`` in all options that are paths, wherever their values come from."""
    for option in options:
        if Path in (option.hint, *get_args(option.hint)):
            option.tokens = [
                token.evolve(value=str(at_home(token.value, option.name))) if token.value.startswith("~") else token
                for token in option.tokens
            ]
