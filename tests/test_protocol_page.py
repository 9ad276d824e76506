"""``docs/protocol.md`` says what the code does: every table of the page against the code, in both directions."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from hashlib import sha1
from inspect import signature
from pathlib import Path
from typing import Any, cast

import msgpack
import numpy as np
import pytest
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.proto import dht_pb2, p2pd_pb2
from hivemind.utils import MSGPackSerializer
from pydantic import BaseModel

import p2p_diloco
from p2p_diloco.core import manifest, records
from p2p_diloco.core.anchor import ANCHOR_CONTEXT
from p2p_diloco.core.blocks import Int4, Int8
from p2p_diloco.core.buckets import Quota
from p2p_diloco.core.certificate import TAKEN_CONTEXT
from p2p_diloco.core.codecs import CODECS, known
from p2p_diloco.core.config import Timeouts
from p2p_diloco.core.group import ROSTER_CONTEXT
from p2p_diloco.core.identity import PEER_ID_PREFIX, PRIVATE_KEY_PREFIX
from p2p_diloco.core.invitation import (
    INVITATION_CONTEXT,
    REVOCATIONS_CONTEXT,
    SEAT_CONTEXT,
    Invitation,
    Revocations,
)
from p2p_diloco.core.manifest import PROTOCOL, RunManifest
from p2p_diloco.core.records import RUNS_KEY, Record, peers_key
from p2p_diloco.core.roster import READINESS_CONTEXT, Readiness
from p2p_diloco.core.runfile import RunSpec
from p2p_diloco.core.signed_part import CONTRIBUTION_CONTEXT, REDUCTION_CONTEXT
from p2p_diloco.core.update import UPDATE_MAGIC
from p2p_diloco.ledger.chain import CHAIN_MAGIC
from p2p_diloco.peer.probes import CONSENT_CONTEXT, DialConsent, Probes
from p2p_diloco.peer.reception import REQUESTS
from p2p_diloco.wire.channel import DIAL_BACK_PROTOCOL, MANIFEST_PROTOCOL, run_protocol
from p2p_diloco.wire.kademlia import HardenedDHTProtocol, node_id_of
from p2p_diloco.wire.message import Message
from p2p_diloco.wire.messages import MESSAGES, pack
from p2p_diloco.wire.probe_messages import DialBack
from p2p_diloco.wire.round_messages import NoWitness
from p2p_diloco.wire.state_messages import AskManifest
from tests.support import decoder
from tests.support.builders import identity
from tests.support.decoder import public_key

PAGE = Path(__file__).parents[1] / "docs" / "protocol.md"
PACKAGE = Path(p2p_diloco.__file__).parent
ROOMS = ("core", "ledger", "wire", "round", "peer")
"""Where the protocol is."""

LOCAL = {
    **dict.fromkeys(
        ("KEYS_KEPT", "OPENED_KEPT", "SEATS_KEPT", "ADDRESSES_KEPT"), "how much is remembered, to save time"
    ),
    **dict.fromkeys(("READ_BUFFER_BYTES", "MAX_KNOWN_PEERS", "SAMPLED_PARTS"), "to save time and memory"),
    **dict.fromkeys(("MAX_DAEMON_MESSAGE_BYTES", "MAX_SOCKET_PATH_BYTES", "MAX_LOSSES"), "between us and our p2pd"),
    **dict.fromkeys(("LOSS_WINDOW_S", "POLL_S", "TERMINATE_S", "MAX_OPEN_FILES"), "between us and our p2pd"),
    **dict.fromkeys(("PR_SET_PDEATHSIG", "MAX_UNREAD_BYTES", "PEERS_EVERY_S"), "between the processes of one peer"),
    **dict.fromkeys(("INNER_EVENT_EVERY_S", "NOT_YET", "LOOK_EVERY_S", "RENDER_EVERY_S"), "events and metrics"),
    **dict.fromkeys(("MAX_CONNECTIONS", "MAX_HEAD_BYTES", "READ_BYTES", "GZIP_FROM_BYTES"), "the web server"),
    **dict.fromkeys(("MAX_TOKEN_CHARS", "KEY_BYTES", "DAY_S", "OWN_PERMISSIONS"), "files of the owner and the user"),
    **dict.fromkeys(("MAX_CHARS", "TYPE_CHECKING"), "what a user may write; the interpreter"),
    "STEP_GRACE_S": "how long Ctrl+C waits",
    **dict.fromkeys(("ITEM_BYTES", "START_OF_ENTRY_BYTES"), "what follows from the forms of chain and msgpack"),
    **dict.fromkeys(("RUN_ID_CHARS", "LENGTH_BYTES", "MAX_FILE_BYTES"), "what follows from the form of an anchor"),
}
"""Numbers of these rooms that no other peer can tell: name -> what they are for."""


# -- the page --------------------------------------------------------------------------------------------------------


@cache
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


@cache
def tables() -> dict[str, list[list[str]]]:
    """The rows of each table of the page, without its head, by the heading above it."""
    found: dict[str, list[list[str]]] = {}
    heading, head_seen = "", False
    for line in page().splitlines():
        if line.startswith("#"):
            heading, head_seen = line.lstrip("# "), False
        elif not line.startswith("|"):
            head_seen = False
        elif not head_seen:
            head_seen = True
            assert heading not in found, f"two tables under {heading!r}"
            found[heading] = []
        elif set(line) - set("|- "):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            found[heading].append([cell.strip().replace("\\|", "|") for cell in cells])
    return found


def rows(heading: str, columns: int) -> list[tuple[str, ...]]:
    """The first columns of a table, without the marks of code."""
    return [tuple(cell.replace("`", "") for cell in row[:columns]) for row in tables()[heading]]


# -- how the page says what the code has -----------------------------------------------------------------------------


def number(value: float) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if value >= 1 << 20:
        for name, power in (("", value), (" - 1", value + 1)):
            if power & (power - 1) == 0:
                return f"2^{power.bit_length() - 1}{name}"
    return str(value)


def bounds(schema: dict[str, Any]) -> str:
    whole = schema["type"] == "int"
    low, high = schema.get("ge"), schema.get("le")
    if whole and "gt" in schema:
        low = schema["gt"] + 1
    if whole and "lt" in schema:
        high = schema["lt"] - 1
    said = []
    if low is not None and high is not None:
        said.append(f"{number(low)} to {number(high)}")
    else:
        said += [f"above {number(schema['gt'])}"] if "gt" in schema and not whole else []
        said += [f"at least {number(low)}"] if low is not None else []
        said += [f"at most {number(high)}"] if high is not None else []
        said += [f"below {number(schema['lt'])}"] if "lt" in schema and not whole else []
    if schema.get("allow_inf_nan") is False and high is None:
        said.append("finite")
    return ", ".join(said)


def length(schema: dict[str, Any], unit: str) -> str:
    least, most = schema.get("min_length"), schema.get("max_length")
    if least == most and least is not None:
        return f"{least} {unit}"
    if least and most:
        return f"{least} to {most} {unit}"
    return f"at most {most} {unit}" if most else f"at least {least} {unit}" if least else ""


def described(schema: dict[str, Any]) -> tuple[str, str]:
    """Type and limit of what a schema of pydantic's takes."""
    kind = schema["type"]
    if kind == "function-after" and schema["function"]["function"] is known:
        return "str", "one of " + ", ".join(CODECS)
    if kind in ("default", "function-after", "model-field", "definitions"):
        return described(schema["schema"])
    if kind == "nullable":
        inner, limit = described(schema["schema"])
        return f"{inner} or nil", limit
    if kind == "literal":
        return "str", "one of " + ", ".join(map(str, schema["expected"]))
    if kind == "union":
        inner, limit = described(schema["choices"][0])
        return inner, limit + ", or empty"
    if kind == "list":
        inner, limit = described(schema["items_schema"])
        return f"[{inner}]", length(schema, "items") + (f", each {limit}" if limit else "")
    if kind == "bytes":
        return kind, length(schema, "bytes")
    if kind == "str":
        pattern = schema.get("pattern")
        said = [length(schema, "characters"), f"matches {pattern}" if pattern else ""]
        return kind, ", ".join(filter(None, said))
    if kind in ("int", "float"):
        return kind, bounds(schema)
    return {"dict": "map"}.get(kind, kind), ""


