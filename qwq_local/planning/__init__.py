"""Arithmetic only, no probing: context, rope scaling, budgets."""
