"""The search over plans: the space, its estimates, the best plan, and what to change when nothing fits."""
