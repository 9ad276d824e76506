from __future__ import annotations

import math
import re
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.errors import Stopped
from p2p_diloco.core.interruption import stop_signals
from p2p_diloco.core.runfile import DataSpec, InnerSpec, ModelSpec, OuterSpec, RunSpec
from p2p_diloco.learn.data import Corpus
from p2p_diloco.learn.inner import (
    DAMAGED,
    INNER_FILE,
    InnerOptimizer,
    Place,
    computes_in_bf16,
    draws_drop,
    learning_rate,
    place_in_run,
    whole,
)
from p2p_diloco.learn.model import build_model, loss_of
from p2p_diloco.learn.parameters import bind_parameters, layout_of, read_parameters
from tests.support.builders import identity

CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
SPEC = RunSpec(
    name="inner",
    model=ModelSpec(config=CONFIG),
    data=DataSpec(seq_len=8),
    inner=InnerSpec(steps=5, batch_size=2, lr=1e-2, warmup_steps=3),
    outer=OuterSpec(steps=4),
)
CPU = torch.device("cpu")


def corpus() -> Corpus:
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 20, np.uint8)
    return Corpus(train=text, held_out=text[:100], vocab_size=256, fingerprint="")


def trainer() -> tuple[InnerOptimizer, Vector]:
    model = build_model(CONFIG, seed=1)
    local = np.empty(layout_of(model).n, np.float32)
    read_parameters(model, local)
    bind_parameters(model, local)
    return InnerOptimizer(model, SPEC, CPU), local


def run(inner: InnerOptimizer, steps: range) -> list[float]:
    return [inner.step(corpus(), peer_id="me", at=Place(step, step)) for step in steps]


def test_the_learning_rate_warms_up_then_falls_along_a_cosine_to_its_floor() -> None:
    spec = InnerSpec(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(spec, step, 110) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[60] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rates[110] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert learning_rate(spec, 10_000, 110) == pytest.approx(0.1)
    assert learning_rate(InnerSpec(lr=1.0, warmup_steps=1000), 4, 5) == pytest.approx(1.0)


def test_training_lowers_the_loss_in_shared_memory() -> None:
    inner, local = trainer()
    before = local.copy()
    losses = run(inner, range(20))
    assert losses[-1] < losses[0] - 0.5
    assert not np.array_equal(local, before)


def test_accumulated_gradients_are_those_of_one_large_batch() -> None:
    inner, _ = trainer()
    batches = [
        corpus().batch(run_seed=0, peer_id="me", step=3, batch_size=2, seq_len=8, micro_step=micro) for micro in (0, 1)
    ]
    both = torch.from_numpy(np.concatenate(batches))
    logits = inner.model(input_ids=both[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), both[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    inner.optimizer.step()
    accumulated, _ = trainer()
    accumulated.spec = SPEC.model_copy(
        update={"inner": SPEC.inner.model_copy(update={"grad_accumulation": 2, "clip": 1e9})}
    )
    accumulated.step(corpus(), peer_id="me", at=Place(3, 3))
    for one, other in zip(inner.parameters, accumulated.parameters):
        moment, expected = accumulated.optimizer.state[other]["exp_avg"], inner.optimizer.state[one]["exp_avg"]
        assert torch.allclose(moment, expected, atol=1e-6)


@pytest.mark.parametrize("grad_accumulation", [1, 2, 3])
def test_the_optimizer_sees_the_rate_of_its_inner_step_however_many_batches_that_has(grad_accumulation: int) -> None:
    inner, _ = trainer()
    more = SPEC.inner.model_copy(update={"grad_accumulation": grad_accumulation})
    inner.spec = SPEC.model_copy(update={"inner": more})
    seen: list[tuple[float, ...]] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.append(tuple(group["lr"] for group in optimizer.param_groups))

    inner.optimizer.register_step_pre_hook(look)
    for step in (0, 1, 2, 3, 11, 19):  # of 20; 3 of them warm up
        inner.step(corpus(), peer_id="me", at=Place(step, step))
    middle = 1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 8 / 17)))
    end = 1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 16 / 17)))
    assert SPEC.inner.min_lr_ratio == 0.1
    assert [rates[0] for rates in seen] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, middle, end])
    assert all(rates[0] == rates[1] for rates in seen)


