"""Where a causal language model keeps its layers, norm and embeddings.

Most models are read by their structure. What structure does not say about an architecture stands in
a file named after its `config.model_type`, which holds one `Architecture`; docs/architectures.md
shows how to write one.
"""
