"""Operators that follow each other become one: `rewrite_rules.py` is the table, each rewrite verified in numbers."""
