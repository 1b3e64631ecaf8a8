"""The runtimes that can run a model, and AUTO, which measures them, keeps the decision and says why."""
