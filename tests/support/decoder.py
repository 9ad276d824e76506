"""What went over the streams of a run, decoded and computed again: written from ``docs/protocol.md`` alone.

It imports nothing of the package, so that it can be right only where the page is. BLAKE3, which neither the standard
library nor numpy has, is an argument where it is needed.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from tests.support.decoded_shares import parts_of_each, shares_of, uplinks_of

Vector = npt.NDArray[np.float32]
Blake3 = Callable[[bytes], bytes]


class Undecodable(ValueError):
    """Something that the page does not allow."""


def check(holds: bool, what: str) -> None:
    if not holds:
        raise Undecodable(what)


# -- 1. notation -----------------------------------------------------------------------------------------------------


def h(*pieces: bytes) -> bytes:
    """``H(a, b, ...)``."""
    lengths_and_pieces = (len(piece).to_bytes(8, "big") + piece for piece in pieces)
    return hashlib.blake2b(b"".join(lengths_and_pieces), digest_size=32).digest()


def unpack(data: bytes) -> Any:
    """One plain value of msgpack, and nothing behind it."""
    try:
        return msgpack.unpackb(data, max_array_len=65536, max_map_len=64, ext_hook=no_extension)
    except (ValueError, msgpack.UnpackException) as error:
        raise Undecodable(f"not plain msgpack: {error}") from error


def no_extension(code: int, data: bytes) -> object:
    raise ValueError(f"extension type {code}")


# -- 3. peers --------------------------------------------------------------------------------------------------------

BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
PEER_ID_PREFIX = bytes.fromhex("002408011220")

RECORD = (
    *("peer_id", "run_id", "run_name", "issued_s", "life_s", "role", "phase", "step", "head", "committed", "heads"),
    *("snapshot_step", "snapshot_digest", "maddrs", "client_mode", "name", "version", "inner_step"),
    *("inner_steps_planned", "loss", "held_out_loss", "held_out_step", "tokens", "tokens_per_s", "group_size"),
    *("round_s", "round_bytes", "metrics_addr", "seat", "revocations"),
    *("known", "known_members", "signatures", "certifying", "witnessed", "awaits_witness"),
    *("anchored_step", "anchor", "barred", "barred_digest", "found_wrong", "helped"),
    *("share_percent", "reached_over", "reaches_over", "helps"),
)
READINESS = (
    *("peer_id", "run_id", "leader", "step", "head", "weight", "client_mode", "dropped", "tokens_per_s", "nonce"),
    *("seat", "helps", "uplinks", "reached_over", "reaches_over"),
)
CONSENT = ("peer_id", "asker", "dialler", "ports")
INVITATION = ("peer_id", "run_id", "token", "name", "places", "expires_s")
REVOCATIONS = ("peer_id", "run_id", "number", "tokens", "steps")
CONTEXTS = {
    RECORD: b"p2p-diloco record\0",
    READINESS: b"p2p-diloco readiness\0",
    CONSENT: b"p2p-diloco dial consent\0",
    INVITATION: b"p2p-diloco invitation\0",
    REVOCATIONS: b"p2p-diloco revocations\0",
}
ROSTER_CONTEXT = b"p2p-diloco roster\0"
CONTRIBUTION_CONTEXT = b"p2p-diloco contribution\0"
REDUCTION_CONTEXT = b"p2p-diloco reduction\0"
TAKEN_CONTEXT = b"p2p-diloco taken\0"


def public_key(peer_id: str) -> bytes:
    """The 32 bytes inside a peer id."""
    number = 0
    for character in peer_id:
        number = 58 * number + BASE58.index(character)
    zeros = len(peer_id) - len(peer_id.lstrip("1"))
    data = bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")
    check(len(data) == 38 and data.startswith(PEER_ID_PREFIX), f"not a peer id: {peer_id}")
    return data[6:]


@lru_cache(maxsize=4096)
def open_sealed(sealed: bytes, names: tuple[str, ...]) -> Mapping[str, Any]:
    """The fields of a statement, whose signature is good."""
    check(len(sealed) <= (65536 if names == REVOCATIONS else 2048), "a statement that is too long")
    body, signature = unpack(sealed)
    values = unpack(body)
    check(len(values) == len(names), f"{len(values)} values, not {len(names)}")
    fields = dict(zip(names, values))
    check(is_signed(public_key(fields["peer_id"]), CONTEXTS[names] + body, signature), "a bad signature")
    return fields


def open_seat(seat: bytes, peer_id: str, run_id: str, owner: str) -> Mapping[str, Any]:
    """The invitation under which a peer takes part, with both signatures good."""
    check(len(seat) <= 512, "a seat that is too long")
    sealed, signature = unpack(seat)
    invitation = open_sealed(sealed, INVITATION)
    check((invitation["peer_id"], invitation["run_id"]) == (owner, run_id), "another owner's, or another run's")
    statement = b"p2p-diloco seat\0" + msgpack.packb([run_id, peer_id])
    check(is_signed(public_key(invitation["token"]), statement, signature), "a token that has not signed")
    return invitation


def open_manifest(data: bytes) -> tuple[bytes, str]:
    """The canonical bytes of a signed manifest, and the run id."""
    start, end = b'{"manifest":', b',"signature":"'
    canonical, _, rest = data.removeprefix(start).rpartition(end)
    check(data.startswith(start) and len(rest) == 130 and rest.endswith(b'"}'), "not a signed manifest")
    owner = canonical.rpartition(b'"owner":"')[2].partition(b'"')[0].decode()
    signed = is_signed(public_key(owner), b"p2p-diloco manifest\0" + canonical, bytes.fromhex(rest[:128].decode()))
    check(signed, "a manifest that its owner did not sign")
    return canonical, h(b"run", canonical)[:20].hex()


# Ed25519 (RFC 8032, section 5.1.7), points in extended coordinates.

P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int, int, int]


def add(a: Point, b: Point) -> Point:
    x = (a[1] - a[0]) * (b[1] - b[0]) % P
    y = (a[1] + a[0]) * (b[1] + b[0]) % P
    t, z = 2 * a[3] * b[3] * D % P, 2 * a[2] * b[2] % P
    e, f, g, i = y - x, z - t, z + t, y + x
    return e * f % P, g * i % P, f * g % P, e * i % P


def times(scalar: int, point: Point) -> Point:
    total: Point = (0, 1, 1, 0)
    while scalar:
        if scalar & 1:
            total = add(total, point)
        point, scalar = add(point, point), scalar >> 1
    return total


def point_of(data: bytes) -> Point:
    y = int.from_bytes(data, "little")
    sign, y = y >> 255, y & (2**255 - 1)
    x2 = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(x2, (P + 3) // 8, P)
    if x * x % P != x2:
        x = x * pow(2, (P - 1) // 4, P) % P
    check(x * x % P == x2, "not a point of the curve")
    x = P - x if x & 1 != sign else x
    return x, y, 1, x * y % P


BASE = point_of((4 * pow(5, -1, P) % P).to_bytes(32, "little"))


def is_signed(key: bytes, message: bytes, signature: bytes) -> bool:
    scalar = int.from_bytes(signature[32:], "little")
    if len(signature) != 64 or scalar >= ORDER:
        return False
    k = int.from_bytes(hashlib.sha512(signature[:32] + key + message).digest(), "little") % ORDER
    left, right = times(scalar, BASE), add(point_of(signature[:32]), times(k, point_of(key)))
    return (left[0] * right[2] - right[0] * left[2]) % P == 0 and (left[1] * right[2] - right[1] * left[2]) % P == 0


# -- 4. the outer state ----------------------------------------------------------------------------------------------

PART_VALUES = 262144
BLOCK = {"int8": 256, "int4": 64}
LARGEST = {"int8": 127, "int4": 7}
MAGNITUDE = {"fp32": 1e30, "fp16": 65504.0, "int8": 1e30, "int4": 1e30}


def parts_of(n: int) -> list[slice]:
    return [slice(start, min(start + PART_VALUES, n)) for start in range(0, n, PART_VALUES)]


def encoded_bytes(k: int, codec: str) -> int:
    if codec in BLOCK:
        integers = k if codec == "int8" else (k + 1) // 2
        return 4 * -(-k // BLOCK[codec]) + integers
    return k * (4 if codec == "fp32" else 2)


def encode(values: Vector, codec: str) -> bytes:
    check(bool(np.isfinite(values).all()), "only finite values can be encoded")
    limit = np.float32(MAGNITUDE[codec])
    x = np.clip(values, -limit, limit)
    if codec not in BLOCK:
        return x.astype("<f4" if codec == "fp32" else "<f2").tobytes()
    scales, integers = [], []
    for start in range(0, len(x), BLOCK[codec]):
        block = x[start : start + BLOCK[codec]]
        scale = np.float32(np.abs(block).max()) / np.float32(LARGEST[codec])
        scale = scale if scale >= np.float32(2.0**-126) else np.float32(0)
        inverse = np.float32(1) / scale if scale else np.float32(0)
        scales.append(scale)
        integers.append(np.rint(block * inverse))
    whole = np.concatenate(integers).astype(np.int8)
    packed = np.array(scales, "<f4").tobytes()
    if codec == "int8":
        return packed + whole.tobytes()
    nibbles = [int(q) + 8 for q in whole] + [8] * (len(whole) % 2)
    return packed + bytes(low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2]))


def decode(data: bytes, k: int, codec: str) -> Vector:
    check(len(data) == encoded_bytes(k, codec), "an encoded part of another length")
    limit = np.float32(MAGNITUDE[codec])
    if codec not in BLOCK:
        values = np.frombuffer(data, "<f4" if codec == "fp32" else "<f2").astype(np.float32)
        check(bool(np.isfinite(values).all() and (np.abs(values) <= limit).all()), "a value out of its limits")
        return values
    blocks = -(-k // BLOCK[codec])
    scales, rest = np.frombuffer(data, "<f4", blocks), data[4 * blocks :]
    sound = np.isfinite(scales) & (scales >= 0) & (scales <= limit / np.float32(LARGEST[codec]))
    check(bool(sound.all()), "a scale out of its limits")
    if codec == "int8":
        integers = np.frombuffer(rest, np.int8)
    else:
        integers = np.array([half - 8 for byte in rest for half in (byte & 15, byte >> 4)][:k], np.int8)
    return integers.astype(np.float32) * np.repeat(scales, BLOCK[codec])[:k].astype(np.float32)


def mean_of(contributions: Sequence[tuple[int, Vector]], total: int, k: int) -> Vector:
    """(weight, values) of each, in the order of the roster."""
    mean = np.zeros(k, np.float32)
    for weight, values in contributions:
        mean = mean + values * np.float32(weight / total)
    return mean


def product(x: Vector, y: Vector) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        found = product_in(x, y)
    return found if 2.0**-64 <= abs(found) <= 2.0**64 else product_in(x.astype(np.float64), y.astype(np.float64))


def product_in(x: npt.NDArray[np.floating], y: npt.NDArray[np.floating]) -> float:
    lanes = 16384
    products = np.zeros(-(-len(x) // lanes) * lanes, x.dtype)
    products[: len(x)] = x * y
    sums = np.zeros(lanes, x.dtype)
    for row in products.reshape(-1, lanes):
        sums = sums + row
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    return float(sums[0])


def weighted(g: Mapping[int, Vector], shares: Mapping[int, float], k: int) -> Vector:
    mean = np.zeros(k, np.float32)
    for i, share in shares.items():
        mean = mean + g[i] * np.float32(share)
    return mean


def robust_mean_of(g: Mapping[int, Vector], w: Sequence[int], total: int | None, k: int) -> tuple[list[int], Vector]:
    """Who counts, and the mean. ``total``: None for adopt."""
    order = sorted(g)
    norms = {i: math.sqrt(product(g[i], g[i])) for i in order}
    ranked = sorted(norms.values())
    bound = math.inf if len(order) == 1 else 4 * ranked[0] if len(order) == 2 else ranked[(len(order) - 1) // 2]
    alike = {i: bound / norms[i] if norms[i] > bound else 1.0 for i in order}

    def shares_of(among: Sequence[int], factors: Mapping[int, float]) -> dict[int, float]:
        away = sum(w[i] for i in order if i not in among)
        whole = sum(w[i] for i in among) if total is None else total - away
        shares = {i: (w[i] / whole) * factors[i] for i in among}
        return {i: float(np.float32(share)) if share >= 2.0**-126 else 0.0 for i, share in shares.items()}

    shares = shares_of(order, alike)
    mean = weighted(g, shares, k)
    left, factors = list(order), dict(alike)
    if len(order) >= 5:
        usual = sorted(w)[(len(w) - 1) // 2]
        for i in order:
            most = bound * max(1.0, w[i] / usual)
            factors[i] = most / norms[i] if norms[i] > most else 1.0
        q = {i: product(g[i], g[i]) for i in order}
        d = {i: product(g[i], mean) for i in order}
        m = product(mean, mean)
        while 2 * (len(left) - 1) > len(order):
            c = {}
            for i in left:
                a = d[i] - shares[i] * q[i]
                o = m - (2 * shares[i]) * d[i] + (shares[i] * shares[i]) * q[i]
                c[i] = a / (math.sqrt(q[i]) * math.sqrt(o)) if q[i] > 0 and o > 0 else 0.0
            j = min(left, key=lambda i: c[i])
            if c[j] >= 0:
                break
            m = m - (2 * shares[j]) * d[j] + (shares[j] * shares[j]) * q[j]
            d = {i: d[i] - shares[j] * product(g[i], g[j]) for i in left}
            left.remove(j)
    return left, weighted(g, shares_of(left, factors), k)


def mask_of(members: Sequence[int]) -> bytes:
    number = sum(1 << i for i in members)
    return number.to_bytes((number.bit_length() + 7) // 8, "little")


def members_of(mask: bytes) -> list[int]:
    check(not mask.endswith(b"\0") and len(mask) <= 32, "a mask with zeros at its end, or too long")
    number = int.from_bytes(mask, "little")
    return [i for i in range(number.bit_length()) if number >> i & 1]


@dataclass(frozen=True)
class Mean:
    """A part of an update."""

    mask: bytes
    data: bytes

    @cached_property
    def hash(self) -> bytes:
        return h(self.mask, self.data)


@dataclass(frozen=True)
class Header:
    step: int
    parent: bytes
    contributors: Sequence[tuple[str, int]]
    part_hashes: Sequence[bytes]

    @cached_property
    def packed(self) -> bytes:
        contributors = [[peer_id, weight] for peer_id, weight in self.contributors]
        packed: bytes = msgpack.packb([self.step, self.parent, contributors, list(self.part_hashes)])
        return packed

    @property
    def link(self) -> bytes:
        return h(self.packed)

    @property
    def head(self) -> bytes:
        return h(self.parent, self.link)


UPDATE_MAGIC = bytes.fromhex("44694c6f436f5501")


def pack_update(header: Header, means: Sequence[Mean]) -> bytes:
    mask_bytes = -(-len(header.contributors) // 8)
    parts = [mean.mask.ljust(mask_bytes, b"\0") + mean.data for mean in means]
    return UPDATE_MAGIC + len(header.packed).to_bytes(4, "big") + header.packed + header.head + b"".join(parts)


def open_header(data: bytes) -> Header:
    step, parent, contributors, part_hashes = unpack(data)
    header = Header(step, parent, [(peer_id, weight) for peer_id, weight in contributors], part_hashes)
    check(header.packed == data, "a header that is packed otherwise")
    return header


def open_update(data: bytes, n: int, codec: str) -> tuple[Header, list[Mean]]:
    check(data[:8] == UPDATE_MAGIC, "not an update")
    end = 12 + int.from_bytes(data[8:12], "big")
    header = open_header(data[12:end])
    check(header.head == data[end : end + 32], "a damaged header")
    part_hashes = header.part_hashes
    at, mask_bytes, means = end + 32, -(-len(header.contributors) // 8), []
    for where in parts_of(n):
        size = encoded_bytes(where.stop - where.start, codec)
        mask, values = data[at : at + mask_bytes], data[at + mask_bytes : at + mask_bytes + size]
        means.append(Mean(mask.rstrip(b"\0"), values))
        at += mask_bytes + size
    check(at == len(data), f"{len(data) - at} bytes behind an update")
    check([mean.hash for mean in means] == list(part_hashes), "a part with another hash")
    return header, means


@dataclass
class State:
    step: int
    head: bytes
    theta: Vector
    momentum: Vector

    @classmethod
    def genesis(cls, theta: Vector, blake3: Blake3) -> State:
        head = h(b"genesis", blake3(theta.astype("<f4").tobytes()))
        return cls(step=0, head=head, theta=theta.copy(), momentum=np.zeros_like(theta))

    def apply(self, header: Header, means: Sequence[Mean], codec: str, lr: float, momentum: float) -> None:
        check((header.step, header.parent) == (self.step, self.head), "an update that does not follow")
        check(len(means) == len(parts_of(len(self.theta))), "an update with too few parts, or too many")
        mu, rate = np.float32(momentum), np.float32(lr)
        for where, mean in zip(parts_of(len(self.theta)), means):
            g = decode(mean.data, where.stop - where.start, codec)
            m = self.momentum[where] * mu
            m = m + g
            v = m * mu
            v = g + v
            v = v * rate
            self.momentum[where], self.theta[where] = m, self.theta[where] - v
        self.step, self.head = header.step + 1, header.head

    def chunks(self) -> list[bytes]:
        grid = parts_of(len(self.theta))
        return [vector[where].astype("<f4").tobytes() for vector in (self.theta, self.momentum) for where in grid]


def state_digest(step: int, head: bytes, chunk_hashes: Sequence[bytes]) -> bytes:
    return h(b"state", step.to_bytes(8, "big"), head, *chunk_hashes)


# -- 6. frames, 8. messages ------------------------------------------------------------------------------------------

MESSAGES: dict[str, tuple[set[str], set[str]]] = {
    "ready": ({"readiness", "record"}, set()),
    "roster": ({"members", "signature"}, {"absent", "idle"}),
    "too-few": ({"ready"}, set()),
    "no-witness": (set(), set()),
    "redirect": ({"record"}, set()),
    "behind": ({"record"}, set()),
    "no": ({"reason"}, set()),
    "closing": ({"head", "gather_s", "record"}, {"callers"}),
    "eta": ({"eta_s"}, {"busy", "leader", "uncalled"}),
    "contribute": ({"round_id"}, {"number"}),
    "receipt": ({"round_id", "part_hashes"}, {"number", "state"}),
    "again": ({"number", "members", "parts"}, set()),
    "commit": ({"part_hashes", "holders"}, {"state"}),
    "took": ({"signature"}, set()),
    "ask-commit": ({"round_id"}, set()),
    "took-before": ({"part_hashes", "signature"}, {"state"}),
    "certifies": ({"full", "members", "signatures"}, {"witness"}),
    "ask-witness": ({"link", "certificate"}, set()),
    "witnessed": ({"signature"}, set()),
    "ask-part": ({"round_id", "part", "hash"}, set()),
    "ask-contributions": ({"round_id", "number", "part"}, set()),
    "accuses": ({"peer_id"}, set()),
    "ask-evidence": (set(), set()),
    "ask-heads": ({"since"}, {"pruned"}),
    "heads": ({"first", "head", "links"}, set()),
    "ask-chain": ({"since"}, set()),
    "ask-update": ({"step", "head"}, set()),
    "ask-index": ({"step", "digest"}, set()),
    "ask-chunk": ({"step", "digest", "chunk"}, set()),
    "ask-have": ({"step", "digest"}, set()),
    "have": ({"chunks"}, set()),
    "size": ({"size_bytes"}, set()),
    "ask-manifest": (set(), set()),
    "push": ({"record"}, set()),
    "ask-revocations": (set(), set()),
    "revocations": ({"sealed"}, set()),
    "ask-anchors": ({"since"}, set()),
    "anchors": ({"anchors"}, set()),
    "ask-roster": ({"head", "leader", "round_id", "signature"}, set()),
    "ask-other": ({"round_id", "link", "full", "members", "signatures"}, {"state", "witness"}),
    "other": ({"link", "full", "members", "signatures"}, {"state", "witness"}),
    "ask-barred": (set(), set()),
    "barred": ({"peer_ids"}, set()),
    "ask-proof": ({"peer_id"}, set()),
    "ask-dial-back": ({"consent"}, set()),
    "dial-back": (set(), set()),
    "dialed-back": ({"reached", "ip"}, {"reason"}),
    "ask-transfer": ({"up_bytes", "down_bytes"}, set()),
    "transferred": ({"wall_s"}, set()),
}
"""Tag -> the fields that must be there, and those that may."""

ANSWERS = {
    "ready": ({"eta"}, {"roster", "too-few", "no-witness", "redirect", "behind"}),
    "closing": ({"eta"}, {"eta", "behind", "redirect"}),
    "receipt": ({"eta"}, {"again", "commit"}),
    "took": ({"eta"}, {"certifies"}),
    "ask-commit": ({"eta"}, {"took-before", "commit"}),
    "ask-witness": ({"eta"}, {"witnessed"}),
    "accuses": (set[str](), {"ask-evidence"}),
    "ask-heads": (set[str](), {"heads"}),
    "ask-have": (set[str](), {"have"}),
    "push": (set[str](), {"push"}),
    "ask-revocations": (set[str](), {"revocations"}),
    "ask-anchors": (set[str](), {"anchors"}),
    "ask-roster": (set[str](), {"roster"}),
    "ask-other": (set[str](), {"other"}),
    "ask-barred": (set[str](), {"barred"}),
    "ask-dial-back": (set[str](), {"dialed-back"}),
}
"""Request -> what may come before the answer, and the answer; ``no`` in any case."""
BLOBS = {"ask-contributions", "ask-chain", "ask-update", "ask-index", "ask-chunk", "ask-manifest", "ask-proof"}
CHUNK_BYTES = 1048576


@dataclass(frozen=True)
class Message:
    tag: str
    fields: Mapping[str, Any]


def frames(data: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        check(size <= 4194304 and at + 4 + size <= len(data), "a frame that is too long, or cut short")
        found.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return found


def message(frame: bytes) -> Message:
    content = unpack(frame)
    check(isinstance(content, list) and len(content) == 2 and content[0] in MESSAGES, "not a message")
    tag, fields = content
    must, may = MESSAGES[tag]
    check(must <= set(fields) <= must | may, f"{tag} with fields {sorted(fields)}")
    for name, kind in (("record", RECORD), ("readiness", READINESS), ("consent", CONSENT), ("leader", RECORD)):
        if isinstance(fields.get(name), bytes) and fields[name]:
            open_sealed(fields[name], kind)
    return Message(tag, fields)


# -- 9. a round ------------------------------------------------------------------------------------------------------


def known_at(step: int, last: Sequence[Sequence[str]]) -> frozenset[str]:
    """Who is known. ``last``: of the last 16 updates, or of all, who contributed to most parts of each."""
    updates = Counter(peer_id for contributed in last for peer_id in contributed)
    return frozenset(peer_id for peer_id, count in updates.items() if count >= 4 and step >= 16)


@dataclass(frozen=True)
class Round:
    """What follows from a roster, and from who is known."""

    leader: str
    """Who gathered it."""
    sealed: tuple[bytes, ...]
    signature: bytes
    absent: tuple[bytes, ...] = ()
    idle: tuple[int, ...] = ()
    keep: bool = False
    min_group: int = 2
    owner: str = ""
    """Whose seed may help."""
    known_on: Mapping[bytes, frozenset[str]] = field(default_factory=dict)
    """Head -> who is known there; nobody, where it has no entry."""

    @cached_property
    def round_id(self) -> bytes:
        return h(b"round", self.leader.encode(), *self.sealed, b"absent", *self.absent, b"idle", bytes(self.idle))

    @cached_property
    def members(self) -> list[Mapping[str, Any]]:
        signed = is_signed(public_key(self.leader), ROSTER_CONTEXT + self.round_id, self.signature)
        check(signed, "a roster that its leader did not sign")
        members = [open_sealed(one, READINESS) for one in self.sealed]
        last = members[-1]
        if last["helps"]:
            check(last["peer_id"] == self.owner, "a helper that is not the owner's seed")
            check(last["dropped"] and not last["client_mode"], "a helper that cannot help")
        trainers = [member for member in members if member is not last or not last["helps"]]
        check(not any(member["helps"] for member in trainers), "a helper that is not the last member")
        ranks = [h(self.sealed_head(members), member["peer_id"].encode()) for member in trainers]
        check(ranks == sorted(set(ranks)), "a roster that is not in the order of rank")
        check(len({(member["run_id"], member["step"], member["head"]) for member in members}) == 1, "many heads")
        check({member["leader"] for member in members} == {self.leader}, "a readiness for another leader")
        return members

    @cached_property
    def helper(self) -> list[int]:
        return [i for i, member in enumerate(self.members) if member["helps"]]

    @cached_property
    def trainers(self) -> list[Mapping[str, Any]]:
        return self.members[: len(self.members) - len(self.helper)]

    @cached_property
    def known(self) -> list[int]:
        known = self.known_on.get(self.sealed_head(self.members), frozenset[str]())
        return [i for i, member in enumerate(self.trainers) if member["peer_id"] in known]

    def first_of_each(self, members: Sequence[int]) -> list[int]:
        """Of these members, of each token the first, and all that have none."""
        seats = {i: self.members[i]["seat"] for i in sorted(members)}
        tokens = {i: open_sealed(unpack(seat)[0], INVITATION)["token"] if seat else i for i, seat in seats.items()}
        return [i for i in tokens if i == min(j for j in tokens if tokens[j] == tokens[i])]

    @property
    def too_few_known(self) -> bool:
        return len(self.first_of_each(self.known)) < min(2, self.min_group)

    @cached_property
    def counting(self) -> list[int]:
        if self.too_few_known:
            return list(range(len(self.trainers)))
        unknown = len(self.trainers) - len(self.known)
        check(unknown <= max(1, (len(self.known) - 1) // 2), "a roster with too many newcomers")
        dialled = [i for i in self.known if not self.members[i]["client_mode"]]
        gathers = self.leader in self.known_on[self.sealed_head(self.members)]
        helps = self.leader in [self.members[i]["peer_id"] for i in self.helper]
        check(gathers or helps or not dialled, "a roster that a newcomer gathered")
        return self.known

    def is_most(self, members: Sequence[int]) -> bool:
        certifying = self.first_of_each(self.counting)
        return 2 * len(set(members) & set(certifying)) > len(certifying)

    @staticmethod
    def sealed_head(members: Sequence[Mapping[str, Any]]) -> bytes:
        head: bytes = members[0]["head"]
        return head

    @property
    def step(self) -> int:
        step: int = self.members[0]["step"]
        return step

    @property
    def ids(self) -> list[str]:
        return [member["peer_id"] for member in self.members]

    @cached_property
    def median(self) -> int:
        claims = sorted(member["weight"] for member in self.trainers)
        claim: int = claims[(len(claims) - 1) // 2]
        return claim

    @cached_property
    def weights(self) -> list[int]:
        return [min(member["weight"], 4 * self.median) for member in self.trainers]

    def total(self, came: Sequence[int]) -> int:
        if self.keep:
            return sum(self.weights) + self.median * len(self.absent)
        return sum(self.weights[i] for i in came)

    def reducers(self, members: Sequence[int]) -> list[int]:
        dialled = self.would_reduce(members)
        return [i for i in dialled if i not in self.idle] or dialled

    @cached_property
    def uplinks(self) -> list[int]:
        """What the uplink of each member counts as, in bytes/s."""
        tags = [h(self.sealed_head(self.members), peer_id.encode())[:4] for peer_id in self.ids]
        said = {i: self.members[i]["uplinks"] for i in self.first_of_each(self.counting)}
        return uplinks_of(tags, said, self.reducers(range(len(self.members))))

    def dealt(self, members: Sequence[int], parts: Sequence[int]) -> dict[int, list[int]]:
        """Reducer -> its parts."""
        reducers = self.reducers(members)
        shares = shares_of([self.uplinks[i] for i in reducers], len(members))
        return dict(zip(reducers, parts_of_each(shares, parts)))

    def would_reduce(self, members: Sequence[int]) -> list[int]:
        trainers = [i for i in members if i not in self.helper]
        counting = [i for i in trainers if i in self.counting] or trainers
        return [*(i for i in counting if self.is_fit(i)), *(i for i in members if i in self.helper)] or counting

    def reaches(self, one: int, other: int) -> bool:
        return bool(self.members[one]["reaches_over"] & self.members[other]["reached_over"])

    def is_fit(self, member: int) -> bool:
        """To average for those that count and contribute."""
        due = [i for i in self.counting if not self.members[i]["dropped"]]
        over = {family: sum(self.members[i]["reaches_over"] & family != 0 for i in due) for family in (1, 2)}
        main = 1 if over[1] >= over[2] else 2
        by_main = self.members[member]["reached_over"] & main != 0
        return not self.members[member]["client_mode"] and (by_main or all(self.reaches(i, member) for i in due))

    @property
    def leaders(self) -> list[int]:
        """Of settle, one after the other."""
        everybody = range(len(self.members))
        return sorted(self.reducers(everybody), key=lambda i: sum(not self.reaches(j, i) for j in everybody if j != i))

    def reduce(self, came: Mapping[int, Vector], k: int, codec: str) -> Mean:
        """``came``: index in the roster -> its decoded contribution to a part of ``k`` values."""
        order = sorted(came)
        mean = mean_of([(self.weights[i], came[i]) for i in order], self.total(order), k)
        return Mean(mask_of(order), encode(mean, codec))

    def header(self, part_hashes: Sequence[bytes]) -> Header:
        contributors = list(zip(self.ids, self.weights))
        return Header(self.step, self.sealed_head(self.members), contributors, part_hashes)


@dataclass(frozen=True)
class Certificate:
    """What stands in a certificate beside the roster."""

    full: bytes
    state: bytes
    signatures: Sequence[tuple[int, bytes]]
    witness: bytes

    def packed(self, meeting: Round) -> bytes:
        roster = [meeting.leader, list(meeting.sealed), list(meeting.absent), meeting.signature, list(meeting.idle)]
        signatures = [[i, signature] for i, signature in self.signatures]
        packed: bytes = msgpack.packb([roster, self.full, self.state, signatures, self.witness])
        return packed

    def signed(self, meeting: Round, link: bytes) -> bytes:
        """What is under every signature."""
        return TAKEN_CONTEXT + h(meeting.round_id, link, self.full, self.state)

    def check(self, meeting: Round, link: bytes, owner: str, *, to_be_witnessed: bool = False) -> None:
        """``to_be_witnessed``: the owner has not signed yet."""
        who, signed = [i for i, _ in self.signatures], self.signed(meeting, link)
        check(who == sorted(set(who)), "signatures that do not rise")
        check(set(members_of(self.full)) <= set(range(len(meeting.trainers))), "a contributor beyond the roster")
        for i, signature in self.signatures:
            check(is_signed(public_key(meeting.ids[i]), signed, signature), f"not the signature of member {i}")
        check(meeting.is_most(who), "signatures of too few")
        if self.witness:
            check(is_signed(public_key(owner), signed, self.witness), "not the witness of the owner")
        by_owner = bool(self.witness) or owner in {meeting.ids[i] for i in who}
        check(by_owner or to_be_witnessed or not meeting.too_few_known, "no witness")


def open_certificate(data: bytes, **rules: Any) -> tuple[Round, Certificate]:
    """``rules``: what ``Round`` has to be told."""
    roster, full, state, signatures, witness = unpack(data)
    leader, members, absent, signature, idle = roster
    meeting = Round(leader, tuple(members), signature, tuple(absent), tuple(idle), **rules)
    certificate = Certificate(full, state, [(i, one) for i, one in signatures], witness)
    check(len(data) <= 524288 and certificate.packed(meeting) == data, "a certificate that is packed otherwise")
    return meeting, certificate


def open_entry(data: bytes, **rules: Any) -> tuple[Header, Round, Certificate]:
    """A header and the certificate beside it."""
    header, certificate = unpack(data)
    return open_header(header), *open_certificate(certificate, **rules)


# -- streams ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """What went over one stream in both directions."""

    opener: str
    server: str
    up: bytes
    """From the one that opened it."""
    down: bytes


@dataclass(frozen=True)
class Made:
    """What stands behind a reduced part."""

    number: int
    reducer: int
    inputs: bytes
    """A mask of 32 bytes, then 32 bytes for the contributions."""
    signature: bytes


def place(round_id: bytes, number: int, part: int) -> bytes:
    return h(round_id, bytes([number]), part.to_bytes(4, "big"))


def inputs_of(came: Mapping[int, tuple[bytes, bytes]], blake3: Blake3) -> bytes:
    """``came``: index in the roster -> (contribution, signature)."""
    senders = sum(1 << i for i in came).to_bytes(32, "little")
    return senders + h(*(bytes([i]) + blake3(came[i][0]) + came[i][1] for i in sorted(came)))


def contributions_of(blob: bytes) -> dict[int, tuple[bytes, bytes]]:
    """What answers ``ask-contributions``, as ``inputs_of`` wants it."""
    came = {i: (data, signature) for i, data, signature in unpack(blob)}
    check(list(came) == sorted(came), "contributions in another order")
    return came


@dataclass
class Decoded:
    """One stream's frames, each read as what it is."""

    stream: Stream
    asked: list[Message] = field(default_factory=list)
    answered: list[Message] = field(default_factory=list)
    contributions: dict[int, bytes] = field(default_factory=dict)
    """Part -> what the opener sent for it."""
    signatures: dict[int, bytes] = field(default_factory=dict)
    """Part -> the opener's, over that."""
    means: dict[int, Mean] = field(default_factory=dict)
    """Part -> what the server sent for it."""
    reductions: dict[int, Made] = field(default_factory=dict)
    """Part -> what its reducer has signed."""
    blobs: list[tuple[Message, bytes]] = field(default_factory=list)
    """Request -> what came for it."""
    frames: int = 0


