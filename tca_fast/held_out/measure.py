"""Base, hybrid, adapter model and target, one after the other, on the same text.

No more than two models are in memory: what the hybrid has beside the target are the base's MLPs and
the adapters, and the rest of the base goes once it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from tca_fast import checkpoint
from tca_fast.adapted_model import AdaptedModel
from tca_fast.bridging.streams import build_backbone, load_model
from tca_fast.config import TrainConfig
from tca_fast.errors import UserError, one_line
from tca_fast.evaluation.faithfulness import Batch, Faithfulness, measure_faithfulness
from tca_fast.evaluation.report import MODEL_NAMES, ModelName
from tca_fast.held_out.text import HeldOutText, read_text
from tca_fast.training.run import resolve_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Models(NamedTuple):
    """A pair and trained adapters; base and adapter model share what they can with the target.

    Attributes:
        base: the base; with backbone "base" the adapters stand in it.
        adapted: the adapter model.
        target: the target.
    """

    base: PreTrainedModel
    adapted: AdaptedModel
    target: PreTrainedModel


def load_models(config: TrainConfig, adapter: Path) -> Models:
    """Load the pair of a run and put its trained adapters in their place.

    Raises:
        UserError: a model or adapter that cannot be read, or adapters of other models.
    """
    pair, device = config.pair, str(resolve_device(config.run.device))
    base = load_model("pair.base", pair.base, pair.base_revision, pair, device).eval()
    target = load_model("pair.target", pair.target, pair.target_revision, pair, device).eval()
    accept = tuple(pair.accept_differences)
    stream = build_backbone(base, target, backbone=pair.backbone, accept=accept)
    return Models(base, checkpoint.load(stream, adapter), target)


def measure_adapter(config: TrainConfig, adapter: Path, num_samples: int) -> Faithfulness:
    """Faithfulness of the adapter model alone on the run's validation file.

    Raises:
        UserError: adapters, models or data that cannot be read.
    """
    text = read_text(config, num_samples)
    models = load_models(config, adapter)
    batches = text.batches(_vocab_size(models.target))
    return measure_faithfulness(models.adapted, models.target, batches)


def measured_models(config: TrainConfig) -> tuple[ModelName, ...]:
    """The models of a run in the order in which they are measured."""
    if config.pair.backbone == "target":
        return MODEL_NAMES
    return tuple(name for name in MODEL_NAMES if name != "hybrid")


def measure_models(
    config: TrainConfig,
    adapter: Path,
    text: HeldOutText,
    batch_tokens: int,
    progress: Callable[[ModelName, int], None],
) -> dict[ModelName, Faithfulness]:
    """Faithfulness of every model of a run, the target itself for a check.

    Args:
        config: names the models, their backbone and the device.
        adapter: directory of the trained adapters.
        text: what is read.
        batch_tokens: of one forward, padding included.
        progress: called with the model at work and the number of sequences it has just read.

    Returns:
        By name, in the order of `measured_models`.

    Raises:
        UserError: models or adapters that cannot be read or do not fit, or too little memory.
    """
    try:
        base, adapted, target = load_models(config, adapter)
        batches = text.batches(_vocab_size(target), batch_tokens)

        def measured(name: ModelName, model: PreTrainedModel | AdaptedModel) -> None:
            read = _counted(batches, partial(progress, name))
            found[name] = measure_faithfulness(model, target, read)

        found: dict[ModelName, Faithfulness] = {}
        is_hybrid = config.pair.backbone == "target"
        if is_hybrid:
            measured("base", base)
        # All of it that the hybrid does not share.
        del base
        with adapted.disabled():
            measured("hybrid" if is_hybrid else "base", adapted)
        measured("adapter", adapted)
        measured("target", target)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--batch-tokens: {batch_tokens} need more memory than there is ({one_line(error)}); "
            "give fewer"
        ) from None
    return found


def _counted(batches: Sequence[Batch], progress: Callable[[int], None]) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        progress(len(batch.input_ids))


def _vocab_size(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().num_embeddings)
