"""BLOOM: a norm follows the token embedding; the MLP is given the residual and adds it itself."""

from tca_fast.architectures.structure import Architecture

ARCHITECTURE = Architecture(final_norm="ln_f", inputs=("word_embeddings_layernorm",))
