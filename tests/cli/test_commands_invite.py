"""`invite`, `revoke` and `peer --invite`: what they write, what they refuse, and that no token is ever shown."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2p_diloco.cli import cli
from p2p_diloco.core.errors import Stopped
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.invitation import Token, open_seat, open_token
from p2p_diloco.ledger.folder import MANIFEST_FILE
from p2p_diloco.ledger.seats import read_revocations, read_seat
from tests.cli.test_cli import MADDR, OWNER, as_on_a_fresh_machine, refused  # noqa: F401
from tests.support.builders import identity
from tests.support.invited import token_of

Refused = Callable[..., str]


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    """The folder of a seed, with a run by invitation."""
    return seed_folder(tmp_path / "seed", "invite", OWNER)


def seed_folder(folder: Path, membership: Any, owner: Identity) -> Path:
    from tests.ledger import test_seats

    manifest = test_seats.manifest_of(membership).model_copy(update={"owner": OWNER.peer_id})
    run = folder / f"tiny-{manifest.run_id[:12]}"
    (run / "ledger" / "updates").mkdir(parents=True)
    (run / "ledger" / "updates" / "0000000004.update").touch()
    (run / MANIFEST_FILE).write_bytes(manifest.signed(OWNER))
    owner.save(folder / "identity.key")
    return folder


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*argv: str) -> str:
        assert cli.main(argv) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


# -- the owner -----------------------------------------------------------------------------------------------------


def test_an_invitation_is_written_for_its_owner_alone(seed: Path, said: Callable[..., str]) -> None:
    out = said("invite", str(seed), "--name", "attic", "--days", "30", "--places", "2")
    path = Path("attic.invitation")
    token = open_token(path.read_text(), "file")
    assert out.startswith("attic.invitation: invitation of attic, 2 places, until ")
    assert "p2p-diloco peer --initial-peers ADDRESS --invite attic.invitation" in out
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (token.invitation.name, token.invitation.places, token.invitation.peer_id) == ("attic", 2, OWNER.peer_id)
    assert not any(word in out for word in path.read_text().split())


def test_to_another_file_or_to_standard_output(seed: Path, said: Callable[..., str], tmp_path: Path) -> None:
    said("invite", str(seed), "--name", "a", "--days", "1", "--out", str(tmp_path / "x" / "a.txt"))
    assert open_token((tmp_path / "x" / "a.txt").read_text(), "file").invitation.name == "a"
    out = said("invite", str(seed), "--name", "b", "--days", "1", "--out", "-")
    assert open_token(out, "stdout").invitation.name == "b"


def test_all_are_listed_and_revoked(seed: Path, said: Callable[..., str]) -> None:
    assert said("invite", str(seed), "--list") == ""
    for name in ("attic", "barn"):
        said("invite", str(seed), "--name", name, "--days", "30")
    barn = open_token(Path("barn.invitation").read_text(), "file").invitation.token
    out = said("revoke", str(seed), "barn")
    assert out == f"barn {barn}: revoked from outer step 6 on; the seed tells the others\n"
    attic_line, barn_line = said("invite", str(seed), "--list").splitlines()
    assert attic_line.startswith("attic ")
    assert ", until " in attic_line
    assert barn_line.startswith("barn ")
    assert barn_line.endswith(f"{barn}  1 place, revoked from outer step 6 on")
    run = next(seed.glob("tiny-*"))
    assert read_revocations(run / "ledger", cli_manifest(run)) is not None


def cli_manifest(run: Path) -> Any:
    from p2p_diloco.ledger.folder import read_manifest

    return read_manifest(run)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["invite"], "requires an argument"),
        (["invite", "nowhere", "--name", "a", "--days", "1"], "nowhere: no run here"),
        (["invite", "SEED", "--name", "a"], "give --name and --days, or --list"),
        (["invite", "SEED", "--days", "1"], "give --name and --days, or --list"),
        (["invite", "SEED", "--name", "a b", "--days", "1"], "--name a b: 1 to 32 letters"),
        (["invite", "SEED", "--name", "a", "--days", "0"], 'Invalid value "0" for --days. Must be >= 1.'),
        (["invite", "SEED", "--name", "a", "--days", "3651"], 'Invalid value "3651" for --days. Must be <= 3650.'),
        (["invite", "SEED", "--name", "a", "--days", "1", "--places", "0"], 'Invalid value "0" for --places.'),
        (["invite", "SEED", "--name", "a", "--days", "1", "--places", "101"], 'Invalid value "101" for --places.'),
        (["invite", "SEED", "--name", "a", "--days", "1", "--out", "SEED"], "there is such a file; choose another"),
        (
            ["invite", "SEED", "--name", "a", "--days", "1", "--identity", "x"],
            "x: no such key; the folder of the run's",
        ),
        (["invite", "SEED", "--run-id", "x", "--list"], "--run-id x: a run id has 40 hexadecimal digits"),
        (["revoke", "SEED"], "requires an argument"),
        (["revoke", "SEED", "nobody"], "nobody: no invitation of this name or id; 'p2p-diloco invite FOLDER --list'"),
        (["peer", "--initial-peers", MADDR, "--invite", "x"], "--invite x: cannot be read (No such file or directory)"),
        (["peer", "--initial-peers", MADDR, "--invite", "/"], "--invite /: cannot be read (Is a directory)"),
        (["peer", "--initial-peers", MADDR, "--invite"], "--invite requires an argument"),
    ],
)
def test_a_mistake_is_one_line(refused: Refused, seed: Path, argv: list[str], message: str) -> None:  # noqa: F811
    assert message in refused(*[str(seed) if word == "SEED" else word for word in argv])


def test_an_open_run_and_a_folder_that_is_not_the_owners(refused: Refused, tmp_path: Path) -> None:  # noqa: F811
    open_run = seed_folder(tmp_path / "open", "open", OWNER)
    other = seed_folder(tmp_path / "other", "invite", identity(7))
    for command in (["invite", "--name", "a", "--days", "1"], ["revoke", "a"]):
        assert "this run is open, whoever has an address may train" in refused(command[0], str(open_run), *command[1:])
        assert "identity.key: not the key of the run's owner" in refused(command[0], str(other), *command[1:])
    assert not Path("a.invitation").exists()


# -- the volunteer -------------------------------------------------------------------------------------------------


@pytest.fixture
def token(seed: Path, said: Callable[..., str]) -> Token:
    said("invite", str(seed), "--name", "attic", "--days", "30")
    return open_token(Path("attic.invitation").read_text(), "file")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations with which a peer was about to look for its run; it ends there."""
    from p2p_diloco.learn import swarm

    configs: list[Any] = []

    def find(config: Any, **_: object) -> None:
        configs.append((config, dict(os.environ)))
        raise Stopped("far enough")

    monkeypatch.setattr(swarm.Swarm, "find", find)
    return configs


