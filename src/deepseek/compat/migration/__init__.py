"""Finding what an upgrade breaks in configs, Python sources and checkpoints, and writing a migrated copy."""
