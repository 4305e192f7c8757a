"""Which models a run trains between, by their names and by their weights."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from tca_fast.adapter_config import Provenance
from tca_fast.config import PairConfig
from tca_fast.fingerprint import Fingerprint, fingerprint, fingerprinted_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tca_fast.bridging.streams import Streams
    from tca_fast.training.engine import Engine


def provenance(pair: PairConfig, streams: Streams, engine: Engine) -> Provenance:
    """What the adapters' files say of the models; called on every rank."""
    return Provenance(
        base=pair.base,
        base_revision=pair.base_revision,
        target=pair.target,
        target_revision=pair.target_revision,
        backbone=pair.backbone,
        fingerprint=_whole_fingerprint(streams.adapted.model, engine),
    )


def models_digest(streams: Streams, engine: Engine) -> str:
    """A hash of some weights of both streams, by which a resumed run knows them again.

    Models may have moved between two starts of a run, and others may lie where they were.
    """
    marks = [
        _whole_fingerprint(model, engine) for model in (streams.adapted.model, streams.reference)
    ]
    text = " ".join(part for mark in marks for part in (mark.mlp, mark.rest))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _whole_fingerprint(model: PreTrainedModel, engine: Engine) -> Fingerprint:
    with engine.whole(fingerprinted_layers(model)):
        return fingerprint(model)
