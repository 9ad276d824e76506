"""The inner state, written beside training: who waits for whom, what is copied when, and who is told of a failure."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from safetensors.torch import save

from p2p_diloco.core.codec import Vector
from p2p_diloco.core.errors import LedgerError
from p2p_diloco.learn import inner as inner_module
from p2p_diloco.learn.inner import INNER_FILE, InnerOptimizer
from p2p_diloco.learn.keeper import Keeper
from p2p_diloco.ledger.disk import TEMPORARY, whole_file
from tests.learn.test_inner import run, trainer

STUCK_S = 20.0
"""A test that waits for longer has failed."""
Moments = dict[str, torch.Tensor]


class Gate:
    """Where writes wait until they may go on: each write is let in, or fails, as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.written = 0
        monkeypatch.setattr(inner_module, "whole_file", self.whole_file)

    @contextmanager
    def whole_file(self, path: Path, size_bytes: int) -> Iterator[IO[bytes]]:
        self.reached.set()
        assert self.opened.wait(STUCK_S)
        with whole_file(path, size_bytes) as file:
            yield file
        self.written += 1


class Watched(np.ndarray):
    """Local parameters that call ``copying`` when they are copied."""

    copying: Callable[[Vector], Vector]

    def copy(self, *_: object) -> Vector:  # type: ignore[override]
        return self.copying(np.asarray(self))


def watched(local: Vector, copying: Callable[[Vector], Vector]) -> Watched:
    view = local.view(Watched)
    view.copying = copying
    return view


def check_until_it_has_ended(keeper: Keeper) -> None:
    until_s = time.monotonic() + STUCK_S
    while keeper.writing and time.monotonic() < until_s:
        keeper.check()


def begin(keeper: Keeper, local: Vector, tokens: int = 0, head: str = "ab") -> None:
    keeper.begin(local, head=head, inner_step=3 if tokens else 0, tokens=tokens)


def head_in(path: Path) -> str:
    kept = trainer()[0].load(path)
    assert kept is not None
    return kept[1]


def copies(inner: InnerOptimizer) -> Moments:
    return {name: moment.clone() for name, moment in inner.moments()[0].items()}


def test_inner_steps_do_not_wait_for_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes nothing; training goes on as if nobody wrote, and so does what is written in the end."""
    gate = Gate(monkeypatch)
    alone, _ = trainer()
    expected = run(alone, range(8))
    inner, local = trainer()
    keeper = Keeper(inner, tmp_path / INNER_FILE)
    losses = run(inner, range(3))
    begin(keeper, local, tokens=48)
    assert gate.reached.wait(STUCK_S)
    losses += run(inner, range(3, 8))
    assert losses == expected
    assert not (tmp_path / INNER_FILE).exists()
    gate.opened.set()
    keeper.finish()
    assert gate.written == 1


def test_moments_of_one_parameter_are_of_one_inner_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An inner step is made whenever something has been written: the others are of later ones."""
    inner, local = trainer()
    run(inner, range(2))
    seen: dict[float, Moments] = {2.0: copies(inner)}

    class Busy(io.BytesIO):
        def write(self, data: object, /) -> int:
            written = super().write(data)  # type: ignore[arg-type]
            assert not inner.changing.locked()
            made = len(seen) + 2
            run(inner, range(made - 1, made))
            seen[float(made)] = copies(inner)
            return written

    @contextmanager
    def busy_file(path: Path, size_bytes: int) -> Iterator[IO[bytes]]:
        with Busy() as file:
            yield file
            assert len(file.getvalue()) == size_bytes
            path.write_bytes(file.getvalue())

    monkeypatch.setattr(inner_module, "whole_file", busy_file)
    inner.save(tmp_path / INNER_FILE, local[:0], head="ab", inner_step=0, tokens=0)
    again, _ = trainer()
    assert again.load(tmp_path / INNER_FILE) is not None
    moments, steps = again.moments()
    assert len(set(steps.values())) == len(again.parameters)
    for i, made in steps.items():
        for name in (f"exp_avg.{i}", f"exp_avg_sq.{i}"):
            assert torch.equal(moments[name], seen[made][name])


