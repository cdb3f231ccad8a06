"""The reference for importance matrices: a forward pass of Qwen2 in float64 NumPy.

A checkpoint's spec, its weights as they are stored, and chunks of tokens in; the sum of squares per column of
everything that is multiplied with a weight out. Written from the model's description alone (RMSNorm, rotary
embedding of halves, grouped query attention, SwiGLU); imports nothing of the project's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import CheckpointSpec

Matrix = NDArray[np.float64]
EPSILON, THETA = 1e-5, 1e6


@dataclass
class Reference:
    """A model whose linear layers sum the squares of their inputs."""

    spec: CheckpointSpec
    weights: Mapping[str, NDArray[np.float32]]
    sums: dict[str, Matrix] = field(default_factory=lambda: defaultdict(lambda: np.zeros(1)))

    def run(self, chunks: Iterable[list[int]]) -> dict[str, Matrix]:
        """The sums over all chunks by the GGUF's names, with `output.weight` for a tied model too."""
        for chunk in chunks:
            self._forward(np.array(chunk))
        return dict(self.sums)

    def _forward(self, tokens: NDArray[np.int64]) -> None:
        hidden = self._weight("model.embed_tokens.weight")[tokens]
        for layer in range(self.spec.n_layers):
            place, block = f"model.layers.{layer}", f"blk.{layer}"
            normed = _normed(hidden, self._weight(f"{place}.input_layernorm.weight"))
            q, k, v = (
                self._linear(normed, f"{place}.self_attn.{part}_proj", f"{block}.attn_{part}.weight")
                + self._weight(f"{place}.self_attn.{part}_proj.bias")
                for part in "qkv"
            )
            attended = self._attention(q, k, v)
            hidden = hidden + self._linear(
                attended, f"{place}.self_attn.o_proj", f"{block}.attn_output.weight"
            )
            normed = _normed(hidden, self._weight(f"{place}.post_attention_layernorm.weight"))
            gate = self._linear(normed, f"{place}.mlp.gate_proj", f"{block}.ffn_gate.weight")
            up = self._linear(normed, f"{place}.mlp.up_proj", f"{block}.ffn_up.weight")
            gated = gate / (1 + np.exp(-gate)) * up
            hidden = hidden + self._linear(gated, f"{place}.mlp.down_proj", f"{block}.ffn_down.weight")
        self._remember("output.weight", _normed(hidden, self._weight("model.norm.weight")))

    def _attention(self, q: Matrix, k: Matrix, v: Matrix) -> Matrix:
        spec, n_tokens = self.spec, len(q)
        width = spec.hidden_size // spec.n_heads
        q = _rotated(q.reshape(n_tokens, spec.n_heads, width))
        k = _rotated(k.reshape(n_tokens, spec.n_kv_heads, width))
        v = v.reshape(n_tokens, spec.n_kv_heads, width)
        shared = spec.n_heads // spec.n_kv_heads
        hidden_from = np.triu(np.full((n_tokens, n_tokens), -np.inf), 1)
        heads = []
        for head in range(spec.n_heads):
            scores = q[:, head] @ k[:, head // shared].T / np.sqrt(width) + hidden_from
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads.append(shares / shares.sum(axis=1, keepdims=True) @ v[:, head // shared])
        return np.concatenate(heads, axis=1)

    def _linear(self, values: Matrix, name: str, gguf_name: str) -> Matrix:
        self._remember(gguf_name, values)
        product: Matrix = values @ self._weight(f"{name}.weight").T
        return product

    def _remember(self, gguf_name: str, values: Matrix) -> None:
        self.sums[gguf_name] = self.sums[gguf_name] + np.square(values).sum(axis=0)

    def _weight(self, name: str) -> Matrix:
        return self.weights[name].astype(np.float64)


def _normed(values: Matrix, weight: Matrix) -> Matrix:
    scale = np.sqrt(np.square(values).mean(axis=1, keepdims=True) + EPSILON)
    normed: Matrix = values / scale * weight
    return normed


def _rotated(heads: Matrix) -> Matrix:
    """Rotary positions: value i and value i + half of each head turn together."""
    n_tokens, _, width = heads.shape
    half = width // 2
    angles = np.arange(n_tokens)[:, None] * THETA ** (-np.arange(half) / half)
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = heads[..., :half], heads[..., half:]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
