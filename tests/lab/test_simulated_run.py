from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from p2p_diloco.core.errors import UsageError
from p2p_diloco.lab.simulated_run import SimulatedRun, SimulationSpec, members_at, replica_names
from tests.support.small_runs import table_of


def parse(**changes: Any) -> SimulatedRun:
    return SimulatedRun.parse(table_of({key.replace("__", "."): value for key, value in changes.items()}), "FILE")


def test_a_run_file_is_simulated_as_it_is() -> None:
    what = parse()
    assert what.simulate == SimulationSpec()
    assert (what.simulate.replicas, what.simulate.drop, what.simulate.outer) == ((4,), 0.0, "nesterov")


def test_a_number_or_a_list() -> None:
    assert parse(simulate__replicas=3).simulate.replicas == (3,)
    assert parse(simulate__replicas=[1, 2]).simulate.replicas == (1, 2)
    assert parse(simulate__speeds=[1.0, 0.5]).simulate.speeds == (1.0, 0.5)


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [(4, [4] * 8), ([2, 4], [2] * 4 + [4] * 4), ([4, 2], [4] * 4 + [2] * 4), ([1, 2, 3, 4], [1, 1, 2, 2, 3, 3, 4, 4])],
)
def test_stages_are_of_equal_length(replicas: Any, expected: list[int]) -> None:
    spec = parse(simulate__replicas=replicas).simulate
    assert [spec.replicas_at(step, 8) for step in range(8)] == expected
    names = replica_names(spec.most_replicas)
    assert [len(members_at(spec, names, step, 8)) for step in range(8)] == expected
    assert members_at(spec, names, 7, 8) == list(range(expected[7]))


def test_slow_replicas_make_fewer_inner_steps_and_at_least_one() -> None:
    spec = parse(simulate__speeds=[1.0, 0.5, 0.01]).simulate
    assert [spec.inner_steps_of(k, 10) for k in range(4)] == [10, 5, 1, 10]
    assert SimulationSpec().inner_steps_of(3, 10) == 10


def test_the_divisor_is_the_runs_unless_it_is_chosen() -> None:
    assert [SimulationSpec().divided_by(policy) for policy in ("adopt", "keep")] == ["adopt", "keep"]
    assert SimulationSpec(divisor="all").divided_by("adopt") == "keep"
    assert SimulationSpec(divisor="arrived").divided_by("keep") == "adopt"


def test_flags_come_before_the_file() -> None:
    what = parse(simulate__replicas=3, simulate__prune=0.5).with_flags(replicas=2, drop=0.25)
    assert (what.simulate.replicas, what.simulate.drop, what.simulate.prune) == ((2,), 0.25, 0.5)
    assert parse().with_flags(replicas=None, drop=None) == parse()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"simulate.replica": 4}, "[simulate]: unknown key 'replica'; did you mean 'replicas'?"),
        ({"simulate.replicas": 0}, "[simulate]: key 'replicas.1': input should be greater than 0 (got '0')"),
        ({"simulate.replicas": []}, "[simulate]: key 'replicas': "),
        ({"simulate.replicas": "four"}, "[simulate]: key 'replicas': "),
        ({"simulate.drop": 1.0}, "[simulate]: key 'drop': input should be less than 1 (got '1.0')"),
        ({"simulate.shards": "mine"}, "[simulate]: key 'shards': input should be 'iid' or 'non-iid' (got 'mine')"),
        ({"simulate.speeds": [2.0]}, "[simulate]: key 'speeds.1': input should be less than or equal to 1 (got '2.0')"),
        ({"simulate.delay": 4}, "simulate.delay: 4 is not below inner.steps"),
        ({"simulate.replicas": 8, "round.max_group": 4}, "simulate.replicas: more than round.max_group, 4"),
        ({"inner.step": 4}, "unknown key 'inner.step'; did you mean 'steps'?"),
    ],
)
def test_a_bad_file_is_named_with_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        SimulatedRun.parse(table_of(changes), "FILE")
    assert str(refused.value).startswith(f"FILE: {message}"), refused.value


def test_a_simulate_that_is_no_table() -> None:
    with pytest.raises(UsageError, match=r"FILE: \[simulate\]: key 'top level': input should be a valid dictionary"):
        SimulatedRun.parse({**table_of(), "simulate": 4}, "FILE")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such run file"):
        SimulatedRun.load(tmp_path / "run.toml")
