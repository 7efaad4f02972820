# SPDX-License-Identifier: Apache-2.0
"""Mutual TLS between relays: 1.3 only, both show a certificate, both check the other's name."""

import dataclasses
import ipaddress
import ssl

from nova_dmigrate import exception


@dataclasses.dataclass(frozen=True)
class TlsSettings:
    """Files (PEM) and the name that the peer's certificate must be for.

    :ivar ca: certificates of the authorities that may have issued the peer's certificate
    :ivar certificate: this host's certificate, followed by intermediate ones
    :ivar key: its private key
    :ivar peer_name: DNS name or IP address among the subject alternative names of the peer
    """

    ca: str
    certificate: str
    key: str
    peer_name: str


def client_context(settings: TlsSettings) -> ssl.SSLContext:
    """Return the context for connecting. :raises ConfigurationError: a file is not usable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = True
    _configure(context, settings)
    return context


def server_context(settings: TlsSettings) -> ssl.SSLContext:
    """Return the context for accepting. :raises ConfigurationError: a file is not usable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # No session is ever resumed. And whoever only sends never reads: what it has not read would
    # turn its close into a reset, and what it sent last could be lost.
    context.num_tickets = 0
    _configure(context, settings)
    return context


def _configure(context: ssl.SSLContext, settings: TlsSettings) -> None:
    if not settings.peer_name:
        raise exception.ConfigurationError("TLS: the name of the peer is not given")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cafile=settings.ca)
        context.load_cert_chain(settings.certificate, settings.key, password=_no_password)
    except (OSError, ValueError) as error:
        # OpenSSL does not say which of the files it is.
        raise exception.ConfigurationError(
            f"TLS: cannot use CA {settings.ca}, certificate {settings.certificate} and key "
            f"{settings.key}: {error}"
        ) from error


def _no_password() -> str:
    """Answer OpenSSL, which would ask at the terminal for the password of an encrypted key."""
    raise ValueError("the key is encrypted")


def check_peer_name(sock: ssl.SSLSocket, name: str) -> None:
    """Check that the peer's verified certificate is for ``name``, as OpenSSL does for clients only.

    :raises ssl.CertificateError: it is for other names
    """
    certificate = sock.getpeercert() or {}
    names = [(str(entry[0]), str(entry[1])) for entry in certificate.get("subjectAltName", ())]
    if not any(_matches(kind, value, name) for kind, value in names):
        shown = ", ".join(value for _, value in names[:8]) or "no name"
        raise ssl.CertificateError(f"its certificate is for {shown}, not for {name}")


def _matches(kind: str, pattern: str, name: str) -> bool:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return kind == "DNS" and _matches_dns(pattern.lower(), name.lower().rstrip("."))
    try:
        return kind == "IP Address" and ipaddress.ip_address(pattern.strip()) == address
    except ValueError:
        return False


def _matches_dns(pattern: str, name: str) -> bool:
    if pattern == name:
        return True
    # A wildcard stands for the whole first label and for nothing else (RFC 6125).
    first, _, domain = name.partition(".")
    return bool(first and "." in domain) and pattern == f"*.{domain}"


_SENTENCES = {
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "UNSUPPORTED_PROTOCOL": "it does not offer TLS 1.3",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it does not accept this side's version of TLS",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it requires a certificate of this side",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the authority that issued this side's certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept this side's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "this side's certificate has expired",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "this side's certificate is revoked",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not accept this side's certificate",
}


def explain(error: ssl.SSLError) -> str:
    """Say in words what went wrong; the subject of the sentence is the peer."""
    if isinstance(error, ssl.SSLCertVerificationError):
        message = getattr(error, "verify_message", None)
        return f"its certificate is refused: {message}" if message else str(error.args[-1])
    if is_end(error):
        return "it closed the connection"
    reason = error.reason or str(error)
    return _SENTENCES.get(reason, f"TLS failed: {reason.replace('_', ' ').lower()}")


def is_end(error: Exception) -> bool:
    """Say whether the peer has just gone, with or without TLS's own good-bye."""
    return isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)


def is_about_certificates(error: ssl.SSLError) -> bool:
    """Say whether the failure is one of identity rather than of the protocol."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return True
    reason = error.reason or ""
    return "CERTIFICATE" in reason or "UNKNOWN_CA" in reason
