"""Text in, batches of tokens out: sources, tokenizing, the token cache, batching, and n-gram yardsticks."""
