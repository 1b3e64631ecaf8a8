"""Which dtype each product runs in."""
