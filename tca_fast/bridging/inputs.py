"""What the models of a step are called with: padded rows, or sequences packed into one row.

Packed sequences lie side by side without padding. Their positions begin at 0 again, and from these
transformers builds masks that let no token see another sequence: block-diagonal for SDPA and eager
attention, block masks for flex attention. Flash attention is told the boundaries instead.

Shapes: B sequences or 1 packed row, S positions, N packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tca_fast.architectures.structure import decoder_parts
from tca_fast.errors import UserError
from tca_fast.losses import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Packing(NamedTuple):
    """Where the sequences of a packed row lie.

    Attributes:
        position_ids: int64 [1, S], 0 at the first token of every sequence.
        boundaries: int32 [N+1], where each sequence begins, and S.
        longest: tokens of the longest sequence; on the host, because flash attention asks there.
    """

    position_ids: Tensor
    boundaries: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Packing:
        """Sequences of these lengths, each at least 1, one after the other."""
        counts = torch.tensor(lengths)
        ends = counts.cumsum(0)
        position_ids = torch.arange(int(ends[-1])) - (ends - counts).repeat_interleave(counts)
        boundaries = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        return cls(position_ids.unsqueeze(0), boundaries, max(lengths))

    def without_borders(self, labels: Tensor) -> Tensor:
        """Labels [1, S] in which no sequence predicts the first token of the next one."""
        return labels.masked_fill(self.position_ids == 0, IGNORED_LABEL)


class Inputs(NamedTuple):
    """One micro-batch as the forward passes of a step see it.

    Attributes:
        input_ids: int64 [B, S].
        token_mask: bool [B, S], real tokens.
        labels: int64 [B, S], -100 where KL and LM do not count.
        packing: None for rows of one sequence each, padded on the right.
    """

    input_ids: Tensor
    token_mask: Tensor
    labels: Tensor
    packing: Packing | None = None

    def arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        """What the model, or its decoder, is called with; no KV cache."""
        arguments: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False}
        if self.packing is None:
            return {**arguments, "attention_mask": self.token_mask}
        # With a padding mask transformers would not look for packed sequences.
        arguments |= {"attention_mask": None, "position_ids": self.packing.position_ids}
        if "flash" in str(model.config._attn_implementation):
            # Else every layer would find the boundaries itself and wait for the device.
            boundaries, longest = self.packing.boundaries, self.packing.longest
            arguments |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
            arguments |= {"max_length_q": longest, "max_length_k": longest}
        return arguments


def check_packing(model: PreTrainedModel) -> None:
    """Find out whether a model keeps packed sequences apart, by trying.

    Two short sequences are run packed, as one sequence, and the second one alone. Packed, its
    states must be far closer to those alone than they are in the context of the first. Recurrent
    layers, absolute positions that a model counts itself and attention implementations that
    build no masks all fail this.

    Raises:
        UserError: the model mixes packed sequences, or cannot be run on them.
    """
    name, attention = type(model).__name__, model.config._attn_implementation
    remedy = "set run.train_batch_tokens=null to pad instead"
    first, second = torch.arange(2, 8), torch.arange(5, 14)
    rows = {
        "alone": (second, [9]),
        "packed": (torch.cat([first, second]), [6, 9]),
        "one sequence": (torch.cat([first, second]), [15]),
    }
    parts = decoder_parts(model)
    states = {}
    for row, (ids, lengths) in rows.items():
        ids = (ids % model.config.vocab_size).unsqueeze(0).to(model.device)
        packing = Packing.of(lengths)
        packing = packing._replace(
            position_ids=packing.position_ids.to(model.device),
            boundaries=packing.boundaries.to(model.device),
        )
        inputs = Inputs(ids, torch.ones_like(ids).bool(), ids, packing)
        try:
            with torch.no_grad():
                output = parts.decoder(**inputs.arguments(model))
        except TypeError as error:
            raise UserError(
                f"model: {name} takes no position ids ({error}), so sequences cannot be packed; "
                f"{remedy}"
            ) from None
        states[row] = output.last_hidden_state[0, -9:].float()
    distance = {row: (states[row] - states["alone"]).norm() for row in ("packed", "one sequence")}
    if not distance["packed"] <= 0.1 * distance["one sequence"]:
        raise UserError(
            f"model: {name} with pair.attn_implementation={attention!r} lets packed sequences see "
            f"each other; {remedy}"
        )
