"""An authority of our own and what it signs, made with the `openssl` program.

In come names and addresses, out come PEM files: keys are readable by their owner only. What is there and
still good is kept, so that running it again changes nothing. It knows nothing of etcd.
"""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 365
# A certificate with less time than this left is made anew.
RENEW_SECONDS = 30 * 24 * 3600
# openssl makes a key in milliseconds; more than this means that it waits for something.
COMMAND_SECONDS = 30


class OpensslError(Exception):
    """openssl is missing or refused; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What to sign.

    Attributes:
        name: Beginning of the file names.
        common_name: Subject; empty for none. etcd takes that of a client's certificate for the user.
        hosts: Addresses and names that a server answers at.
        server: True when it proves a server.
        client: True when it proves a client.
    """

    name: str
    common_name: str = ""
    hosts: tuple[str, ...] = ()
    server: bool = False
    client: bool = False

    def extensions(self) -> str:
        """Returns the extensions, as openssl reads them."""
        usages = [
            word for word, wanted in (("serverAuth", self.server), ("clientAuth", self.client)) if wanted
        ]
        lines = [
            "basicConstraints=critical,CA:FALSE",
            "keyUsage=critical,digitalSignature",
            f"extendedKeyUsage={','.join(usages)}",
        ]
        if self.hosts:
            names = [f"{'IP' if _is_address(host) else 'DNS'}:{host}" for host in self.hosts]
            lines.append(f"subjectAltName={'critical,' if not self.common_name else ''}{','.join(names)}")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Authority:
    """Our own authority, in a folder of its own."""

    directory: Path

    @property
    def certificate(self) -> Path:
        """What everybody trusts."""
        return self.directory / "ca.pem"

    @property
    def key(self) -> Path:
        """What signs; needed only to sign, keep it off the members."""
        return self.directory / "ca.key"

    def ensure(self) -> bool:
        """Makes it unless it is there; tells whether it was made.

        Raises:
            OpensslError: openssl is missing or refused.
        """
        if self.certificate.exists() and self.key.exists():
            return False
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_key(self.key)
        _openssl(
            *("req", "-x509", "-new", "-sha256", "-days", str(AUTHORITY_DAYS)),
            *("-key", str(self.key), "-out", str(self.certificate), "-subj", "/CN=millrace etcd authority"),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )
        return True

    def ensure_signed(self, directory: Path, wanted: Certificate) -> bool:
        """Makes `<name>.pem` and `<name>.key` unless they are there and good; tells whether it did.

        Raises:
            OpensslError: openssl is missing or refused.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        certificate, key = directory / f"{wanted.name}.pem", directory / f"{wanted.name}.key"
        extensions = directory / f"{wanted.name}.ext"
        if self._is_good(certificate, key, extensions, wanted):
            return False
        if not key.exists():
            _make_key(key)
        extensions.write_text(wanted.extensions())
        request = directory / f"{wanted.name}.csr"
        subject = f"/CN={wanted.common_name}" if wanted.common_name else "/"
        _openssl("req", "-new", "-key", str(key), "-out", str(request), "-subj", subject)
        _openssl(
            *("x509", "-req", "-sha256", "-days", str(CERTIFICATE_DAYS), "-in", str(request)),
            *("-CA", str(self.certificate), "-CAkey", str(self.key), "-CAcreateserial"),
            *("-extfile", str(extensions), "-out", str(certificate)),
        )
        request.unlink()
        return True

    def _is_good(self, certificate: Path, key: Path, extensions: Path, wanted: Certificate) -> bool:
        """Tells whether a certificate says what is wanted, is ours, and lasts a while."""
        if not (certificate.exists() and key.exists() and extensions.exists()):
            return False
        return (
            extensions.read_text() == wanted.extensions()
            and _openssl_agrees("x509", "-noout", "-checkend", str(RENEW_SECONDS), "-in", str(certificate))
            and _openssl_agrees("verify", "-CAfile", str(self.certificate), str(certificate))
        )


def _is_address(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdigit()


def _make_key(path: Path) -> None:
    # The file exists with its mode before the secret is in it.
    path.touch(mode=0o600)
    path.chmod(0o600)
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(path))


def _run(arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    program = shutil.which("openssl")
    if program is None:
        raise OpensslError("openssl is not on PATH: install it, then run this again")
    return subprocess.run(
        [program, *arguments], check=False, capture_output=True, text=True, timeout=COMMAND_SECONDS
    )


def _openssl(*arguments: str) -> None:
    done = _run(arguments)
    if done.returncode != 0:
        raise OpensslError(f"openssl {arguments[0]} failed: {done.stderr.strip()[-500:]}")


def _openssl_agrees(*arguments: str) -> bool:
    return _run(arguments).returncode == 0
