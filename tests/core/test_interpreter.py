"""What a user's folder, locale and terminal may be, with real processes: small ones, which import neither torch nor
hivemind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from p2p_diloco.core.interpreter import ROOT, python_command

Done = subprocess.CompletedProcess[bytes]
BEGIN = (
    "import sys; from p2p_diloco.core.interpreter import begin, end; sys.argv[1:] = [{command!r}]; begin(sys.argv); "
)


def python(
    program: str, folder: Path, command: str = "status", **options: object
) -> subprocess.CompletedProcess[bytes]:
    """Runs ``program`` after ``begin`` of that command."""
    given: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": folder, **options}
    words = [sys.executable, "-c", BEGIN.format(command=command) + program]
    return subprocess.run(words, check=False, timeout=60, **given)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def shadow(tmp_path: Path) -> Path:
    """A folder whose files have the names of modules."""
    for name in ("random", "secrets", "types", "signal", "numpy", "hivemind"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the user\\'s {name}')\n")
    return tmp_path


def child(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A module of ours that imports ``random`` and much else."""
    command = python_command("-m", "p2p_diloco.lab.faults")
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_child_imports_nothing_of_the_current_folder(shadow: Path) -> None:
    for environment in ({}, {"PYTHONSAFEPATH": "1"}):
        done = child(shadow, **environment)
        assert (done.returncode, done.stderr) == (0, "")


def test_what_pythonpath_names_stays_on_a_childs_path(shadow: Path) -> None:
    (shadow / "types.py").unlink()
    assert "the user's " in child(shadow, PYTHONPATH=str(shadow)).stderr


@pytest.mark.parametrize("named", ["", "/nowhere:", ":/nowhere", "/nowhere::/elsewhere"])
def test_the_command_itself_imports_nothing_of_it_either(shadow: Path, named: str) -> None:
    """Empty entries of PYTHONPATH, which are the current folder, are no wish for it."""
    (shadow / "types.py").unlink()  # python -m itself would import it before anything of ours
    environment = {**os.environ, "PYTHONPATH": named}
    program = "import random, secrets, os; print(os.environ['PYTHONPATH'], os.getcwd() in sys.path)"
    done = python(program, shadow, env=environment)
    assert (done.stderr, done.returncode) == (b"", 0)
    assert done.stdout.decode().split() == [*filter(None, [":".join(filter(None, named.split(":")))]), "False"]
    named_on_purpose = python("import secrets", shadow, env={**os.environ, "PYTHONPATH": str(shadow)})
    assert b"the user's secrets" in named_on_purpose.stderr
    asked = subprocess.run(
        [sys.executable, "-m", "p2p_diloco", "--version"], cwd=shadow, capture_output=True, text=True, check=False
    )
    assert (asked.returncode, asked.stderr) == (0, "")


def test_in_a_checkout_what_lies_beside_the_package_is_found() -> None:
    """However the package itself is found: it may be installed, and the rest of a checkout is not."""
    done = python("from importlib.util import find_spec; print(find_spec('benchmarks') is not None)", Path(ROOT))
    assert (done.stdout, done.stderr) == (b"True\n", b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_lead_nowhere(tmp_path: Path, closed: str) -> None:
    program = (
        BEGIN.format(command="status") + "import socket; sys.stdin.read(); print('out'); print('err', file=sys.stderr);"
        f"open({str(tmp_path / 'seen')!r}, 'w').write(str(socket.socket().fileno())); sys.exit(end(7))"
    )
    words = f'"$0" -c "$1" {closed}'
    done = subprocess.run(
        ["sh", "-c", words, sys.executable, program], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    assert done.returncode == 7, done.stderr
    assert int((tmp_path / "seen").read_text()) > 2
    assert done.stdout == (b"" if ">&-" in closed.split() else b"out\n")


def test_a_lasting_command_goes_on_without_a_reader(tmp_path: Path) -> None:
    program = "print('x' * 100_000, flush=True); print('still here', file=sys.stderr); sys.exit(end(0))"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as broken:
        lasting = python(program, tmp_path, "peer", stdout=broken)
        other = python(program, tmp_path, "status", stdout=broken)
    assert (lasting.returncode, lasting.stderr) == (0, b"still here\n")
    assert other.returncode == 1
    assert b"BrokenPipeError" in other.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_output_on_a_full_disk_is_said_and_ends_no_work(tmp_path: Path) -> None:
    program = "print('x' * 100_000, flush=True); print('still here', file=sys.stderr); sys.exit(end({code}))"
    with open("/dev/full", "wb") as full:
        done = python(program.format(code=0), tmp_path, "peer", stdout=full)
        failed = python(program.format(code=2), tmp_path, "peer", stdout=full)
        silent = python("print('x', file=sys.stderr); print('out'); sys.exit(end(0))", tmp_path, "status", stderr=full)
    said = b"error: standard output: No space left on device; the rest of it is lost, free space\n"
    assert (done.returncode, done.stderr) == (1, b"still here\n" + said)
    assert (failed.returncode, failed.stderr) == (2, b"still here\n")
    assert (silent.returncode, silent.stdout) == (0, b"out\n")


LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("name", ["M\xfcnchen".encode(), b"bad\xff", "\u6a4b".encode()])
def test_a_path_is_bytes_whatever_the_locale(tmp_path: Path, name: bytes) -> None:
    folder = os.fsencode(tmp_path) + b"/" + name
    os.mkdir(folder)
    program = "import os; [found] = os.listdir(); print(found); print(sys.getfilesystemencoding(), os.fsencode(found))"
    done = python(program, tmp_path, env={**os.environ, **LOCALE})
    assert done.stderr == b""
    shown = name.decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace")
    assert done.stdout == shown + f"\nutf-8 {name!r}\n".encode()


def test_python_looks_for_no_garbage_at_the_end(tmp_path: Path) -> None:
    program = "import gc; end(0); print(gc.get_freeze_count() > 0)"
    assert python(program, tmp_path).stdout.split() == [b"True"]
