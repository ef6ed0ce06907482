"""`python -m factorctl`, which is also what `accelerate launch -m factorctl` starts."""

from factorctl.cli.app import main

if __name__ == "__main__":
    main()
