# SPDX-License-Identifier: Apache-2.0
"""Which pictures a run was trained on: eight bytes of each beside its weights, whatever its file is called.

The digest is of the picture as it is decoded, before it is cut or resized, so that it stays when a file is copied, renamed,
put into another class's folder, a shard or a table, or saved anew without loss.
"""

from __future__ import annotations

import io
from os import PathLike

import numpy as np

from ..errors import DataError
from ..files import open_regular, to_path, write_bytes

LARGEST = 1 << 30  # bytes that are read of it, eight for each picture
TRAINED_FILE = "trained.npz"


def write_trained(folder: str | PathLike[str], digests: np.ndarray) -> None:
    """Note pictures by their digests, added to those that are noted already: a run may go on with other ones."""
    noted = read_trained(folder)
    everything = digests if noted is None else np.concatenate([noted, digests])
    content = io.BytesIO()
    np.savez(content, pictures=np.unique(everything[everything != 0]))
    write_bytes(to_path(folder) / TRAINED_FILE, content.getvalue())


def read_trained(path: str | PathLike[str]) -> np.ndarray | None:
    """The digests, int64 and in their order, beside the weights of a run; None where nothing is noted.

    Args:
        path: the run's folder, or a file in it.

    Raises:
        DataError: the file is damaged.
    """
    path = to_path(path)
    file = (path if path.is_dir() else path.parent) / TRAINED_FILE
    try:
        with open_regular(file) as content, np.load(content, allow_pickle=False) as stored:
            if stored.zip.getinfo("pictures.npy").file_size > LARGEST:
                raise ValueError("it claims more pictures than there can be")
            return stored["pictures"].astype(np.int64, casting="safe")
    except FileNotFoundError:
        return None
    except Exception as error:  # zipfile and NumPy say in many ways that a file is damaged
        raise DataError(
            f"cannot read {file}, which tells the pictures that the run was trained on: {error}; remove it, and nothing "
            "is known of them"
        ) from error


def told_overlap(path: str | PathLike[str], digests: np.ndarray) -> str:
    """A line for a test whose pictures a run was trained on in part, as where a data set holds some twice; or nothing."""
    noted = read_trained(path)
    count = 0 if noted is None else int(np.isin(digests, noted).sum())
    return f"note     {count} of the {len(digests)} test images are among those that were trained on\n" if count else ""