@dataclass
class Decoder:
    """Of one run. ``rounds`` are known from the rosters of streams that were decoded before."""

    n: int
    codec: str
    owner: str
    blake3: Blake3
    keep: bool = False
    min_group: int = 2
    rounds: dict[bytes, Round] = field(default_factory=dict)
    agains: dict[tuple[bytes, int], Message] = field(default_factory=dict)
    """Round id and number -> what its leader asked for."""
    certified: dict[bytes, tuple[list[bytes], Certificate]] = field(default_factory=dict)
    """Round id -> part hashes, and a certificate of the update."""
    history: dict[bytes, tuple[bytes, list[str]]] = field(default_factory=dict)
    """Head -> the one before, and who contributed to most parts of the update between them."""
    known_on: dict[bytes, frozenset[str]] = field(default_factory=dict)
    """Head -> who is known there."""

    def all(self, streams: Sequence[Stream]) -> list[Decoded]:
        """Rosters first, then what was said about the rounds, then the butterflies."""
        order = {"ready": 0, "receipt": 1}
        firsts = [message(frames(stream.up)[0]).tag for stream in streams]
        ranked = sorted(range(len(streams)), key=lambda i: order.get(firsts[i], 2))
        decoded = {i: self.stream(streams[i]) for i in ranked}
        return [decoded[i] for i in range(len(streams))]

    def stream(self, stream: Stream) -> Decoded:
        """Everything that was said; nothing may be left over."""
        up, down = iter(frames(stream.up)), iter(frames(stream.down))
        decoded = Decoded(stream, frames=len(frames(stream.up)) + len(frames(stream.down)))
        for frame in up:
            request = message(frame)
            decoded.asked.append(request)
            if request.tag == "contribute":
                self._butterfly(decoded, request, up, down)
            elif request.tag == "ask-part":
                self._part(decoded, request, down)
            elif request.tag in BLOBS:
                self._blob(decoded, request, down)
            elif request.tag == "accuses":
                self._answers(decoded, down, *ANSWERS["accuses"])
                if decoded.answered[-1].tag == "ask-evidence":
                    self._blob(decoded, request, up)
            elif request.tag == "ask-transfer":
                check(len(next(up)) == request.fields["up_bytes"], "a transfer of another length")
                self._answers(decoded, down, set(), {"transferred"})
                check(len(next(down)) == request.fields["down_bytes"], "a transfer of another length")
            elif decoded.asked[0].tag == "ask-roster" and request.tag in ("roster", "no"):
                check(decoded.answered[-1].tag == "roster", f"{request.tag} is no request")
            elif request.tag in ("eta", "no"):
                check(decoded.answered[-1].tag == "commit", f"{request.tag} is no request")
                if request.tag == "no":
                    self._answers(decoded, down, *ANSWERS["took"])
            elif request.tag in ANSWERS:
                self._answers(decoded, down, *ANSWERS[request.tag])
                if request.tag == "ask-commit" and decoded.answered[-1].tag == "commit":
                    self._answers(decoded, down, set(), {"certifies"})
            else:
                check(request.tag == "dial-back", f"{request.tag} is no request")
            self._note(request, decoded)
        check(next(down, None) is None, "frames that nobody asked for")
        return decoded

    def _answers(self, decoded: Decoded, down: Iterator[bytes], before: set[str], answer: set[str]) -> None:
        for frame in down:
            said = message(frame)
            decoded.answered.append(said)
            check(said.tag in before | answer | {"no"}, f"{said.tag} is no answer here")
            if said.tag not in before or (said.tag in answer and not said.fields.get("busy", False)):
                return

    def _note(self, request: Message, decoded: Decoded) -> None:
        last = decoded.answered[-1] if decoded.answered else None
        if last is None:
            return
        if request.tag == "ask-other":
            self._told(decoded, request.fields)
        if last.tag == "roster" and request.tag == "ready":
            absent, rules = tuple(last.fields.get("absent", ())), self._rules()
            leader, members = decoded.stream.server, tuple(last.fields["members"])
            idle = tuple(last.fields.get("idle", ()))
            found = Round(leader, members, last.fields["signature"], absent, idle, **rules)
            check(bool(found.members), "an empty roster")
            would = found.would_reduce(range(len(found.trainers)))
            fits = list(idle) == sorted(set(idle) & set(would)) and 2 * len(idle) <= len(would)
            check(fits, "a roster that leaves the wrong ones idle")
            self.rounds[found.round_id] = found
        if last.tag == "again" and request.tag == "receipt":
            self.agains[request.fields["round_id"], last.fields["number"]] = last
        if last.tag == "certifies":
            self._certified(decoded, last.fields)
        if request.tag == "ask-witness":
            self._witnessed(decoded, request.fields, last)

    def _rules(self) -> dict[str, Any]:
        rules = {"keep": self.keep, "min_group": self.min_group, "owner": self.owner}
        return {**rules, "known_on": self.known_on}

    def _certified(self, decoded: Decoded, fields: Mapping[str, Any]) -> None:
        meeting = self.rounds[decoded.asked[0].fields["round_id"]]
        commit = [said for said in decoded.answered if said.tag == "commit"][-1].fields
        check(len(fields["members"]) == len(fields["signatures"]), "a signature is missing")
        certificate = Certificate(
            full=fields["full"],
            state=commit.get("state", b""),
            signatures=list(zip(fields["members"], fields["signatures"])),
            witness=fields.get("witness", b""),
        )
        header = meeting.header(commit["part_hashes"])
        certificate.check(meeting, header.link, self.owner)
        for took in (message for message in decoded.asked if message.tag == "took"):
            signed, signature = certificate.signed(meeting, header.link), took.fields["signature"]
            check(is_signed(public_key(decoded.stream.opener), signed, signature), "a member that signs something else")
        found = self.certified.setdefault(meeting.round_id, (commit["part_hashes"], certificate))
        check(found[0] == commit["part_hashes"], "two commits of one round")
        self._learn(header, [meeting.ids[i] for i in members_of(certificate.full)])

    def _told(self, decoded: Decoded, fields: Mapping[str, Any]) -> None:
        """What a member is about to apply is certified, by no more of its signatures than it takes."""
        meeting = self.rounds[fields["round_id"]]
        signatures = list(zip(fields["members"], fields["signatures"]))
        witness, state = fields.get("witness", b""), fields.get("state", b"")
        told = Certificate(full=fields["full"], state=state, signatures=signatures, witness=witness)
        told.check(meeting, fields["link"], self.owner)
        check(decoded.answered[-1].tag == "no", "two updates of one round")

    def _learn(self, header: Header, in_most_parts: list[str]) -> None:
        self.history[header.head] = header.parent, in_most_parts
        last, at = list[list[str]](), header.head
        while at in self.history and len(last) < 16:
            at, contributed = self.history[at]
            last.append(contributed)
        self.known_on.setdefault(header.head, known_at(header.step + 1, last))

    def _witnessed(self, decoded: Decoded, asked: Mapping[str, Any], answer: Message) -> None:
        meeting, certificate = open_certificate(asked["certificate"], **self._rules())
        check(meeting.round_id in self.rounds and not certificate.witness, "another round's certificate")
        certificate.check(meeting, asked["link"], self.owner, to_be_witnessed=True)
        if answer.tag == "witnessed":
            check(decoded.stream.server == self.owner, "a witness that is not the owner")
            signed = certificate.signed(meeting, asked["link"])
            check(is_signed(public_key(self.owner), signed, answer.fields["signature"]), "a witness of something else")

    def _butterfly(self, decoded: Decoded, request: Message, up: Iterator[bytes], down: Iterator[bytes]) -> None:
        round_id, number = request.fields["round_id"], request.fields.get("number", 0)
        found = self.rounds[round_id]
        members, parts = list(range(len(found.members))), list(range(len(parts_of(self.n))))
        if number:
            again = self.agains[round_id, number]
            members, parts = again.fields["members"], again.fields["parts"]
        mine = found.dealt(members, parts)[found.ids.index(decoded.stream.server)]
        for part, frame in zip(mine, up):
            data, signature = frame[:-64], frame[-64:]
            check(len(data) == encoded_bytes(self._values(part), self.codec), "a contribution of another length")
            signed = CONTRIBUTION_CONTEXT + h(place(round_id, number, part), self.blake3(data))
            check(is_signed(public_key(decoded.stream.opener), signed, signature), "a contribution that is not signed")
            decoded.contributions[part] = data
            decoded.signatures[part] = signature
        for part, frame in zip(mine, down):
            if not self._mean(decoded, found, part, frame):
                decoded.answered.append(message(frame))
                return
            said, by = decoded.reductions[part].number, found.ids[decoded.reductions[part].reducer]
            check((said, by) == (number, decoded.stream.server) or said > number, "a part of another reducer")

    def _mean(self, decoded: Decoded, found: Round, part: int, frame: bytes) -> bool:
        size = encoded_bytes(self._values(part), self.codec)
        if not frame or len(frame) != 1 + frame[0] + size + 130:
            return False
        mask, behind = frame[1 : 1 + frame[0]], frame[-130:]
        inside = set(members_of(mask))
        mean = Mean(mask, frame[1 + len(mask) : -130])
        made = Made(number=behind[0], reducer=behind[1], inputs=behind[2:66], signature=behind[66:])
        signed = REDUCTION_CONTEXT + h(place(found.round_id, made.number, part), made.inputs, mean.hash)
        check(is_signed(public_key(found.ids[made.reducer]), signed, made.signature), "a part that is not signed")
        sent = set(members_of(made.inputs[:32].rstrip(b"\0")))
        check(inside == sent or (inside < sent and len(sent) >= 5 and 2 * len(inside) > len(sent)), "another mask")
        decoded.means[part], decoded.reductions[part] = mean, made
        return True

    def _part(self, decoded: Decoded, request: Message, down: Iterator[bytes]) -> None:
        part, size = request.fields["part"], message(next(down))
        decoded.answered.append(size)
        if size.tag == "size":
            found = self.rounds[request.fields["round_id"]]
            check(self._mean(decoded, found, part, next(down)), "a part of another length")
            mean = decoded.means[part]
            check((mean.hash, len(mean.data)) == (request.fields["hash"], size.fields["size_bytes"]), "another part")

    def _blob(self, decoded: Decoded, request: Message, down: Iterator[bytes]) -> None:
        frame = next(down, None)
        if frame is None:
            return  # whoever asked has closed the stream
        size = message(frame)
        decoded.answered.append(size)
        if size.tag == "no":
            return
        check(size.tag == "size", f"{size.tag} is no answer to {request.tag}")
        left, data = size.fields["size_bytes"], b""
        while left:
            chunk = next(down)
            check(len(chunk) == min(left, CHUNK_BYTES), "a frame of a blob that is too short")
            data, left = data + chunk, left - len(chunk)
        decoded.blobs.append((request, data))

    def _values(self, part: int) -> int:
        return min(PART_VALUES, self.n - part * PART_VALUES)


# -- 13. on disk -----------------------------------------------------------------------------------------------------


def pack_snapshot(state: State, run_id: str, blake3: Blake3) -> bytes:
    n, chunks = len(state.theta), state.chunks()
    digest = state_digest(state.step, state.head, [blake3(chunk) for chunk in chunks])
    text = (
        f'{{"__metadata__":{{"digest":"{digest.hex()}","head":"{state.head.hex()}","run":"{run_id}",'
        f'"step":"{state.step}"}},'
        f'"theta":{{"dtype":"F32","shape":[{n}],"data_offsets":[0,{4 * n}]}},'
        f'"momentum":{{"dtype":"F32","shape":[{n}],"data_offsets":[{4 * n},{8 * n}]}}}}'
    )
    return (504).to_bytes(8, "little") + text.encode().ljust(504) + b"".join(chunks)
