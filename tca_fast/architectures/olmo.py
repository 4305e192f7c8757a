"""OLMo: the norms have no weights, by which the final one could be found."""

from tca_fast.architectures.structure import Architecture

ARCHITECTURE = Architecture(final_norm="norm")
