"""What a user gets for each mistake: one line that names it, the right exit code, and nothing started."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2p_diloco import __version__
from p2p_diloco.cli import cli, options
from p2p_diloco.cli.arguments import peer_config
from p2p_diloco.core.addresses import Endpoint
from p2p_diloco.core.config import PeerConfig
from p2p_diloco.core.errors import Stopped, UsageError
from p2p_diloco.core.identity import Identity
from p2p_diloco.core.interruption import Stop
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.look import monitor

OWNER = Identity.from_seed(bytes(32))
MADDR = f"/ip4/127.0.0.1/tcp/4001/p2p/{OWNER.peer_id}"
RUN_FILE = """
name = "tiny"
[model.config]
model_type = "llama"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 64
[data]
source = "path"
path = "texts"
seq_len = 16
[outer]
steps = 5
"""


@pytest.fixture(autouse=True)
def as_on_a_fresh_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("p2p_diloco")
    before, levels = list(root.handlers), (root.level, ours.level)
    for variable in list(os.environ):
        if variable.startswith(options.ENVIRONMENT):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.chdir(tmp_path)
    yield
    logging.captureWarnings(False)
    root.handlers[:] = before
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must fail; what its one line says after ``error:``."""

    def run(*argv: str, exit_code: int = 2) -> str:
        assert cli.main(argv) == exit_code
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if " INFO " not in line]
        assert out == ""
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return run


def run_file(folder: Path, text: str = RUN_FILE) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def texts(folder: Path, documents: int = 100, text: str = "All happy families are alike. ") -> None:
    (folder / "texts").mkdir()
    for i in range(documents):
        (folder / "texts" / f"{i}.txt").write_text(f"{text}{i}")


def manifest_file(folder: Path, signer: Identity = OWNER) -> Path:
    manifest = RunManifest(
        spec=RunSpec.load(run_file(folder)),
        model_config_json='{"model_type":"llama"}',
        n_params=1000,
        layout_digest="1" * 64,
        vocab_size=256,
        data_fingerprint="",
        genesis="2" * 64,
        owner=OWNER.peer_id,
    )
    path = folder / "manifest.json"
    path.write_bytes(manifest.signed(signer))
    return path


