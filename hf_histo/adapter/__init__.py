"""The adapter folder: what a run leaves behind, and all that a prediction needs beside the backbone."""
