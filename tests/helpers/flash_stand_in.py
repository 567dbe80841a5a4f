"""A stand-in for flash-attention, which needs a GPU.

It keeps the contract of the package (causality and windows aligned to the lower right, sequences joined by
`cu_seqlens`, rows that see nothing are zero), but takes float32 unless it is strict, so that the results can be held
against a reference's. Where a kernel runs for real, its rounding to half precision comes on top.
"""

import torch
from transformers import modeling_flash_attention_utils as flash_utils


class StandIn:
    """The functions of `flash-attn`, and what they were called with.

    Args:
        tuples: whether they return the log-sum-exp beside the output, as flash-attention 3 does.

    Attributes:
        calls: one word for each call.
        strict: refuse what the package refuses: tensors on the CPU, and in float32.
        on_gpu: take the tensors, which are on the CPU, for those of a GPU.
    """

    def __init__(self, tuples: bool = False) -> None:
        self.tuples = tuples
        self.calls: list[str] = []
        self.strict = self.on_gpu = False

    def install(self, monkeypatch):
        """Puts it where transformers imports flash-attention."""
        for name in ("_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn"):
            monkeypatch.setattr(flash_utils, name, None)
        monkeypatch.setattr(flash_utils, "_process_flash_kwargs_fn", None)
        monkeypatch.setattr(flash_utils, "_loaded_implementation", None)

        def imports(*args, **kwargs):
            functions = self.flash_attn_func, self.flash_attn_varlen_func, None
            return *functions, flash_utils._pad_input, flash_utils._unpad_input

        monkeypatch.setattr(flash_utils, "_lazy_imports", imports)

    def one(self, q, k, v, scale, causal, window, softcap, sinks):
        """A sequence: q `(S, heads, D)`, k and v `(K, G, D)`; gives `(S, heads, D)`."""
        (S, heads, D), (K, G, _) = q.shape, k.shape
        assert k.shape == v.shape
        assert v.shape[-1] == D <= 256
        if self.strict and not self.on_gpu:
            raise RuntimeError("Expected q.is_cuda() to be true, but got false.")
        if self.strict and q.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        dtype = q.dtype
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
        k, v = k.repeat_interleave(heads // G, dim=1), v.repeat_interleave(heads // G, dim=1)
        scores = torch.einsum("shd,khd->hsk", q, k) * (D**-0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(K - S, K)[:, None] - torch.arange(K)  # to the left, (S, K)
        visible = torch.ones(S, K, dtype=torch.bool)
        left, right = window
        if left >= 0:
            visible &= distance <= left
        if right >= 0:
            visible &= -distance <= right
        if causal:
            visible &= distance >= 0
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, S, 1)], dim=-1)
        weights = scores.softmax(-1).nan_to_num()[..., :K]
        return torch.einsum("hsk,khd->shd", weights, v).to(dtype)

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, s_aux=None
    ):
        self.calls.append("batch")
        assert q.shape[0] == k.shape[0]
        rows = [self.one(*row, softmax_scale, causal, window_size, softcap, s_aux) for row in zip(q, k, v, strict=True)]
        return (torch.stack(rows), None) if self.tuples else torch.stack(rows)

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        s_aux=None,
    ):
        self.calls.append("joined")
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q[-1] == q.shape[0]
        assert cu_seqlens_k[-1] == k.shape[0] == v.shape[0]
        assert max_seqlen_q >= cu_seqlens_q.diff().max()
        assert max_seqlen_k >= cu_seqlens_k.diff().max()
        pieces = zip(
            q.split(cu_seqlens_q.diff().tolist()),
            k.split(cu_seqlens_k.diff().tolist()),
            v.split(cu_seqlens_k.diff().tolist()),
            strict=True,
        )
        joined = torch.cat([self.one(*x, softmax_scale, causal, window_size, softcap, s_aux) for x in pieces])
        return (joined, None) if self.tuples else joined
