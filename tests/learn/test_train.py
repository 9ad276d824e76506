"""One peer's training, against a network process that follows a script: what is kept, what is taken up again."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from benchmarks.stage import write_texts
from p2p_diloco.core.errors import DataError, LedgerError, NetworkError
from p2p_diloco.core.interruption import Stop
from p2p_diloco.core.manifest import RunManifest
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.learn import train as training
from p2p_diloco.learn.inner import INNER_FILE, InnerOptimizer, Place, place_in_run
from p2p_diloco.learn.swarm import Swarm
from p2p_diloco.learn.train import (
    SMALL_MODEL,
    TrainConfig,
    good_threads,
    keep,
    open_run_corpus,
    resume,
    train,
)
from p2p_diloco.ledger.disk import TEMPORARY
from p2p_diloco.peer.control import Evaluated, InnerStep, Leave, OuterResult, OuterStep
from tests.support.scripted import TOKENS, ScriptedNetwork, head_at, joined, outcome, scripted_manifest
from tests.support.small_models import llama, vector_of

STUCK_S = 20.0
"""A test that waits for longer has failed."""
FAILED = outcome(0, committed=False, reason="no leader")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "text"
    write_texts(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, text: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(text.with_name("cache")))


def script(manifest: RunManifest, *outcomes: OuterResult, step: int = 0, evaluate: bool = False) -> ScriptedNetwork:
    network = ScriptedNetwork(manifest, step=step, evaluate=evaluate)
    network.theta[:] = vector_of(llama(0))
    network.outcomes.extend(outcomes)
    return network


def trained(
    network: ScriptedNetwork, manifest: RunManifest, folder: Path, text: Path, *, stop_after: int | None = None
) -> None:
    """As ``p2p-diloco peer`` does it. ``stop_after``: inner steps, after which a signal comes."""
    stop = Stop()
    folder.mkdir(exist_ok=True)
    with joined(network, manifest, folder) as swarm:
        if stop_after is not None:
            stop_in(swarm, stop, stop_after)
        train(swarm, TrainConfig(device="cpu", threads=1, data=text), stop)


def stop_in(swarm: Swarm, stop: Stop, inner_steps: int) -> None:
    report = swarm.report

    def report_and_stop(loss: float, tokens: int) -> None:
        report(loss, tokens)
        stop.requested = swarm.tokens == inner_steps * TOKENS

    swarm.report = report_and_stop  # type: ignore[method-assign]


def kept_in(folder: Path) -> dict[str, str]:
    with safe_open(folder / INNER_FILE, "pt") as file:
        return dict(file.metadata())


def kept_beside_training(folder: Path) -> dict[str, str]:
    """As ``kept_in``, of what another thread is writing still, perhaps."""
    until_s = time.monotonic() + STUCK_S
    while not (folder / INNER_FILE).exists() and time.monotonic() < until_s:
        time.sleep(0.01)
    return kept_in(folder)


# -- an interruption changes nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_peer_that_was_stopped_and_comes_back_offers_what_it_would_have_offered(
    tmp_path: Path, text: Path, stop_after: int
) -> None:
    manifest = scripted_manifest(outer_steps=1)
    alone = script(manifest, outcome(1))
    trained(alone, manifest, tmp_path / "alone", text)

    trained(script(manifest), manifest, tmp_path / "stopped", text, stop_after=stop_after)
    again = script(manifest, outcome(1))
    trained(again, manifest, tmp_path / "stopped", text)
    assert again.offered == alone.offered
    assert [line.tokens for line in again.lines(OuterStep)] == [4 * TOKENS]
    assert [line.inner_step for line in again.lines(InnerStep)] == list(range(stop_after + 1, 5))


def test_also_after_a_round_that_failed(tmp_path: Path, text: Path) -> None:
    manifest = scripted_manifest(outer_steps=1)
    alone = script(manifest, FAILED, outcome(1))
    trained(alone, manifest, tmp_path / "alone", text)
    assert [line.tokens for line in alone.lines(OuterStep)] == [4 * TOKENS, 8 * TOKENS]

    trained(script(manifest, FAILED), manifest, tmp_path / "stopped", text, stop_after=6)
    assert (kept_in(tmp_path / "stopped")["inner_step"], kept_in(tmp_path / "stopped")["tokens"]) == ("2", "96")
    again = script(manifest, outcome(1))
    trained(again, manifest, tmp_path / "stopped", text)
    assert again.offered == alone.offered[1:]
    assert [line.tokens for line in again.lines(OuterStep)] == [8 * TOKENS]


def test_batches_go_on_after_a_failure_and_the_schedule_begins_again(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Place] = []

    def noted(spec: RunSpec, outer_step: int, batch_step: int, inner_step: int) -> Place:
        places.append(place_in_run(spec, outer_step, batch_step, inner_step))
        return places[-1]

    monkeypatch.setattr("p2p_diloco.learn.train.place_in_run", noted)
    manifest = scripted_manifest(outer_steps=2)
    kept = outcome(1, committed=False, adopted=True, kept=True, reason="behind")
    trained(script(manifest, FAILED, kept, outcome(2)), manifest, tmp_path, text)
    assert [place.batch_step for place in places] == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert [place.schedule_step for place in places] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda kept: {**kept, "head": head_at(1)}, "of another head"),
        (lambda kept: {**kept, "local": kept["local"][1:]}, "of another model"),
        (lambda kept: {**kept, "local": kept["local"][:0], "inner_step": 0, "tokens": 0}, "as after an outer step"),
        (lambda kept: {**kept, "tokens": 0}, "without tokens"),
    ],
)
def test_where_local_is_of_no_use_the_moments_are(
    tmp_path: Path, spoil: Callable[[dict[str, object]], dict[str, object]], what: str
) -> None:
    manifest = scripted_manifest()
    before = InnerOptimizer(llama(3), manifest.spec, torch.device("cpu"))
    learn(before)
    kept = spoil({"local": vector_of(before.model), "head": head_at(0), "inner_step": 2, "tokens": 2 * TOKENS})
    local = kept.pop("local")
    before.save(tmp_path / INNER_FILE, local, **kept)  # type: ignore[arg-type]
    with joined(script(manifest), manifest, tmp_path) as swarm:
        model = llama(1)
        swarm.load_into(model)
        inner = InnerOptimizer(model, manifest.spec, torch.device("cpu"))
        resume(swarm, model, inner)
        assert np.array_equal(vector_of(model), swarm.theta), what
        assert (swarm.inner_step, swarm.tokens_since_theta, swarm.tokens_this_step) == (0, 0, 0)
        moments, expected = inner.moments()[0], before.moments()[0]
        assert len(expected) > 0
        assert all(torch.equal(moments[name], moment) for name, moment in expected.items())


def learn(inner: InnerOptimizer) -> None:
    """One step of AdamW, on gradients of ones."""
    for parameter in inner.parameters:
        parameter.grad = torch.ones_like(parameter)
    inner.optimizer.step()


# -- what is kept, and when --------------------------------------------------------------------------------------------


def test_the_state_is_kept_at_snapshot_steps_without_local(tmp_path: Path, text: Path) -> None:
    manifest = scripted_manifest(snapshot_every=2)
    network = script(manifest, outcome(1), outcome(2))
    with pytest.raises(NetworkError, match="no more outer steps"):
        trained(network, manifest, tmp_path, text)
    kept = kept_beside_training(tmp_path)
    assert (kept["head"], kept["inner_step"], kept["tokens"]) == (head_at(2), "0", "0")


def test_what_a_round_left_of_local_is_kept_with_all_tokens_that_it_has_seen(tmp_path: Path, text: Path) -> None:
    manifest = scripted_manifest(snapshot_every=1)
    network = script(manifest, outcome(1, committed=False, adopted=True, kept=True, reason="behind"))
    with pytest.raises(NetworkError, match="no more outer steps"):
        trained(network, manifest, tmp_path, text)
    kept = kept_beside_training(tmp_path)
    assert (kept["head"], kept["inner_step"], kept["tokens"]) == (head_at(1), "0", str(4 * TOKENS))
    with safe_open(tmp_path / INNER_FILE, "np") as file:
        assert file.get_tensor("local").tobytes() == network.offered[0]


def test_at_the_end_it_is_kept_as_it_is(tmp_path: Path, text: Path) -> None:
    manifest = scripted_manifest(snapshot_every=1)
    trained(script(manifest, outcome(1)), manifest, tmp_path, text, stop_after=7)
    kept = kept_in(tmp_path)
    assert (kept["head"], kept["inner_step"], kept["tokens"]) == (head_at(1), "3", str(3 * TOKENS))
    assert set(json.loads(kept["steps"]).values()) == {7.0}


def test_of_a_model_elsewhere_than_in_shared_memory_its_parameters_are_kept(tmp_path: Path) -> None:
    """As of one on a GPU: local is what it was when the last outer step asked for it."""
    manifest = scripted_manifest()
    with joined(script(manifest), manifest, tmp_path) as swarm:
        swarm.begin()  # and it is not bound to a model
        inner = InnerOptimizer(llama(1), manifest.spec, torch.device("cpu"))
        keep(swarm, inner)
        kept = inner.load(tmp_path / INNER_FILE)
    assert kept is not None
    assert np.array_equal(kept[0], vector_of(inner.model))


def test_a_full_disk_ends_training(tmp_path: Path, text: Path) -> None:
    """While it goes on, and not only at the next snapshot step, which never comes. The script has outer steps for
    longer than a write takes to fail."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / (INNER_FILE + TEMPORARY)).symlink_to(full)
    manifest = scripted_manifest(inner_steps=1, outer_steps=1000, snapshot_every=2)
    network = script(manifest, *(outcome(step, planned=1) for step in (2, *range(3, 600, 2))))
    with pytest.raises(LedgerError, match="disk full, free 1 MB or move the folder"):
        trained(network, manifest, tmp_path, text)
    assert network.lines(Leave)[0].reason == "LedgerError"
    assert not (tmp_path / INNER_FILE).exists()


