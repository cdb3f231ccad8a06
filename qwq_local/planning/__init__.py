"""Arithmetic only, no probing: memory, context, rope scaling, budgets."""
