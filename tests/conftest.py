"""Settings of hypothesis: the same examples in every run, and no deadline, for a busy machine is no failure. What the
tests of rounds have in common."""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings

from p2p_diloco.core import grid
from p2p_diloco.core.errors import RemoteError
from p2p_diloco.round.meeting import Meeting
from tests.support.meetings import SMALL_PART_VALUES, Losses

settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile(
    "brief", settings.get_profile("steady"), max_examples=50, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile("steady")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "PART_VALUES", SMALL_PART_VALUES)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Losses:
    found, lose = Losses(), Meeting.lose

    def noted(self: Meeting, member: int, error: RemoteError | None) -> None:
        if member not in self.lost:
            found.append((self.me, member, f"{type(error).__name__}: {error.reason}" if error else "silent"))
        lose(self, member, error)

    monkeypatch.setattr(Meeting, "lose", noted)
    return found
