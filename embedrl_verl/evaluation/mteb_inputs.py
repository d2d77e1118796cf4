# SPDX-License-Identifier: Apache-2.0
"""What mteb 2.26 gives an encoder (a `BatchedInput`: columns of equal length) as inputs of `EmbedRLModel`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embedrl_verl.data.schema import Side
from embedrl_verl.errors import ConfigError, DataError, EmbedderError
from embedrl_verl.model import Ask, ask_for
from embedrl_verl.model.tcots import FAILURES

READ = ("text", "image", "video")
_PAGE_TYPE, _PAGE_TASKS = "DocumentUnderstanding", ("VisRAGRet", "VDRMultilingual")


def has_pages(task_metadata: Any) -> bool:
    """Whether the pictures of a task are pages of documents: by mteb's type, and by name where its type is another."""
    return bool(task_metadata.type == _PAGE_TYPE or task_metadata.name.startswith(_PAGE_TASKS))


def with_files(inputs: Any) -> Any:
    """The data loader with images and videos as they lie in the files: they are then decoded, and frames drawn, as in
    training (embedrl_verl/data), by nothing but Pillow and PyAV, and one that is broken can be named."""
    from datasets import Image, Video
    from torch.utils.data import DataLoader

    dataset = inputs.dataset
    features = getattr(dataset, "features", None) or {}
    columns = [name for name, one in features.items() if isinstance(one, (Image, Video)) and one.decode]
    if not columns:
        return inputs
    for name in columns:
        dataset = dataset.cast_column(name, type(features[name])(decode=False))
    return DataLoader(
        dataset, batch_size=inputs.batch_size, collate_fn=inputs.collate_fn, num_workers=inputs.num_workers
    )


def asks_of(
    batch: Mapping[str, Any], names: Sequence[str], side: Side, *, instruction: str, is_page: bool, max_frames: int
) -> list[Ask]:
    """The inputs of a batch, decoded.

    Args:
        names: of each input, for messages.
        is_page: pictures are pages of documents.
        max_frames: frames drawn from a video.

    Raises:
        EmbedderError: names the input that cannot be read.
    """
    columns = {key: batch[key] for key in READ if key in batch}
    found = []
    for number, name in enumerate(names):
        row = {key: column[number] for key, column in columns.items()}
        try:
            with _video_file(row.pop("video", None)) as video:
                given = _given(row, video, is_page)
                found.append(ask_for(given, side, instruction=instruction, max_frames=max_frames))
        except (*FAILURES, ConfigError) as error:
            raise EmbedderError(f"{name}: {error}") from error
    return found


def count_of(batch: Mapping[str, Any]) -> int:
    """Number of inputs of a batch; ConfigError for a batch with nothing that is read, or with sound."""
    if batch.get("audio") is not None:
        raise ConfigError("inputs must be text, image and video; these have audio. Leave the task out")
    counts = {key: len(batch[key]) for key in READ if key in batch}
    if len(set(counts.values())) != 1:
        raise DataError(f"a batch must have columns of equal length among {', '.join(READ)}; got {counts}")
    return next(iter(counts.values()))


def _given(row: Mapping[str, Any], video: str | None, is_page: bool) -> dict[str, Any]:
    """A mapping for `ask_for`."""
    pictures = row.get("image")
    images = [_image(one) for one in (pictures if isinstance(pictures, (list, tuple)) else [pictures])]
    given: dict[str, Any] = {"text": row.get("text") or "", "images": [one for one in images if one is not None]}
    if video is not None:
        given["video"] = video
    elif is_page and given["images"]:
        given["kind"] = "page"
    return given


def _image(one: Any) -> Any:
    """An image, its bytes or its path; data sets give a file as {"bytes", "path"}."""
    if not isinstance(one, Mapping):
        return one
    return one["path"] if one.get("bytes") is None else one["bytes"]


@contextmanager
def _video_file(video: Any) -> Iterator[str | None]:
    """Path of a video, which data sets give as {"bytes", "path"}."""
    if video is None:
        yield None
    elif not isinstance(video, Mapping):
        raise DataError(f"a video must be a file's path or bytes; got {type(video).__name__}")
    elif video.get("bytes") is None:
        yield str(video["path"])
    else:
        with tempfile.TemporaryDirectory(prefix="embedrl-mteb-") as folder:
            file = Path(folder) / "clip"
            file.write_bytes(video["bytes"])
            yield str(file)
