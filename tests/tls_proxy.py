"""HTTPS in front of any server on loopback, with a certificate made for it."""

import ipaddress
import select
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOST = "127.0.0.1"


def self_signed(path: Path) -> Path:
    """Write a key and a certificate of 127.0.0.1 that is its own authority, both into one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    now = datetime.now()
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


@contextmanager
def https(url: str, certificate: Path, speaks: str = "http/1.1") -> Iterator[str]:
    """Serve what `http://HOST:PORT` serves by HTTPS on another port, `h2` where that speaks gRPC; the new URL."""
    host, port = url.removeprefix("http://").split(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.set_alpn_protocols([speaks])

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            # A client that does not trust the certificate, or closes first, is no fault of the server's.
            with (
                suppress(OSError),
                context.wrap_socket(self.request, server_side=True) as client,
                socket.create_connection((host, int(port))) as server,
            ):
                relay(client, server)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server((HOST, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"https://{HOST}:{server.server_address[1]}"
        finally:
            server.shutdown()


def relay(client: ssl.SSLSocket, server: socket.socket) -> None:
    """Pass on what each side sends until the server has no more; one thread, since an SSL socket is not for two."""
    others: dict[socket.socket, socket.socket] = {client: server, server: client}
    open_ends: list[socket.socket] = [client, server]
    while server in open_ends:
        for source in [client] if client.pending() else select.select(open_ends, [], [])[0]:
            if data := source.recv(1 << 16):
                others[source].sendall(data)
                continue
            open_ends.remove(source)
            if source is client:
                server.shutdown(socket.SHUT_WR)
