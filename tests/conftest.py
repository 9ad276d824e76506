"""Settings of hypothesis: the same examples in every run, and no deadline, for a busy machine is no failure."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
