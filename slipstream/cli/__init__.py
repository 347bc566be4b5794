"""The command line: parse, call, show. The only package that prints or chooses an exit code.

stdout carries the answer (`--json`: one document), stderr everything else. Exit codes: 0 success, 1 an
expected failure, 2 usage or configuration, 130 interrupted. Heavy packages are imported by the commands that
need them, so that help and `check` start at once.

front.py      the application, options that commands share, how they answer and fail
commands.py   commands on pipelines, artifacts and models
checks.py     commands that say what a run would take, and whether it can be trusted
tuning.py     the command that searches for better settings
"""

from slipstream.cli import commands, checks, tuning  # isort: skip  # help lists commands in this order
from slipstream.cli.front import app, main

__all__ = ["app", "checks", "commands", "main", "tuning"]
