# SPDX-License-Identifier: Apache-2.0
"""`python -m embedrl_verl.cli`, as `embedrl`."""

import sys

from embedrl_verl.cli import main

sys.exit(main())
