"""The fenced blocks of a page, and how a test runs them: what `tests/test_docs.py` is made of.

Blocks of one page run from its top to its end in one empty folder; Python blocks share their names.

    ```python, ```bash     run; a first line "# not run by the tests: REASON" has it checked only
    ```yaml title="NAME"   written to that file of the folder
    anything else          left alone
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import typer.main

from tca_fast import train
from tca_fast.cli import app
from tca_fast.config import load_config
from tca_fast.errors import UserError
from tca_fast.training.deepspeed_settings import fill_settings, read_settings

NOT_RUN = re.compile(r"# not run by the tests: (\S.*)")
_FENCE = re.compile(r"^```(\w*)[ ]*([^\n]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="([^"]+)"')
_LIMIT_S = 300


@dataclass
class Block:
    language: str
    title: str | None
    code: str
    line: int

    @property
    def not_run(self) -> bool:
        return NOT_RUN.match(self.code) is not None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        title = _TITLE.search(match[2])
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(match[1], title and title[1], match[3], line))
    assert text.count("\n```") + text.startswith("```") == 2 * len(found), f"{page}: open fence"
    return found


def run_page(page: Path, folder: Path) -> None:
    """Run or check every block; a failure names the page and the line."""
    names: dict = {"__name__": "__main__"}
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            # As many empty lines in front as the page has, so that a traceback points into it.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            if not block.not_run:
                exec(code, names)
        elif block.language == "bash":
            check_commands(block.code, where)
            if not block.not_run:
                run_commands(block.code, folder, where)
        elif block.title:
            (folder / block.title).write_text(block.code, encoding="utf-8")


def run_commands(code: str, folder: Path, where: str) -> None:
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder,
        env={**os.environ, "PATH": programs},
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
    )
    assert result.returncode == 0, f"{where}: {result.stdout[-2000:]}{result.stderr[-2000:]}"


def check_commands(code: str, where: str) -> None:
    """Bash can read it, and our own commands exist with the options that are given."""
    checked = subprocess.run(["bash", "-n", "-c", code], capture_output=True, text=True)
    assert checked.returncode == 0, f"{where}: {checked.stderr}"
    group = typer.main.get_command(app)
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["deepspeed"]:
            check_launch(words, where)
        if words[:1] != ["tca-fast"]:
            continue
        command, rest = group, words[1:]
        while hasattr(command, "commands"):
            assert rest and rest[0] in command.commands, f"{where}: no such command: {line}"
            command, rest = command.commands[rest[0]], rest[1:]
        try:
            command.make_context("tca-fast", rest)
        except Exception as error:  # typer's own copy of click has no public name for these
            raise AssertionError(f"{where}: {line}: {error}") from error


def check_launch(words: list[str], where: str) -> None:
    """The configuration and the DeepSpeed file of a launcher's line load, and fit its ranks."""
    launcher, module = words[: words.index("--module")], words.index("tca_fast.train")
    given = [
        int(n) for name, n in pairwise(launcher) if name in ("--num_gpus", "--num_accelerators")
    ]
    options = train._parse(words[module + 1 :])
    path = Path(options.deepspeed)
    try:
        config = load_config(options.config, options.overrides)
        fill_settings(read_settings(path), config, *given or [1], torch.device("cuda"), path)
    except UserError as error:
        raise AssertionError(f"{where}: {' '.join(words)}: {error}") from error
