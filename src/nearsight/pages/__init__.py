# SPDX-License-Identifier: Apache-2.0
"""What draws and writes pages. Knows nothing of networks.

brief.py      how results show themselves at a prompt, and as tables
names.py      names that others gave, as they can be shown
csv_json.py   numbers as CSV and JSON
palette.py    what each colour means
style.py      how all drawings look, and the files that they become
figure.py     figures that a notebook shows
drawings.py   pictures made of cells
charts.py     lines and points, with their numbers beside them
html.py       pages of HTML in which nothing runs but what the package wrote
templates/    the pages
"""
