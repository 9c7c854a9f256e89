"""What a good engineer gets from torch alone: Bark's causal models with a static cache under torch.compile.

A contiguous cache of full length, one step a call, SDPA, sampling as argmax(p / q), compiled with
mode="max-autotune" (which captures CUDA graphs on a GPU). A peer for the decode benchmarks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bark_fast.modules.gpt import GPT


class StaticCacheStep(nn.Module):
    """One decode step of `gpt` for a batch whose sequences have the same length. Shares the weights."""

    def __init__(self, gpt: GPT, batch: int, low: int, high: int, temperature: float) -> None:
        super().__init__()
        self.gpt, self.low, self.high, self.temperature = gpt, low, high, temperature
        config, weight = gpt.config, gpt.wte.weight
        shape = (batch, config.n_head, config.block_size, config.head_dim)
        for index in range(config.n_layer):
            for name in ("keys", "values"):
                cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
                self.register_buffer(f"{name}{index}", cache, persistent=False)
        visible = torch.ones(config.block_size, config.block_size, dtype=torch.bool, device=weight.device)
        self.register_buffer("visible", visible.tril(), persistent=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The next tokens (batch,) after ids (batch, time) at positions (time,)."""
        config = self.gpt.config
        batch, time = ids.shape
        x = F.embedding(ids, self.gpt.wte.weight) + self.gpt.wpe.weight[positions]
        mask = self.visible[positions]
        for index, layer in enumerate(self.gpt.layers):
            qkv = F.linear(self._norm(layer.ln_1, x), layer.qkv.weight, layer.qkv.bias)
            heads = qkv.view(batch, time, 3, config.n_head, config.head_dim)
            query, key, value = heads.permute(2, 0, 3, 1, 4)
            keys, values = getattr(self, f"keys{index}"), getattr(self, f"values{index}")
            keys.index_copy_(2, positions, key)
            values.index_copy_(2, positions, value)
            seen = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
            x = x + F.linear(seen.transpose(1, 2).flatten(2), layer.out.weight, layer.out.bias)
            hidden = F.gelu(F.linear(self._norm(layer.ln_2, x), layer.fc.weight, layer.fc.bias))
            x = x + F.linear(hidden, layer.proj.weight, layer.proj.bias)
        last = self._norm(self.gpt.ln_f, x[:, -1])
        logits = F.linear(last, self.gpt.head.weight[self.low : self.high]).float()
        if self.temperature == 0:
            return logits.argmax(-1) + self.low
        probabilities = F.softmax(logits / self.temperature, dim=-1)
        noise = torch.empty_like(probabilities).exponential_()
        return (probabilities / noise).argmax(-1) + self.low

    @staticmethod
    def _norm(norm: Any, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, 1e-5)


class StaticCachePeer:
    """Prefills eagerly, then decodes by a compiled step."""

    def __init__(
        self, gpt: GPT, batch: int, low: int, high: int, temperature: float, mode: str | None = "max-autotune"
    ) -> None:
        self.eager = StaticCacheStep(gpt, batch, low, high, temperature)
        self.compiled = torch.compile(self.eager, mode=mode, fullgraph=True) if mode else self.eager

    @torch.inference_mode()
    def decode(self, prompt: Tensor, count: int) -> Tensor:
        """`count` tokens (batch, count) after prompt (batch, time), on the model's device."""
        position = torch.arange(prompt.shape[1], device=prompt.device)
        token = self.eager(prompt, position)
        drawn = [token]
        position = position[-1:]
        for _ in range(count - 1):
            position = position + 1
            # a captured graph overwrites its output at the next call
            token = self.compiled(token[:, None], position).clone()
            drawn.append(token)
        return torch.stack(drawn, dim=1)
