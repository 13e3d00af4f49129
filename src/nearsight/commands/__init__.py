# SPDX-License-Identifier: Apache-2.0
"""The commands, one a file: each reads its arguments and calls a public function. cli.py lists them."""
