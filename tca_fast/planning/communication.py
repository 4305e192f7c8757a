"""What ranks send each other in an optimizer step, and how long that takes.

The assumptions are written down in docs/planning.md: ring collectives, one after the other, whose
time adds to that of the arithmetic; the slowest link decides; and a start-up time for every
collective that grows with the logarithm of the number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tca_fast.config import AdapterConfig
from tca_fast.planning.devices import OF_LINK, Device
from tca_fast.planning.memory import MAX_LIVE_PARAMETERS, REDUCE_BUCKET, adapter_parameters
from tca_fast.planning.passes import Passes
from tca_fast.planning.shapes import ModelShape

# Start-up of a collective for every doubling of the ranks: an assumption.
SECONDS_PER_HOP = 10e-6


@dataclass(frozen=True)
class Traffic:
    """Of one rank and one optimizer step.

    Attributes:
        num_bytes: that it sends, and receives as many.
        num_collectives: operations that all ranks take part in.
    """

    num_bytes: float
    num_collectives: float

    def seconds(self, device: Device, num_ranks: int) -> float:
        """Time on the links of a device's node, or between nodes where there are several."""
        if num_ranks == 1:
            return 0.0
        bandwidth = device.link_bandwidth
        if num_ranks > device.per_node:
            # Every device has an adapter and every adapter a ring: a rank sends on all of them.
            bandwidth = min(bandwidth, device.per_node * device.network_bandwidth)
        start_up = self.num_collectives * math.ceil(math.log2(num_ranks)) * SECONDS_PER_HOP
        return self.num_bytes / (OF_LINK * bandwidth) + start_up


def step_traffic(
    shape: ModelShape,
    adapter: AdapterConfig,
    passes: Passes,
    *,
    stage: int,
    num_ranks: int,
    itemsize: int = 2,
    micro_batches: int = 1,
) -> Traffic:
    """What a stage of ZeRO sends.

    With A the adapters' parameters and s = (N-1)/N: stage 0 reduces the gradients on all ranks,
    2·s·A; stages 1 and 2 reduce them on all ranks as well, as DeepSpeed does, 2·s·A, and gather the
    updated parameters, s·A; stage 3 scatters gradients, and gathers the weights of every layer,
    frozen ones too, each time it runs. ZeRO-3 keeps what fits its limit of live parameters between
    two uses; where all weights fit, each is gathered once forward and once backward.

    Args:
        shape, adapter: of the pair.
        passes: of one forward and backward, see `passes.layer_passes`.
        stage: 0 to 3.
        num_ranks: N.
        itemsize: bytes of a weight and gradient on the way.
        micro_batches: forwards of a rank in one optimizer step.
    """
    if num_ranks == 1:
        return Traffic(0.0, 0)
    trained = adapter_parameters(shape, adapter)
    share = (num_ranks - 1) / num_ranks
    buckets = math.ceil(trained / REDUCE_BUCKET)
    if stage == 0:
        return Traffic(2 * share * trained * itemsize, buckets)
    # Stages 2 and 3 reduce after every micro-batch, stage 1 once; only stage 3 sends each rank its
    # part alone.
    times = micro_batches if stage >= 2 else 1
    sent = (2 if stage < 3 else 1) * share * trained * itemsize
    reduced = Traffic(times * sent, times * buckets)
    if stage < 3:
        return Traffic(reduced.num_bytes + share * trained * itemsize, reduced.num_collectives + 1)
    of_adapter = trained / shape.num_hidden_layers
    frozen = shape.attention_parameters + shape.mlp_parameters
    streams = shape.num_hidden_layers * (frozen + shape.mlp_parameters + of_adapter)
    adapter_runs = passes.adapter_forward + passes.adapter_backward
    reference_runs = passes.reference_forward + passes.reference_backward
    gathered = adapter_runs * (frozen + of_adapter) + reference_runs * frozen
    collectives = adapter_runs + reference_runs
    if streams + shape.outer_parameters <= MAX_LIVE_PARAMETERS:
        gathered, collectives = 2 * streams, 4.0 * shape.num_hidden_layers
    heads = 2 * shape.outer_parameters
    return Traffic(
        reduced.num_bytes + micro_batches * share * (gathered + heads) * itemsize,
        reduced.num_collectives + micro_batches * collectives,
    )
