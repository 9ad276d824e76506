"""K replicas without a network: against the textbook, against plain torch, and against themselves after a stop."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.codecs import CODECS
from p2p_diloco.core.errors import UsageError
from p2p_diloco.core.outer import OuterState
from p2p_diloco.core.update import Update
from p2p_diloco.lab import own_texts, simulate, trainers
from p2p_diloco.lab import simulation as simulation_module
from p2p_diloco.lab.checkpoint import CHECKPOINT_FILE
from p2p_diloco.lab.recount import Past
from p2p_diloco.lab.simulate import open_simulation, run
from p2p_diloco.lab.simulation import Simulation
from p2p_diloco.lab.simulation_result import SUMMARY_FILE
from p2p_diloco.lab.trainers import SimulatedTrainer
from p2p_diloco.learn.data import Corpus
from p2p_diloco.learn.inner import InnerOptimizer, Place, draws_drop, place_in_run
from p2p_diloco.learn.model import build_model, evaluate, load_model, loss_of
from p2p_diloco.learn.parameters import read_parameters, write_parameters
from p2p_diloco.ledger.folder import find_run, load_state
from tests.support.reference import diloco
from tests.support.small_models import vector_of
from tests.support.small_runs import SMALL, small_run

PLAIN = {"inner.warmup_steps": 0, "inner.min_lr_ratio": 1.0, "inner.weight_decay": 0.0, "inner.clip": 1e9}
"""An inner optimizer that is torch's, as it is."""
MEAN = {"outer.lr": 1.0, "outer.momentum": 0.0}
WITH_DROPOUT = {"config": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def open_small(folder: Path, changes: Mapping[str, Any] | None = None, name: str = "out") -> Simulation:
    return open_simulation(small_run(folder, changes), folder / name, base=folder, device="cpu", threads=1)


def theta_of(simulation: Simulation) -> Vector:
    for _ in run(simulation):
        pass
    return simulation.state.theta


# -- oracles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outer_lr", "momentum"), [(0.7, 0.9), (1.0, 0.0)])
def test_it_is_textbook_diloco(tmp_path: Path, outer_lr: float, momentum: float) -> None:
    """Of three replicas, one of half the speed, on the very batches that ours draw."""
    changes = PLAIN | {"simulate.replicas": 3, "outer.lr": outer_lr, "outer.momentum": momentum}
    simulation = open_small(tmp_path, changes)
    spec = simulation.what.run
    model = build_model(simulation.manifest.transformers_config, seed=None)
    write_parameters(model, simulation.state.theta)

    def loss(replica_model: torch.nn.Module, replica: int, step: int) -> torch.Tensor:
        outer_step, inner_step = divmod(step, spec.inner.steps)
        batch = simulation.held_out.batch(
            run_seed=spec.seed,
            peer_id=simulation.replicas[replica].name,
            step=place_in_run(spec, outer_step, inner_step, inner_step).batch_step,
            batch_size=spec.inner.batch_size,
            seq_len=spec.data.seq_len,
        )
        return loss_of(replica_model, torch.from_numpy(batch))

    diloco(
        model,
        loss,
        functools.partial(torch.optim.AdamW, lr=spec.inner.lr, betas=(0.9, 0.95), weight_decay=0.0),
        weights=[1.0, 1.0, 1.0],
        inner_steps=spec.inner.steps,
        outer_steps=spec.outer.steps,
        outer_lr=outer_lr,
        outer_momentum=momentum,
    )
    expected = np.empty_like(simulation.state.theta)
    read_parameters(model, expected)
    np.testing.assert_allclose(theta_of(simulation), expected, rtol=0, atol=1e-5)


def test_one_replica_and_a_plain_mean_is_plain_training(tmp_path: Path) -> None:
    simulation = open_small(tmp_path, MEAN | {"simulate.replicas": 1})
    spec = simulation.what.run
    model = build_model(simulation.manifest.transformers_config, seed=None)
    write_parameters(model, simulation.state.theta)
    inner = InnerOptimizer(model, spec, torch.device("cpu"))
    for step in range(spec.outer.steps):
        for k in range(spec.inner.steps):
            inner.step(simulation.held_out, peer_id="replica-1", at=place_in_run(spec, step, k, k))
    alone = np.empty_like(simulation.state.theta)
    read_parameters(model, alone)
    np.testing.assert_allclose(theta_of(simulation), alone, rtol=0, atol=1e-6)


def test_the_curve_is_the_held_out_loss_of_theta(tmp_path: Path) -> None:
    simulation = open_small(tmp_path, {"simulate.evaluate_every": 2})
    theta_of(simulation)
    assert [point.held_out_loss is not None for point in simulation.curve] == [True, False, True, True]
    model = build_model(simulation.manifest.transformers_config, seed=None)
    write_parameters(model, simulation.state.theta)
    batches = simulation.held_out.held_out_batches(batch_size=8, seq_len=16, max_tokens=512)
    assert simulation.curve[-1].held_out_loss == pytest.approx(evaluate(model, batches), rel=1e-5)
    tokens = [point.tokens for point in simulation.curve]
    assert tokens == [4 * step * simulation.what.run.inner.steps * 64 for step in range(4)]
    assert simulation.curve[-1].sent_bytes == 3 * 4 * simulation.manifest.n_params


# -- what studies vary -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_stays_close_to_fp32(tmp_path: Path, codec: str) -> None:
    exact = theta_of(open_small(tmp_path, name="exact"))
    coded = theta_of(open_small(tmp_path, {"outer.codec": codec}, name="coded"))
    moved = float(np.abs(exact - open_small(tmp_path, name="start").state.theta).max())
    assert float(np.abs(coded - exact).max()) <= (0.0 if codec == "fp32" else 0.3 * moved)


def test_a_drop_is_that_of_a_peer_of_this_name(tmp_path: Path) -> None:
    """Who is dropped is in no part; with half of all dropped, some are, and some are not."""
    simulation = open_small(tmp_path, {"simulate.drop": 0.5, "outer.steps": 6})
    heads = []
    for step in range(6):
        members = simulation.replicas
        dropped = {replica.name for replica in members if draws_drop(0, replica.name, step, 0.5)}
        heads.append((len(dropped), simulation.outer_step().head))
    assert {0 < count < 4 for count, _ in heads} == {True, False} or len({count for count, _ in heads}) > 1
    assert len({head for _, head in heads}) == 6


def test_where_nobody_contributes_theta_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation_module, "draws_drop", lambda *_: True)
    simulation = open_small(tmp_path, MEAN)
    before = simulation.state.theta.copy()
    assert simulation.outer_step().step == 1
    assert np.array_equal(simulation.state.theta, before)
    assert all(np.array_equal(replica.local, before) for replica in simulation.replicas)


