"""Where a data set's files lie: a folder, or a repository of the Hub whose files are fetched when they are asked for.

Names are relative and have forward slashes. Nothing is decoded here; a folder is listed once, when it is first asked.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from fvg_adapter.data.errors import DataError, DataFileError


class Files(ABC):
    """A tree of files: what a folder holds, and where a file can be opened.

    Attributes:
        name: what messages call the tree.
    """

    name: str

    @abstractmethod
    def content(self, folder: str) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the folders and of the files in a folder ("" is the top); both empty if there is no such folder."""

    @abstractmethod
    def path(self, file: str) -> Path:
        """A file of this machine with the content of `file`; fetches it if it must.

        Raises:
            DataFileError: it cannot be fetched.
        """

    def folders(self, folder: str) -> frozenset[str]:
        """Names of the folders in a folder."""
        return self.content(folder)[0]

    def has(self, file: str) -> bool:
        """Whether a file is there, by its name in exactly this case."""
        folder, _, name = file.rpartition("/")
        return name in self.content(folder)[1]

    def text(self, file: str) -> str:
        """A file as UTF-8 text.

        Raises:
            DataFileError: it is not there, cannot be read, or is no such text.
        """
        if not self.has(file):
            raise DataFileError(f"{self.name} has no file {file!r}.")
        try:
            return self.path(file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataFileError(f"{file!r} in {self.name} cannot be read as UTF-8 text: {error}") from error


class LocalFiles(Files):
    """The files below a folder of this machine; links are followed."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root: Path = Path(root)
        self.name: str = str(self.root)
        self._content: dict[str, tuple[frozenset[str], frozenset[str]]] = {}

    def content(self, folder: str) -> tuple[frozenset[str], frozenset[str]]:
        """See Files.content."""
        if folder not in self._content:
            folders: set[str] = set()
            files: set[str] = set()
            place = self.root / folder
            if place.is_dir():
                with os.scandir(place) as entries:
                    for entry in entries:
                        if not entry.name.startswith("."):
                            (folders if entry.is_dir() else files).add(entry.name)
            self._content[folder] = frozenset(folders), frozenset(files)
        return self._content[folder]

    def path(self, file: str) -> Path:
        """See Files.path."""
        return self.root / file


class HubFiles(Files):
    """The files of a data set repository on the Hub: listed once, each fetched (and cached) when it is opened.

    Args:
        repo: its id, as in "user/name". revision: branch, tag or commit; the listing pins the commit it found.

    Raises:
        DataError: no such repository or revision, or no connection.
    """

    def __init__(self, repo: str, revision: str | None = None) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        self.name: str = f"the data set repository {repo!r}"
        self.repo: str = repo
        try:
            self.revision: str | None = HfApi().dataset_info(repo, revision=revision).sha
            found = HfApi().list_repo_files(repo, repo_type="dataset", revision=self.revision)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise DataError(f"Could not list {self.name} on the Hub: {str(error).splitlines()[0]}") from error
        self._content: dict[str, tuple[set[str], set[str]]] = {"": (set(), set())}
        for file in found:
            self._add(file)

    def _add(self, file: str) -> None:
        folder, _, name = file.rpartition("/")
        self._folder(folder)[1].add(name)

    def _folder(self, folder: str) -> tuple[set[str], set[str]]:
        if folder not in self._content:
            parent, _, name = folder.rpartition("/")
            self._folder(parent)[0].add(name)
            self._content[folder] = set(), set()
        return self._content[folder]

    def content(self, folder: str) -> tuple[frozenset[str], frozenset[str]]:
        """See Files.content."""
        folders, files = self._content.get(folder, (set(), set()))
        return frozenset(folders), frozenset(files)

    def path(self, file: str) -> Path:
        """See Files.path."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        options: dict[str, Any] = {"repo_type": "dataset", "revision": self.revision}
        try:
            return Path(hf_hub_download(self.repo, file, **options))
        except (HfHubHTTPError, OSError) as error:
            raise DataFileError(f"{file!r} of {self.name} could not be fetched: {error}") from error
