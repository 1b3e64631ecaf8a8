"""Vision transformers for image classification."""
