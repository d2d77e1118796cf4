# SPDX-License-Identifier: Apache-2.0
"""Where a source's files come from: a local folder or file, or a data set repository of the Hugging Face hub.

A repository is pinned to the commit that its revision names at the start. The files that a converter asks for are
downloaded whole, to the hub's own cache.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fsspec.utils import glob_translate

from embedrl_verl.errors import ConfigError, DataError, ResourceError

HUB_ID = re.compile(r"(?:hf://datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


class InputRoot:
    """A folder; or one file, whose folder is then the root; or a repository of the hub, which then has a `commit`.

    `location` is as the data card names it. Files of the folder `without`, which is being written, are no input. The
    media root is the one that is given, else the root, if it is local.
    """

    def __init__(self, location: str | Path, without: Path | None = None, media_root: str = "") -> None:
        self.location, self.commit = str(location), ""
        self._without = without and without.expanduser().resolve()
        full = Path(location).expanduser()
        self._only = full.name if full.is_file() else None
        self._folder = full.parent if full.is_file() else full
        if media_root and not Path(media_root).expanduser().is_dir():
            raise ConfigError(f"the media root {media_root} is no folder; --media-root names the one of all paths")
        if not full.exists():
            self._open_repository()
        local = None if self.commit else self._folder
        self.media_root = Path(media_root).expanduser() if media_root else local

    def files(self, *patterns: str) -> list[str]:
        """Paths relative to the root, with "/", of the files that match any glob pattern ("**" = any depth), without
        doubles, in natural order (part-2 before part-10) pattern by pattern."""
        found = [name for pattern in patterns for name in sorted(self._matching(pattern), key=natural_key)]
        return list(dict.fromkeys(found))

    def _matching(self, pattern: str) -> Iterator[str]:
        if self.commit:
            yield from filter(re.compile(glob_translate(pattern)).match, self._names)
        elif self._only is not None:
            yield from fnmatch.filter([self._only], pattern.rsplit("/", 1)[-1])
        else:
            for path in self._folder.glob(pattern):
                if path.is_file() and not (self._without and path.resolve().is_relative_to(self._without)):
                    yield path.relative_to(self._folder).as_posix()

    def path(self, name: str) -> Path:
        """The file on this machine. Raises ResourceError if the hub does not give it."""
        if not self.commit:
            return self._folder / name
        from huggingface_hub import hf_hub_download

        with _asking(f"{self.location}: {name} cannot be read; run the command again to go on"):
            return Path(hf_hub_download(self._repo, name, repo_type="dataset", revision=self.commit))

    def _open_repository(self) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError

        given = self.location
        named = HUB_ID.fullmatch(given)
        if named is None or given.startswith((".", "/")):
            raise DataError(f"{given}: no such file or folder, and not a hub id (owner/name or owner/name@revision)")
        self._repo = named["repo"]
        try:
            with _asking(f"{given}: no such file or folder here, and the hub does not give a data set of this name"):
                self.commit = str(HfApi().dataset_info(self._repo, revision=named["revision"]).sha)
                self._names = HfApi().list_repo_files(self._repo, repo_type="dataset", revision=self.commit)
        except HFValidationError as error:
            raise DataError(f"{given}: no such file or folder, and not a hub id ({error})") from error
        self.location = f"hf://datasets/{self._repo}@{self.commit}"


@contextmanager
def _asking(what: str) -> Iterator[None]:
    from httpx import HTTPError, StreamError  # of `huggingface_hub` 1; no OSError

    try:
        yield
    except (OSError, HTTPError, StreamError) as error:
        raise ResourceError(f"{what} ({type(error).__name__}: {(str(error) or '-').splitlines()[0]})") from error


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key in which numbers count as numbers: part-2 before part-10."""
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]