def check_seat(config: Any, token: Token) -> None:
    me = Identity.load(config.identity_path)
    assert me is not None
    assert config.run_id == token.invitation.run_id
    assert open_seat(read_seat(config.folder, token.invitation.run_id), me.peer_id) == token.invitation


def test_a_peer_takes_its_seat_from_a_file(token: Token, found: list[Any]) -> None:
    assert cli.main(["peer", "--initial-peers", MADDR, "--device", "cpu", "--invite", "attic.invitation"]) == 0
    check_seat(found[0][0], token)
    assert not any(token.key.key.private_bytes_raw() in path.read_bytes() for path in files_in(found[0][0].folder))


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_peer_takes_its_seat_from_standard_input(
    token: Token, found: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(token.text()))
    assert cli.main(["peer", "--initial-peers", MADDR, "--device", "cpu", "--invite", "-"]) == 0
    check_seat(found[0][0], token)


@pytest.mark.parametrize("variable", ["P2P_DILOCO_PEER_INVITE", "P2P_DILOCO_INVITE"])
@pytest.mark.parametrize("between", ["\n", " "])
def test_a_peer_takes_its_seat_from_the_environment_which_nobody_inherits(
    token: Token, found: list[Any], monkeypatch: pytest.MonkeyPatch, variable: str, between: str
) -> None:
    monkeypatch.setenv(variable, between.join(token.text().split()))
    assert cli.main(["peer", "--initial-peers", MADDR, "--device", "cpu"]) == 0
    config, environment = found[0]
    check_seat(config, token)
    assert variable not in environment
    assert not any(word in value for value in environment.values() for word in token.text().split())


def test_other_commands_take_it_out_of_the_environment_too(
    token: Token, seed: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2P_DILOCO_PEER_INVITE", token.text())
    said("invite", str(seed), "--list")
    assert "P2P_DILOCO_PEER_INVITE" not in os.environ


@pytest.mark.parametrize("before", [["peer", "--initial-peers", MADDR, "--invite"], ["peer"], ["status"], []])
def test_a_token_on_the_command_line_is_refused_and_not_repeated(
    token: Token,
    refused: Refused,  # noqa: F811
    before: list[str],
) -> None:
    for words in ([token.text()], token.text().split()):
        line = refused(*before, *words)
        assert line.startswith("an invitation on the command line can be read by every user of this machine")
        assert not any(word in line for word in token.text().split())


def test_a_piece_of_a_token_is_not_repeated(token: Token, refused: Refused) -> None:  # noqa: F811
    for word in token.text().split()[1:]:
        line = refused("peer", "--initial-peers", MADDR, "--invite", word)
        assert line.startswith("--invite: cannot be read")
        assert word not in line


def test_a_token_in_the_environment_that_is_damaged_is_not_repeated(
    token: Token,
    refused: Refused,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("P2P_DILOCO_PEER_INVITE", token.text()[:-40])
    line = refused("peer", "--initial-peers", MADDR)
    assert line.startswith("environment variable P2P_DILOCO_PEER_INVITE: ")
    assert not any(word in line for word in token.text()[:-40].split())


def test_an_invitation_to_another_run_or_one_that_has_expired(
    token: Token,
    refused: Refused,  # noqa: F811
) -> None:
    line = refused("peer", "--initial-peers", MADDR, "--invite", "attic.invitation", "--run-id", "ab" * 20)
    assert line == f"--run-id {'ab' * 20}: the invitation is to another run, {token.invitation.run_id}"
    Path("old").write_text(token_of("old", expires_s=1, owner=OWNER).text())
    line = refused("peer", "--initial-peers", MADDR, "--invite", "old")
    assert line == "--invite: the invitation old has expired; ask the run's owner for another one"
