"""Every TOML file that a person writes is read here: run files, studies, faults, options."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Mapping
from pathlib import Path

from p2p_diloco.core.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


TomlTable = Mapping[str, object]
"""A table as somebody has written it. What is in it is known once it has been parsed."""


def read_toml(path: Path, what: str) -> TomlTable:
    """Returns the table in a file in UTF-8, with a byte order mark or without. Raises a UsageError that names the file,
    and ``what`` it should be."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such {what}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    text = data.removeprefix(codecs.BOM_UTF8)
    try:
        return tomllib.loads(text.decode())
    except UnicodeDecodeError as error:
        offset = len(data) - len(text) + error.start
        raise UsageError(f"{path}: not a text file in UTF-8 (at byte {offset}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from error
