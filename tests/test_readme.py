# SPDX-License-Identifier: Apache-2.0
"""The README and the pages of docs/ keep their word: blocks run, commands parse, links lead somewhere, names exist.

Every check takes text and returns the list of what is wrong with it, so that it can be tried on a page that is wrong.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import sys
import traceback
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.fr.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("bash", "sh", "console")
# Commands that are so quick and harmless that they are run as they stand.
RUN_ALSO = ("models", "info")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    line: int  # of its first line of code, from 1
    code: str


def blocks(text: str, *languages: str) -> list[Block]:
    """The fenced blocks in one of the languages, in order."""
    found = []
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", text, re.MULTILINE | re.DOTALL):
        found.append(Block(match[1], text.count("\n", 0, match.start(2)) + 1, match[2]))
    return [block for block in found if block.language in languages]


# --- Python blocks run ---------------------------------------------------------------------------------------------


def python_faults(text: str) -> list[str]:
    """Run the Python blocks of a page in order, in one namespace and the current folder, up to the first that fails."""
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(text, "python"):
        # Blank lines before the code make line numbers those of the page.
        source = "\n" * (block.line - 1) + block.code
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(source, "page", "exec"), namespace)
        except Exception:
            return [f"block at line {block.line}: {traceback.format_exc(limit=-2)}"]
    return []


# --- Commands are valid --------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """A line that a page tells the reader to type, and what it says comes back."""

    line: int
    words: list[str]
    output: str


def commands(text: str) -> list[Command]:
    """The commands in shell blocks. In a console block they follow a `$`, and the other lines are output."""
    found = []
    for block in blocks(text, *SHELL):
        lines = iter(enumerate(block.code.splitlines(), start=block.line))
        for number, line in lines:
            if block.language == "console" and not line.startswith("$ "):
                if found:
                    found[-1] = found[-1]._replace(output=found[-1].output + line + "\n")
                continue
            typed = line.removeprefix("$ ")
            while typed.endswith("\\"):
                typed = typed[:-1] + next(lines, (0, ""))[1].strip()
            found += [Command(number, words, "") for words in split_commands(typed)]
    return found


def split_commands(typed: str) -> list[list[str]]:
    """The words of each command of a line, without comments and settings of the environment."""
    lexer = shlex.shlex(typed, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&|"):
            found.append([])
        elif found[-1] or not re.fullmatch(r"\w+=.*", word):
            found[-1].append(word)
    return [words for words in found if words]


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def nearsight(*words: str) -> tuple[int, str]:
    """The exit code of the command line tool, and what it prints."""
    from nearsight.cli import main

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = main(words)
    except SystemExit as stop:
        code = stop.code
    return (code if isinstance(code, int) else int(code is not None)), printed.getvalue()


@lru_cache(maxsize=32)
def nearsight_help(subcommand: str | None) -> str | None:
    """The help text of a subcommand, or None if there is no such subcommand."""
    words = ("--help",) if subcommand is None else (subcommand, "--help")
    code, printed = nearsight(*words)
    return printed if code == 0 else None


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text))


def nearsight_faults(words: list[str], output: str) -> list[str]:
    subcommand = words[1] if len(words) > 1 and not words[1].startswith("-") else None
    if subcommand is None:
        return []
    known = nearsight_help(subcommand)
    if known is None:
        return [f"nearsight has no subcommand {subcommand}"]
    given = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
    faults = [f"nearsight {subcommand} has no option {flag}" for flag in sorted(given - flags(known) - {"--help"})]
    differing = sorted((flags(output) ^ flags(known)) - {"--help"})
    if "--help" in given and output.strip() and differing:
        faults.append(f"the help of nearsight {subcommand} that is shown is not current: {', '.join(differing)}")
    if subcommand in RUN_ALSO and not faults:
        code, printed = nearsight(*words[1:])
        if code != 0:
            faults.append(f"{shlex.join(words)} ended with {code}: {printed}")
    return faults


def command_faults(text: str) -> list[str]:
    """What is wrong with the commands of a page: unknown subcommands, options, make targets, missing scripts."""
    faults = []
    for line, words, output in commands(text):
        program = os.path.basename(words[0])
        if program == "nearsight":
            found = nearsight_faults(words, output)
        elif program == "make":
            targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            found = [f"the Makefile has no target {name}" for name in targets if name not in make_targets()]
        elif program in ("python", "python3"):
            scripts = [word for word in words[1:2] if word.endswith(".py")]
            found = [f"there is no {script}" for script in scripts if not (ROOT / script).is_file()]
        else:
            found = []
        faults += [f"line {line}: {fault}" for fault in found]
    return faults


# --- Links lead somewhere ------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """The page without its fenced blocks: what is inside them is code, not links or headings."""
    return re.sub(r"^```.*?^```\s*$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings get where it is shown."""
    headings = re.findall(r"^#+ +(.*?) *#*$", prose(text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def link_faults(text: str, folder: Path) -> list[str]:
    """Relative links and images of a page in `folder` that lead nowhere, and anchors that no heading has."""
    without_code = re.sub(r"`[^`\n]*`", "", prose(text))
    targets = re.findall(r"\]\(<?([^)\s>]+)", without_code)
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", without_code, re.MULTILINE)
    targets += re.findall(r"(?:src|href|srcset)=\"([^\"]+)\"", without_code)
    faults = []
    for target in targets:
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path, _, anchor = target.partition("#")
        page = folder / path if path else None
        if page is not None and not page.exists():
            faults.append(f"{target}: no such file")
        elif anchor:
            linked = text if page is None else page.read_text(encoding="utf-8")
            if anchor not in anchors(linked):
                faults.append(f"{target}: no such heading")
    return faults


# --- Names exist ---------------------------------------------------------------------------------------------------


def exists(dotted: str) -> bool:
    """Whether `nearsight.a.b` can be reached by imports and attributes."""
    first, *rest = dotted.split(".")
    reached = importlib.import_module(first)
    path = first
    for name in rest:
        path += f".{name}"
        if not hasattr(reached, name):
            try:
                importlib.import_module(path)
            except ModuleNotFoundError:
                return False
        reached = getattr(reached, name)
    return True


def name_faults(text: str) -> list[str]:
    """Names written `ns.something` or `nearsight.something` that are not there. Inline code and Python blocks count."""
    code = re.findall(r"`([^`\n]+)`", prose(text)) + [block.code for block in blocks(text, "python")]
    names = set()
    for piece in code:
        names.update(re.findall(r"(?<![\w./-])(?:ns|nearsight)((?:\.[A-Za-z_]\w*)+)", piece))
    return [f"nearsight{name} does not exist" for name in sorted(names) if not exists(f"nearsight{name}")]


# --- One version ---------------------------------------------------------------------------------------------------


def versions(folder: Path) -> dict[str, str | None]:
    """The version that each file states."""
    patterns = {
        "pyproject.toml": r"^version = \"([^\"]+)\"",
        "CITATION.cff": r"^version: \"?([^\"\s]+)",
        "CHANGELOG.md": r"^## \[(\d[^\]]*)\]",  # the newest; "Unreleased" has no number
    }
    found = {}
    for name, pattern in patterns.items():
        match = re.search(pattern, (folder / name).read_text(encoding="utf-8"), re.MULTILINE)
        found[name] = match[1] if match else None
    return found


def version_faults(folder: Path) -> list[str]:
    stated = versions(folder)
    faults = [f"{name} states no version" for name, version in stated.items() if version is None]
    if len(set(stated.values())) > 1:
        faults.append(f"the versions differ: {stated}")
    return faults


# --- The project's own pages ---------------------------------------------------------------------------------------


@pytest.fixture(params=PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def page(request) -> Path:
    return request.param


def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert python_faults(page.read_text(encoding="utf-8")) == []


def test_commands_are_valid(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # so that no option is broken over two lines
    assert command_faults(page.read_text(encoding="utf-8")) == []


def test_links_lead_somewhere(page):
    assert link_faults(page.read_text(encoding="utf-8"), page.parent) == []


def test_names_exist(page):
    assert name_faults(page.read_text(encoding="utf-8")) == []


def test_versions_agree():
    assert version_faults(ROOT) == []


def test_changelog_links_lead_somewhere():
    assert link_faults((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), ROOT) == []


# --- The checks can fail -------------------------------------------------------------------------------------------

GOOD = """\
# A page: with code

See [below](#more-of-it), [the plan](docs/design.md) and [elsewhere](https://example.org/x#y).
`ns.Window` and `nearsight.attention.blocked` exist, and so do `nearsight info` and `runs/nearsight.log`.

## More of it

```python
import nearsight as ns
window = ns.Window(7)
print(window)
```

```python
assert window.output_size((9, 9)) == (9, 9)
```

```console
$ THREADS=1 make test  # everything; not only `quick`
= 3 passed
$ python bench/unfold.py \\
    --threads 2
```

```text
nearsight is not a command here, nor is [this](a-link.md)
```
"""


def test_a_good_page_has_no_faults():
    assert python_faults(GOOD) == command_faults(GOOD) == link_faults(GOOD, ROOT) == name_faults(GOOD) == []


def test_blocks_know_their_lines():
    lines = GOOD.splitlines()
    assert [lines[block.line - 1] for block in blocks(GOOD, "python")] == ["import nearsight as ns", lines[14]]


def test_commands_are_told_from_their_output():
    assert [(words, output) for _, words, output in commands(GOOD)] == [
        (["make", "test"], "= 3 passed\n"),
        (["python", "bench/unfold.py", "--threads", "2"], ""),
    ]


@pytest.mark.parametrize(
    ("check", "right", "wrong", "message"),
    [
        (python_faults, "(9, 9)) ==", "(9, 9)) !=", "line 15"),
        (python_faults, "print(window)", "print(windows)", "NameError"),
        (python_faults, "ns.Window(7)", "ns.Window(", "SyntaxError"),
        (command_faults, "make test", "make tests", "no target tests"),
        (command_faults, "THREADS=1 make test", "THREADS=1 make tests", "no target tests"),
        (command_faults, "make test", "make check && make tests", "no target tests"),
        (command_faults, "bench/unfold.py", "bench/fold.py", "no bench/fold.py"),
        (name_faults, "`ns.Window`", "`ns.Windows`", "nearsight.Windows does not exist"),
        (name_faults, "attention.blocked", "attention.unblocked", "nearsight.attention.unblocked does not exist"),
        (name_faults, "ns.Window(7)", "ns.Door(7)", "nearsight.Door does not exist"),
    ],
)
def test_a_wrong_page_is_found_out(check, right, wrong, message):
    assert right in GOOD
    assert message in "\n".join(check(GOOD.replace(right, wrong)))


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("(docs/design.md)", "(docs/designs.md)", "docs/designs.md: no such file"),
        ("(docs/design.md)", "(docs/design.md#no-such-room)", "no such heading"),
        ("(#more-of-it)", "(#less-of-it)", "#less-of-it: no such heading"),
        ("[the plan](docs/design.md)", '<img src="docs/no.svg">', "docs/no.svg: no such file"),
    ],
)
def test_a_dead_link_is_found_out(right, wrong, message):
    assert right in GOOD
    assert message in "\n".join(link_faults(GOOD.replace(right, wrong), ROOT))


@pytest.mark.parametrize(
    ("command", "output", "message"),
    [
        ("nearsight learn --model x", "", "no subcommand learn"),
        ("nearsight train --model x --speed 3", "", "no option --speed"),
        ("nearsight train --help", "  --model NAME\n  --speed N\n", "not current: --data, --speed"),
    ],
)
def test_a_wrong_nearsight_command_is_found_out(command, output, message, monkeypatch):
    helps = {"train": "usage: nearsight train [--help] --model NAME --data NAME\n"}
    monkeypatch.setattr(sys.modules[__name__], "nearsight_help", helps.get)
    right = f"```console\n$ nearsight train --model=x \\\n    --data y\n$ nearsight train --help\n{helps['train']}```\n"
    assert command_faults(right) == []
    assert message in "\n".join(command_faults(f"```console\n$ {command}\n{output}```\n"))


def test_the_real_command_line_is_asked(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    right = "```bash\nnearsight train --model sasa_nano --data digits --seed 3 --output runs/a\nnearsight info\n```\n"
    assert command_faults(right) == []
    assert command_faults(right.replace("--seed", "--sead")) == ["line 2: nearsight train has no option --sead"]
    assert command_faults(right.replace("train", "trian")) == ["line 2: nearsight has no subcommand trian"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("CHANGELOG.md", "# Changelog\n\n## [Unreleased]\n\n## [0.3.0] - 2026-01-01\n", "the versions differ"),
        ("CITATION.cff", "title: nearsight\n", "CITATION.cff states no version"),
    ],
)
def test_versions_that_differ_are_found_out(name, text, message, tmp_path):
    good = {
        "pyproject.toml": '[project]\nversion = "0.2.0"\n',
        "CITATION.cff": "cff-version: 1.2.0\nversion: 0.2.0\n",
        "CHANGELOG.md": "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-01-01\n\n## [0.1.0] - 2025-01-01\n",
    }
    for file, content in good.items():
        (tmp_path / file).write_text(content, encoding="utf-8")
    assert version_faults(tmp_path) == []
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert message in "\n".join(version_faults(tmp_path))
