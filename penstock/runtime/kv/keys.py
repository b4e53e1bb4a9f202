"""Names for what blocks hold: a block's key covers its tokens and all before them, and the request's salt.

SHA-256, so that nobody can make a prompt whose blocks pass for another's.
"""

from __future__ import annotations

from hashlib import sha256

import numpy as np
from numpy.typing import NDArray


def extend_keys(keys: list[bytes], tokens: NDArray[np.int32], block_size: int, salt: bytes = b"") -> None:
    """Append the keys of those full blocks of `tokens` that `keys` does not name yet.

    A key is the digest of the key before it (of the salt's, for the first) and the block's tokens.
    """
    data, width = memoryview(tokens.astype(np.int32, copy=False).tobytes()), 4 * block_size
    key = keys[-1] if keys else sha256(salt).digest()
    for start in range(len(keys) * width, len(data) - width + 1, width):
        digest = sha256(key)
        digest.update(data[start : start + width])
        key = digest.digest()
        keys.append(key)
