"""Is it still the model? Perplexity, KL divergence, agreement."""
