"""The shared step: the objective with nothing computed twice.

One pass through the target gives every reference state and what its layers were called with; one
pass through the adapter stream gives KL, L1 and NMSE; every mixed model starts from a state that
one of the two has. The adapter states at the cutoffs stay in the graph, so a2r gradients join the
others there and each adapter layer is back-propagated once. Logits exist in chunks only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tca_fast.bridging import head
from tca_fast.bridging.head import Distances, Readout
from tca_fast.bridging.inputs import Inputs
from tca_fast.bridging.objective import BridgingObjective, Passes
from tca_fast.bridging.partial import PartialRunner, Trace, whole_heads
from tca_fast.bridging.streams import Streams
from tca_fast.sparsity import record

if TYPE_CHECKING:
    from tca_fast.config import ObjectiveConfig


class SharedObjective(BridgingObjective):
    """The objective by one pass of each stream, suffixes of both, and chunked logits.

    Where the streams share the embedding, r2a(0) is the main pass; where they share the head,
    a2r(L) is. These bridges then cost nothing but their weight.
    """

    def __init__(self, streams: Streams, config: ObjectiveConfig) -> None:
        """Hold both streams; only the adapters have gradients."""
        super().__init__(streams, config)
        options = {"is_checkpointed": config.gradient_checkpointing}
        self._adapter = PartialRunner(streams.adapted.model, **options)
        self._reference = PartialRunner(streams.reference, **options)
        self._shares_embedding = self._adapter.shares_embedding(self._reference)
        self._shares_head = self._adapter.shares_head(self._reference)

    def _passes(self, inputs: Inputs, cutoffs: Sequence[int]) -> Passes:
        with torch.no_grad():
            reference = self._reference.run(inputs)
        with record(inputs.token_mask, keeps_inputs=self.keeps_inputs) as recorder:
            adapter = self._adapter_pass(inputs, reference)
        main = Readout(adapter.states[-1], self._adapter)
        bridges = {}
        for cutoff in cutoffs:
            if cutoff >= 1:
                bridges["a2r", cutoff] = self._a2r(cutoff, adapter, reference, main)
            if cutoff < self.num_layers:
                bridges["r2a", cutoff] = self._r2a(cutoff, adapter, reference, main)
        # Bridges that are the main pass are read once, with it.
        students = list({id(student): student for student in (main, *bridges.values())}.values())
        teacher = Readout(reference.states[-1], self._reference)
        found = self._distances(teacher, students, inputs.labels)
        of_student = {
            id(student): {"kl": kl, "lm": lm}
            for student, kl, lm in zip(students, found.kl, found.lm, strict=True)
        }
        bridge_sums = {
            f"{direction}_{name}/cutoff_{cutoff}": value
            for (direction, cutoff), student in bridges.items()
            for name, value in of_student[id(student)].items()
        }
        return Passes(
            found.teacher_lm,
            of_student[id(main)],
            bridge_sums,
            adapter.states,
            reference.states,
            recorder,
        )

    def _adapter_pass(self, inputs: Inputs, reference: Trace) -> Trace:
        """The main pass, from h_0 on where that is shared."""
        if not self._shares_embedding:
            return self._adapter.run(inputs)
        states = self._adapter.resume(reference.calls, reference.states[0], 0)
        return Trace(states, reference.calls)

    def _a2r(self, cutoff: int, adapter: Trace, reference: Trace, main: Readout) -> Readout:
        """The target's layers from the adapter stream's state on; its gradient flows on below."""
        if cutoff == self.num_layers and self._shares_head:
            return main
        states = self._reference.resume(reference.calls, adapter.states[cutoff], cutoff)
        return Readout(states[-1], self._reference)

    def _r2a(self, cutoff: int, adapter: Trace, reference: Trace, main: Readout) -> Readout:
        """The adapter stream's layers from the target's state on, without statistics."""
        if cutoff == 0 and self._shares_embedding:
            return main
        states = self._adapter.resume(adapter.calls, reference.states[cutoff], cutoff)
        return Readout(states[-1], self._adapter)

    def _distances(
        self, teacher: Readout, students: Sequence[Readout], labels: Tensor
    ) -> Distances:
        with whole_heads([self._reference, self._adapter]):
            return head.distances(teacher, students, labels, self.config.loss)