# -- flags -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pear"], 'Unknown command "pear". Did you mean "peer"?'),
        (["peer", "--inital-peers", MADDR], "Unknown option: --inital-peers. Did you mean --initial-peers?"),
        (["peer"], "--initial-peers is empty: give the address of a peer that is in the run, like /ip4/"),
        (["peer", "--initial-peers"], "--initial-peers is empty"),
        (["status", "--initial-peers"], "--initial-peers is empty"),
        (["seed", "run.toml", "--patience", "0.05"], 'Invalid value "0.05" for --patience. Must be >= 0.1.'),
        (["swarm", "run.toml", "--peers", "1", "--patience", "11"], "for --patience. Must be <= 10."),
        (["swarm", "run.toml", "--peers", "1", "--faults", "none.toml"], "none.toml: no such file of faults"),
        (["peer", "--initial-peers", ""], "address '': it begins with no '/'"),
        (["peer", "--initial-peers", "localhost:4001"], "address 'localhost:4001': it begins with no '/'"),
        (["peer", "--initial-peers", "/ip4/127.0.0.1/tcp/4001"], "lacks /p2p/PEER-ID at its end; copy the whole"),
        (["status", "--initial-peers", MADDR[:-1]], "is not a peer's id"),
        (["export", "--to", "x", "--initial-peers", "x"], "address 'x'"),
        (["manifest", "--initial-peers", "x"], "address 'x'"),
        (["peer", "--initial-peers", MADDR, "--threads", "0"], 'Invalid value "0" for --threads. Must be >= 1.'),
        (["peer", "--initial-peers", MADDR, "--threads", "-2"], 'Invalid value "-2" for --threads. Must be >= 1.'),
        (["peer", "--initial-peers", MADDR, "--threads", "two"], 'unable to convert "two" into int'),
        (["peer", "--initial-peers", MADDR, "--device", "cuda:99"], "device 'cuda:99' is not available"),
        (["peer", "--initial-peers", MADDR, "--data", "nowhere"], "--data nowhere: no such file or folder"),
        (["peer", "--initial-peers", MADDR, "--run-id", "tiny"], "--run-id tiny: a run id has 40 hexadecimal digits"),
        (["peer", "--initial-peers", MADDR, "--name", "n" * 33], "longer than 32 characters"),
        (["peer", "--initial-peers", MADDR, "--name", "\U0001f9ea" * 17], "longer than 64 bytes"),
        (["peer", "--initial-peers", MADDR, "--max-upload", "0"], "--max-upload 0: give megabytes per second, 0.1 or"),
        (["peer", "--initial-peers", MADDR, "--max-upload", "-1"], "--max-upload -1: give megabytes per second"),
        (
            ["peer", "--initial-peers", MADDR, "--max-upload", "0.0999"],
            "--max-upload 0.0999: give megabytes per second",
        ),
        (["peer", "--initial-peers", MADDR, "--max-upload", "nan"], "--max-upload nan: give megabytes per second"),
        (["peer", "--initial-peers", MADDR, "--max-upload", "inf"], "--max-upload inf: give megabytes per second"),
        (["peer", "--initial-peers", MADDR, "--max-upload", "fast"], 'unable to convert "fast" into float'),
        (["peer", "--initial-peers", MADDR, "--host-maddrs", "0.0.0.0:1"], "listen on TCP, like /ip4/0.0.0.0/tcp/4001"),
        (["peer", "--initial-peers", MADDR, "--host-maddrs"], "--host-maddrs is empty"),
        (["peer", "--initial-peers", MADDR, "--announce-maddrs", "x"], "address 'x'"),
        (["peer", "--initial-peers", MADDR, "--folder", "/dev/null/x"], "--folder /dev/null/x: cannot be written (Not"),
        (["peer", "--initial-peers", MADDR, "--metrics-addr", "http://x"], "--metrics-addr http://x: give a port, for"),
        (["peer", "--initial-peers", MADDR, "--metrics-addr", "0"], "--metrics-addr 0: give a port, for this machine"),
        (["peer", "--initial-peers", MADDR, "--metrics-addr", "192.0.2.1:1"], "--metrics-addr 192.0.2.1:1: cannot"),
        (["peer", "stray", "--initial-peers", MADDR], "Unused Tokens: ['stray']"),
        (["seed"], "name a run file, to publish a run, or --initial-peers, to mirror one that is there"),
        (["seed", "nowhere.toml", "--run-id", "0" * 40], "--run-id and --invite are for a mirror"),
        (["seed", "--initial-peers", MADDR, "--run-id", "x"], "--run-id x: a run id has 40 hexadecimal digits"),
        (["seed", "nowhere.toml"], "nowhere.toml: no such run file"),
        (["swarm", "nowhere.toml"], '"swarm" parameter --peers requires an argument'),
        (["swarm", "nowhere.toml", "--peers", "0"], 'Invalid value "0" for --peers. Must be >= 1.'),
        (["swarm", "nowhere.toml", "--peers", "2"], "nowhere.toml: no such run file"),
        (["export"], "--to requires an argument"),
        (["export", "--to", "x"], "give either --folder or --initial-peers"),
        (["export", "--to", "x", "--folder", "y", "--initial-peers", MADDR], "give either --folder or --initial-peers"),
        (["export", "--to", "x", "--initial-peers", MADDR, "--step", "3"], "--step goes with --folder"),
        (["export", "--to", "x", "--folder", "y", "--step", "-1"], 'Invalid value "-1" for --step. Must be >= 0.'),
        (["export", "--to", "x", "--folder", "nowhere"], "nowhere: no run here"),
        (["sample"], "give either --export or --folder"),
        (["sample", "--export", "nowhere"], "nowhere: no exported model here"),
        (["sample", "--export", "x", "--max-tokens", "0"], 'Invalid value "0" for --max-tokens. Must be >= 1.'),
        (["sample", "--export", "x", "--top-k", "0"], 'Invalid value "0" for --top-k. Must be >= 1.'),
        (["sample", "--export", "x", "--seed", str(2**64)], "for --seed. Must be < 18446744073709551616."),
        (["sample", "--export", "x", "--temperature", "-1"], "for --temperature. Must be 0 or more."),
        (["sample", "--export", "x", "--temperature", "nan"], "for --temperature. Must be 0 or more."),
        (["doctor"], "--initial-peers is empty"),
        (["doctor", "--initial-peers", MADDR[:-1]], "is not a peer's id"),
        (["doctor", "--initial-peers", MADDR, "--run-id", "tiny"], "--run-id tiny: a run id has 40 hexadecimal digits"),
        (["doctor", "--initial-peers", MADDR, "--host-maddrs", "0.0.0.0:1"], "listen on TCP, like /ip4/0.0.0.0/tcp"),
        (["doctor", "--initial-peers", MADDR, "--announce-maddrs", "x"], "address 'x'"),
        (["doctor", "--initial-peers", MADDR, "--threads", "0"], 'Invalid value "0" for --threads. Must be >= 1.'),
        (["monitor"], "--initial-peers is empty"),
        (["monitor", "--initial-peers", MADDR, "--run-id", "abc"], "a run id has 40 hexadecimal digits"),
        (["monitor", "--initial-peers", MADDR, "--listen", "everywhere"], "--listen everywhere: give a port"),
        (["manifest"], "give either a file or folder, or --initial-peers"),
        (["manifest", "nowhere"], "nowhere: no such file"),
        (["manifest", "nowhere.toml"], "nowhere.toml: no such run file"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(refused: Refused, argv: list[str], message: str) -> None:
    assert message in refused(*argv)


def test_a_port_that_is_taken_is_named(refused: Refused, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        maddr = f"/ip4/127.0.0.1/tcp/{port}"
        assert f"port {port} is in use" in refused("seed", str(run_file(tmp_path)), "--host-maddrs", maddr)
        assert f"port {port} is in use" in refused("peer", "--initial-peers", MADDR, "--host-maddrs", maddr)
        assert f"port {port} is in use" in refused("monitor", "--initial-peers", MADDR, "--listen", str(port))


@pytest.mark.parametrize("flags", [[], ["--private-targets"]])
def test_what_a_monitor_is_told(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(monitor, "run_monitor", lambda *given, **more: told.extend((*given, more)))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["monitor", "--initial-peers", MADDR, "--folder", str(tmp_path / "new"), "--listen", str(port)]
    assert cli.main(command + flags) == 0
    config = PeerConfig(folder=tmp_path / "new", initial_peers=(MADDR,), client_mode=True)
    assert told == [config, Endpoint(host="127.0.0.1", port=port), {"private_targets": bool(flags)}]


def test_the_version_and_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    commands = ("seed", "peer", "swarm", "status", "monitor", "doctor", "export", "sample", "manifest", "verify")
    assert all(f" {command} " in out for command in commands)
    assert cli.main(["peer", "--help"]) == 0
    assert "--initial-peers" in capsys.readouterr().out


# -- run files and manifests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[outer]", "[outer", "not valid TOML"),
        ("steps = 5", "stepps = 5", "unknown key 'outer.stepps'; did you mean 'steps'?"),
        ("steps = 5", 'steps = "5"', "key 'outer.steps': input should be a valid integer"),
        ("steps = 5", "steps = 0", "key 'outer.steps': input should be greater than 0"),
        ("seq_len = 16", "seq_len = -16", "key 'data.seq_len': input should be greater than or equal to 8"),
        ("seq_len = 16", "seq_len = 128", "key 'data.seq_len': 128, but the model sees at most 64 tokens"),
        ("hidden_size = 16", "hiden_size = 16", "unknown key 'model.config.hiden_size'; did you mean 'hidden_size'?"),
        ('"llama"', '"lama"', "run.toml: key 'model.config.model_type': transformers has no language model 'lama'"),
        ("seq_len = 16", 'seq_len = 16\ntokenizer = "x"', "run.toml: key 'data.tokenizer': "),
    ],
)
def test_a_mistake_in_a_run_file_is_one_line(
    refused: Refused, tmp_path: Path, before: str, after: str, message: str
) -> None:
    texts(tmp_path, documents=1000)
    path = str(run_file(tmp_path, RUN_FILE.replace(before, after)))
    for command in ("manifest", "seed"):
        assert message in refused(command, path)
    assert not list(tmp_path.glob("share/*/seed/*/manifest.json"))


ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ENCODER |= {"max_position_embeddings": 16, "pad_token_id": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ENCODER | {"model_type": "roberta"}, "key 'data.seq_len': 16, but the model fails in training on as many"),
        (ENCODER | {"model_type": "xlm-roberta"}, "key 'data.seq_len': 16, but the model fails in training on as many"),
        ({"model_type": "gpt2", "n_positions": 8}, "key 'data.seq_len': 16, but the model sees at most 8 tokens"),
        ({"model_type": "qwen3_moe", "head_dmi": 32}, "unknown key 'model.config.head_dmi'; did you mean 'head_dim'?"),
        ({"model_type": "rwkv", "rescale_every": 6}, "key 'model.config.rescale_every': 6, and a run has 0 alone"),
    ],
)
def test_a_model_that_peers_could_not_train_is_refused_and_nothing_is_left(
    refused: Refused, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    texts(tmp_path, documents=1000)
    model = "\n".join(f"{key} = {json.dumps(value)}" for key, value in config.items())
    start, end = RUN_FILE.index("model_type"), RUN_FILE.index("[data]")
    path = str(run_file(tmp_path, RUN_FILE[:start] + model + "\n" + RUN_FILE[end:]))
    out = tmp_path / "out"
    assert message in refused("manifest", path)
    assert message in refused("seed", path, "--folder", str(out))
    assert message in refused("simulate", path, "--replicas", "1", "--device", "cpu", "--folder", str(out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.layers.0.mlp.up_proj.weight", float("nan")), ("lm_head.weight", float("-inf"))],
)
def test_weights_that_are_not_finite_are_refused_and_nothing_is_left(
    refused: Refused, tmp_path: Path, name: str, value: float
) -> None:
    import torch

    from p2p_diloco.learn.model import no_progress_bars
    from tests.support.small_models import llama

    texts(tmp_path, documents=1000)
    model: Any = llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = value
    with no_progress_bars():
        model.save_pretrained(tmp_path / "start")
    start, end = RUN_FILE.index("[model.config]"), RUN_FILE.index("[data]")
    text = RUN_FILE[:start] + '[model]\npath = "start"\n' + RUN_FILE[end:]
    path = str(run_file(tmp_path, text.replace("[data]", '[data]\ntokenizer = "bytes"')))
    out, message = tmp_path / "out", f"{name}: 1 of "
    assert message in refused("manifest", path)
    assert message in refused("seed", path, "--folder", str(out))
    assert message in refused("simulate", path, "--replicas", "1", "--device", "cpu", "--folder", str(out))
    assert not out.exists()


def test_a_sound_run_file_says_what_trying_the_model_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts(tmp_path, documents=1000)
    assert cli.main(["manifest", str(run_file(tmp_path))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "run.toml: sound" in lines[0]
    tried = r"tried +learns from and is evaluated on a row of 16 tokens: \d+\.\d s, at most \d+\.\d GB"
    assert [line for line in lines if re.match(tried, line)]
    assert re.match(r"text +1000 files, 1000 documents, each followed by a 0 byte; ", lines[-1])


def test_text_that_is_missing_or_too_short_is_named(refused: Refused, tmp_path: Path) -> None:
    path = str(run_file(tmp_path))
    assert "key 'data.path': no such file or folder: " in refused("manifest", path)
    assert "texts" in refused("seed", path, exit_code=1)
    texts(tmp_path, documents=1, text="short")
    assert "one sequence needs 17" in refused("seed", path, exit_code=1)


def test_a_run_file_without_anything_to_read_is_not_sound(refused: Refused, tmp_path: Path) -> None:
    path = str(run_file(tmp_path))
    (tmp_path / "texts").mkdir()
    assert "or .parquet files in this folder" in refused("manifest", path, exit_code=1)
    (tmp_path / "texts" / "0.jsonl").write_text('{"text": null}\n')
    assert "0 bytes read; files without text under data.text_key: 1, 15 bytes" in refused("manifest", path, exit_code=1)
    (tmp_path / "texts" / "0.jsonl").write_text('{"body": "x"}\n')
    assert "data.text_key can be: body" in refused("manifest", path, exit_code=1)


def test_a_model_folder_without_weights_is_not_sound(refused: Refused, tmp_path: Path) -> None:
    texts(tmp_path)
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "config.json").write_text('{"model_type": "llama", "hidden_size": 16}')
    head, data = RUN_FILE.split("[model.config]")[0], RUN_FILE[RUN_FILE.index("[data]") :]
    text = f'{head}[model]\npath = "start"\n{data}'.replace("seq_len = 16", 'seq_len = 16\ntokenizer = "bytes"')
    assert "start: no weights here" in refused("manifest", str(run_file(tmp_path, text)))


def untimed(out: str) -> list[str]:
    """Returns the lines without the one that says what trying the model took, which differs from time to time."""
    return [line for line in out.splitlines() if not line.startswith("tried ")]


def test_a_sound_run_file_is_summed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts(tmp_path)
    (tmp_path / "texts" / "notes.md").write_text("a note")
    assert cli.main(["manifest", str(run_file(tmp_path))]) == 0
    out, err = capsys.readouterr()
    assert "INFO tokenizing" in err
    assert len(err.splitlines()) == 1
    assert re.search(r"^text +\d+ files, \d+ documents, each followed by a 0 byte; \d+ tokens, .* held out$", out, re.M)
    assert re.search(r"^skipped +files with a suffix that is not read: 1, 6 bytes \(notes\.md\)$", out, re.M)
    assert cli.main(["manifest", str(run_file(tmp_path))]) == 0
    again, err = capsys.readouterr()
    assert (untimed(again), err) == (untimed(out), ""), "the tokens are kept"
    assert "run.toml: sound" in out
    assert "llama, 10800 parameters" in out
    assert "5, learning rate 0.7, momentum 0.9, codec int8" in out


def test_a_sound_manifest_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = manifest_file(tmp_path)
    for source in (path, tmp_path):
        assert cli.main(["manifest", str(source)]) == 0
        out = capsys.readouterr().out
        assert "signature    valid" in out
        assert OWNER.peer_id in out
        assert "2" * 64 in out


def test_a_manifest_that_its_owner_did_not_sign_is_refused(refused: Refused, tmp_path: Path) -> None:
    path = manifest_file(tmp_path, signer=Identity.generate())
    assert f"{path}: the manifest's signature is not its owner's" in refused("manifest", str(path))
    assert f"{path}: the manifest's signature is not its owner's" in refused("manifest", str(tmp_path))
    path.write_bytes(manifest_file(tmp_path).read_bytes().replace(b'"n_params":', b'"n_params":1'))
    assert "signature is not its owner's" in refused("manifest", str(path))
    path.write_text("not a manifest")
    assert f"{path}: not a signed manifest" in refused("manifest", str(path))


# -- faults ------------------------------------------------------------------------------------------------------------

CUT = '[[fault]]\naction = "cut"\nat_s = 1\npeer = "peer-{}"\n'


def test_faults_of_peers_that_will_not_be(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "faults.toml").write_text(CUT.format(2))
    message = refused("swarm", "run.toml", "--peers", "1", "--faults", "faults.toml")
    assert message == "faults.toml: key 'fault.1.peer': no peer 'peer-2'; there are seed, peer-1, random"


def test_cables_where_no_namespaces_can_be_made(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2p_diloco.lab.namespaces.why_not", lambda: "this user may not make them; root may")
    (tmp_path / "faults.toml").write_text(CUT.format(1))
    message = refused("swarm", str(run_file(tmp_path)), "--peers", "1", "--faults", "faults.toml")
    assert message == "faults.toml: cut needs network namespaces: this user may not make them; root may"
    assert not (tmp_path / "runs").exists()


# -- a run on disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    from p2p_diloco.learn.genesis import start_run

    texts(tmp_path)
    return start_run(run_file(tmp_path), tmp_path / "seed", OWNER).parent


def test_a_run_on_disk_becomes_an_export_that_writes(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    before = sorted(path.relative_to(run_folder) for path in run_folder.rglob("*"))
    assert cli.main(["export", "--folder", str(run_folder.parent), "--to", "model"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("model: outer step 0 of run tiny ")
    assert len(out.splitlines()) == 1
    assert sorted(path.relative_to(run_folder) for path in run_folder.rglob("*")) == before

    written = []
    for source in (["--export", "model"], ["--folder", str(run_folder)]):
        assert cli.main(["sample", *source, "--prompt", "All", "--max-tokens", "9", "--seed", "1"]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] != "\n"
    assert "held-out" not in written[0], "with a prompt, what is written goes on from it, and no more is"
    for source in (["--export", "model"], ["--folder", str(run_folder)]):  # without, and with text of the owner's own
        assert cli.main(["sample", *source, "--max-tokens", "9"]) == 0
        assert "held-out" not in capsys.readouterr().out
    info = Path("model/p2p_diloco.json")
    info.write_text(json.dumps(json.loads(info.read_text()) | {"prompt": "def f():\n    return \x1b[2J1\n"}))
    assert cli.main(["sample", "--export", "model", "--max-tokens", "9", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("held-out text, which no peer has trained on:\n\n  | def f():\n  |     return [2J1\n\n")
    assert "how the model goes on:\n\n  > " in out
    assert "What to expect: a model of " in out

    assert "leads to outer steps 0 to 0" in refused(
        "export", "--folder", str(run_folder), "--to", "model", "--step", "1"
    )
    assert "exists and is no earlier export" in refused("export", "--folder", str(run_folder), "--to", "texts")


# -- options from elsewhere --------------------------------------------------------------------------------------------


def parsed(*argv: str) -> dict[str, Any]:
    _, bound, _ = cli.app.parse_args(argv, exit_on_error=False, print_error=False)
    return dict(bound.arguments)


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "peer.toml"
    path.write_text(
        f'threads = 1\nname = "file"\ninitial_peers = ["{MADDR}"]\nuse-relay = false\nrelay-service = true\n'
    )
    found = parsed("peer", "--config", str(path))
    assert (found["threads"], found["initial_peers"]) == (1, (MADDR,))
    assert found["node"].name == "file"
    assert (found["node"].use_relay, found["node"].relay_service) == (False, True)

    monkeypatch.setenv("P2P_DILOCO_THREADS", "2")
    monkeypatch.setenv("P2P_DILOCO_INITIAL_PEERS", f"{MADDR} /dns/b")
    monkeypatch.setenv("P2P_DILOCO_USE_RELAY", "true")
    monkeypatch.setenv("P2P_DILOCO_CONFIG", str(path))
    found = parsed("peer")
    assert (found["threads"], found["initial_peers"]) == (2, (MADDR, "/dns/b"))
    assert (found["node"].name, found["node"].use_relay) == ("file", True)

    monkeypatch.setenv("P2P_DILOCO_PEER_THREADS", "3")
    assert parsed("peer")["threads"] == 3
    found = parsed("peer", "--threads", "4", "--no-use-relay", "--initial-peers", "/dns/c")
    assert (found["threads"], found["node"].use_relay, found["initial_peers"]) == (4, False, ("/dns/c",))


def test_the_upload_rate_is_given_in_megabytes(tmp_path: Path) -> None:
    for command in (["peer"], ["seed", "run.toml"]):
        for argv, rate in (([], None), (["--max-upload", "2.5"], 2_500_000.0), (["--max-upload", "0.1"], 100_000.0)):
            node = replace(parsed(*command, "--name", "x", *argv)["node"], folder=tmp_path)
            config = peer_config(node, command[0], [])
            assert config.max_upload_bytes_per_s == rate
            assert PeerConfig.model_validate_json(config.model_dump_json()) == config


def test_a_config_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "peer.toml").write_bytes(b"\xef\xbb\xbfthreads = 3\r\n")
    assert parsed("peer", "--config", "peer.toml")["threads"] == 3


def test_a_tilde_is_the_home_folder_wherever_an_option_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    home = tmp_path / "home"
    assert parsed("seed", "~/run.toml")["run_file"] == home / "run.toml"
    assert parsed("peer", "--data=~/text")["data"] == home / "text"
    assert parsed("experiment", "drop", "--folder", "~")["folder"] == home
    monkeypatch.setenv("P2P_DILOCO_SEED_FOLDER", "~/x")
    monkeypatch.setenv("P2P_DILOCO_IDENTITY", "~/key")
    (home / "seed.toml").write_text("config = 'no'".replace("config = 'no'", "name = '~/n'"))
    node = parsed("seed", "run.toml", "--config", "~/seed.toml")["node"]
    assert (node.folder, node.identity, node.name) == (home / "x", home / "key", "~/n")
    (home / "peer.toml").write_text("data = '~/text'")
    assert parsed("peer", "--config", "~/peer.toml")["data"] == home / "text"
    assert parsed("peer", "--folder", "./~x")["node"].folder == Path("~x")


def test_a_home_that_there_is_not_is_one_line(refused: Refused) -> None:
    assert "--folder: ~no-such-user/x: no home folder of that name" in refused(
        "seed", "run.toml", "--folder", "~no-such-user/x"
    )


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "some/file: disk full, free 1 MB or move the folder"),
        (errno.EDQUOT, "some/file: disk full, free 1 MB or move the folder"),
        (errno.EFBIG, "some/file: larger than a file may be here; raise the limit (ulimit -f) or move the folder"),
    ],
)
def test_a_full_disk_that_nobody_else_has_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, message: str
) -> None:
    failing(monkeypatch, OSError(number, os.strerror(number), "some/file"))
    assert cli.main(EXPORT) == 1
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_full_temporary_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"))
    assert cli.main(EXPORT) == 1
    assert "error: no temporary folder can be written: free space in /tmp, or set TMPDIR" in capsys.readouterr().err


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2P_DILOCO_FOLDER", "")
    monkeypatch.setenv("P2P_DILOCO_PEER_INITIAL_PEERS", " ")
    assert not parsed("peer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--config peer.toml: no such file"),
        ("threads =", "--config peer.toml: not valid TOML"),
        ("\udcff", "--config peer.toml: not a text file in UTF-8"),
        ("name = '\udcff'", "--config peer.toml: not a text file in UTF-8 (at byte 8); save it as UTF-8"),
        ("thread = 1", "peer.toml: unknown key 'thread'; did you mean threads?"),
        ("[peer]\nthreads = 1", "peer.toml: unknown key 'peer'; "),
        ('config = "x"', "peer.toml: unknown key 'config'; "),
        ("threads = 0", 'Invalid value "0" for [threads] provided by peer.toml. Must be >= 1.'),
        ('threads = "two"', "from peer.toml"),
        ("threads = [1]", "threads"),
        ("[threads]\nx = 1", "threads"),
        ("initial-peers = []", "--initial-peers is empty"),
        ('initial-peers = ["x"]', "address 'x'"),
        ('initial-peers = "x"', "address 'x'"),
        ("use-relay = 'perhaps'", "use-relay"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line(
    refused: Refused, tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "peer.toml").write_bytes(text.encode(errors="surrogateescape"))
    assert message in refused("peer", "--config", "peer.toml")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "P2P_DILOCO_PEER_THREDS",
            "1",
            "unknown environment variable P2P_DILOCO_PEER_THREDS; did you mean P2P_DILOCO_PEER_THREADS?",
        ),
        ("P2P_DILOCO_THREADS", "two", 'unable to convert "two" into int'),
        ("P2P_DILOCO_CONFIG", "nowhere.toml", "--config nowhere.toml: no such file"),
        ("P2P_DILOCO_INITIAL_PEERS", "x", "address 'x'"),
        ("P2P_DILOCO_ELSE", "x", "--initial-peers is empty"),
    ],
)
def test_a_mistake_in_the_environment_is_one_line(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert message in refused("peer")


# -- how a command ends ------------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("p2p_diloco.ledger.folder.find_run", fail)
    monkeypatch.setattr("p2p_diloco.core.runfile.RunSpec.load", fail)


EXPORT = ("export", "--to", "x", "--folder", "y")


def test_what_nobody_expected_is_one_line_unless_debugging(
    monkeypatch: pytest.MonkeyPatch, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, RuntimeError("two\nlines \x1b[2J"))
    message = "internal error: RuntimeError: two lines [2J; run again with --debug and report it"
    assert refused(*EXPORT, exit_code=1) == message
    assert cli.main([*EXPORT, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("P2P_DILOCO_DEBUG", "1")
    assert cli.main(EXPORT) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_exit_code_is_the_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, UsageError("mend this"))
    assert cli.main(EXPORT) == 2
    assert capsys.readouterr().err == "error: mend this\n"
    failing(monkeypatch, Stopped("stopped"))
    assert cli.main(EXPORT) == 0
    assert "error" not in capsys.readouterr().err


def test_an_interruption_is_no_failure_of_a_command_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert cli.main(EXPORT) == 130
    assert cli.main(["seed", "run.toml"]) == 0


def check_quiet(script: str, exit_code: int) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (exit_code, "", "")


STARTING = """
import os, signal, sys
from p2p_diloco.cli import cli
import p2p_diloco.core.manifest

def load(path):
    os.kill(os.getpid(), signal.{signal})
    raise ImportError("an import that was interrupted")

p2p_diloco.core.runfile.RunSpec.load = load
sys.exit(cli.main([{command!r}, "x.toml"]))
"""


@pytest.mark.parametrize(
    ("signal", "command", "exit_code"),
    [("SIGINT", "seed", 0), ("SIGTERM", "seed", 0), ("SIGINT", "manifest", 130), ("SIGTERM", "manifest", 143)],
)
def test_a_signal_before_anything_is_started(signal: str, command: str, exit_code: int) -> None:
    script = STARTING.format(signal=signal, command=command)
    check_quiet(script, exit_code)


IMPORTING = """
import signal, sys, types, weakref
from p2p_diloco.__main__ import main

class Lock:
    pass

def run_command():
    lock = Lock()
    callback = weakref.ref(lock, lambda _: signal.raise_signal(signal.{signal}))
    del lock
    print("went on")

sys.modules["p2p_diloco.cli.cli"] = types.SimpleNamespace(main=run_command)
sys.argv = ["p2p-diloco", {command!r}]
main()
"""


@pytest.mark.parametrize(
    ("signal", "command", "exit_code"),
    [("SIGINT", "peer", 0), ("SIGTERM", "monitor", 0), ("SIGINT", "status", 130), ("SIGTERM", "status", 143)],
)
def test_a_signal_is_not_lost_in_a_callback_of_the_imports(signal: str, command: str, exit_code: int) -> None:
    """importlib's locks have such callbacks: whatever is raised in one is ignored."""
    script = IMPORTING.format(signal=signal, command=command)
    check_quiet(script, exit_code)


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "p2p_diloco", "manifest", str(manifest_file(tmp_path))]
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_log_shows_what_peers_say_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    cli.set_up_logging("status", verbose=False)
    logging.getLogger("p2p_diloco.peer.peer").info("peer says \x1b[2J\u202e%s", "\x07")
    logging.getLogger("p2p_diloco.peer.peer").debug("unseen")
    logging.getLogger("some.library").info("unseen")
    out, err = capsys.readouterr()
    assert err.endswith(" INFO peer says [2J\n")
    assert len(err.splitlines()) == 1
    assert out == ""


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("command", ["peer", "seed"])
def test_a_refused_identity_leaves_no_empty_folder(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, there: bool
) -> None:
    """One that was there before stays, also when it is empty."""
    error = UsageError("identity bad.key: not an Ed25519 libp2p key")

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("p2p_diloco.learn.swarm.Swarm.find", refuse)
    monkeypatch.setattr("p2p_diloco.learn.genesis.start_run", refuse)
    run_file(tmp_path)
    if there:
        (tmp_path / "own").mkdir()
    argv = ("run.toml",) if command == "seed" else ("--initial-peers", MADDR)
    assert refused(command, *argv, "--folder", "own") == str(error)
    assert (tmp_path / "own").exists() == there


@pytest.mark.parametrize("asked", [True, False])
def test_a_peer_that_was_asked_to_stop_says_so_when_it_has_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: bool
) -> None:
    """As a seed does."""

    def train(_swarm: object, _choices: object, stop: Stop) -> None:
        stop.requested = asked

    swarm = SimpleNamespace(manifest=None, maddrs=[], wait_for_state=lambda: None)
    monkeypatch.setattr("p2p_diloco.learn.swarm.Swarm.find", lambda *_, **__: nullcontext(swarm))
    monkeypatch.setattr("p2p_diloco.learn.train.require_text", lambda *_: None)
    monkeypatch.setattr("p2p_diloco.learn.train.train", train)
    assert cli.main(["peer", "--initial-peers", MADDR]) == 0
    assert capsys.readouterr().err.endswith("INFO stopped\n") == asked


def test_a_folder_without_a_run_is_refused_before_torch_is_imported() -> None:
    script = (
        "import sys; from p2p_diloco.cli import cli; "
        "code = cli.main(['export', '--folder', 'nowhere', '--to', 'x']); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere: no run here")
