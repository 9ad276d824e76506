"""What volunteers run as a service or in a container, in ``peers/``: systemd accepts the units, and the command knows
the options that units, their environment files and the Containerfile name."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from p2p_diloco.cli import cli
from p2p_diloco.core.toml import read_toml
from tests.support.containerfile import read_instructions
from tests.swarm.places import LEAVE_S

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "peers"
CONTAINERFILE = PEERS / "Containerfile"
ROLES = ("peer", "seed")
ADDRESS = "/ip4/127.0.0.1/tcp/4001"
VALUES = {"INITIAL_PEERS": ADDRESS, "RUN_ID": "0" * 40, "NAME": "me"}
"""What a volunteer writes where the examples have nothing."""


def parsed(argv: list[str]) -> tuple[str, dict[str, Any]]:
    function, bound, _ = cli.app.parse_args(argv, exit_on_error=False, print_error=False)
    return function.__name__, dict(bound.arguments)


def unit_of(role: str) -> Path:
    return PEERS / f"p2p-diloco-{role}.service"


def settings_of(role: str) -> dict[str, str]:
    lines = [line for line in unit_of(role).read_text().splitlines() if re.match(r"\w+=", line)]
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Of a user who has the command."""
    program = tmp_path / ".local" / "bin" / "p2p-diloco"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / "runtime").mkdir(mode=0o700)
    return tmp_path


def complaints(unit: Path, home: Path) -> list[str]:
    """Lines of systemd-analyze about this unit. Keys that it does not know are no failure to it, but they are here."""
    environment = os.environ | {"HOME": str(home), "XDG_RUNTIME_DIR": str(home / "runtime")}
    command = ["systemd-analyze", "--user", "verify", str(unit)]
    verified = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in verified.stderr.splitlines() if unit.name in line]
    return lines or verified.stderr.splitlines() if verified.returncode else lines


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("role", ROLES)
def test_systemd_accepts_the_units(role: str, home: Path) -> None:
    assert complaints(unit_of(role), home) == []
    commented = re.sub(r"(?m)^# (\w+=)", r"\1", unit_of(role).read_text())
    assert commented != unit_of(role).read_text()
    everything = home / unit_of(role).name
    everything.write_text(commented)
    assert complaints(everything, home) == []
    everything.write_text(commented.replace("KillMode", "KilMode"))
    assert "Unknown key 'KilMode'" in complaints(everything, home)[0]
    (home / ".local" / "bin" / "p2p-diloco").unlink()
    assert "is not executable" in complaints(unit_of(role), home)[0]


@pytest.mark.parametrize("role", ROLES)
def test_a_unit_runs_the_command_with_the_folder_that_must_be_kept(role: str) -> None:
    settings = settings_of(role)
    program, *argv = shlex.split(settings["ExecStart"].replace("%h", "/home/me"))
    assert program == "/home/me/.local/bin/p2p-diloco"
    command, arguments = parsed(argv)
    assert (command, arguments["node"].folder) == (role, Path(f"/home/me/p2p-diloco/{role}"))
    assert settings["EnvironmentFile"] == f"%h/p2p-diloco/{role}.env"


@pytest.mark.parametrize("role", ROLES)
def test_a_unit_leaves_politely_and_comes_back_only_where_that_helps(role: str) -> None:
    settings = settings_of(role)
    assert float(settings["TimeoutStopSec"]) > LEAVE_S
    assert settings["KillMode"] == "mixed", "p2pd must outlive the first signal, or nobody hears the goodbye"
    assert (settings["Restart"], settings["RestartPreventExitStatus"]) == ("on-failure", "2")
    assert settings["WantedBy"] == "default.target"


@pytest.mark.parametrize("role", ROLES)
def test_a_unit_is_started_again_for_as_long_as_it_takes(role: str) -> None:
    settings = settings_of(role)
    assert settings["StartLimitIntervalSec"] == "0"
    assert "StartLimitBurst" not in settings
    assert f"started again {settings['RestartSec']} s later" in (ROOT / "docs" / "service.md").read_text()


