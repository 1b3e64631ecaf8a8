"""Training: the loop that yields events, and `prepare` for those who keep their own loop."""
