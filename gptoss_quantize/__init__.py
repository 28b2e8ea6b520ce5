"""Quantize gpt-oss experts to int4 with AWQ and GPTQ, and prove what it cost."""

__version__ = "0.1.0"
