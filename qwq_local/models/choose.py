"""What a repository offers and what the machine holds in, the offer to take and the reason out.

The best quantization is the largest that leaves room for a working context; a model kept in 16 bits and more
is nobody's best, so those are never chosen unasked. Arithmetic only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwq_local.errors import DoesNotFit
from qwq_local.models.catalog import UNQUANTIZED, Offer
from qwq_local.models.fit import LEAST_CONTEXT, Fit
from qwq_local.text import binary_size, decimal_size


@dataclass(frozen=True, slots=True)
class Choice:
    """An offer and why it was chosen, in one line."""

    offer: Offer
    reason: str


def best_offer(repo: str, available: Sequence[Offer], fit: Fit) -> Choice:
    """The largest quantization with room for 16k tokens. Raises DoesNotFit with what the smallest gives."""
    usable = [offer for offer in available if offer.file_type and offer.file_type not in UNQUANTIZED]
    where = f"{binary_size(fit.memory.free_bytes)} free in {fit.memory.place}"
    for offer in usable:
        context = fit.context(offer.n_bytes)
        if context >= LEAST_CONTEXT:
            return Choice(
                offer,
                f"{offer.file_type} ({decimal_size(offer.n_bytes)}) is the largest of {len(usable)} types "
                f"that leaves room for {LEAST_CONTEXT:,} tokens: {context:,} with a {fit.kv_type} KV cache, "
                f"{where}",
            )
    if not usable:
        raise DoesNotFit(f"{repo} has no quantized GGUF. Name another with --repo, or a file with --file.")
    smallest = usable[-1]
    raise DoesNotFit(
        f"no type in {repo} leaves room for {LEAST_CONTEXT:,} tokens here: {where}, and the smallest, "
        f"{smallest.file_type}, is {decimal_size(smallest.n_bytes)} and gives "
        f"{fit.context(smallest.n_bytes):,}. Take it all the same with `qwq pull {smallest.file_type}`, "
        "or make a smaller one: `qwq pull --convert Q3_K_M`."
    )
