"""Other people's runtimes: checkpoints to their formats, their checkpoints to ours, and proof that all agree."""
