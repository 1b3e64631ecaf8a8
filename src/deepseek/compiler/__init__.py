"""From a model as it was written to the fastest correct way of running it: capture, rewriting, backends, selection."""