def test_keep_goes_on_from_its_own_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lost contribution comes with the next one, and counts with the tokens of both."""
    monkeypatch.setattr(
        simulation_module, "draws_drop", lambda _seed, name, step, _p: name == "replica-2" and step == 0
    )
    simulation = open_small(tmp_path, MEAN | {"round.on_missed": "keep", "simulate.replicas": 2})
    simulation.outer_step()
    first, second = simulation.replicas
    assert np.array_equal(first.local, simulation.state.theta)
    assert not np.array_equal(second.local, simulation.state.theta)
    tokens = simulation.what.run.inner.steps * simulation.what.run.tokens_per_inner_step
    assert (first.tokens, second.tokens) == (0, tokens)
    simulation.outer_step()
    assert second.tokens == 0
    assert np.array_equal(second.local, simulation.state.theta)


def test_the_divisor_decides_how_far_one_contribution_of_two_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation_module, "draws_drop", lambda _seed, name, _step, _p: name == "replica-2")
    moved = {}
    for divisor in ("arrived", "all"):
        changes = MEAN | {"simulate.replicas": 2, "simulate.divisor": divisor}
        simulation = open_small(tmp_path, changes, name=divisor)
        before = simulation.state.theta.copy()
        simulation.outer_step()
        moved[divisor] = simulation.state.theta - before
    np.testing.assert_allclose(moved["all"], 0.5 * moved["arrived"], rtol=0, atol=1e-7)


def test_slow_replicas_count_with_their_tokens(tmp_path: Path) -> None:
    simulation = open_small(tmp_path, {"simulate.replicas": 2, "simulate.speeds": [1.0, 0.5]})
    point = simulation.outer_step()
    assert point.tokens == (4 + 2) * simulation.what.run.tokens_per_inner_step


def test_who_trained_alone_for_long_claims_no_more_than_a_peer_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two who made 24 inner steps of 4, in two offers, and one who made 4: 16 count of each of the two."""
    steps = {"a": (20, 4), "b": (4,), "c": (24,)}
    past = Past(names=("a", "b", "c"), inner_steps={0: steps}, dropped={0: frozenset()}, heads={})
    simulation = open_simulation(
        small_run(tmp_path, MEAN), tmp_path / "out", base=tmp_path, device="cpu", threads=1, past=past
    )
    found, reduce = list[Update](), simulation._reduce

    def noted(members: Sequence[SimulatedTrainer], dropped: set[str]) -> tuple[Update, int]:
        update, sent_bytes = reduce(members, dropped)
        found.append(update)
        return update, sent_bytes

    monkeypatch.setattr(simulation, "_reduce", noted)
    simulation.outer_step()
    each = simulation.what.run.tokens_per_inner_step
    assert dict(found[0].header.contributors) == {"a": 16 * each, "b": 4 * each, "c": 16 * each}


