# SPDX-License-Identifier: Apache-2.0
"""Where raw rows come from: a local file or folder, or a data set repository of the Hugging Face hub.

A repository is read file by file through `huggingface_hub`'s file system, as `datasets` does when it streams: of
parquet only the row groups that are wanted travel. It is pinned to the commit that its revision names at the start.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any, Protocol, cast

from embedrl_verl.convert.converter import InputRoot
from embedrl_verl.data.files import sha256_of
from embedrl_verl.errors import ConfigError, DataError, ResourceError

HUB_ID = re.compile(r"(?:hf://datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


class Root(InputRoot, Protocol):
    """What the job needs of a root beyond what a converter sees.

    Attributes:
        location: as the data card names it.
        is_remote: a failed read says nothing about the data.
    """

    location: str
    is_remote: bool

    def open(self, name: str) -> IO[bytes]:
        """The file's bytes from the start; seekable; `.gz` is unpacked. Raises DataError if it cannot be opened."""
        ...

    def local_path(self, name: str) -> Path | None:
        """Path of the file if it is on this machine."""
        ...

    def size(self, name: str) -> int:
        """Bytes."""
        ...

    def stamp(self, name: str) -> str:
        """Changes when the file changes."""
        ...

    def sha256(self, name: str) -> str | None:
        """Hash of the bytes as stored; None where it would have to be downloaded for that."""
        ...


class LocalRoot:
    """A folder; or one file, whose folder is then the root. Nothing below `without` (the output) is seen."""

    is_remote = False

    def __init__(self, path: str | Path, without: str | Path | None = None) -> None:
        self.location = str(path)
        full = Path(path).expanduser()
        if not full.exists():
            raise DataError(f"{path}: no such file or folder")
        self.only = full.name if full.is_file() else None
        self.folder = full.parent if full.is_file() else full
        self._without = None if without is None else Path(without).expanduser().resolve()

    def files(self, *patterns: str) -> list[str]:
        """See `InputRoot.files`; of a root that is one file, that file if a pattern fits its name."""
        found: dict[str, None] = {}
        for pattern in patterns:
            if self.only is not None:
                names = [self.only] if Path(self.only).match(pattern.rsplit("/", 1)[-1]) else []
            else:
                paths = [path for path in self.folder.glob(pattern) if path.is_file() and not self._is_output(path)]
                names = [path.relative_to(self.folder).as_posix() for path in paths]
            found.update(dict.fromkeys(sorted(names, key=natural_key)))
        return list(found)

    def _is_output(self, path: Path) -> bool:
        return self._without is not None and path.resolve().is_relative_to(self._without)

    def open(self, name: str) -> IO[bytes]:
        """See `Root.open`."""
        try:
            path = self.folder / name
            return cast(IO[bytes], gzip.open(path)) if name.endswith(".gz") else open(path, "rb")
        except OSError as error:
            raise DataError(f"{name}: cannot be opened ({error})") from error

    def local_path(self, name: str) -> Path:
        """See `Root.local_path`."""
        return self.folder / name

    def size(self, name: str) -> int:
        """See `Root.size`."""
        return (self.folder / name).stat().st_size

    def stamp(self, name: str) -> str:
        """Size and time of the last change."""
        stat = (self.folder / name).stat()
        return f"{stat.st_size} bytes, changed at {stat.st_mtime_ns}"

    def sha256(self, name: str) -> str | None:
        """See `Root.sha256`."""
        return sha256_of(self.folder / name)


class RemoteRoot:
    """A folder of an fsspec file system, such as a repository of the hub at one commit.

    Args:
        protocol: of fsspec, as "hf".
        base: path of the folder there.
        location: as the data card names it.
    """

    is_remote = True

    def __init__(self, protocol: str, base: str, location: str) -> None:
        self.protocol, self.base, self.location = protocol, base.rstrip("/"), location

    @cached_property
    def _system(self) -> Any:
        import fsspec  # comes with datasets; needed only for hub ids

        return fsspec.filesystem(self.protocol)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_system"}  # every process connects anew

    def files(self, *patterns: str) -> list[str]:
        """See `InputRoot.files`."""
        found: dict[str, None] = {}
        for pattern in patterns:
            with self._asking(pattern):
                paths = [path for path in self._system.glob(f"{self.base}/{pattern}") if not self._system.isdir(path)]
            names = [path[len(self.base) + 1 :] for path in paths]
            found.update(dict.fromkeys(sorted(names, key=natural_key)))
        return list(found)

    def open(self, name: str) -> IO[bytes]:
        """See `Root.open`. Raises ResourceError if the server does not answer."""
        with self._asking(name):
            file = self._system.open(f"{self.base}/{name}", "rb")
        return cast(IO[bytes], gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file)

    def local_path(self, name: str) -> None:
        """None: it is elsewhere."""
        return

    def size(self, name: str) -> int:
        """See `Root.size`."""
        return int(self._info(name)["size"])

    def stamp(self, name: str) -> str:
        """The commit is part of the location, so the size is enough."""
        return f"{self.size(name)} bytes"

    def sha256(self, name: str) -> str | None:
        """Hash that the hub keeps of large files; None without one."""
        large = self._info(name).get("lfs")
        return None if large is None else str(large["sha256"])

    def _info(self, name: str) -> dict[str, Any]:
        with self._asking(name):
            info: dict[str, Any] = self._system.info(f"{self.base}/{name}")
        return info

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        try:
            yield
        except remote_errors() as error:
            raise unreadable(self.location, name, error) from error


def unreadable(location: str, name: str, error: Exception) -> ResourceError:
    """What to raise when a server does not give a file."""
    return ResourceError(f"{location}: {name} cannot be read ({error}); run the command again to go on")


@cache
def remote_errors() -> tuple[type[Exception], ...]:
    """What a file system of the hub raises when the server does not answer. Since `huggingface_hub` 1 it speaks through
    httpx, whose errors are no OSError."""
    try:
        from httpx import HTTPError, StreamError
    except ImportError:
        return (OSError,)
    return OSError, HTTPError, StreamError


def open_root(location: str, without: str | Path | None = None) -> Root:
    """The root that a user names: an existing path, else a hub id `owner/name` or `hf://datasets/owner/name@revision`.

    Args:
        without: folder that is being written; its files are no input.
    """
    if Path(location).expanduser().exists():
        return LocalRoot(location, without)
    named = HUB_ID.fullmatch(location)
    if named is None or location.startswith((".", "/")):
        raise DataError(f"{location}: no such file or folder, and not a hub id (owner/name or owner/name@revision)")
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ConfigError(
            f"{location}: no such file or folder; reading from the hub needs `pip install datasets`"
        ) from error
    repo, revision = named["repo"], named["revision"]
    try:
        commit = HfApi().dataset_info(repo, revision=revision).sha
    except HFValidationError as error:
        raise DataError(f"{location}: no such file or folder, and not a hub id ({error})") from error
    except remote_errors() as error:
        raise ResourceError(
            f"{location}: no such file or folder here, and the hub does not give a data set of this name "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    base = f"datasets/{repo}@{commit}"
    return RemoteRoot("hf", base, f"hf://{base}")


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key in which numbers count as numbers: part-2 before part-10."""
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
