"""`python -m gptoss_quantize`, and `torchrun -m gptoss_quantize` for several processes."""

from gptoss_quantize.cli import main

if __name__ == "__main__":
    main()
