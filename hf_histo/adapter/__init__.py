"""The adapter folder: the result of a run, and everything that a prediction needs besides the backbone."""