def test_moments_that_led_astray_are_forgotten(tmp_path: Path, text: Path) -> None:
    manifest = scripted_manifest()
    diverged = outcome(1, committed=False, adopted=True, reason="diverged")
    trained(script(manifest, diverged), manifest, tmp_path, text, stop_after=6)
    assert set(json.loads(kept_in(tmp_path)["steps"]).values()) == {2.0}


def test_theta_is_evaluated_by_whose_turn_it_is(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 103.5, 200.0, 202.0])
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    manifest = scripted_manifest(outer_steps=2)
    network = script(manifest, outcome(1), outcome(2, evaluate=True), evaluate=True)
    trained(network, manifest, tmp_path, text)
    first, second = network.lines(Evaluated)
    assert (first.step, second.step) == (0, 2)
    assert (first.tokens, second.tokens) == (64, 64)
    assert first.held_out_loss == pytest.approx(np.log(256), abs=0.2)
    assert second.held_out_loss is not None
    assert first.held_out_loss is not None
    assert second.held_out_loss < first.held_out_loss
    assert (first.seconds, second.seconds) == (3.5, 2.0)


# -- before it begins --------------------------------------------------------------------------------------------------


def test_a_peer_is_told_what_was_read_of_its_text(tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = scripted_manifest(outer_steps=1)
    with caplog.at_level("INFO"):
        trained(script(manifest, outcome(1)), manifest, tmp_path, text)
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("text: ")]
    assert len(told) == 1
    assert re.fullmatch(r"text: \d+ files, \d+ documents, each followed by .*; \d+ tokens, .* held out", told[0])


