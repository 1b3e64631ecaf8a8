"""The decoder-only transformer: GPT-2, Llama and mixture-of-experts shapes from one readable model."""