def test_a_pool_that_grows(tmp_path: Path) -> None:
    """Who comes later starts from theta, with new moments."""
    simulation = open_small(tmp_path, {"simulate.replicas": [1, 2, 4]})
    tokens = [simulation.outer_step().tokens for _ in range(3)]
    step_tokens = 4 * simulation.what.run.tokens_per_inner_step
    assert tokens == [step_tokens, 3 * step_tokens, 7 * step_tokens]


def test_a_late_update_is_merged_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"simulate.replicas": 1, "simulate.delay": 2, "inner.lr": 1e-12, "simulate.merge": 0.25}
    simulation = open_small(tmp_path, changes)
    replica = simulation.replicas[0]
    replica.local += np.float32(1.0)  # as if it had learned that
    simulation.outer_step()
    own = replica.local.copy()
    lates, step = list[bool](), replica.inner.step

    def noted(*args: Any, **named: Any) -> float:
        lates.append(replica.late)
        return step(*args, **named)

    monkeypatch.setattr(replica.inner, "step", noted)
    replica.learn(simulation.what, simulation.state, [4])
    assert lates == [True, True, False, False]
    assert np.allclose(replica.local, 0.25 * own + 0.75 * simulation.state.theta, atol=1e-6)


def test_who_was_away_or_dropped_is_not_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes theta at once: who is away has nothing to merge, and what was dropped is lost."""
    changes = {"simulate.replicas": [2, 1, 2], "simulate.delay": 2, "outer.steps": 6}
    simulation = open_small(tmp_path, changes)
    dropped = set[str]()
    monkeypatch.setattr(simulation, "_is_dropped", lambda step, replica: replica.name in dropped)
    lates = []
    for _ in range(5):
        simulation.outer_step()
        lates.append([replica.late for replica in simulation.replicas])
    assert lates == [[True, True], [True, True], [True, False], [True, False], [True, True]]
    assert np.array_equal(simulation.replicas[1].local, simulation.state.theta) is False

    simulation = open_small(tmp_path, {"simulate.replicas": 2, "simulate.delay": 2}, name="dropped")
    monkeypatch.setattr(simulation, "_is_dropped", lambda step, replica: replica is simulation.replicas[1])
    simulation.outer_step()
    assert [replica.late for replica in simulation.replicas] == [True, False]
    assert np.array_equal(simulation.replicas[1].local, simulation.state.theta)


def test_who_diverges_takes_theta_and_contributes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a peer does; the step is that of those whose parameters are finite."""
    without = open_small(tmp_path, {"simulate.replicas": 2}, name="without")
    monkeypatch.setattr(without, "_is_dropped", lambda step, replica: replica is without.replicas[1])
    without.outer_step()

    simulation = open_small(tmp_path, {"simulate.replicas": 2})
    one = simulation.replicas[1]
    learn = one.learn

    def diverge(*arguments: Any) -> list[float]:
        losses = learn(*arguments)
        one.local[0] = np.nan
        return losses

    monkeypatch.setattr(one, "learn", diverge)
    simulation.outer_step()
    assert np.array_equal(simulation.state.theta, without.state.theta)
    assert np.array_equal(one.local, simulation.state.theta)
    assert one.inner.moments() == ({}, {})


