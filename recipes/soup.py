"""Average adapters of one backbone to a single adapter: a greedy soup, chosen on val.

    python recipes/soup.py --adapters runs/a/adapter runs/b/adapter runs/c/adapter --data DIR --output_dir runs/soup

From the best on val on, each adapter stays in the mean if the mean with it is at least as good there. The mean is
exact for LoRA, its updates side by side: a folder as of a run, as fast as each of its parts once merged.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import SoupOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(SoupOptions, __doc__)
    from hf_histo.experiments.soup import make_soup

    print(make_soup(options))


if __name__ == "__main__":
    run(main)
