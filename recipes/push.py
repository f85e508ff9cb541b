"""Upload a finished adapter folder to the Hub.

    python recipes/push.py --adapter runs/NAME/adapter --hub_model_id OWNER/NAME
    python recipes/push.py --adapter runs/NAME/adapter --hub_model_id OWNER/NAME --hub_private --hub_revision v2

Log in first (`hf auth login`, or HF_TOKEN). What the Hub has already is not sent again: an upload that was cut off goes
on by the same command. No path of this machine is uploaded: a backbone from a local folder goes by the folder's name,
or by `--hub_base_model`. Look into the folder before you make it public: predictions/ names your images, and figures/
shows some of them.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from hf_histo import hub
from hf_histo.launch import run


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="adapter folder of a finished run")
    parser.add_argument("--hub_model_id", required=True, help="repository on the Hub: owner/name")
    parser.add_argument("--hub_base_model", help="name on the Hub (owner/name) of a backbone that was a local folder")
    parser.add_argument("--hub_private", action="store_true", help="create the repository as private")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--hub_revision", help="branch of it to write to, made where it is missing (default: main)")
    way.add_argument("--hub_create_pr", action="store_true", help="open a pull request there instead of writing")
    options = parser.parse_args()

    hub.check_access(options.hub_model_id, pull_request=options.hub_create_pr)
    address = hub.push(
        options.adapter,
        options.hub_model_id,
        private=options.hub_private,
        revision=options.hub_revision,
        pull_request=options.hub_create_pr,
        base_model=options.hub_base_model,
    )
    print(f"uploaded: {address}")


if __name__ == "__main__":
    run(main)