def test_a_theta_that_is_not_finite_ends_it_with_a_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = open_small(tmp_path)
    step = simulation.rule.step

    def overflow(state: OuterState, update: Update) -> None:
        step(state, update)
        if state.step == 2:
            state.theta[0] = np.inf

    monkeypatch.setattr(simulation.rule, "step", overflow)
    points = list(run(simulation))
    assert [point.step for point in points] == [1, 2]
    assert points[-1].held_out_loss is None
    assert "not finite" in points[-1].line()
    assert json.loads((tmp_path / "out" / SUMMARY_FILE).read_text())["curve"][-1]["held_out_loss"] is None
    assert open_small(tmp_path).done


def test_pruning_and_two_bits_leave_less_of_an_outer_gradient(tmp_path: Path) -> None:
    for changes in ({"simulate.prune": 0.5}, {"simulate.quantize": "int2"}):
        name = "-".join(changes)
        simulation = open_small(tmp_path, MEAN | {"simulate.replicas": 1} | changes, name=name)
        before = simulation.state.theta.copy()
        simulation.outer_step()
        still = float((simulation.state.theta == before).mean())
        assert 0.3 < still < 0.9, changes
    assert simulation.curve[-1].sent_bytes < simulation.manifest.n_params


def test_shards_of_ones_own_are_other_batches(tmp_path: Path) -> None:
    simulation = open_small(tmp_path, {"simulate.shards": "non-iid", "simulate.replicas": 2})
    first, second = (replica.corpus.train for replica in simulation.replicas)
    assert len(first) + len(second) == len(simulation.held_out.train)
    assert simulation.outer_step().step == 1


def test_a_warm_start_is_made_once_and_changes_the_genesis(tmp_path: Path) -> None:
    cold = open_small(tmp_path, name="cold")
    warm = open_small(tmp_path, {"simulate.warm_steps": 6}, name="warm")
    assert warm.manifest.genesis != cold.manifest.genesis
    assert warm.manifest.run_id != cold.manifest.run_id
    first, last = cold.curve[0].held_out_loss, warm.curve[0].held_out_loss
    assert first is not None
    assert last is not None
    assert last < first
    kept = list((tmp_path / "warm").glob("*.float32"))
    assert len(kept) == 1
    written = kept[0].stat().st_mtime_ns
    (tmp_path / "warm" / CHECKPOINT_FILE).unlink(missing_ok=True)
    again = open_small(tmp_path, {"simulate.warm_steps": 6}, name="warm")
    assert np.array_equal(again.state.theta, warm.state.theta)
    assert kept[0].stat().st_mtime_ns == written


