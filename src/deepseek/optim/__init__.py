"""Optimizers, learning-rate rules and clipping."""
