# SPDX-License-Identifier: Apache-2.0
"""What draws and writes pages. Knows nothing of networks.

names.py      names that others gave, as they can be shown
csv_json.py   numbers as CSV and JSON
drawings.py   the style of all drawings, and pictures made of cells
charts.py     lines and points, with their numbers beside them
html.py       pages of HTML in which nothing runs but what the package wrote
templates/    the pages
"""