def default(schema: dict[str, Any]) -> str:
    """ "" where a field must be there."""
    if schema["type"] != "default":
        return ""
    value = schema["default"]
    if value is None:
        return "nil"
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else json_like(value)


def json_like(value: object) -> str:
    if isinstance(value, (str, bytes)):
        return "empty" if not value else str(value)
    if isinstance(value, (int, float)):
        return number(value)
    return "empty" if value == [] else str(value)


def fields_of(kind: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """Name, type, limit and default of every field, in order."""
    schema: Any = kind.__pydantic_core_schema__
    while schema["type"] != "model-fields":
        schema = schema["schema"]
    return [(name, *described(field["schema"]), default(field["schema"])) for name, field in schema["fields"].items()]


# -- the tables ------------------------------------------------------------------------------------------------------


def test_every_message_and_each_of_its_fields() -> None:
    said = {name.strip("`"): rows(name, 4) for name in tables() if name.startswith("`")}
    said |= {tag: [] for tag in re.findall(r"^### `(.+)`\n\nNo fields\.", page(), re.MULTILINE)}
    assert said == {tag: fields_of(kind) for tag, kind in MESSAGES.items()}
    assert set(re.findall(r"^### `(.+)`$", page(), re.MULTILINE)) == set(MESSAGES)


def test_where_a_message_may_come_and_how_long_it_is() -> None:
    streams: dict[type[Message], str] = dict.fromkeys(REQUESTS, "run")
    streams |= {AskManifest: "manifest", DialBack: "dial-back"}
    largest = {1 << 18: "256 KiB", 513 << 10: "513 KiB", 1 << 22: "4 MiB"}
    code = [(tag, streams.get(kind, "-"), largest[kind.max_bytes]) for tag, kind in MESSAGES.items()]
    assert rows("All messages", 3) == code
    assert [kind for kind in MESSAGES.values() if kind.purpose is not None] == [
        kind for kind in MESSAGES.values() if kind in streams
    ]


def test_only_messages_are_named_as_answers() -> None:
    answers = [cell for row in tables()["All messages"] for cell in row[4:]]
    named = {name for cell in answers for name in re.findall(r"`([a-z-]+)`", cell)}
    assert named <= set(MESSAGES)


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("Record", Record),
        ("Readiness", Readiness),
        ("Consent", DialConsent),
        ("Invitation", Invitation),
        ("Revocations", Revocations),
    ],
    ids=str,
)
def test_every_signed_statement_in_the_order_of_its_fields(heading: str, kind: type[BaseModel]) -> None:
    assert rows(heading, 5) == [(str(i), *field) for i, field in enumerate(fields_of(kind))]


