"""A Containerfile without a container engine: its instructions are carried out below a folder that stands for ``/``.

RUN lines run in a fresh virtual environment, which sees what is installed where the tests run, so that pip has nothing
to fetch. The base image, VOLUME and USER are left out: nobody needs another user's rights here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Instruction:
    name: str
    """Like RUN."""
    text: str
    """The rest, in one line."""

    @property
    def words(self) -> list[str]:
        """The words of a list in JSON, or of plain text."""
        return list(json.loads(self.text)) if self.text.startswith("[") else shlex.split(self.text)


def read_instructions(path: Path) -> list[Instruction]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [Instruction(name=name, text=text) for name, _, text in (line.partition(" ") for line in joined)]


@dataclass(kw_only=True)
class Image:
    """What the instructions have made so far."""

    root: Path
    context: Path
    """The clone."""
    folder: Path = Path("/")
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def bin(self) -> Path:
        return self.root / "venv" / "bin"

    @property
    def environment(self) -> dict[str, str]:
        """Of commands in the image. Absolute paths in its variables lie below ``root``."""
        here = {
            key: str(self.inside(value)) if value.startswith("/") else value for key, value in self.variables.items()
        }
        return {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "LANG": "C.UTF-8", **here}

    def inside(self, path: str) -> Path:
        return self.root / (self.folder / path).relative_to("/")

    def build(self, instructions: list[Instruction]) -> None:
        self.make_venv()
        for instruction in instructions:
            match instruction.name:
                case "WORKDIR":
                    self.folder = Path(instruction.text)
                    self.inside(".").mkdir(parents=True, exist_ok=True)
                case "COPY":
                    self.copy(*instruction.words)
                case "ENV":
                    self.variables |= dict(word.split("=", 1) for word in instruction.words)
                case "RUN":
                    self.run(instruction.text)

    def make_venv(self) -> None:
        """With a pip that is the tests' own: one that came with Python would bring an older setuptools with it."""
        venv = [sys.executable, "-m", "venv", "--without-pip", str(self.root / "venv")]
        subprocess.run(venv, check=True, capture_output=True)
        (packages,) = self.root.glob("venv/lib/python*/site-packages")
        (packages / "installed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        pip = self.bin / "pip"
        pip.write_text(f'#!/bin/sh\nexec {self.bin / "python"} -m pip "$@"\n')
        pip.chmod(0o755)

    def copy(self, *paths: str) -> None:
        *sources, to = paths
        for source in (self.context / name for name in sources):
            if source.is_dir():
                shutil.copytree(source, self.inside(to), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, self.inside(to))

    def run(self, command: str) -> None:
        """AssertionError, with what it printed, when it fails. pip fetches nothing, neither packages nor setuptools."""
        offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        ran = subprocess.run(
            ["sh", "-c", command],
            cwd=self.inside("."),
            env=self.environment | offline,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}"
