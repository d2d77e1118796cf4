# SPDX-License-Identifier: Apache-2.0
"""Your own data as pair records: jsonl, parquet, a folder of `datasets`, or a hub id; docs/data.md has the column map.

python data_preprocess/generic.py --input photos.jsonl --out data/photos --column query.images=photo \\
    --column target.text=caption --value 'instruction=Find the caption of this photo.'
"""

import sys

from embedrl_verl.convert.command import convert_main
from embedrl_verl.convert.generic import add_generic_options, make_generic

if __name__ == "__main__":
    sys.exit(convert_main(make_generic, __doc__.splitlines()[0], add_generic_options))
