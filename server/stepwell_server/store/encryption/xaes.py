"""XAES-256-GCM: AES-256-GCM with a derived key for each 192-bit nonce.

Plain GCM has 96-bit nonces. Random ones suffice for 2**32 messages per key (NIST SP 800-38D, section 8.3), which is
two and a half days at 20,000 steps per second. Counted ones repeat after a store is copied or restored. XAES-256-GCM
(https://c2sp.org/XAES-256-GCM) allows random nonces for 2**80 messages per key: it derives the key for AES-GCM from
the key and the first half of the nonce (a KDF of NIST SP 800-108r1 with AES-CMAC), and uses the second half as the
nonce of AES-GCM.
"""

from __future__ import annotations

import os
import threading

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
NONCE_BYTES = 24
TAG_BYTES = 16

_DERIVING_BYTES = 12
NONCE_REST_BYTES = NONCE_BYTES - _DERIVING_BYTES
_COUNT_BYTES = 4
_BLOCK_BITS, _REDUCTION = 128, 0x87  # of CMAC, NIST SP 800-38B
_MESSAGES = (b"\x00\x01X\x00", b"\x00\x02X\x00")


class Key:
    """A key of 32 bytes. Thread-safe."""

    def __init__(self, key: bytes) -> None:
        cipher = Cipher(algorithms.AES(key), modes.ECB())  # noqa: S305  # the raw block cipher, to build CMAC
        self._encryptor = cipher.encryptor()
        self._lock = threading.Lock()
        doubled = int.from_bytes(self._encryptor.update(bytes(16)), "big") << 1
        if doubled >> _BLOCK_BITS:
            doubled ^= (1 << _BLOCK_BITS) | _REDUCTION
        self._masks = [doubled ^ (int.from_bytes(message, "big") << 96) for message in _MESSAGES]

    def derive(self, nonce: bytes) -> AESGCM:
        """Return the cipher for all nonces with the same first half. It takes their last 12 bytes."""
        part = int.from_bytes(nonce[:_DERIVING_BYTES], "big")
        blocks = b"".join([(mask ^ part).to_bytes(16, "big") for mask in self._masks])
        with self._lock:
            derived = self._encryptor.update(blocks)
        return AESGCM(derived)


def rest_of(nonce: bytes) -> bytes:
    """Return the part of a nonce that AES-GCM takes."""
    return nonce[_DERIVING_BYTES:]


def random_nonces(count: int) -> npt.NDArray[np.uint8]:
    """Return nonces `(count, NONCE_BYTES)` for records that are encrypted together: random bytes and a four-byte counter.

    Nonces of two calls collide only if 160 random bits do, so each is as good as a fully random one. All have the
    same first half, and so share the result of `derive`.
    """
    nonces = np.empty((count, NONCE_BYTES), np.uint8)
    nonces[:, :-_COUNT_BYTES] = np.frombuffer(os.urandom(NONCE_BYTES - _COUNT_BYTES), np.uint8)
    nonces[:, -_COUNT_BYTES:] = np.arange(count, dtype=">u4").view(np.uint8).reshape(count, _COUNT_BYTES)
    return nonces
