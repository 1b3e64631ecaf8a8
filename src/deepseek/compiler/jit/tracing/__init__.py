"""What rewritten code calls while it is traced: operators that are Python or part of the graph."""