def test_text_that_is_not_the_runs_is_refused(text: Path) -> None:
    manifest = scripted_manifest()
    assert open_run_corpus(manifest, text, "me").vocab_size == manifest.vocab_size
    another = manifest.model_copy(update={"data_fingerprint": "f" * 64})
    with pytest.raises(DataError, match="is not the one that this run uses"):
        open_run_corpus(another, text, "me")


def test_small_models_have_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert [good_threads(n) for n in (1, SMALL_MODEL - 1, SMALL_MODEL, 10 * SMALL_MODEL)] == [1, 1, 7, 7]


@pytest.mark.parametrize(
    ("committed", "adopted", "reason", "line"),
    [
        (True, False, "", "outer step 7: group of 3, loss 2.5000, 32 tokens/s"),
        (False, True, "behind", "outer step 7: taken over from the swarm (behind)"),
        (False, True, "diverged", "outer step 7: back to theta (diverged); what was learned since then is lost"),
        (False, True, "repaired", "outer step 7: back to theta (repaired); what was learned since then is lost"),
        (False, False, "alone", "outer step 7: training alone, waiting for peers"),
        (False, False, "failed", "outer step 7: the round did not commit (failed); training on"),
    ],
)
def test_an_outer_step_is_one_line_that_says_what_became_of_it(
    committed: bool, adopted: bool, reason: str, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    swarm: Any = SimpleNamespace(step=7, loss=2.5, tokens_per_s=32.0)
    result = OuterResult(committed=committed, adopted=adopted, reason=reason, step=7, head="ab", group=3)
    with caplog.at_level(logging.INFO):
        training.log_result(swarm, result)
    [message] = caplog.messages
    assert message.startswith(line)
