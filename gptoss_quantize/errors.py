"""The one exception for refused input.

The command line turns it into exit code 1 and one message without a traceback. Everything else that is
raised is a bug of ours and keeps its traceback. Usage errors (exit code 2) are typer's.
"""


class InputError(ValueError):
    """Input that is refused: the message says what, where, what was expected, and the remedy."""
