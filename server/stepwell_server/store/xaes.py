"""XAES-256-GCM: AES-256-GCM under a key of its own for each nonce of 192 bits.

GCM alone has nonces of 96 bits. Drawn at random they are good for 2**32 messages of one key (NIST SP 800-38D, section
8.3), which is two and a half days of 20,000 steps per second; counted, they repeat when a store is copied or goes back.
XAES-256-GCM (https://c2sp.org/XAES-256-GCM) takes random nonces for 2**80 messages of one key: the first half of the
nonce and the key give the key that AES-GCM uses, with the second half (a KDF of NIST SP 800-108r1 with AES-CMAC).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
NONCE_BYTES = 24
TAG_BYTES = 16

_DERIVING_BYTES = 12
_BLOCK_BITS, _REDUCTION = 128, 0x87  # of CMAC, NIST SP 800-38B
_MESSAGES = (b"\x00\x01X\x00", b"\x00\x02X\x00")


class Key:
    """A key of 32 bytes. Safe for threads."""

    def __init__(self, key: bytes) -> None:
        cipher = Cipher(algorithms.AES(key), modes.ECB())  # noqa: S305  # the block cipher itself, of which CMAC is made
        self._encryptor = cipher.encryptor()
        self._lock = threading.Lock()
        doubled = int.from_bytes(self._encryptor.update(bytes(16)), "big") << 1
        if doubled >> _BLOCK_BITS:
            doubled ^= (1 << _BLOCK_BITS) | _REDUCTION
        self._masks = [doubled ^ (int.from_bytes(message, "big") << 96) for message in _MESSAGES]

    def derive(self, nonce: bytes) -> AESGCM:
        """What encrypts and decrypts under nonces that begin as this one does; it takes their last 12 bytes."""
        part = int.from_bytes(nonce[:_DERIVING_BYTES], "big")
        blocks = b"".join([(mask ^ part).to_bytes(16, "big") for mask in self._masks])
        with self._lock:
            derived = self._encryptor.update(blocks)
        return AESGCM(derived)


def rest_of(nonce: bytes) -> bytes:
    """The part of a nonce that AES-GCM takes."""
    return nonce[_DERIVING_BYTES:]


def following(nonce: bytes) -> Iterator[bytes]:
    """Nonces that begin as a random one does and differ in the last four bytes: for what is encrypted together.

    Each is as good as a random one: two runs share nonces only if 160 random bits are the same.
    """
    start = nonce[:-4]
    for number in range(2**32):
        yield start + number.to_bytes(4, "big")
