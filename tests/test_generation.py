"""Generating with adapters: the fast backend against the reference, and the benchmark of a step."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import tca_fast
from benchmarks import generation
from benchmarks.cases import CASES
from tca_fast import miniature, ops


def test_256_greedy_tokens_are_those_of_the_reference():
    """On the miniature's target, with adapters of which a part fires for every token."""
    model = AutoModelForCausalLM.from_pretrained(miniature.target_path()).eval()
    adapted = tca_fast.attach(model, tca_fast.AdapterConfig(num_features=512))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in adapted.layers:
            adapter.W_enc.copy_(torch.randn(adapter.W_enc.shape, generator=generator))
            adapter.W_enc.div_(adapter.W_enc.norm(dim=1, keepdim=True))
            adapter.W_dec.copy_(torch.randn(adapter.W_dec.shape, generator=generator) * 0.02)
            adapter.b_enc.fill_(-1.0)
    prompt = torch.tensor([[5, 6, 7, 8, 9]])

    def generate():
        return adapted.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=256,
            max_new_tokens=256,
            do_sample=False,
        )

    with adapted.record() as recording:
        ours = generate()
    with ops.backend("reference"):
        theirs = generate()
    with adapted.disabled():
        bare = generate()
    assert ours.shape == (1, 5 + 256)
    assert torch.equal(ours, theirs) and not torch.equal(ours, bare)
    share = recording.layer(1).counts().double().mean() / 512
    assert 0.001 < share < 0.5


@pytest.mark.parametrize("case", CASES["tiny"], ids=lambda case: case.name)
def test_the_benchmark_runs(case):
    step = generation.measure(case, rounds=4)
    assert step.layer_ms > 0 and step.product_ms > 0
    assert step.ratio[1] <= step.ratio[0] <= step.ratio[2]
