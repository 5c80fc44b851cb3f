"""`tokbench`, and `python -m tokbench`."""

from typing import NoReturn

from tokbench.interrupts import ending_at_once


def main() -> NoReturn:
    """Run the command line, ready for Ctrl-C before its imports, which take the time of a second thought."""
    with ending_at_once():
        from tokbench import cli

        cli.main()


if __name__ == "__main__":
    main()