@pytest.mark.parametrize("family", ["llama", "gpt2"], ids=["plain", "dropout"])
def test_a_warm_start_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    if family == "gpt2":
        monkeypatch.setitem(SMALL, "model", WITH_DROPOUT)
    monkeypatch.setattr(trainers, "WARM_KEPT_EVERY", 2)
    changes, made = {"simulate.warm_steps": 7}, list[int]()
    whole = open_small(tmp_path, changes, name="whole")
    step = InnerOptimizer.step

    def interrupted(self: InnerOptimizer, corpus: Corpus, *, peer_id: str, at: Place) -> float:
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(at.batch_step)
        return step(self, corpus, peer_id=peer_id, at=at)

    monkeypatch.setattr(InnerOptimizer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_small(tmp_path, changes, name="parts")
    made.clear()
    parts = open_small(tmp_path, changes, name="parts")
    assert made == [4, 5, 6]
    assert parts.state.digest() == whole.state.digest()
    assert {path.suffix for path in (tmp_path / "parts").glob("warm-*")} == {".float32", ".lock"}


# -- interrupted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"simulate.drop": 0.5, "round.on_missed": "keep"},
        {"simulate.delay": 2},
        {"simulate.outer": "adam", "outer.lr": 0.3},
        {"simulate.replicas": [1, 3], "simulate.speeds": [1.0, 0.5]},
        {"model": WITH_DROPOUT},
    ],
    ids=["plain", "drops", "late", "adam", "pool", "dropout"],
)
def test_a_simulation_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """After every outer step; its last digest is that of one that was never stopped."""
    changes = {"outer.steps": 4} | changes
    if "model" in changes:
        monkeypatch.setitem(SMALL, "model", changes["model"])
        del changes["model"]
    whole = open_small(tmp_path, changes, name="whole")
    theta_of(whole)
    monkeypatch.setattr(simulate, "CHECKPOINT_SHARE", 1e9)
    for _ in range(4):
        for _ in run(open_small(tmp_path, changes, name="parts")):
            break
    parts = open_small(tmp_path, changes, name="parts")
    assert parts.done
    assert parts.state.digest() == whole.state.digest()
    assert [vars(point) for point in parts.curve] == [vars(point) for point in whole.curve]


def test_a_step_that_was_not_kept_is_made_again(tmp_path: Path) -> None:
    """No checkpoint: from the beginning."""
    stopped = open_small(tmp_path)
    stopped.outer_step()
    assert open_small(tmp_path).state.step == 0


def test_what_it_leaves_is_a_run_that_others_read(tmp_path: Path) -> None:
    simulation = open_small(tmp_path, {"simulate.warm_steps": 2})
    theta = theta_of(simulation)
    manifest, state = load_state(find_run(tmp_path / "out"))
    assert (manifest.run_id, state.digest()) == (simulation.manifest.run_id, simulation.state.digest())
    assert np.array_equal(state.theta, theta)
    model, tokenizer = load_model(find_run(tmp_path / "out"))
    assert tokenizer.vocab_size == 256
    assert not model.training
    summary = json.loads((tmp_path / "out" / SUMMARY_FILE).read_text())
    assert summary["digest"] == simulation.state.digest().hex()
    assert summary["heads"]["3"] == simulation.state.head.hex()


def test_its_summary_is_written_in_this_order(tmp_path: Path) -> None:
    """Byte for byte, but for the figures: studies of older versions are read, too."""
    simulation = open_small(tmp_path, {"simulate.evaluate_every": 2, "outer.steps": 2})
    theta_of(simulation)
    text = (tmp_path / "out" / SUMMARY_FILE).read_text()
    summary = json.loads(text)
    assert text == json.dumps(summary, indent=1) + "\n"
    assert list(summary) == [
        *("what", "run_id", "digest", "heads", "held_out", "curve", "wall_s", "torch", "device"),
    ]
    assert list(summary["curve"][0]) == ["step", "head", "held_out_loss", "loss", "tokens", "sent_bytes"]
    assert summary["what"] == json.loads(simulation.what.model_dump_json())
    assert summary["heads"] == {str(point.step): point.head for point in simulation.curve}
    assert summary["held_out"] == [[p.step, p.held_out_loss] for p in simulation.curve if p.held_out_loss is not None]
    assert [point["step"] for point in summary["curve"]] == [0, 1, 2]
    assert (summary["torch"], summary["device"]) == (torch.__version__, "cpu")