def test_the_manifest() -> None:
    code = [(name, "table" if kind == "model" else kind, *rest) for name, kind, *rest in fields_of(RunManifest)]
    assert rows("5. The manifest", 4) == code


def test_what_a_round_needs_of_the_run_file() -> None:
    sections = {name: field.annotation for name, field in RunSpec.model_fields.items()}
    code = {
        f"{section}.{name}": rest
        for section, kind in sections.items()
        if isinstance(kind, type) and issubclass(kind, BaseModel)
        for name, *rest in fields_of(kind)
    }
    said = {name: rest for name, *rest in rows("What a round needs of the run file", 4)}
    assert said == {name: code[name] for name in said}
    assert {name for name in code if name.startswith(("outer.", "round."))} <= set(said)


def test_every_time_out() -> None:
    assert rows("Time-outs", 2) == [(name, number(value)) for name, value in vars(Timeouts()).items()]


def numbers_of_the_rooms() -> Iterator[tuple[str, float]]:
    """Every constant of these rooms that is a number."""
    for room in ROOMS:
        for path in sorted((PACKAGE / room).glob("*.py")):
            module = importlib.import_module(f"p2p_diloco.{room}.{path.stem}")
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                for target in targets:
                    if isinstance(target, ast.Name) and re.fullmatch(r"[A-Z][A-Z0-9_]*", target.id):
                        value = getattr(module, target.id)
                        if isinstance(value, (int, float)):
                            yield target.id, value


