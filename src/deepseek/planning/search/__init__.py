"""The search over plans: the space, its prices, the best plan, and what to change when nothing fits."""
