"""Entry point of ``ddim`` and ``python -m ddim_cli``: a signal is answered from the start, also while all is loaded."""

import sys

from ddim_cli.cli.signals import asks_for_json, ended_at_once


def main() -> None:
    with ended_at_once(asks_for_json(sys.argv[1:])):
        from ddim_cli.cli.app import main as run
    run()


if __name__ == "__main__":
    main()
