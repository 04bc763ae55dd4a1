"""``python -m mfac_core``: the same as the ``mfac`` command."""

from mfac_core.cli import main

if __name__ == "__main__":
    main()
