# SPDX-License-Identifier: Apache-2.0
"""What a person looks at: a static HTML page of records with their T-CoTs, and tables of lengths.

`rows` and `examine` read pair records and make views (`views`); `card` and `page` turn views into HTML and read
nothing, so other commands can show what they have in the same cards. Imports neither torch nor verl nor ray.
"""
