"""Decode attention in plain torch: prefix and cache are read where they lie, only their scores are joined."""

import torch


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
) -> torch.Tensor:
    """Softmax attention of one token per row over ``[prefix of stream p | cache]``.

    Args:
        query: ``(P*B, heads, 1, D)``, stream-major rows.
        key: ``(P*B, G, K, D)``; ``heads`` is a multiple of G (grouped queries).
        value: ``(P*B, G, K, Dv)``.
        prefix_k: ``(P, G, T, D)``, shared by the B rows of each stream.
        prefix_v: ``(P, G, T, Dv)``.
        mask: ``None``, or over prefix and cache: boolean (True: attend) or additive, broadcasting to
            ``(P*B, heads, 1, T + K)``.
        scaling: factor on the scores; ``D ** -0.5`` if ``None``.

    Returns:
        ``(P*B, heads, 1, Dv)`` in the dtype of ``query``.
    """
    (R, heads, _, D), (P, G, T, _) = query.shape, prefix_k.shape
    B, n = R // P, heads // G
    scaling = D**-0.5 if scaling is None else scaling
    grouped = (query * scaling).view(R, G, n, D)  # the queries of a key/value head as its rows
    by_stream = grouped.unflatten(0, (P, B)).transpose(1, 2).reshape(P, G, B * n, D)  # (P, B, G, n, D) -> ...
    prefix_scores = torch.matmul(by_stream, prefix_k.to(query.dtype).transpose(-1, -2))  # (P, G, B*n, T)
    prefix_scores = prefix_scores.unflatten(2, (B, n)).transpose(1, 2).reshape(R, G, n, T)
    scores = torch.cat([prefix_scores, torch.matmul(grouped, key.transpose(-1, -2))], dim=-1)  # (R, G, n, T + K)
    if mask is not None:
        mask = mask.expand(R, heads, 1, -1).view(R, G, n, -1) if mask.shape[1] != 1 else mask
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    prefix_weights, weights = weights[..., :T], weights[..., T:]
    prefix_weights = prefix_weights.unflatten(0, (P, B)).transpose(1, 2).reshape(P, G, B * n, T)
    output = torch.matmul(prefix_weights, prefix_v.to(query.dtype))  # (P, G, B*n, Dv)
    output = output.unflatten(2, (B, n)).transpose(1, 2).reshape(R, G, n, -1)
    return (output + torch.matmul(weights, value)).view(R, heads, 1, -1)
