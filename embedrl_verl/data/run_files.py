# SPDX-License-Identifier: Apache-2.0
"""What the pair files of a run tell before it starts, as far as they are on this machine: their media root, how many
pairs there are of each source, and whether the first rows can be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from embedrl_verl.config.batch import BatchPlan, mini_batches
from embedrl_verl.config.rules import files_of
from embedrl_verl.config.schema import MediaConfig
from embedrl_verl.data.files import common_media_root, pair_files
from embedrl_verl.data.media import resolve_media_path
from embedrl_verl.data.parquet import read_batches, scan_pairs
from embedrl_verl.data.schema import PairRecord
from embedrl_verl.errors import ConfigError, DataError, MediaError

PAIRS = ("data.train_files", "data.val_files")
FIRST_ROWS = 32


def root_of_files(files: Sequence[str], media_root: str | None) -> str | None:
    """The media root that is set, else the one that the data cards of the files and folders that are here agree on;
    ConfigError where they do not."""
    return media_root or common_media_root(filter(None, map(local, files)))


def fill_media_root(config: Any) -> None:
    """Set `data.media_root` of a run configuration, in place, to `root_of_files`."""
    named = [file for key in (*PAIRS, "embedrl.embedder.train.anchor_files") for file in files_of(config, key)]
    config.data.media_root = root_of_files(named, config.data.get("media_root"))


def local(file: str) -> Path | None:
    """The path of a file or folder, None if it is not here."""
    path = Path(file).expanduser()
    return path if "://" not in file and path.exists() else None


def pairs_by_source(file: Path) -> Counter[str]:
    """Rows of a parquet file, or of a data set folder's parts, by data source."""
    counts: Counter[str] = Counter()
    for part in pair_files([file]):
        for _, batch in read_batches(part, ["data_source"]):
            counts.update({row["values"] or "": row["counts"] for row in pc.value_counts(batch[0]).to_pylist()})
    return counts


def check_pair_files(config: Any) -> None:
    """Refuse pair files that are here and cannot be used: no pair records, too few for a batch, media of the first rows
    that are not in the media root. A media root that is not here says nothing. ConfigError."""
    root = config.data.media_root
    look = root is None or Path(root).expanduser().is_dir()
    for key in PAIRS:
        named = files_of(config, key)
        here = [path for file in named if (path := local(file))]
        try:
            counts = [pairs_by_source(path) for path in here]
            for part in pair_files(here):
                if look:
                    _check_media(part, root)
        except DataError as error:
            raise ConfigError(f"{key} must hold pair records that can be used; got {error}") from error
        if key == "data.train_files" and len(here) == len(named) > 0:
            _check_batch(sum(counts, Counter()), config)


def steps_an_epoch(counts: Mapping[str, int], config: Any) -> int:
    """Steps that pairs by data source make, as `PairBatchSampler` cuts them into batches: of one source each, and of
    whole runs of pairs that stay together."""
    parts, together = mini_batches(config), MediaConfig.from_config(config.data).pairs_together
    need = BatchPlan.of(config).pairs // parts
    return sum(count // together * together // need for count in counts.values()) // parts


def _check_batch(counts: Counter[str], config: Any) -> None:
    step, most = BatchPlan.of(config).pairs, config.data.get("train_max_samples", -1)
    need = step // mini_batches(config)
    if most >= 0:  # which sources they are of is drawn
        counts = Counter({"all": min(counts.total(), most // 2)})
    short = {source: count for source, count in sorted(counts.items()) if count < need}
    if short or not steps_an_epoch(counts, config):
        got = ", ".join(f"{source} {count}" for source, count in (short or counts).items())
        raise ConfigError(
            f"data.train_files must hold {need} pairs of each data source, a batch, and {step} in all, a step; got "
            f"{got or 'none'}. Lower data.train_batch_size (2 prompts a pair; recipes: PAIRS), or leave the source out"
        )


def _check_media(part: Path, root: str | None) -> None:
    for row, record in islice(scan_pairs(part), FIRST_ROWS):
        if isinstance(record, DataError):
            raise record
        for path in media_paths(record):
            try:
                resolve_media_path(path, root)
            except MediaError as error:
                raise MediaError(f"{part}, row {row}: {error}") from error


def media_paths(record: PairRecord) -> Iterator[str]:
    """Paths of the media of a record."""
    for item in (record.query, record.target, *record.negatives):
        clip = item.video
        media = (*item.images, *(clip.frames if clip else ()), clip.path if clip else None)
        yield from (one for one in media if isinstance(one, str))
