# SPDX-License-Identifier: Apache-2.0
"""What a person looks at: a static HTML page of records with their T-CoTs, and tables of lengths.

`show` makes views (`views`) of pair records; `page` turns views into HTML and reads nothing, so other commands can
show what they have in the same cards. Imports neither torch nor verl nor ray.
"""
