"""Adapters on disk for the tests of foreign formats."""

import torch
from tiny import randomise, tiny_qwen2

import tca_fast
from tca_fast.adapter_config import Provenance
from tca_fast.formats import conversion

LAYERS, WIDTH, FEATURES, K = 3, 24, 7, 2
RELU = {}
TOPK = {"activation": "topk", "k": K}
PROVENANCE = Provenance("org/base", "v1", "org/target", None, "target")


def saved(directory, *, dtype=torch.float32, provenance=PROVENANCE, **config):
    """Random adapters on a tiny Qwen2, saved to a directory."""
    adapted = tca_fast.attach(
        tiny_qwen2(), tca_fast.AdapterConfig(num_features=FEATURES, **config), dtype=dtype
    )
    randomise(adapted)
    adapted.save_pretrained(directory, provenance)
    return adapted


def convert(source, destination, to, **names):
    conversion.convert(conversion.prepare(source, to, **names), destination)
    return destination


def contents(directory):
    """Every file below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def branch(adapted, layer, x):
    """What our adapter adds to an MLP that gives zero."""
    with torch.no_grad():
        return adapted.layers[layer](x, torch.zeros_like(x)).y


def inputs(dtype=torch.float32, seed=5):
    return torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def described(path):
    """Every tensor of a safetensors file: its shape and dtype as the file says."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        return {
            key: (file.get_slice(key).get_shape(), file.get_slice(key).get_dtype())
            for key in file.keys()  # noqa: SIM118
        }
