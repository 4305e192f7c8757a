"""Tiny random models and dense oracles shared by the tests."""

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tca_fast.bridging.inputs import Packing

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def tiny_qwen2(seed: int = 0, **overrides) -> PreTrainedModel:
    """A random Qwen2 whose logits are far from uniform."""
    return random_model(Qwen2ForCausalLM, Qwen2Config(**{**SHAPE, **overrides}), seed)


def tiny_llama(seed: int = 0, **overrides) -> PreTrainedModel:
    return random_model(LlamaForCausalLM, LlamaConfig(**{**SHAPE, **overrides}), seed)


def random_model(cls, config, seed: int) -> PreTrainedModel:
    """Any architecture with weights far from those of a fresh model."""
    torch.manual_seed(seed)
    model = cls(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif "norm" in name:
                parameter.uniform_(0.7, 1.3)
    return model.eval()


def randomise(adapted, seed: int = 1) -> None:
    """Give every adapter a decoder and biases, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapted.layers:
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def batch(vocab_size: int = SHAPE["vocab_size"], seed: int = 2) -> dict[str, Tensor]:
    """Two sequences, the second padded on the right, the first tokens of the first masked."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, vocab_size, (2, 11), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 7:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[0, :3] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def packed(padded: dict[str, Tensor]) -> dict:
    """The sequences of a padded batch side by side in one row, the first token of each labelled."""
    real = padded["attention_mask"].bool()
    labels = padded["labels"].clone()
    labels[:, 0] = padded["input_ids"][:, 0]
    return {
        "input_ids": padded["input_ids"][real].unsqueeze(0),
        "attention_mask": real[real].long().unsqueeze(0),
        "labels": labels[real].unsqueeze(0),
        "packing": Packing.of(real.sum(1).tolist()),
    }


def dense_adapter(x, mlp_out, W_enc, b_enc, W_dec, b_dec, k=None, gain=None, mask=None):
    """The adapter and its L1 by autograd on dense tensors: the oracle of every operator.

    Among the k largest, ties go to the lowest index and NaN is the largest value.
    """
    z = x @ W_enc.T + b_enc
    features = z.relu()
    if k is not None:
        other, own = z.unsqueeze(1), z.unsqueeze(2)
        larger = (other > own) | (other.isnan() & ~own.isnan())
        equal = (other == own) | (other.isnan() & own.isnan())
        earlier = torch.ones(z.shape[1], z.shape[1], dtype=torch.bool).tril(-1)
        rank = (larger | (equal & earlier)).sum(2)
        features = torch.where(rank < k, features, 0.0)
    weighted = (features * W_dec.norm(dim=1)).sum(1)
    if mask is not None:
        weighted = weighted[mask]
    gained = features if gain is None else features * gain
    y = mlp_out + gained @ W_dec
    return (y if b_dec is None else y + b_dec), weighted.sum(), features
