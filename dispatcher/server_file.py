"""`<state>/server.json`: where a run is served and the token for it; and files that hold a token.

Where the server speaks TLS, the file also has the SHA-256 fingerprint of its certificate: the
client that reads it talks to that certificate and to no other.

Who can read such a file may take work and hand in results, so it is written for its owner alone
and is not believed when somebody else could have read or written it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
from pathlib import Path

import msgspec

from dispatcher.errors import UsageError
from dispatcher.storage.files import Files

SERVER_FILE = "server.json"
ADMIN_TOKEN_FILE = "admin.token"
CERTIFICATE_FILE = "tls.pem"
"""The server's own private key and certificate."""
DRAINED = "drained"
TOKEN_VARIABLE = "DISPATCHER_TOKEN"
ADMIN_TOKEN_VARIABLE = "DISPATCHER_ADMIN_TOKEN"
FINGERPRINT_VARIABLE = "DISPATCHER_FINGERPRINT"

_TOKEN_BYTES = 32
_TOKEN_LENGTHS = (16, 1024)
_LONGEST_FILE_BYTES = 1 << 16
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class ServerFile(msgspec.Struct):
    """What server.json holds; `token` is None when the server asks for none.

    `state` is `running`, `complete`, `stopped`, or `drained` after POST /drain.
    `fingerprint` is that of the server's certificate, None where `url` is not https.
    """

    url: str
    token: str | None
    run: str
    epoch: int
    pid: int
    state: str
    fingerprint: str | None = None


def server_file_in(state_dir: Path) -> Path:
    """Return the path of a run's server.json."""
    return state_dir / SERVER_FILE


def state_dir_of(address: str) -> Path | None:
    """Return the state directory that the address `@PATH` means; None for another address.

    Raises UsageError when there is no such directory.
    """
    if not address.startswith("@") or address == "@":
        return None
    path = Path(address[1:])
    # pathlib's own raise OSError for a name that is too long.
    state_dir = path if os.path.isdir(path) else path.parent
    if not os.path.isdir(state_dir):
        raise UsageError(f"{address}: there is no directory {state_dir}; is the run begun?")
    return state_dir


def read_server_file(path: Path) -> ServerFile:
    """Read the server.json at `path`, or in the state directory at `path`.

    Raises FileNotFoundError when it is not there (yet), OSError when it cannot be read, and
    UsageError when it cannot be trusted or does not hold what it should.
    """
    if path.is_dir():
        path = server_file_in(path)
    remedy = "remove it, and a server that is started again writes it anew"
    content = read_private(path, remedy)
    try:
        found = msgspec.json.decode(content, type=ServerFile)
        if found.token is not None:
            check_token(found.token, f"the token in {path}")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is not the server.json of a dispatcher server ({error}); {remedy}"
        ) from error
    if found.fingerprint is not None:
        found.fingerprint = check_fingerprint(found.fingerprint, f"the fingerprint in {path}")
        if not found.url.startswith("https://"):
            raise UsageError(
                f"{path} names a certificate, but its url {found.url} is not https; {remedy}"
            )
    return found


def write_server_file(path: Path, content: ServerFile, files: Files | None = None) -> None:
    """Replace server.json atomically and durably, readable by its owner alone.

    Raises UsageError when something else than a file stands there, OSError when it cannot be
    written; either way the earlier file is still whole.
    """
    write_private(path, msgspec.json.encode(content) + b"\n", files)


def write_private(path: Path, content: bytes, files: Files | None = None) -> None:
    """Replace a small file atomically and durably with one that its owner alone can read."""
    _check_replaceable(path)
    (files or Files()).write_whole(path, content, 0o600)


def remove_partial_files(state_dir: Path) -> None:
    """Remove what a process that died while it wrote one of these files left behind."""
    for name in (SERVER_FILE, ADMIN_TOKEN_FILE, CERTIFICATE_FILE):
        for partial in state_dir.glob(f".{name}.*.tmp"):
            with contextlib.suppress(OSError):
                partial.unlink()


