"""The functions of flash-attn that transformers calls, in plain operators.

flash-attn runs on GPUs only. What is passed to it does not depend on the device, so here it is
replaced below transformers: masks, boundaries and windows are as they would be there.
"""

import contextlib
import sys
from types import ModuleType

import pytest
import torch
from transformers import modeling_flash_attention_utils as utils


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
    softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """Attention within every row: q [B, S, heads, d], k and v [B, S, fewer heads, d]."""
    assert not dropout_p and not softcap and causal
    S, repeats = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (each.repeat_interleave(repeats, dim=2) for each in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    behind = torch.arange(S).unsqueeze(1) - torch.arange(S)
    seen = behind >= 0
    if window_size[0] >= 0:
        seen &= behind <= window_size[0]
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    """The same within every sequence of a row: q [T, heads, d], boundaries int32 [N+1]."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    assert sum(lengths) == len(q) == len(k)
    assert max_seqlen_q == max_seqlen_k == max(lengths) and type(max_seqlen_q) is int
    sequences = zip(*(each.unsqueeze(0).split(lengths, dim=1) for each in (q, k, v)), strict=True)
    outputs = [
        flash_attn_func(*one, dropout_p, softmax_scale, causal, window_size, softcap)
        for one in sequences
    ]
    return torch.cat(outputs, dim=1).squeeze(0)


@contextlib.contextmanager
def installed():
    """As if flash-attn were there and this machine could run it."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func = flash_attn_func
    package.flash_attn_varlen_func = flash_attn_varlen_func
    package.flash_attn_with_kvcache = None
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", package)
        patch.setitem(sys.modules, "flash_attn.bert_padding", padding)
        patch.setattr(utils, "is_flash_attn_2_available", lambda: True)
        patch.setattr(utils, "_loaded_implementation", None)
        yield
