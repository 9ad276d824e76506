"""All kinds of lies that the fault explorer knows, by what they are told about."""

from __future__ import annotations

from collections.abc import Callable

from tests.support import lies_beside, lies_in_rounds
from tests.support.lying import Liar

SILENT = "silent records"
"""Signed records of peers that answer nothing: there is nobody behind them."""
GHOSTS = "invented history"
"""Liars that come with a history of their own."""
FORKED = "forked history"
"""Most of those that were known before an anchor sign another history from there on."""
IDLE = "idle members"
INVENTED_SNAPSHOT = "invented snapshot"
SLOW_READERS = "slow readers"
HURRIES = "hurries"
TWO_ROSTERS = "two rosters"
A_AGAIN_B = "A-Again-B"
RETURNING = "returning majority"
"""Nobody lies: most of the group come back, and the few have gone on meanwhile."""

CONTRIBUTIONS: dict[str, Callable[[Liar], None]] = {
    "flipped": lies_in_rounds.flipped,
    "flipped, largest weight": lies_in_rounds.heavy,
    "x100": lies_in_rounds.hundredfold,
    "1e30": lies_in_rounds.huge,
    "stale": lies_in_rounds.stale,
}
REDUCERS: dict[str, Callable[[Liar], None]] = {
    "mean x-10": lies_in_rounds.reduces_tenfold,
    "zeros for a mean": lies_in_rounds.reduces_to_zeros,
    "zeros in a quarter": lies_in_rounds.reduces_a_quarter_to_zeros,
    "flipped bits": lies_in_rounds.flips_a_bit,
    "masks others away": lies_in_rounds.masks_away,
    "two means": lies_in_rounds.reduces_differently,
    "tells no other": lies_in_rounds.tells_no_other,
}
LEADERS: dict[str, Callable[[Liar], None]] = {
    "decides nothing": lies_in_rounds.decides_nothing,
    "invented parts": lies_in_rounds.commits_invented,
    "two commits": lies_in_rounds.commits_twice,
    A_AGAIN_B: lies_in_rounds.commits_and_asks_again,
    TWO_ROSTERS: lies_in_rounds.sends_two_rosters,
}
HISTORIES: dict[str, Callable[[Liar], None]] = {
    "extends alone": lies_beside.extends,
    GHOSTS: lies_beside.extends,
    INVENTED_SNAPSHOT: lies_beside.invents_snapshots,
    FORKED: lies_beside.forks,
}
BESIDE: dict[str, Callable[[Liar], None]] = {
    IDLE: lies_in_rounds.idle,
    "Eta(86400)": lies_beside.promises,
    "always busy": lies_beside.busy,
    "claimed speed": lies_beside.claims_speed,
    HURRIES: lies_beside.hurries,
    "silent streams": lies_beside.opens_streams,
    SLOW_READERS: lies_beside.reads_slowly,
}
CORRUPT = CONTRIBUTIONS | REDUCERS | LEADERS | HISTORIES | BESIDE
LIES = (*CORRUPT, SILENT)
KINDS = (*LIES, RETURNING)
"""All that ``draw_with_liars`` knows."""