def page_hint(url: str, path: Path, *, wants_token: bool) -> str:
    """Return how to watch a run in a browser; of the token only where it is, as logs are kept."""
    token = f"; the token it asks for is in {path}" if wants_token else ""
    return f"to watch it, open {url}/ in a browser{token}"


def new_token() -> str:
    """Return a token that cannot be guessed: 256 random bits."""
    return secrets.token_urlsafe(_TOKEN_BYTES)


def read_token_file(path: Path) -> str:
    """Return the token that a file holds, a file of this user that nobody else can read.

    Raises FileNotFoundError, OSError, and UsageError with what is wrong and what to do.
    """
    content = read_private(path, "write a new token to a new file")
    return check_token(content.decode("ascii", "replace").strip(), f"the token in {path}")


def token_given(
    token_file: Path | None, option: str = "--token-file", variable: str = TOKEN_VARIABLE
) -> str | None:
    """Return the token a user gave: in the file of `option`, else in `variable`, else None.

    Raises UsageError.
    """
    if token_file is not None:
        try:
            return read_token_file(token_file)
        except OSError as error:
            raise UsageError(f"cannot read {option} {token_file}: {error.strerror}") from error
    token = os.environ.get(variable)
    return check_token(token, variable) if token else None


def check_token(token: str, name: str) -> str:
    """Return `token`, or raise UsageError that says what a token is and never shows it."""
    least, most = _TOKEN_LENGTHS
    printable = token.isascii() and token.isprintable() and " " not in token
    if not printable or not least <= len(token) <= most:
        raise UsageError(
            f"{name} must be {least} to {most} printable ASCII characters without spaces"
        )
    return token


def fingerprint_of(certificate: bytes) -> str:
    """Return the SHA-256 fingerprint of a certificate (DER): 64 small hexadecimal digits."""
    return hashlib.sha256(certificate).hexdigest()


def fingerprint_given(fingerprint: str | None) -> str | None:
    """Return the fingerprint a user gave: this one, else that in DISPATCHER_FINGERPRINT, or None.

    Raises UsageError.
    """
    if fingerprint is not None:
        return check_fingerprint(fingerprint, "the fingerprint of the server's certificate")
    from_variable = os.environ.get(FINGERPRINT_VARIABLE)
    return check_fingerprint(from_variable, FINGERPRINT_VARIABLE) if from_variable else None


def check_fingerprint(text: str, name: str) -> str:
    """Return a fingerprint as `fingerprint_of` writes it, from any way tools print one.

    Raises UsageError.
    """
    digits = re.sub(r"^sha-?256( fingerprint)?[=:]", "", text.strip().lower()).replace(":", "")
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise UsageError(
            f"{name} must be a SHA-256 fingerprint, 64 hexadecimal digits, not {text[:80]!r}"
        )
    return digits


def read_private(path: Path, remedy: str) -> bytes:
    """Return the content of a small file of this user that nobody else can read or change.

    Raises FileNotFoundError, OSError, and UsageError with what is wrong and the `remedy`.
    """
    try:
        # Not blocking, so that a pipe in the file's place is refused and not waited for.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            problem = "is a symbolic link, which is not followed"
        elif isinstance(error, PermissionError):
            problem = "may not be read by this user"
        else:
            raise
        raise UsageError(f"{path} {problem}; {remedy}") from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{path} is not a regular file; {remedy}")
        if found.st_uid not in (os.geteuid(), 0):
            raise UsageError(f"{path} belongs to another user; {remedy}")
        if found.st_mode & _OTHERS:
            raise UsageError(
                f"{path} holds a secret that others can read or change (its mode is "
                f"{stat.S_IMODE(found.st_mode):04o}); {remedy}, or chmod 600 it if nobody did"
            )
        return os.read(fd, _LONGEST_FILE_BYTES)
    finally:
        os.close(fd)


def _check_replaceable(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
        raise UsageError(f"{path} is {kind}; remove it, it is written anew")
