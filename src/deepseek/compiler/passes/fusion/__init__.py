"""Operators that follow each other become one: `rules.py` is the table, and each rewrite is verified in numbers."""
