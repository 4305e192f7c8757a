"""GPT-2: learned positions are added to the token embedding."""

from tca_fast.architectures.structure import Architecture

ARCHITECTURE = Architecture(final_norm="ln_f", inputs=("wpe",))
