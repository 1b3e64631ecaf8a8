"""Models that `transformers` defines, under one way of calling them: BERT and its family, T5, and others."""
