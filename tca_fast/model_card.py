"""The README.md of an adapter checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tca_fast.adapter_config import CheckpointInfo, Provenance

_CARD = """\
---
{front}
---

# Transcoder adapters

Sparse branches beside the MLPs of a language model that make up for the difference between a base
model's MLPs and its fine-tuned sibling's. This directory holds the adapters only.

| | |
|---|---|
| base (gives the MLPs) | {base}, revision {base_revision} |
| target (imitated) | {target}, revision {target_revision} |
| backbone (gives everything else) | {backbone} |
| decoder layers, model width | {layers}, {width} |
| features per layer | {features} |
| activation | {activation} |
| decoder bias | {decoder_bias} |

The adapters attach to {model}. Without tca_fast, `AutoModel` and `pipeline` of
transformers do not open them; with it:

```python
import tca_fast

this = "path/to/this/directory"  # or the name of this repository
adapted = tca_fast.load_adapted(this)  # fetches the models named above
adapted = tca_fast.load(model, this)  # or attach to one that is loaded
with adapted.disabled():
    ...  # the model without adapters
```
"""


def model_card(info: CheckpointInfo) -> str:
    """Model card in the hub's form: front matter, what was trained, how to load it."""
    config, provenance = info.adapter, info.provenance
    base, target = provenance.base or "not recorded", provenance.target or "not recorded"
    hub_id = provenance.target if provenance.backbone == "target" else provenance.base
    front = ["library_name: tca_fast", "tags: [transcoder-adapter, interpretability]"]
    if hub_id and re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) and not Path(hub_id).exists():
        front.insert(0, f"base_model: {hub_id}")
    activation = config.activation if config.k is None else f"{config.activation}, k = {config.k}"
    return _CARD.format(
        front="\n".join(front),
        base=base,
        base_revision=provenance.base_revision or "default",
        target=target,
        target_revision=provenance.target_revision or "default",
        backbone=provenance.backbone,
        layers=info.num_layers,
        features=config.num_features,
        width=info.hidden_size,
        activation=activation,
        decoder_bias="yes" if config.decoder_bias else "no",
        model=model_to_load(provenance),
    )


def model_to_load(provenance: Provenance) -> str:
    """The model that the adapters attach to, in words."""
    base = _named(provenance.base, provenance.base_revision, "the base model")
    target = _named(provenance.target, provenance.target_revision, "the target model")
    if provenance.backbone == "base":
        return base
    return f"the hybrid, which is {target} with the MLPs of {base}"


def _named(model: str | None, revision: str | None, unknown: str) -> str:
    if model is None:
        return unknown
    return model if revision is None else f"{model} at revision {revision}"
