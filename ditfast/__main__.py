"""``python -m ditfast``: the command line, also from a checkout that is not installed."""

from .cli.command import main

if __name__ == "__main__":
    main()