def test_the_rate_goes_by_the_schedule_and_the_batch_by_its_own_number() -> None:
    """After a failed round they are different ones."""
    inner, _ = trainer()
    again, _ = trainer()
    assert inner.step(corpus(), peer_id="me", at=Place(9, 4)) == again.step(corpus(), peer_id="me", at=Place(9, 5))
    assert inner.optimizer.param_groups[0]["lr"] == learning_rate(SPEC.inner, 4, 20)
    assert again.optimizer.param_groups[0]["lr"] == learning_rate(SPEC.inner, 5, 20)


def test_peers_learn_from_batches_of_their_own() -> None:
    losses = {trainer()[0].step(corpus(), peer_id=identity(i).peer_id, at=Place(0, 0)) for i in range(1, 6)}
    assert len(losses) == 5


def test_a_mixture_learns_its_routers_loss_and_reports_the_cross_entropy() -> None:
    """Each of two micro-batches has its own router loss, as in transformers; the gradient is that of their mean."""
    mixture = CONFIG | {"model_type": "mixtral", "num_local_experts": 4, "output_router_logits": True}
    mixture |= {"router_aux_loss_coef": 3.0}
    inner = SPEC.inner.model_copy(update={"grad_accumulation": 2, "clip": 1e9, "warmup_steps": 0})
    trained = InnerOptimizer(build_model(mixture, seed=1), SPEC.model_copy(update={"inner": inner}), CPU)
    loss = trained.step(corpus(), peer_id="me", at=Place(3, 3))

    model: Any = build_model(mixture, seed=1)
    plain = []
    for micro in (0, 1):
        rows = corpus().batch(run_seed=0, peer_id="me", step=3, batch_size=2, seq_len=8, micro_step=micro)
        inputs, targets = torch.from_numpy(rows[:, :-1]), torch.from_numpy(np.ascontiguousarray(rows[:, 1:]))
        outputs = model(input_ids=inputs, labels=targets, shift_labels=targets)
        (outputs.loss / 2).backward()
        plain.append(outputs.loss.item() - 3.0 * outputs.aux_loss.item())
    assert loss == pytest.approx(np.mean(plain), rel=1e-5)
    for parameter, other in zip(trained.parameters, model.parameters()):
        moment = trained.optimizer.state[parameter]["exp_avg"]
        torch.testing.assert_close(moment, (1 - inner.beta1) * other.grad, rtol=1e-4, atol=1e-7)


def test_a_restart_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    inner, local = trainer()
    run(inner, range(6))
    inner.save(tmp_path / INNER_FILE, local, head="ab", inner_step=6, tokens=96)
    expected = run(inner, range(6, 12))

    again, local_again = trainer()
    kept = again.load(tmp_path / INNER_FILE)
    assert kept is not None
    local_again[:], head, inner_step, tokens = kept
    assert (head, inner_step, tokens) == ("ab", 6, 96)
    assert run(again, range(6, 12)) == expected
    assert np.array_equal(local, local_again)


def test_a_parameter_that_never_has_a_gradient_has_no_moments(tmp_path: Path) -> None:
    """Its number is the first one; the moments of the others stay theirs."""
    model = build_model(CONFIG, seed=1)
    model.register_parameter("unused", torch.nn.Parameter(torch.zeros(3)))
    inner = InnerOptimizer(model, SPEC, CPU)
    assert inner.parameters[0].shape == (3,)
    run(inner, range(2))
    moments, steps = inner.moments()
    assert list(steps) == [str(i) for i in range(1, len(inner.parameters))]

    again = InnerOptimizer(build_model(CONFIG, seed=1), SPEC, CPU)
    assert not again.restore(moments, steps), "another model's"
    assert not again.optimizer.state
    again.model.register_parameter("unused", torch.nn.Parameter(torch.zeros(3)))
    again = InnerOptimizer(again.model, SPEC, CPU)
    assert again.restore(moments, steps)
    kept, _ = again.moments()
    assert kept.keys() == moments.keys()
    assert all(torch.equal(kept[name], moment) for name, moment in moments.items())


