"""`python -m hf_histo COMMAND`, which accelerate and torchrun start as a module."""

from hf_histo.cli import main

if __name__ == "__main__":
    main()
