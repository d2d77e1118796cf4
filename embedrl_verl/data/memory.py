# SPDX-License-Identifier: Apache-2.0
"""Media that stay bytes in the parquet files are kept in memory by training: said, or refused, before they are read."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embedrl_verl.data.parquet import SCHEMA
from embedrl_verl.errors import ResourceError
from embedrl_verl.platforms.machine import machine_memory

logger = logging.getLogger(__name__)
GIB = 1 << 30
SAID_FROM = 0.1
"""Share of the machine's memory from which the bytes are worth a warning."""


def embedded_bytes(path: str | Path) -> int:
    """Bytes of media in the rows of a parquet file, from its footer alone. Equal media of a row group may count once,
    so that it takes at least so much to hold them.

    Raises:
        OSError, pyarrow.ArrowException: the file cannot be read.
    """
    footer = pq.read_metadata(path)
    groups = (footer.row_group(group) for group in range(footer.num_row_groups))
    columns = (group.column(column) for group in groups for column in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if _is_media(column.path_in_schema))


def _is_media(path: str) -> bool:
    names = path.split(".")
    return names[-1] == "bytes" and names[0] in SCHEMA.names  # other columns are not read


def check_memory(files: Iterable[str | Path]) -> None:
    """Warn when the media in some parquet files take much of the machine's (or container's) memory. Files that cannot
    be read are left to whoever reads their rows. Every process of a `torchrun` on the machine holds them.

    Raises:
        ResourceError: they cannot fit.
    """
    held, named = 0, ""
    for file in files:
        try:
            here = embedded_bytes(file)
        except (OSError, pa.ArrowException):
            continue
        held += here
        named = named or (str(file) if here else "")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    total = machine_memory().total
    text = (
        f"media in the rows of {named} and the files beside it take {held / GIB:.1f} GiB in each of {processes} "
        f"process(es), and training keeps them in memory; the machine has {total / GIB:.1f} GiB. Media in files of "
        "their own are read when they are needed: convert the data again with --media files"
    )
    if held * processes > total:
        raise ResourceError(text)
    if held * processes > SAID_FROM * total:
        logger.warning(text)
