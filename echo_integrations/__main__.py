"""``python -m echo_integrations``: the command line of `echo_integrations.cli`."""

import sys

from echo_integrations.cli import main

if __name__ == "__main__":
    sys.exit(main())
