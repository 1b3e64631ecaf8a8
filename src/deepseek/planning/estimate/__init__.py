"""Seconds and bytes of one training step under a plan: compute, communication, memory, and the pipeline's schedule."""
