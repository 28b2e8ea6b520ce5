"""The demo: a real language model re-expressed as gpt-oss, models of true shape with random weights, and the tour."""
