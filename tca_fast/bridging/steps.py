"""The forms of the training step, by the name that configurations and `verify` use."""

from tca_fast.bridging.objective import BridgingObjective
from tca_fast.bridging.plain import PlainObjective
from tca_fast.bridging.shared import SharedObjective

STEPS: dict[str, type[BridgingObjective]] = {
    "plain": PlainObjective,
    "shared": SharedObjective,
}
