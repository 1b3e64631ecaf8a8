"""Python control flow on tensor values, rewritten into operators that decide at run time what they are.

A function's source becomes a syntax tree (`parsing`), its early returns and breaks become structure (`lowering`), and
its `if`, `while` and `for` become calls of operators with one small function per branch (`transforming`, which asks
`liveness` which variables go in and out). The operators (`operators`) stay plain Python where the condition is a
Python value, and become `torch.cond` and `while_loop` where it is a tensor that is being traced; `merging` makes the
branches agree.
"""
