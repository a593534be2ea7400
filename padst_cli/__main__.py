"""`python -m padst_cli`, for launchers that start modules (`accelerate launch -m padst_cli ...`)."""

from padst_cli.app import main

if __name__ == "__main__":
    main()
