"""Text to tokens, tokens to statistics."""
