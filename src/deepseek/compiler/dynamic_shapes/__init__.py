"""`@dynamic_graph`: one compiled model for inputs whose lengths change.

decorator.py -> execution.py -> padding.py, buckets.py (which length) -> regions.py (which code) -> codegen.py
"""
