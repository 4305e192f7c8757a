from tca_fast.attachment import *  # TEMPORARY shim (tca_fast.attach must be the function); import tca_fast.attachment instead
from tca_fast.attachment import (
    MLP_NAME,
    AdaptedModel,
    attach,
    decoder_parts,
    detach,
    residual_states,
)  # noqa: F401
