"""The README tells the truth about files, commands and configs."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from longtake.launch.cli import parse
from longtake.launch.compose import compose

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("data", "models", "train", "launch")
    for path in (ROOT / folder).glob("*.py")
    if not path.name.startswith("__")
)
COMMANDS = re.findall(r"^longtake (.+?)(?:\s+#.*)?$", README, flags=re.MULTILINE)


def test_the_tree_has_a_line_for_every_file() -> None:
    tree = README.split("```text\n")[1].split("```")[0]
    folder, listed = "", []
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            listed.append(folder + name)
        else:
            folder = name
    assert sorted(name for name in listed if name.endswith(".py")) == MODULES


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_ones_that_longtake_knows(command: str) -> None:
    args = parse(shlex.split(command))
    if args.command.name == "train":
        assert compose(args.overrides).output_dir


def test_links_and_pictures_are_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            path = ROOT / target
            assert path.exists(), target
            assert path.suffix != ".png" or path.stat().st_size < 300_000


@pytest.mark.parametrize("name", ["vae_wan", "vae_wan_decoder"])
def test_every_number_of_the_recipe_has_its_reason(name: str) -> None:
    """As docs/vae.md says: beside it, or in a comment right above."""
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    bare = [
        line
        for above, line in pairwise(text.splitlines())
        if re.search(r"[:\[] .*\d", line) and "#" not in f"{line}{above.strip()[:1]}"
    ]
    assert not bare
