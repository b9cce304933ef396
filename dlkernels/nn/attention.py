"""Multi-head attention as a module."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from .. import functional


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` computed by :func:`dlkernels.functional.scaled_dot_product_attention`.

    One path serves training and evaluation. A query whose keys are all masked gives zero weights (and the bias of the
    output projection), with ``need_weights=True`` too, where torch gives NaN.

    Examples:
        >>> tokens = torch.randn(2, 5, 16)
        >>> output, weights = MultiheadAttention(16, 4, batch_first=True)(tokens, tokens, tokens)
        >>> output.shape, weights.shape
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 5]))
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``query`` over ``key`` and ``value``.

        Args:
            query: ``[L, N, E]``, ``[N, L, E]`` with ``batch_first``, or ``[L, E]``; ``key`` and ``value`` likewise,
                with ``S`` rows of ``kdim`` and ``vdim`` features.
            key_padding_mask: ``[N, S]`` or ``[S]``; ``True`` hides a key, a float is added to its scores.
            attn_mask: ``[L, S]`` or ``[N * num_heads, L, S]``; ``True`` hides, a float is added.
            need_weights: also return the attention weights, averaged over heads if ``average_attn_weights``.
            is_causal: a hint that ``attn_mask`` is the causal mask.

        Returns:
            The output, shaped as ``query``, and the weights ``[N, L, S]`` (``[N, num_heads, L, S]`` per head, without
            ``N`` for unbatched input) or ``None``.

        Raises:
            RuntimeError, AssertionError: shapes or masks that do not fit, as in torch.
            NotImplementedError: nested tensors.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise NotImplementedError("MultiheadAttention: nested tensors are not supported; pad and pass a mask")
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = self._check_shapes(query, key, value, key_padding_mask, attn_mask)
        batch_dimension = 0 if self.batch_first or not batched else 1

        def batch_first(x: Tensor) -> Tensor:
            return x.unsqueeze(0) if not batched else x.transpose(0, batch_dimension)

        if query is key and key is value:
            q = k = v = batch_first(query)  # stays one tensor, so that one product projects it
        else:
            q, k, v = batch_first(query), batch_first(key), batch_first(value)
        q, k, v = self._project_inputs(q, k, v)  # [N, L or S, E]
        use_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if use_causal else self._merged_mask(q, k, key_padding_mask, attn_mask)
        k, v, mask = self._append_keys(k, v, mask)

        dropout_p = self.dropout if self.training else 0.0
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        weights = None
        if need_weights:
            # The attention over the rows of the identity is the weights, after the same dropout as the output's.
            identity = torch.eye(k.shape[-2], dtype=v.dtype, device=v.device).expand(*v.shape[:-1], -1)
            both = functional.scaled_dot_product_attention(q, k, torch.cat([v, identity], -1), mask, dropout_p)
            output, weights = both.split([self.head_dim, k.shape[-2]], -1)
            weights = weights.mean(1) if average_attn_weights else weights
            if not any(x is not None and x.requires_grad for x in (q, k, mask)):
                weights = weights.detach()  # of the value, which alone wants a gradient, they are no function
        else:
            output = functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, use_causal)
        output = output.transpose(1, 2).flatten(2)  # [N, L, E]
        output = functional.linear(output.transpose(0, batch_dimension), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            output, weights = output.squeeze(0), weights.squeeze(0) if weights is not None else None
        return output, weights

    def _check_shapes(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> bool:
        check = torch_functional._mha_shape_check  # type: ignore[attr-defined]
        batched = check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        if self._qkv_same_embed_dim and key.shape != value.shape:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}"
            )
        return batched

    def _project_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._qkv_same_embed_dim and query is key and key is value:
            q, k, v = functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            return q, k, v
        if self._qkv_same_embed_dim:
            weights = list(self.in_proj_weight.chunk(3))
        else:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        biases = [None, None, None] if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (functional.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _merged_mask(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Tensor | None:
        """Both masks as one additive mask that broadcasts to ``[N, num_heads, L, S]``."""
        padding = torch_functional._canonical_mask(
            mask=key_padding_mask,
            mask_name="key_padding_mask",
            other_type=torch_functional._none_or_dtype(attn_mask),
            other_name="attn_mask",
            target_type=query.dtype,
        )
        mask = torch_functional._canonical_mask(
            mask=attn_mask,
            mask_name="attn_mask",
            other_type=None,
            other_name="",
            target_type=query.dtype,
            check_other=False,
        )
        (batch, keys), queries = key.shape[:2], query.shape[1]
        if mask is not None:
            expected = (queries, keys) if mask.dim() == 2 else (batch * self.num_heads, queries, keys)
            if mask.shape != expected:
                raise RuntimeError(
                    f"The shape of the {mask.dim()}D attn_mask is {mask.shape}, but should be {expected}."
                )
            mask = mask if mask.dim() == 2 else mask.unflatten(0, (batch, self.num_heads))
        if padding is None:
            return mask
        if padding.numel() != batch * keys:
            raise AssertionError(f"expecting key_padding_mask shape of {(batch, keys)}, but got {padding.shape}")
        padding = padding.reshape(batch, 1, 1, keys)
        return padding if mask is None else mask + padding

    def _append_keys(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The learned key and value of ``add_bias_kv`` and the zeros of ``add_zero_attn``, which no mask hides."""
        batch = key.shape[0]
        if self.bias_k is not None and self.bias_v is not None:
            key = torch.cat([key, self.bias_k.to(key.dtype).expand(batch, -1, -1)], 1)
            value = torch.cat([value, self.bias_v.to(value.dtype).expand(batch, -1, -1)], 1)
            mask = mask if mask is None else torch_functional.pad(mask, (0, 1))
        if self.add_zero_attn:
            key = torch.cat([key, key.new_zeros(batch, 1, key.shape[-1])], 1)
            value = torch.cat([value, value.new_zeros(batch, 1, value.shape[-1])], 1)
            mask = mask if mask is None else torch_functional.pad(mask, (0, 1))
        return key, value, mask
