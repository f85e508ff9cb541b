"""Upload a finished adapter folder to the Hub.

    python recipes/push.py --adapter runs/NAME/adapter --hub_model_id OWNER/NAME
    python recipes/push.py --adapter runs/NAME/adapter --hub_model_id OWNER/NAME --hub_private --hub_revision v2

Log in first (`hf auth login`, or HF_TOKEN). What the Hub has already is not sent again: an upload that was cut off goes
on by the same command. No path of this machine is uploaded: a backbone from a local folder goes by the folder's name,
or by `--hub_base_model`. Look into the folder before you make it public: predictions/ names your images, and figures/
shows some of them.
"""

from hf_histo.config import parse_command
from hf_histo.config.commands import PushOptions
from hf_histo.launch import run


def main() -> None:
    options = parse_command(PushOptions, __doc__)
    from hf_histo import hub

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
