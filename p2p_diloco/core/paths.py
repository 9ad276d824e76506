"""Paths as people write them: ``~`` is a home folder, wherever one is given."""

from __future__ import annotations

from pathlib import Path

from p2p_diloco.core.errors import UsageError


def at_home(path: str, where: str) -> Path:
    """Returns ``path`` with a leading ``~`` or ``~user`` replaced by that home folder; ``./~x`` is a file of that name.
    UsageError, which names ``where`` the path was given, when there is no such home."""
    try:
        return Path(path).expanduser() if path.startswith("~") else Path(path)
    except RuntimeError:
        raise UsageError(f"{where}: {path}: no home folder of that name; give the whole path, or ./{path}") from None


def beside(base: Path, path: str, key: str) -> Path:
    """Returns ``path`` as a file in ``base`` names it: absolute, in a home folder, or relative to ``base``. UsageError
    as ``at_home``."""
    return base / at_home(path, f"key '{key}'")
