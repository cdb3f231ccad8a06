"""The bytes of the compute buffers on a computer that is described in a file.

ggml's graph allocator lays out what llama.cpp keeps of a batch while it computes: each result takes the
smallest free block that holds it, and frees the block after its last reader. This module does the same with
the operations of a Qwen layer, in the order in which llama.cpp builds them (src/models/qwen2.cpp,
ggml/src/ggml-alloc.c). On this computer, engine/dry_run.py asks the library instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qwq_convert.architecture import ModelShape

from qwq_local.planning.memory import ComputeBytes, Machine, Placement
from qwq_local.planning.shape import ContextShape, ModelSizes, is_quantized

_F32 = 4
_F16 = 2
_INDEX = 8
# Every layer frees the same blocks: after a few layers the layout repeats.
_LAYERS_THAT_DIFFER = 4
_ENDLESS = 1 << 62
_LOGITS_MARGIN = 7
_CPU_ALIGNMENT, _GPU_ALIGNMENT = 32, 256
# llama.cpp keeps this many copies of a batch's inputs when several GPUs work one after the other.
_PIPELINE_COPIES = 4


@dataclass(slots=True)
class _Stretch:
    """A free stretch of the buffer."""

    start: int
    size: int


@dataclass(slots=True)
class _Arena:
    """ggml's allocator: it takes the smallest free block that fits, else the endless one at the end."""

    alignment: int
    on_gpu: bool
    peak: int = 0
    _free: list[_Stretch] = field(default_factory=lambda: [_Stretch(0, _ENDLESS)])

    def take(self, n_bytes: int) -> _Stretch:
        size = -(-n_bytes // self.alignment) * self.alignment
        fitting = [block for block in self._free[:-1] if block.size >= size]
        # Of blocks of the same size ggml takes the last one.
        block = min(reversed(fitting), key=lambda b: b.size) if fitting else self._free[-1]
        taken = _Stretch(block.start, size)
        block.start += size
        block.size -= size
        if not block.size:
            self._free.remove(block)
        self.peak = max(self.peak, taken.start + size)
        return taken

    def free(self, *blocks: _Stretch) -> None:
        """The blocks are free again, joined with free neighbours."""
        first, *others = sorted([*self._free, *blocks], key=lambda block: block.start)
        self._free = [first]
        for block in others:
            last = self._free[-1]
            if last.start + last.size == block.start:
                last.size += block.size
            else:
                self._free.append(block)

    def move(self, block: _Stretch, n_bytes: int, times: int = 1) -> _Stretch:
        """The result of operations that do not work in place, each of which frees what it read."""
        for _ in range(times):
            read, block = block, self.take(n_bytes)
            self.free(read)
        return block


def described_compute(model: ModelSizes, machine: Machine) -> ComputeBytes:
    """The compute buffers of a described machine: exact for a CPU, unverified for GPUs."""
    shape = model.shape

    def compute(placement: Placement) -> tuple[int, ...]:
        context = placement.context
        row = shape.hidden * context.n_tokens * _F32
        inputs = sum(_inputs(shape, context).values())
        copies = (inputs + row) * (_PIPELINE_COPIES - 1) if len(machine.gpus) > 1 else 0
        one_gpu = compute_bytes(shape, context, on_gpu=True) + copies
        is_all_there = placement.n_gpu_layers == model.n_offloadable
        host = inputs + 2 * row if is_all_there else compute_bytes(shape, context)
        return (*(one_gpu if count else 0 for count in placement.split), host)

    return compute


def compute_bytes(model: ModelShape, context: ContextShape, *, on_gpu: bool = False) -> int:
    """The compute buffer of one device that runs all layers, in bytes; on the CPU exact or a little over.

    Differences to the library are measured by bench/memory.py; a GPU's figures are unverified.
    """
    arena = _Arena(_GPU_ALIGNMENT if on_gpu else _CPU_ALIGNMENT, on_gpu)
    inputs = _inputs(model, context)
    tokens = arena.take(inputs.pop("tokens"))
    row = model.hidden * context.n_tokens * _F32
    arena.take(row)  # for embeddings given instead of tokens; never used, never freed
    *read_by_attention, output_ids = [arena.take(size) for size in inputs.values() if size]
    residual = arena.take(row)
    arena.free(tokens)
    layers = min(model.n_layers, _LAYERS_THAT_DIFFER)
    for layer in range(layers):
        is_last = layer == layers - 1
        attended = _attention(arena, model, context)
        if is_last:
            arena.free(*read_by_attention)
            # The last token's row is the only one that the output needs.
            row = model.hidden * _F32
            attended, residual = arena.move(attended, row), arena.move(residual, row)
            arena.free(output_ids)
        arena.free(residual)
        residual = _feed_forward(arena, model, attended, row, 1 if is_last else context.n_tokens)
    before = arena.peak
    arena.take(model.n_vocab * _F32)
    # Its place depends on smaller blocks, which this does not follow.
    return before if arena.peak == before else arena.peak + arena.peak * _LOGITS_MARGIN // 100


def _inputs(model: ModelShape, context: ContextShape) -> dict[str, int]:
    """The bytes of each input of a batch, in llama.cpp's order."""
    n = context.n_tokens
    # Without flash attention V is stored transposed, and each of its values has an index of its own.
    v_indices = n if context.flash_attention else n * model.kv_width
    mask_value = 2 if context.flash_attention else _F32
    # Keys are rotated by the largest Hadamard matrix whose size divides the head, a power of two.
    k_rotation = model.head_dim & -model.head_dim if _is_rotated(model, context.kv_type_k) else 0
    v_rotation = 64 if _is_rotated(model, context.kv_type_v) else 0
    return {
        "tokens": n * _F32,
        "positions": n * _F32,
        "k_rotation": k_rotation**2 * _F32,
        "v_rotation": v_rotation**2 * _F32,
        "k_indices": n * _INDEX,
        "v_indices": v_indices * _INDEX,
        "mask": context.padded_n_ctx * n * mask_value,
        "output_ids": _F32,
    }


def _is_rotated(model: ModelShape, kv_type: str) -> bool:
    """Whether llama.cpp rotates what it stores in this type (src/llama-kv-cache.cpp)."""
    return is_quantized(kv_type) and model.head_dim % 64 == 0


def _attention(arena: _Arena, model: ModelShape, context: ContextShape) -> _Stretch:
    """The output of one layer's attention; norm and bias work in place."""
    n = context.n_tokens
    wide, narrow = model.q_width * n * _F32, model.kv_width * n * _F32
    rotates_k, rotates_v = _is_rotated(model, context.kv_type_k), _is_rotated(model, context.kv_type_v)
    normed = arena.take(model.hidden * n * _F32)
    query = arena.move(arena.take(wide), wide, 1 + rotates_k)  # RoPE, and the rotation
    value = arena.move(arena.take(narrow), narrow, int(rotates_v))
    key = arena.take(narrow)
    arena.free(normed)
    key = arena.move(key, narrow, 1 + rotates_k)
    arena.free(key, value)
    attend = _flash if context.flash_attention else _unfused
    return arena.move(attend(arena, model, context, query), model.hidden * n * _F32)


def _flash(arena: _Arena, model: ModelShape, context: ContextShape, query: _Stretch) -> _Stretch:
    wide = model.q_width * context.n_tokens * _F32
    as_f16 = context.padded_n_ctx * model.kv_width * _F16
    kv_types = (context.kv_type_k, context.kv_type_v)
    casts = [arena.take(as_f16) for kv_type in kv_types if kv_type == "f32"]
    # CUDA puts f16 copies of quantized keys and values behind the result (ggml-cuda/fattn.cu).
    copies = as_f16 * sum(map(is_quantized, kv_types)) if arena.on_gpu else 0
    mixed = arena.take(wide + copies)
    arena.free(query, *casts)
    return arena.move(mixed, wide, int(_is_rotated(model, context.kv_type_v)))


def _unfused(arena: _Arena, model: ModelShape, context: ContextShape, query: _Stretch) -> _Stretch:
    wide = model.q_width * context.n_tokens * _F32
    scores = arena.move(query, context.padded_n_ctx * context.n_tokens * model.n_heads * _F32)
    return arena.move(scores, wide, 2)


def _feed_forward(arena: _Arena, model: ModelShape, entered: _Stretch, row: int, n_tokens: int) -> _Stretch:
    """The layer's output; its input is added in place and freed."""
    inner = model.intermediate * n_tokens * _F32
    normed = arena.take(row)
    gate, up = arena.take(inner), arena.take(inner)
    arena.free(normed)
    activated = arena.take(inner)
    arena.free(gate, up)
    out = arena.move(activated, row)
    arena.free(entered)
    return out