def test_every_limit() -> None:
    code: dict[str, str] = {}
    for name, value in numbers_of_the_rooms():
        if name not in LOCAL:
            assert code.setdefault(name, number(value)) == number(value), f"{name} has two values"
    assert len(rows("Limits", 1)) == len(set(rows("Limits", 1))), "a limit that is named twice"
    assert dict(rows("Limits", 2)) == code  # type: ignore[arg-type]
    assert set(LOCAL) <= {name for name, _ in numbers_of_the_rooms()}


def test_codecs() -> None:
    huge = np.full(1, 3e38, np.float32)
    code = [
        (
            name,
            str(getattr(codec, "block", "")),
            str(codec.largest) if isinstance(codec, (Int8, Int4)) else "",
            number(float(codec.decode(codec.encode(huge), 1)[0])),
            str(codec.encoded_bytes(262144)),
            str(codec.encoded_bytes(1001)),
        )
        for name, codec in CODECS.items()
    ]
    assert rows("Codecs", 6) == code


def test_names_and_prefixes() -> None:
    def text(context: bytes) -> str:
        return context.decode().replace("\0", "\\0")

    handles = [HardenedDHTProtocol._get_handle_name(None, f"rpc_{name}") for name in ("ping", "store", "find")]
    assert dict(rows("Names and prefixes", 2)) == {  # type: ignore[arg-type]
        "context of a record": text(records.SIGNATURE_CONTEXT),
        "context of a readiness": text(READINESS_CONTEXT),
        "context of an invitation": text(INVITATION_CONTEXT),
        "context of a seat": text(SEAT_CONTEXT),
        "context of revocations": text(REVOCATIONS_CONTEXT),
        "context of a consent": text(CONSENT_CONTEXT),
        "context of a roster": text(ROSTER_CONTEXT),
        "context of a contribution": text(CONTRIBUTION_CONTEXT),
        "context of a reduced part": text(REDUCTION_CONTEXT),
        "context of a commit that is taken": text(TAKEN_CONTEXT),
        "context of an anchor": text(ANCHOR_CONTEXT),
        "context of a manifest": text(manifest.SIGNATURE_CONTEXT),
        "stream of a run": run_protocol("RUN-ID"),
        "stream of manifests": MANIFEST_PROTOCOL,
        "stream of dial backs": DIAL_BACK_PROTOCOL,
        "DHT key of a run's peers": peers_key("RUN-ID"),
        "DHT key of all runs": RUNS_KEY,
        "DHT streams": ", ".join(handles),
        "PEER_ID_PREFIX": PEER_ID_PREFIX.hex(" "),
        "PRIVATE_KEY_PREFIX": PRIVATE_KEY_PREFIX.hex(" "),
        "UPDATE_MAGIC": UPDATE_MAGIC.hex(" "),
        "CHAIN_MAGIC": CHAIN_MAGIC.hex(" "),
    }
    assert f"`PROTOCOL` = {PROTOCOL}." in page()
    for magic in (UPDATE_MAGIC, CHAIN_MAGIC):
        assert f"    {magic.hex(' ')} " in page()
    packed = pack(NoWitness())
    assert f"`{(len(packed).to_bytes(4, 'big') + packed).hex(' ')}`" in page()


def test_dht_protobuf() -> None:
    for message, number_, field, kind in rows("DHT protobuf", 4):
        file = dht_pb2 if hasattr(dht_pb2, message) else p2pd_pb2
        found = getattr(file, message).DESCRIPTOR.fields_by_name[field]
        named = found.message_type or found.enum_type
        scalar = {1: "double", 8: "bool", 9: "string", 12: "bytes"}
        code = named.name if named else scalar[found.type]
        code = f"repeated {code}" if found.is_repeated else code
        assert (number_, kind) == (str(found.number), code), f"{message}.{field}"
    assert [dht_pb2.NOT_FOUND, dht_pb2.FOUND_REGULAR, dht_pb2.FOUND_DICTIONARY] == [0, 1, 2]


