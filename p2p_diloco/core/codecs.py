"""The codecs that a run may name in its run file."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from p2p_diloco.core.blocks import Int4, Int8
from p2p_diloco.core.codec import LARGEST_VALUE, Codec, Vector
from p2p_diloco.core.floats import Floats

CODECS: dict[str, Codec] = {
    "fp32": Floats("<f4", LARGEST_VALUE),
    "fp16": Floats("<f2", 65504.0),
    "int8": Int8(),
    "int4": Int4(),
}
"""A name is for ever: a codec with another layout gets another one."""


def known(name: str) -> str:
    """Returns ``name``. pydantic's ValueError when no codec has it."""
    if name not in CODECS:
        *others, last = (repr(one) for one in CODECS)
        raise PydanticCustomError("codec", "Input should be {names}", {"names": f"{', '.join(others)} or {last}"})
    return name


CodecName = Annotated[str, AfterValidator(known)]
"""A key of CODECS, as manifests and run files name it."""


def encoded_bytes(n: int, codec: CodecName) -> int:
    """Returns how many bytes ``n`` values take in this codec."""
    return CODECS[codec].encoded_bytes(n)


def encode(values: Vector, codec: CodecName) -> bytes:
    """Returns ``values``, float32 [n], as bytes of this codec. Raises ValueError when one of them is not finite."""
    return CODECS[codec].encode(values)


def decode(data: bytes | memoryview, n: int, codec: CodecName) -> Vector:
    """Returns float32 [n]. Raises ValueError when ``data`` is not what the codec makes of ``n`` values."""
    return CODECS[codec].decode(data, n)