def test_where_no_file_is_the_moments_start_from_zero(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inner, _ = trainer()
    assert inner.load(tmp_path / INNER_FILE) is None
    assert not inner.optimizer.state
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:50], "header"),
        (lambda data: data[:50] + b"\0" * 100, "header"),
        (lambda data: data[:-4], "not cover|incomplete"),
        (lambda data: data.replace(b'"tokens"', b'"tokenz"', 1), "'tokens' is missing"),
        (lambda data: data.replace(b"exp_avg.0", b"exp_avg_0", 1), "'exp_avg.0' is missing"),
        (lambda data: data.replace(b'"inner_step": "2"', b'"inner_step": "x"', 1), "invalid literal"),
        (lambda data: data.replace(b'\\"0\\": 2.0', b'\\"0\\": NaN', 1), "not told"),
        (lambda data: data.replace(b'\\"0\\": 2.0', b'\\"0\\": [2]', 1), "not told"),
        (lambda data: data[:-4] + np.float32(np.inf).tobytes(), "not finite"),
    ],
)
def test_a_damaged_file_costs_the_moments_and_is_put_aside_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes], said: str
) -> None:
    inner, local = trainer()
    run(inner, range(2))
    path = tmp_path / INNER_FILE
    inner.save(path, local, head="ab", inner_step=2, tokens=32)
    damaged = damage(path.read_bytes())
    assert damaged != path.read_bytes()
    for _ in range(2):  # the second one takes the place of the first
        path.write_bytes(damaged)
        caplog.clear()
        again, _ = trainer()
        assert again.load(path) is None
        assert not again.optimizer.state
        (record,) = caplog.records
        assert re.search(said, record.getMessage())
        assert [one.read_bytes() for one in tmp_path.iterdir()] == [damaged]
        assert not path.exists()


def test_what_cannot_be_read_is_not_passed_over_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / INNER_FILE
    path.mkdir()
    (tmp_path / (INNER_FILE + DAMAGED)).touch()  # in the way
    inner, _ = trainer()
    assert inner.load(path) is None
    (record,) = caplog.records
    assert "cannot be used" in record.getMessage()
    assert path.is_dir()


def test_what_is_forgotten_is_as_before_the_first_step() -> None:
    inner, local = trainer()
    run(inner, range(3))
    inner.forget()
    assert inner.moments() == ({}, {})
    fresh, theta = trainer()
    theta[:] = local
    assert run(inner, range(3, 6)) == run(fresh, range(3, 6))
    assert np.array_equal(local, theta)


def test_tensors_lie_at_whole_words_in_the_file(tmp_path: Path) -> None:
    """However long the header before them is; safetensors asks for it."""
    inner, local = trainer()
    for length in range(8):
        inner.save(tmp_path / INNER_FILE, local, head="a" * length, inner_step=0, tokens=1)
        data = (tmp_path / INNER_FILE).read_bytes()
        assert int.from_bytes(data[:8], "little") % 8 == 0
        assert np.array_equal(load(data)["local"], local)


def test_drops_are_drawn_anew_for_every_peer_and_outer_step_and_always_the_same() -> None:
    drawn = {(peer, step): draws_drop(3, peer, step, 0.3) for peer in "abcdefgh" for step in range(250)}
    assert 0.27 < sum(drawn.values()) / len(drawn) < 0.33
    assert all(draws_drop(3, peer, step, 0.3) == dropped for (peer, step), dropped in drawn.items())
    assert len({tuple(drawn[peer, step] for step in range(250)) for peer in "abcdefgh"}) == 8
    assert not any(draws_drop(3, "a", step, 0.0) for step in range(100))


