"""`python -m fmdeploy` is the command `fmdeploy`."""

from fmdeploy.cli import main

if __name__ == "__main__":
    main()
