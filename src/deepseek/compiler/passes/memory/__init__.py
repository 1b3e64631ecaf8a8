"""Peak memory of a graph: predicted, lowered by order and reuse, and bounded by recomputing activations."""
