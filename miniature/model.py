"""Qwen2 in plain PyTorch, small enough to read in one sitting.

It maps token ids to logits. Parameter names are those of the Hugging Face checkpoint, so
`state_dict()` is the file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniature import make_tokenizer as shape


class RMSNorm(nn.Module):
    """Scales each vector to unit mean square, then by a learnt weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.HIDDEN_SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (shape.HIDDEN_SIZE,), self.weight.to(x.dtype), shape.RMS_NORM_EPS)


class Attention(nn.Module):
    """Causal attention with rotary positions, several query heads to one key-value head."""

    def __init__(self) -> None:
        super().__init__()
        hidden, kv = shape.HIDDEN_SIZE, shape.N_KV_HEADS * shape.HEAD_DIM
        self.q_proj = nn.Linear(hidden, shape.N_HEADS * shape.HEAD_DIM)
        self.k_proj = nn.Linear(hidden, kv)
        self.v_proj = nn.Linear(hidden, kv)
        self.o_proj = nn.Linear(shape.N_HEADS * shape.HEAD_DIM, hidden, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: list[Tensor] | None,
        padding: Tensor | None,
    ) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            proj(x).view(batch, length, -1, shape.HEAD_DIM).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = extend(cache, k, v)
        return self.o_proj(attend(q, k, v, padding).transpose(1, 2).reshape(batch, length, -1))


def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    """The mix of values up to its position for each query (batch, head, position, head_dim).

    `padding` (batch, position) is true where a key is ignored.
    """
    # Written out: a training step on a CPU spends a third of its time in PyTorch's fused attention.
    batch, heads, length, _ = q.shape
    grouped = (batch, shape.N_KV_HEADS, -1, shape.HEAD_DIM)
    scores = q.reshape(grouped) @ k.transpose(-1, -2) * shape.HEAD_DIM**-0.5
    scores = scores.view(batch, heads, length, -1)
    if length > 1:
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, torch.finfo(scores.dtype).min)
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None, :], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1).to(v.dtype)
    mixed = weights.view(batch, shape.N_KV_HEADS, -1, k.shape[2]) @ v
    return mixed.view(batch, heads, length, shape.HEAD_DIM)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (batch, head, position, head_dim) rotated by its position, halves paired as in Qwen2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def extend(cache: list[Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """All keys and values so far; `cache` holds them for the next call."""
    if cache:
        k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
    cache[:] = [k, v]
    return k, v


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.HIDDEN_SIZE, shape.INTERMEDIATE_SIZE, bias=False)
        self.up_proj = nn.Linear(shape.HIDDEN_SIZE, shape.INTERMEDIATE_SIZE, bias=False)
        self.down_proj = nn.Linear(shape.INTERMEDIATE_SIZE, shape.HIDDEN_SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm()
        self.self_attn = Attention()
        self.post_attention_layernorm = RMSNorm()
        self.mlp = MLP()

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: list[Tensor] | None,
        padding: Tensor | None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, padding)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, layers and last norm: what the checkpoint calls `model`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size(), shape.HIDDEN_SIZE)
        self.layers = nn.ModuleList(Layer() for _ in range(shape.N_LAYERS))
        self.norm = RMSNorm()


class Qwen2(nn.Module):
    """The whole model: `forward` gives hidden states, `lm_head` turns them into logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Trunk()
        self.lm_head = nn.Linear(shape.HIDDEN_SIZE, shape.vocab_size(), bias=False)
        frequency = shape.ROPE_THETA ** -(torch.arange(0, shape.HEAD_DIM, 2) / shape.HEAD_DIM)
        angles = torch.outer(torch.arange(shape.N_CTX).float(), frequency)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(
        self,
        tokens: Tensor,
        caches: list[list[Tensor]] | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (batch, position, hidden); with `caches`, `tokens` continue from them."""
        start = caches[0][0].shape[2] if caches and caches[0] else 0
        x = self.model.embed_tokens(tokens)
        if torch.is_autocast_enabled(tokens.device.type):
            x = x.bfloat16()
        cos = self.cos[start : start + tokens.shape[1]].to(x.dtype)
        sin = self.sin[start : start + tokens.shape[1]].to(x.dtype)
        for place, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, caches[place] if caches else None, padding)
        return self.model.norm(x)


def initialise(model: Qwen2) -> None:
    """Fill the parameters in place. Each layer starts by adding zero to the residual stream."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif name.endswith((".bias", "o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
        elif name.startswith("model.embed_tokens"):
            nn.init.normal_(parameter, std=0.3)
        else:
            nn.init.normal_(parameter, std=shape.HIDDEN_SIZE**-0.5 / 2)