def test_places_in_the_run() -> None:
    """After a round that failed batches go on; the schedule of the outer step begins again, and stays at its end."""
    assert place_in_run(SPEC, 2, 0, 0) == Place(batch_step=10, schedule_step=10)
    assert place_in_run(SPEC, 2, 7, 1) == Place(batch_step=17, schedule_step=11)
    assert place_in_run(SPEC, 2, 7, 7) == Place(batch_step=17, schedule_step=14)


def test_sgd_inside_has_no_moments_and_takes_the_gradient_as_it_is() -> None:
    spec = SPEC.model_copy(
        update={
            "inner": InnerSpec(optimizer="sgd", lr=0.1, warmup_steps=0, min_lr_ratio=1.0, weight_decay=0.0, clip=1e9)
        }
    )
    model = build_model(CONFIG, seed=1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    inner = InnerOptimizer(model, spec, CPU)
    inner.step(corpus(), peer_id="me", at=Place(0, 0))
    assert inner.moments() == ({}, {})
    again = build_model(CONFIG, seed=1)
    batch = corpus().batch(run_seed=0, peer_id="me", step=0, batch_size=16, seq_len=8)
    loss_of(again, torch.from_numpy(batch)).backward()  # type: ignore[no-untyped-call]
    for parameter, old, other in zip(model.parameters(), before, again.parameters()):
        assert other.grad is not None
        torch.testing.assert_close(parameter.detach(), old - 0.1 * other.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("capability", "has_units"),
    [
        ((7, 0), False),
        ((7, 5), False),
        ((6, 1), False),
        ((8, 0), True),
        ((8, 6), True),
        ((9, 0), True),
        ((12, 0), True),
    ],
    ids=["V100", "T4", "P40", "A100", "RTX 30", "H100", "RTX 50"],
)
def test_bf16_where_this_gpu_has_units_for_it(capability: tuple[int, int], has_units: bool) -> None:
    assert computes_in_bf16(capability) is has_units


def test_a_stop_waits_until_a_step_is_whole_though_another_thread_gets_the_signal() -> None:
    """As the system may: pthread_kill gives it to that thread, and Python runs the handler in this one."""
    done: list[str] = []
    begun, end = threading.Event(), threading.Event()

    def live_on() -> None:
        begun.set()
        end.wait()

    other = threading.Thread(target=live_on)
    other.start()
    begun.wait()
    delivered, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    before = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)

    def step() -> None:
        with whole():
            signal.pthread_kill(other.ident or 0, signal.SIGALRM)
            assert delivered.recv(1) == bytes([signal.SIGALRM])
            for _ in range(1000):
                done.append("half a step")  # a thousand chances for a handler
            done.append("whole")
        done.append("went on")

    try:
        with stop_signals() as stop:
            with pytest.raises(Stopped, match="in the middle of an inner step"):
                step()
            assert done[-1] == "whole"
            with whole():
                done.append("nothing came")
            with pytest.raises(Stopped), stop.after_inner_step():
                signal.raise_signal(signal.SIGALRM)
    finally:
        signal.set_wakeup_fd(before)
        for one in (delivered, wakeup):
            one.close()
        end.set()
        other.join()
    assert done[-1] == "nothing came"


def test_an_inner_step_that_is_stopped_is_whole() -> None:
    """A signal before any parameter has changed is told when all have, and their moments with them."""
    inner, local = trainer()
    expected, theta = trainer()
    run(expected, range(1))
    inner.optimizer.register_step_pre_hook(lambda *_: signal.raise_signal(signal.SIGALRM))
    with stop_signals() as stop, pytest.raises(Stopped), stop.after_inner_step():
        run(inner, range(1))
    assert np.array_equal(local, theta)
    assert inner.moments()[1] == expected.moments()[1]
    assert all(parameter.grad is None for parameter in inner.parameters)


def test_another_thread_than_the_main_one_gets_no_signals_to_wait_for() -> None:
    done: list[str] = []

    def step() -> None:
        with whole():
            done.append("whole")

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert done == ["whole"]
