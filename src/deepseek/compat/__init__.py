"""Generations: what each version was, and how to get from one to another. Pure; torch is imported where weights are."""