@pytest.mark.parametrize("role", ROLES)
def test_every_variable_of_an_environment_file_is_an_option(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (PEERS / f"p2p-diloco-{role}.env").read_text()
    variables = dict(re.findall(r"(?m)^(?:# )?(P2P_DILOCO_\w+)=(.*)$", text))
    prefix = f"P2P_DILOCO_{role.upper()}_"
    assert len(variables) == text.count(f"{prefix}") - text.count(f"{prefix}X")
    for name, value in variables.items():
        monkeypatch.setenv(name, value or VALUES[name.removeprefix(prefix)])
    argv = ["peer"] if role == "peer" else ["seed", "run.toml"]
    _, found = parsed(argv)
    assert found["node"].name == "me"
    assert found["node"].host_maddrs == ("/ip4/0.0.0.0/tcp/4001",)
    if role == "peer":
        assert found["initial_peers"] == (ADDRESS,)
        assert (found["run_id"], found["threads"]) == ("0" * 40, 2)
    monkeypatch.setenv(f"{prefix}NAMES", "x")
    with pytest.raises(Exception, match=f"unknown environment variable {prefix}NAMES"):
        parsed(argv)


def test_the_containerfiles_commands_are_those_of_the_program() -> None:
    lines = re.sub(r" \\\n#\s+", " ", CONTAINERFILE.read_text()).splitlines()
    commands = [line.partition(" p2p-diloco ")[2] for line in lines if line.startswith("#     podman run")]
    found = [parsed(shlex.split(command.replace("ADDRESS", ADDRESS))) for command in commands]
    assert [command for command, _ in found] == ["peer", "seed"]
    assert found[1][1]["node"].host_maddrs == ("/ip4/0.0.0.0/tcp/4001",)


def test_the_pages_files_and_commands_are_there() -> None:
    text = re.sub(r" \\\n\s+", " ", (ROOT / "docs" / "service.md").read_text())
    found = re.findall(r"\bp2p-diloco-\w+\.(?:service|env)|\bpeers/[\w.-]+", text)
    named = {name.removeprefix("peers/") for name in found}
    assert named >= {*(f"p2p-diloco-{role}.{kind}" for role in ROLES for kind in ("service", "env"))}
    assert [name for name in named if not (PEERS / name).exists()] == []
    (command,) = re.findall(r"(?m)^    podman run .* p2p-diloco (.*)$", text)
    (options,) = re.findall(r"`(--host-maddrs[^`]*)`", text)
    line = f"{command} {options}".replace("YOUR-ADDRESS", "192.0.2.1").replace("ADDRESS", ADDRESS)
    _, arguments = parsed(shlex.split(line))
    assert arguments["initial_peers"] == (ADDRESS,)
    assert arguments["node"].announce_maddrs == ("/ip4/192.0.2.1/tcp/4001",)


def test_a_container_is_no_roots_and_keeps_one_folder() -> None:
    instructions = {one.name: one for one in read_instructions(CONTAINERFILE)}
    variables = dict(
        word.split("=", 1) for one in read_instructions(CONTAINERFILE) if one.name == "ENV" for word in one.words
    )
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instructions["USER"].text)
    kept = instructions["VOLUME"].text
    assert {"HOME", "XDG_CACHE_HOME", "P2P_DILOCO_FOLDER"} <= set(variables)
    assert all(Path(kept) in (Path(path), *Path(path).parents) for path in variables.values())
    assert (instructions["ENTRYPOINT"].words, instructions["STOPSIGNAL"].text) == (["p2p-diloco"], "SIGTERM")


def test_a_container_has_all_that_runs_may_need() -> None:
    """Text on the hub and in parquet files, and the monitor's page. ``tokenizers`` is a part of ``hf``; the others are
    for who studies or develops."""
    project: Any = read_toml(ROOT / "pyproject.toml", "project")["project"]
    extras = set(project["optional-dependencies"]) - {"dev", "experiments", "mutants", "tokenizers"}
    installed = [one.text for one in read_instructions(CONTAINERFILE) if one.name == "RUN" and "'.[" in one.text]
    assert [set(re.findall(r"\w+", text.partition("[")[2].partition("]")[0])) for text in installed] == [extras]