def test_no_inner_step_is_made_while_moments_are_being_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a moment would be of another step than the other half."""
    inner, local = trainer()
    run(inner, range(2))
    locked: list[bool] = []
    to: Callable[..., torch.Tensor] = torch.Tensor.to

    def watched_to(tensor: torch.Tensor, *how: object, **more: object) -> torch.Tensor:
        locked.append(inner.changing.locked())
        return to(tensor, *how, **more)

    monkeypatch.setattr(torch.Tensor, "to", watched_to)
    inner.save(tmp_path / INNER_FILE, local[:0], head="ab", inner_step=0, tokens=0)
    assert locked == [True] * 2 * len(inner.parameters)


def test_local_parameters_are_those_that_their_tokens_made(tmp_path: Path) -> None:
    """The next inner step is there while they are being copied, and changes nothing before the copy is whole."""
    inner, local = trainer()
    run(inner, range(3))
    before = local.copy()
    steps = threading.Thread(target=run, args=(inner, range(3, 6)))

    def copy_slowly(vector: Vector) -> Vector:
        first = vector[: len(vector) // 2].copy()
        steps.start()
        steps.join(0.2)
        assert steps.is_alive()
        return np.concatenate([first, vector[len(vector) // 2 :]])

    keeper = Keeper(inner, tmp_path / INNER_FILE)
    begin(keeper, watched(local, copy_slowly), tokens=48)
    keeper.finish()
    steps.join()
    assert not np.array_equal(local, before)
    kept = trainer()[0].load(tmp_path / INNER_FILE)
    assert kept is not None
    assert np.array_equal(kept[0], before)
    assert kept[1:] == ("ab", 3, 48)


def test_it_begins_when_nothing_changes_local_any_more(tmp_path: Path) -> None:
    """As long as somebody else changes parameters, the trainer does not go on to do so, too."""
    inner, local = trainer()
    keeper = Keeper(inner, tmp_path / INNER_FILE)
    beginning = threading.Thread(target=begin, args=(keeper, local, 48))
    with inner.changing:
        beginning.start()
        beginning.join(0.1)
        assert beginning.is_alive()
    beginning.join(STUCK_S)
    keeper.finish()
    assert (tmp_path / INNER_FILE).exists()


def test_local_is_left_out_where_it_is_theta(tmp_path: Path) -> None:
    inner, local = trainer()
    run(inner, range(3))
    keeper = Keeper(inner, tmp_path / INNER_FILE)
    begin(keeper, local)
    keeper.finish()
    again, _ = trainer()
    kept = again.load(tmp_path / INNER_FILE)
    assert kept is not None
    assert len(kept[0]) == 0
    assert kept[1:] == ("ab", 0, 0)
    expected, found = inner.moments(), again.moments()
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(found[0][name], moment) for name, moment in expected[0].items())


def test_one_write_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is slower than the rounds: what comes while it writes is left out, what comes later is not."""
    gate = Gate(monkeypatch)
    inner, local = trainer()
    run(inner, range(1))
    keeper = Keeper(inner, tmp_path / INNER_FILE)
    begin(keeper, local, head="aa")
    begin(keeper, local, head="bb")
    gate.opened.set()
    check_until_it_has_ended(keeper)
    assert head_in(tmp_path / INNER_FILE) == "aa"
    begin(keeper, local, head="cc")
    keeper.finish()
    assert head_in(tmp_path / INNER_FILE) == "cc"
    assert gate.written == 2


def test_the_last_write_does_not_race_the_one_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    inner, local = trainer()
    run(inner, range(1))
    keeper = Keeper(inner, tmp_path / INNER_FILE)
    begin(keeper, local, head="old")
    ending = threading.Thread(target=keeper.finish)
    ending.start()
    ending.join(0.1)
    assert ending.is_alive()
    gate.opened.set()
    ending.join(STUCK_S)
    assert gate.written == 1
    inner.save(tmp_path / INNER_FILE, local, head="new", inner_step=1, tokens=16)
    assert head_in(tmp_path / INNER_FILE) == "new"


def full_disk(path: Path) -> None:
    """Every write to the temporary file of ``path`` is refused by the system."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    path.with_name(path.name + TEMPORARY).symlink_to(full)


def no_folder(path: Path) -> None:
    path.rename(path.parent.with_name("kept"))
    path.parent.rmdir()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(full_disk, "disk full, free 1 MB or move the folder"), (no_folder, "No such file or directory")],
)
def test_a_write_that_fails_is_told_to_who_trains(tmp_path: Path, spoil: Callable[[Path], None], said: str) -> None:
    inner, local = trainer()
    run(inner, range(1))
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / INNER_FILE
    inner.save(path, local, head="old", inner_step=1, tokens=16)
    before = path.read_bytes()
    spoil(path)
    keeper = Keeper(inner, path)
    begin(keeper, local, head="new")
    with pytest.raises(LedgerError, match=said):
        check_until_it_has_ended(keeper)
    assert not keeper.writing
    kept = path if path.exists() else tmp_path / "kept"
    assert kept.read_bytes() == before


def test_a_failure_that_nobody_has_asked_for_is_told_when_the_next_write_begins(tmp_path: Path) -> None:
    inner, local = trainer()
    run(inner, range(1))
    keeper = Keeper(inner, tmp_path / "gone" / INNER_FILE)
    begin(keeper, local)
    keeper.finish()
    with pytest.raises(LedgerError, match="No such file"):
        begin(keeper, local)


def test_what_is_no_fault_of_the_disk_is_not_hidden_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, local = trainer()

    def broken(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(inner_module, "whole_file", broken)
    keeper = Keeper(inner, tmp_path / INNER_FILE)
    begin(keeper, local)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        keeper.finish()


def test_a_file_of_earlier_versions_is_read(tmp_path: Path) -> None:
    """They wrote all tensors with the library, sorted as it likes."""
    inner, local = trainer()
    run(inner, range(3))
    moments, steps = inner.moments()
    text = "{" + ", ".join(f'"{i}": {made}' for i, made in steps.items()) + "}"
    metadata = {"head": "ab", "inner_step": "3", "tokens": "48", "steps": text}
    data = save(moments | {"local": torch.from_numpy(local.copy())}, metadata)
    (tmp_path / INNER_FILE).write_bytes(data)
    again, _ = trainer()
    kept = again.load(tmp_path / INNER_FILE)
    assert kept is not None
    assert np.array_equal(kept[0], local)
    assert kept[1:] == ("ab", 3, 48)
    found, found_steps = again.moments()
    assert found_steps == steps
    assert all(torch.equal(found[name], moment) for name, moment in moments.items())
