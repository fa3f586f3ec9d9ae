"""The signature of a record: who recorded a run.

A record holds the sha256 of every file of its run, so that one signature over `record.json` covers them all. It is
made and checked by OpenSSF's model-signing: a Sigstore bundle over a DSSE envelope, with an elliptic-curve key (P-256,
P-384 or P-521), offline. https://github.com/sigstore/model-transparency
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from unlabeled.errors import InputError
from unlabeled.lineage.findings import Difference
from unlabeled.lineage.tracked import RECORD, SIGNATURE

SIGNING_KEY, VERIFY_KEY = "UNLABELED_SIGNING_KEY", "UNLABELED_VERIFY_KEY"


def sign(record: Path) -> None:
    """Write `record.sig` beside a record, with the private key (PEM) that UNLABELED_SIGNING_KEY names; unset: none.

    Raises:
        InputError: the file is no private key that signs.
    """
    if signer := _signer_here():
        signer.sign(record, record.with_name(SIGNATURE))


def check_signing_key() -> None:
    """Raise InputError where `sign` would, before a run has taken its time."""
    _signer_here()


def _signer_here() -> Any:
    if not (key := os.environ.get(SIGNING_KEY)):
        return None
    from model_signing import signing

    try:
        return signing.Config().use_elliptic_key_signer(private_key=Path(key))
    except Exception as error:  # a broken, an encrypted and a foreign key each raise something else
        raise InputError(f"{SIGNING_KEY}={key} is no private key that signs: {_one_line(error)}") from None


def fingerprint(key: Path) -> str:
    """Return the sha256 (hex) of a public key in PEM, by which a signature names the key that made it.

    Raises:
        InputError: the file is no public key.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    try:
        public = load_pem_public_key(key.read_bytes())
    except OSError as error:
        raise InputError(f"{key} is no public key in PEM: {str(error.strerror).lower()}") from None
    except Exception as error:  # as above
        raise InputError(f"{key} is no public key in PEM: {_one_line(error)}") from None
    return hashlib.sha256(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def contradiction(record: bytes, signature: bytes, key: Path) -> Difference | None:
    """Return what keeps a signature from being that of this record by this key; None: it is.

    Raises:
        InputError: the file is no public key that verifies.
    """
    from model_signing import verifying

    ours, theirs = fingerprint(key), _signer(signature)
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:  # as above
        raise InputError(f"{key} is no public key that verifies: {_one_line(error)}") from None
    if theirs and theirs != ours:
        return Difference("record", SIGNATURE, "was made with another key", theirs, ours)
    with tempfile.TemporaryDirectory(prefix="unlabeled-") as room:
        for name, content in ((RECORD, record), (SIGNATURE, signature)):
            Path(room, name).write_bytes(content)
        try:
            if not theirs:
                raise ValueError("it names no key")  # model-signing would print a warning and go on
            verifier.verify(Path(room, RECORD), Path(room, SIGNATURE))
        except Exception:  # whatever strange bytes do to the libraries that read them
            return Difference("record", SIGNATURE, "is damaged, or the signature of another record")
    return None


def _signer(signature: bytes) -> str:
    """The fingerprint of the key that a signature says it was made with; empty where it is no signature."""
    try:
        return str(json.loads(signature)["verificationMaterial"]["publicKey"]["hint"] or "")
    except (ValueError, KeyError, TypeError):
        return ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