def test_a_folder_of_another_simulation_is_refused(tmp_path: Path) -> None:
    theta_of(open_small(tmp_path))
    with pytest.raises(UsageError, match="holds another simulation, or this one before its file changed"):
        open_small(tmp_path, {"simulate.replicas": 2})
    open_small(tmp_path)


def test_a_simulation_that_goes_on_with_other_text_is_refused(tmp_path: Path) -> None:
    for _ in run(open_small(tmp_path)):
        break
    open_small(tmp_path)
    with next((tmp_path / "text").iterdir()).open("a") as file:
        file.write("and more of it")
    with pytest.raises(UsageError, match="out: was begun with another text; choose another"):
        open_small(tmp_path)


def test_a_simulation_that_goes_on_with_other_shards_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"simulate.shards": "non-iid", "simulate.replicas": 2}
    for _ in run(open_small(tmp_path, changes)):
        break
    open_small(tmp_path, changes)
    clusters = own_texts.clusters
    monkeypatch.setattr(own_texts, "clusters", lambda *given: [1 - label for label in clusters(*given)])
    with pytest.raises(UsageError, match="out: was begun with another division of the text; choose another"):
        open_small(tmp_path, changes)


def test_a_plain_simulation_is_not_taken_for_a_recounted_one(tmp_path: Path) -> None:
    theta_of(open_small(tmp_path, {"simulate.replicas": 1}))
    past = Past(names=("a",), inner_steps={0: {"a": (4,)}}, dropped={0: frozenset()}, heads={1: "00" * 32})
    what = small_run(tmp_path, {"simulate.replicas": 1})
    with pytest.raises(UsageError, match="begun with another swarm to recount, or without one"):
        open_simulation(what, tmp_path / "out", base=tmp_path, device="cpu", threads=1, past=past)
    short = open_simulation(what, tmp_path / "short", base=tmp_path, device="cpu", threads=1, past=past)
    assert [point.step for point in run(short)] == [1], "the swarm made one outer step of three"
    assert short.differing_heads() == [1]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    theta_of(open_small(tmp_path))
    path = tmp_path / "out" / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"checkpoint.safetensors: damaged .* delete it to start anew"):
        open_small(tmp_path)
    shutil.rmtree(tmp_path / "out")
    assert open_small(tmp_path).state.step == 0


@pytest.mark.parametrize("layers", [8, 13])
def test_evaluations_change_no_weights_of_a_type_that_rescales_them(tmp_path: Path, layers: int) -> None:
    """RWKV halves weights of block 7 and on, when it is asked without learning, unless its config says otherwise."""
    config = {"model_type": "rwkv", "hidden_size": 16, "intermediate_size": 32, "context_length": 16}
    changes = {"model.config": config | {"num_hidden_layers": layers}, "outer.steps": 8}
    slow = {"inner.lr": 1e-11, "inner.warmup_steps": 1000}  # its embeddings are so small that 1e-9 moves a loss by 1e-4
    simulation = open_small(tmp_path, changes | slow)
    built = vector_of(build_model(simulation.manifest.transformers_config, seed=0))
    assert np.array_equal(simulation.state.theta.view(np.uint32), built.view(np.uint32))
    losses = [point.held_out_loss or 0.0 for point in (*simulation.curve, *run(simulation))]
    assert losses == pytest.approx([losses[0]] * 9, abs=1e-4)
    assert losses[0] > 1
    assert np.abs(simulation.state.theta - built).max() < 1e-6