def test_dht_ids_and_values() -> None:
    """As section 7 says, in its own words."""
    who = identity(1).peer_id
    assert node_id_of(who).to_bytes() == sha1(PEER_ID_PREFIX + public_key(who)).digest()
    assert DHTID.generate(source=peers_key("00")).to_bytes() == sha1(msgpack.packb("p2p-diloco.00.peers")).digest()
    value = DictionaryDHTValue()
    value.store(who, msgpack.packb(b"a sealed record"), 2e9)
    code, data = msgpack.unpackb(MSGPackSerializer.dumps(value), ext_hook=lambda code, data: (code, data))
    _, latest, entries = msgpack.unpackb(data)
    assert (code, latest, entries) == (0x50, 2e9, [[who, msgpack.packb(b"a sealed record"), 2e9]])
    assert HardenedDHTProtocol.serializer is MSGPackSerializer
    assert signature(DHTNode.create).parameters["bucket_size"].default == 20


def test_the_decoder_of_the_tests_has_what_the_page_has() -> None:
    """It was written from the page; a field that comes to the page later has to come to it, too."""
    said = {name.strip("`"): rows(name, 4) for name in tables() if name.startswith("`")}
    must = {tag: {name for name, _, _, value in fields if not value} for tag, fields in said.items()}
    may = {tag: {name for name, _, _, value in fields if value} for tag, fields in said.items()}
    known = decoder.MESSAGES
    assert known == {tag: (must.get(tag, set()), may.get(tag, set())) for tag in MESSAGES}
    statements = (
        ("Record", decoder.RECORD),
        ("Readiness", decoder.READINESS),
        ("Consent", decoder.CONSENT),
        ("Invitation", decoder.INVITATION),
        ("Revocations", decoder.REVOCATIONS),
    )
    for heading, names in statements:
        assert names == tuple(row[1] for row in rows(heading, 2))


def test_how_often_a_peer_may_measure() -> None:
    probes = Probes(here=cast(Any, None))

    def bucket(quota: Quota) -> str:
        return f"{quota._burst} at once, 1 in {1 / quota._per_s:g} s"

    dials = (str(probes._dials._value), bucket(probes._dials_of_one), bucket(probes._dials_in_all))
    transfers = (str(probes._transfers._value), bucket(probes._transfers_of_one), bucket(probes._transfers_in_all))
    assert rows("12. What peers measure", 4) == [("dial backs", *dials), ("transfers", *transfers)]


def test_every_name_in_the_text_is_one_of_the_tables() -> None:
    """A time-out, a limit or a message that is gone from the code is gone from the sentences, too."""
    known = {row[0].strip("`") for table in ("Time-outs", "Limits", "Names and prefixes") for row in tables()[table]}
    fields = {name for kind in MESSAGES.values() for name in kind.model_fields}
    fields |= {
        *Record.model_fields,
        *Readiness.model_fields,
        *DialConsent.model_fields,
        *Invitation.model_fields,
        *RunManifest.model_fields,
    }
    named = set(re.findall(r"`([A-Z][A-Z_]+)`", page())) | set(re.findall(r"`([a-z_]+_s)`", page()))
    assert named <= known | fields


def test_seconds_in_the_text_are_those_of_the_limit_that_is_named_behind_them() -> None:
    """Up to the sections on the limits themselves, which the tables' tests read."""
    limits = {row[0]: row[1] for row in rows("Limits", 2)}
    text = re.sub(r"(?s)## 12.*", "", page())
    found = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?) s\b(?: \(`([A-Z_]+)`\))?", text)
    assert found
    assert [(seconds, name) for seconds, name in found if limits.get(name) != seconds] == []
