"""The events about whom a peer believes: branches, the owner's witness and anchors, digests, audits, proofs. They are
in its log like all others (``event``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from p2p_diloco.core.findings import AuditResult, FindingKind
from p2p_diloco.core.moment import Moment


@dataclass(frozen=True, kw_only=True)
class PartAudited(Moment):
    """A part of a round at ``step``, which ``reducer`` had reduced, was looked at. From ``audits``."""

    event: Literal["audit"] = "audit"
    step: int
    reducer: str
    part: int
    result: AuditResult
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ReducerFound(Moment):
    """Something was found of ``reducer``, and is remembered; ``accuser`` has proved it, or nobody. From ``audits``."""

    event: Literal["found"] = "found"
    step: int
    reducer: str
    kind: FindingKind
    accuser: str


@dataclass(frozen=True, kw_only=True)
class BranchLeft(Moment):
    """The peer has given up its branch of the run's history for another one. From ``follower``."""

    event: Literal["branch"] = "branch"
    fork_step: int
    """Where the two part."""
    left_step: int
    """Where the peer stood on its own one; so ``left_head``."""
    left_head: str
    step: int
    """Where it stands now, on the other one; so ``head``."""
    head: str
    votes: int
    """Of those who have a vote, how many stood on the other branch when the peer set out."""
    votes_left: int
    """And on its own one, itself included if it has a vote."""


@dataclass(frozen=True, kw_only=True)
class WitnessAsked(Moment):
    """The run's owner was asked to witness an update. From ``witness``."""

    event: Literal["witness"] = "witness"
    step: int
    """The outer step that the update leads on from."""
    signed: bool
    reason: str
    """Why it did not sign; empty where it did."""


@dataclass(frozen=True, kw_only=True)
class StateDisputed(Moment):
    """The certificate of an update names other bits of the state that it leads on from. From ``upkeep``."""

    event: Literal["disputed"] = "disputed"
    step: int
    others: tuple[str, ...]
    """Peer ids of those who have signed it."""


@dataclass(frozen=True, kw_only=True)
class AnchorTaken(Moment):
    """The peer goes by a newer anchor of the run's owner. From ``anchoring``."""

    event: Literal["anchored"] = "anchored"
    step: int
    head: str
    number: int
    made: bool
    """Whether this peer, the owner's, has just signed it."""


@dataclass(frozen=True, kw_only=True)
class AnchorContradicted(Moment):
    """The run's owner has signed an anchor that contradicts the one that the peer goes by. From ``anchoring``."""

    event: Literal["anchors_differ"] = "anchors_differ"
    step: int
    """Of the one that it goes by; so ``number``."""
    number: int
    other_step: int


@dataclass(frozen=True, kw_only=True)
class PeerBarred(Moment):
    """Another peer is proved to lie, and takes no part here any more. From ``proofs``."""

    event: Literal["barred"] = "barred"
    step: int
    peer: str
    """Its peer id."""
    why: str
    """What it has signed two of: "rosters", "links" or "parts"."""
