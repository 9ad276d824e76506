"""Every exception of the package.

Two roots, so that a reader of an ``except`` knows whose fault it is, and one exception that is nobody's::

    LocalError                 ours: shown to the user as one line, ends the command
     +-- UsageError            a flag, file or address that the user can mend        exit code 2
     +-- DataError             text, tokenizer or token file                         exit code 1
     +-- LedgerError           the ledger cannot be read or written                  exit code 1
     |    +-- Gap              its files do not lead there; another peer's may
     +-- NetworkError          we cannot start, reach or keep our network side       exit code 1
    RemoteError                a peer's: never ends our process; names the peer
     +-- Misbehaved            its bytes break the protocol: it is excluded from the round
     +-- Silent                it did not answer within the time-out
     +-- Gone                  it cannot be reached, or closed the stream
     +-- Refused               it answered that it will not, and said why
    Stopped                    a signal asked this process to end                    exit code 0
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class LocalError(Exception):
    """Something went wrong on this machine. Its text is one line for the user: what is wrong and how to mend it."""

    exit_code = 1
    """What a command ends with that this ends."""


class UsageError(LocalError):
    """The user gave something that cannot be used: a flag, a file, an address, a model."""

    exit_code = 2


class OtherProtocol(UsageError):
    """A run is of another protocol than this version of p2p-diloco speaks. It is left as it is."""


class DataError(LocalError):
    pass


class LedgerError(LocalError):
    pass


class Gap(LedgerError):
    pass


class NetworkError(LocalError):
    """This peer's network side cannot start, cannot reach anybody, or has ended."""


class Stopped(BaseException):
    """A signal asked this process to end, wherever it was. Like KeyboardInterrupt it is no Exception: ``logging`` and
    other libraries take every Exception that passes through them for a failure of their own, and go on."""

    exit_code = 0


class RemoteError(Exception):
    """Peer ``peer_id`` did something wrong, or could not be reached."""

    def __init__(self, peer_id: str, reason: str) -> None:
        super().__init__(f"peer {peer_id[-8:]}: {reason}")
        self.peer_id = peer_id
        self.reason = reason


class Misbehaved(RemoteError):
    pass


class Silent(RemoteError):
    pass


class Gone(RemoteError):
    pass


class Refused(RemoteError):
    pass


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Puts ``source``, the file that a person can mend, before the message of a UsageError or DataError."""
    try:
        yield
    except (UsageError, DataError) as error:
        raise type(error)(f"{source}: {error}") from error


NO_TEMPORARY_FOLDER = "No usable temporary directory"
"""How Python says that it cannot write to any."""


def disk_failure(error: OSError, what: object = "", size_bytes: int = 0) -> LedgerError | None:
    """Returns the line for a disk that is full, with the remedy; None when ``error`` is another one. ``what`` could not
    be written, of ``size_bytes``; without it, what the error names."""
    what = what or error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = max(1, -(-size_bytes // 10**6))
        return LedgerError(f"{what}: disk full, free {need} MB or move the folder")
    if error.errno == errno.EFBIG:
        return LedgerError(f"{what}: larger than a file may be here; raise the limit (ulimit -f) or move the folder")
    if NO_TEMPORARY_FOLDER in str(error):
        return LedgerError("no temporary folder can be written: free space in /tmp, or set TMPDIR to another one")
    return None
