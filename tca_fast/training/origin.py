"""What a run was made of that its configuration does not say: the program and the data."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from tca_fast.training.data import Corpus

ORIGIN_NAME = "origin.json"


def write_origin(path: Path, corpora: Mapping[str, Corpus]) -> None:
    """Write versions, commit and the digests of the data files as JSON.

    Args:
        path: the file.
        corpora: data files by split.
    """
    origin = {
        "tca_fast": metadata.version("tca_fast"),
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "data": {
            split: {"sha256": corpus.digest, "sequences": len(corpus)}
            for split, corpus in corpora.items()
        },
    }
    path.write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def commit() -> str | None:
    """The git commit of this package, "-dirty" where files were changed; None if unknown.

    A checkout is asked first, then the record that pip keeps of an installation from git.
    """
    package = Path(__file__).parents[1]
    try:
        # An untracked package lies in somebody else's repository, whose commit means nothing.
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return _installed_commit()


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _installed_commit() -> str | None:
    record = metadata.distribution("tca_fast").read_text("direct_url.json")
    commit = json.loads(record).get("vcs_info", {}).get("commit_id") if record else None
    return commit if isinstance(commit, str) else None
