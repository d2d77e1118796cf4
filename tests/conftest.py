# SPDX-License-Identifier: Apache-2.0
"""The tests run on the platform `cpu`, offline and single-threaded, also on a machine with GPUs."""

import os

from embedrl_verl.tiny.environment import CPU_ENV

for _name, _value in CPU_ENV.items():
    os.environ.setdefault(_name, _value)
