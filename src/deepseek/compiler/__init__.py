"""From a model as it was written to the fastest correct way of running it: four rooms in one wing.

    jit/             `@ds.jit`: Python control flow becomes one graph, which is optimized and run
    passes/          what happens to a captured graph: fusion, memory, placement; knows no runtime
    dynamic_shapes/  `@dynamic_graph`: one compiled model for all lengths
    runtimes/        the backends, and AUTO, which measures them and remembers the answer

`jit` stands above the other three, which are strangers to each other; a contract in `pyproject.toml` holds them to it.
"""
