"""Statistics to codes, codes to a checkpoint."""
