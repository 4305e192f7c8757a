"""Push adapters to a repository of the Hugging Face hub, and pull them from one.

Three files travel: `adapter_config.json`, `adapter_model.safetensors` and the model card. Nothing
in a repository is ever run, and no weights but safetensors are read.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from tca_fast.adapter_config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CheckpointInfo,
    adapter_config_json,
    read_adapter_config,
    target_modules,
)
from tca_fast.checkpoint import CARD_NAME
from tca_fast.durable import Replacement
from tca_fast.errors import UserError, one_line
from tca_fast.formats import native
from tca_fast.hub.card import figures_in, with_figures
from tca_fast.model_card import model_card
from tca_fast.training.logs import LOG_NAME

_FILES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)


def push(
    directory: str | Path,
    repo: str,
    *,
    base: str | None = None,
    target: str | None = None,
    private: bool = False,
    overwrite: bool = False,
) -> str:
    """Publish adapters in one commit, with a model card written from the figures of their run.

    The figures are those of `log.jsonl`, `config.yaml` and `origin.json` in the run's directory;
    the card says of each that is missing that it was not recorded. Adapters without a run keep the
    figures that their card has. Nothing here is changed.

    Args:
        directory: a run's output directory, its `adapter`, or what `save_pretrained` wrote.
        repo: "owner/name"; made if it does not exist.
        base, target: names of the two models for others, where the run had them in a directory.
        private: make the repository private.
        overwrite: add a commit to a repository that exists.

    Returns:
        Address of the commit.

    Raises:
        UserError: no whole adapter there, a model that only this machine can find, a repository
            without owner, no token, no network, or a repository that exists or cannot be written.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if "/" not in repo:  # the hub would make it under the user's name, and then not find it
        raise UserError(f"repo: {repo!r} names no owner; give owner/name")
    directory, run = _adapter_and_run(Path(directory))
    adapters = native.read(directory)
    info = _with_names(read_adapter_config(directory), base, target)
    config = adapter_config_json(info, target_modules(adapters.layers_name))
    card = with_figures(_card(directory, info, base or target), run)
    if get_token() is None:
        raise UserError("token: none found; run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    with _answering("repo", repo):
        api.create_repo(repo, private=private, exist_ok=overwrite)
        commit = api.create_commit(
            repo,
            [
                CommitOperationAdd(WEIGHTS_NAME, str(directory / WEIGHTS_NAME)),
                CommitOperationAdd(CONFIG_NAME, config.encode()),
                CommitOperationAdd(CARD_NAME, card.encode()),
            ],
            commit_message="Transcoder adapters",
        )
    return str(commit.commit_url)


def pull(repo: str, directory: str | Path, *, revision: str | None = None) -> Path:
    """Fetch adapters into a directory; `tca_fast.load` also takes the repository's name itself.

    Args:
        repo: "owner/name".
        directory: created if missing; its other files are left alone.
        revision: branch, tag or commit; None is the default branch.

    Returns:
        The directory.

    Raises:
        UserError: no such repository or revision, no network, nothing of ours in it, a file that
            does not fit the others, or a directory that cannot be written.
    """
    from huggingface_hub import snapshot_download

    with _answering("repo", repo):
        found = Path(snapshot_download(repo, revision=revision, allow_patterns=list(_FILES)))
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (found / name).is_file()]
    if missing:
        raise UserError(
            f"repo: {repo} has no {' and no '.join(missing)}, so it holds no tca_fast adapter; "
            "only safetensors are read"
        )
    native.read(found)
    with Replacement(directory) as files:
        for name in _FILES:
            if (found / name).is_file():
                files.write(name, partial(_copy, found / name))
        files.commit()
    return Path(directory)


def _adapter_and_run(directory: Path) -> tuple[Path, Path | None]:
    """Where the adapter is, and the run it belongs to."""
    inside = directory / "adapter"
    if not (directory / CONFIG_NAME).is_file() and (inside / CONFIG_NAME).is_file():
        return inside, directory
    # A checkpoint during training lies one level deeper and has figures of a later step.
    parent = directory.resolve().parent
    return directory, parent if (parent / LOG_NAME).is_file() else None


def _with_names(info: CheckpointInfo, base: str | None, target: str | None) -> CheckpointInfo:
    """The configuration with models that others can find."""
    provenance = info.provenance
    # A revision belongs to the repository it was given for.
    if base is not None:
        provenance = replace(provenance, base=base, base_revision=None)
    if target is not None:
        provenance = replace(provenance, target=target, target_revision=None)
    for role, name in (("base", provenance.base), ("target", provenance.target)):
        if name is not None and (Path(name).is_absolute() or Path(name).exists()):
            raise UserError(
                f"{role}: {name} is a directory of this machine, which nobody else can load; name "
                f"the model for others with {role}=… (--{role} on the command line)"
            )
    return replace(info, provenance=provenance)


def _card(directory: Path, info: CheckpointInfo, renamed: str | None) -> str:
    """The card in the directory, or a new one where it is missing or names other models."""
    path = directory / CARD_NAME
    here = path.read_text(encoding="utf-8") if path.is_file() else ""
    if here and not renamed:
        return here
    return model_card(info) + figures_in(here)


def _copy(source: Path, path: Path) -> None:
    shutil.copyfile(source, path)


@contextmanager
def _answering(field: str, repo: str) -> Iterator[None]:
    """What the hub's client raises, as one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(
            f"{field}: {repo!r} is no name of a repository ({one_line(error)})"
        ) from None
    except errors.GatedRepoError:
        raise UserError(
            f"{field}: {repo} is gated; ask for access on its page, then `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"revision: not in {repo}; give one of its branches, tags or commits"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{field}: {repo} is not on the hub, or is private and your token does not open it; "
            "check the name, or `hf auth login`"
        ) from None
    except errors.HfHubHTTPError as error:
        raise UserError(_refusal(field, repo, error)) from None
    except (errors.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise UserError(
            f"{field}: {repo} cannot be reached ({one_line(error)}); check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from None


def _refusal(field: str, repo: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    remedies = {
        401: "the token is not accepted; run `hf auth login` again",
        403: "the token may not write there; use one with write access, of an owner of the name",
        409: "exists already; pass overwrite=True (--overwrite) to add a commit to it",
    }
    remedy = remedies.get(status or 0, f"refused by the hub ({one_line(error)}); try again later")
    return f"{field}: {repo}: {remedy}"
