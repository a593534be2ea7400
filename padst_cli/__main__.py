"""The `padst` command, and `python -m padst_cli` for launchers that start modules (`accelerate launch -m ...`)."""

import sys


def main() -> None:
    """Import the application and run it; a Ctrl-C meanwhile ends the program as quietly as one later on."""
    try:
        from padst_cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
