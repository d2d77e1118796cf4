# SPDX-License-Identifier: Apache-2.0
"""`python -m embedrl_verl.plan`, as `embedrl plan`."""

import sys

from embedrl_verl.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
