from __future__ import annotations

from p2p_diloco.core.quota import MAX_RATED_PEERS, Quota


def test_a_burst_and_then_so_many_a_second() -> None:
    quota = Quota(per_s=2.0, burst=3.0)
    assert [quota.take("a", 0.0) for _ in range(5)] == [True] * 3 + [False] * 2
    assert quota.take("b", 0.0)
    assert [quota.take("a", 1.0) for _ in range(3)] == [True, True, False]


def test_the_peers_that_were_quiet_longest_are_forgotten() -> None:
    quota = Quota(per_s=2.0, burst=3.0)
    for index in range(MAX_RATED_PEERS + 10):
        quota.take(str(index), 2.0)
    assert len(quota._buckets) == MAX_RATED_PEERS
    assert "9" not in quota._buckets
