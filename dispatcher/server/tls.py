"""The certificate that a server shows, and how one is made that nobody has to buy.

A certificate of the server's own is signed by nobody whom a client would know. Clients know it by
its fingerprint, which stands in server.json: who can read that file meets this server or none.
Key and certificate are in one file of the state directory, so that the two always fit together,
and are kept over restarts, so that a client that knows the fingerprint need not learn another.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import re
import shutil
import ssl
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from dispatcher.errors import DispatcherError, StorageError, UsageError
from dispatcher.server_file import CERTIFICATE_FILE, fingerprint_of, read_private, write_private

AUTO, ON, OFF = "auto", "on", "off"
OPTION_FORMS = "auto|on|off|CERT,KEY"

_LIFETIME_DAYS = 3650
_NAME = "dispatcher"
_OPENSSL_S = 60.0
_CERTIFICATE = re.compile(
    "-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL | re.ASCII
)
_INSTEAD = (
    "install the Python package cryptography or the openssl command, give a certificate of your "
    "own with --tls CERT,KEY, or go without encryption with --tls off"
)
# Whole, because the system's own configuration may be missing or say anything.
_OPENSSL_CONFIG = f"""
[req]
prompt = no
distinguished_name = name
x509_extensions = extensions
[name]
CN = {_NAME}
[extensions]
basicConstraints = critical, CA:TRUE
"""


@dataclass(frozen=True, slots=True)
class Tls:
    """What the server speaks TLS with, and how clients know it."""

    context: ssl.SSLContext
    fingerprint: str


def option(text: str) -> str:
    """Check `--tls` for argparse; the paths in it become absolute."""
    if text in (AUTO, ON, OFF):
        return text
    paths = text.split(",")
    if len(paths) != 2 or not all(paths):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither auto, on, off nor CERT,KEY, the files of a certificate and of "
            "its key"
        )
    return ",".join(str(Path(path).absolute()) for path in paths)


def is_wanted(choice: str, address: str) -> bool:
    """Say whether a server that listens on this IP address speaks TLS."""
    if choice == AUTO:
        return not ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return choice != OFF


def given_tls(choice: str) -> Tls | None:
    """Return TLS with the files that `--tls CERT,KEY` names; None when it names none.

    Raises UsageError when they cannot be used.
    """
    if choice in (AUTO, ON, OFF):
        return None
    certificate, key = map(Path, choice.split(","))
    text = _read_given(certificate, "the certificate")
    _read_given(key, "the key")
    try:
        return _load(text, certificate, key)
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            problem = f"the key {key} is not that of the certificate {certificate}"
        else:
            problem = f"{certificate} and {key} cannot be used ({_reason(error)})"
    except ValueError:
        problem = f"{certificate} holds no certificate"
    raise UsageError(
        f"--tls: {problem}; give a certificate and its key as PEM files, the key without a "
        "passphrase"
    )


def own_tls(state_dir: Path) -> Tls:
    """Return TLS with the run's own certificate; it is made when there is none that can be used.

    Raises DispatcherError when nothing is there to make one with, StorageError when it cannot be
    kept, UsageError when something else than a file stands in its place.
    """
    path = state_dir / CERTIFICATE_FILE
    kept = _load_kept(path)
    if kept is not None:
        return kept
    pem = new_certificate()
    try:
        write_private(path, pem)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    return _load(pem.decode("ascii"), path)


def new_certificate() -> bytes:
    """Return a new private key and a certificate that it signed itself, as PEM.

    Raises DispatcherError when this machine has nothing to make them with.
    """
    try:
        return _by_cryptography()
    except ImportError:
        return _by_openssl()


def _load_kept(path: Path) -> Tls | None:
    """Return TLS with what an earlier server wrote, None unless it can be used as it is."""
    try:
        # What others could read is no secret any more, what they could write not ours.
        text = read_private(path, "").decode("ascii", "replace")
        return _load(text, path) if time.time() < _expires_at(text) else None
    except (OSError, UsageError, ValueError):  # the first is an ssl.SSLError, too
        return None


def _load(pem: str, certificate: Path, key: Path | None = None) -> Tls:
    """Raises ssl.SSLError, and ValueError when `pem`, the certificate's file, holds none."""
    fingerprint = fingerprint_of(_first_certificate(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # A client that asks for a new handshake again and again would keep the server busy.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0  # no client of ours comes back with one
    # With no password at all OpenSSL would ask for one at the terminal, and wait.
    context.load_cert_chain(certificate, key, password="")
    return Tls(context, fingerprint)


def _first_certificate(pem: str) -> bytes:
    """Return the certificate that a server shows: the first of the file. Raises ValueError."""
    found = _CERTIFICATE.search(pem)
    if found is None:
        raise ValueError("no certificate")
    return ssl.PEM_cert_to_DER_cert(found[0])


def _expires_at(pem: str) -> float:
    """Return when a certificate that signed itself expires. Raises ValueError, ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=_first_certificate(pem))
    (certificate,) = context.get_ca_certs()
    return ssl.cert_time_to_seconds(str(certificate["notAfter"]))


def _by_cryptography() -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks of nodes differ
        .not_valid_after(now + datetime.timedelta(days=_LIFETIME_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem: bytes = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    return pem


def _by_openssl() -> bytes:
    openssl = shutil.which("openssl")
    if openssl is None:
        raise DispatcherError(
            "TLS needs a certificate, and there is neither the Python package cryptography nor "
            f"the openssl command to make one; {_INSTEAD}"
        )
    command = [openssl, "req", "-x509", "-sha256", "-days", str(_LIFETIME_DAYS), "-nodes"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-pkeyopt", "ec_param_enc:named_curve"]
    # Through pipes, so that the key is in no file before the one that is nobody else's to read.
    command += ["-config", "/dev/stdin", "-keyout", "/dev/stdout"]
    try:
        done = subprocess.run(
            command,
            input=_OPENSSL_CONFIG.encode(),
            capture_output=True,
            timeout=_OPENSSL_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    else:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        problem = said[-1] if said else "it said nothing"
        if done.returncode == 0 and b"PRIVATE KEY" in done.stdout and b"CERTIFI" in done.stdout:
            return done.stdout
    raise DispatcherError(f"{openssl} could not make a certificate ({problem}); {_INSTEAD}")


def _read_given(path: Path, what: str) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError as error:
        raise UsageError(f"--tls: cannot read {what} {path}: {error.strerror}") from error


def _reason(error: ssl.SSLError) -> str:
    return error.reason or str(error)
