"""The rules of the house, checked on the syntax tree: who imports whom, doors, sizes, names."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("conf", "data", "models", "train", "launch")
MAY_IMPORT = {
    "conf": set(),
    "data": {"data"},
    "models": {"models"},
    "train": {"train", "models", "data"},
    "launch": set(FOLDERS),
}
# Third party → the files (path prefixes) that may import it. Everything else goes through them.
DOORS = {
    "accelerate": ("train/engine", "train/deepspeed_engine"),
    "av": ("data/decode/",),
    "decord": ("data/decode/",),
    "deepspeed": ("train/engine", "train/deepspeed_engine"),
    "diffusers": ("models/interop", "train/export"),
    "duckdb": ("data/catalogue/",),
    "ftfy": ("models/text",),
    "hydra": ("train/main", "train/__main__", "launch/"),
    "matplotlib": ("train/report", "data/world/", "launch/stats_plot"),
    "peft": ("train/lora",),
    "omegaconf": ("train/config", "train/main"),  # main: the type of what Hydra hands over
    "transformers": ("models/text", "train/export", "train/fidelity"),
    "wandb": ("train/tracking",),
    "webdataset": ("data/shards/",),
}
BANNED_FILES = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
BANNED_NAMES = re.compile(r"\bx_[01]\b|\b_target_\b|\bTODO\b|\bFIXME\b")
PICKLE_DOORS = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
MAX_FILE, MAX_FUNCTION, MAX_LOOP, MAX_CONSTRUCTOR, MAX_LINE = 400, 60, 100, 40, 100
LOOP = ("train/trainer.py",)
SELF_EXPLAINING = 8  # lines: a shorter function may speak for itself


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


SOURCES = sources(*FOLDERS)
NAMES = [path.relative_to(ROOT).as_posix() for path in SOURCES]
every_source = pytest.mark.parametrize("name", NAMES)


def tree_of(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def imports(name: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted module) of every import, lazy ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = ["longtake", *Path(name).parts[: -node.level]]
                yield node.lineno, ".".join([*package, *([node.module] if node.module else [])])
            else:
                module = node.module or ""
                if module == "longtake":
                    yield from ((node.lineno, f"longtake.{alias.name}") for alias in node.names)
                else:
                    yield node.lineno, module


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring: explaining must not be punished."""
    first = function.body[0]
    lines = (function.end_lineno or 0) - function.lineno + 1
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


@every_source
def test_imports_point_down(name: str) -> None:
    allowed = MAY_IMPORT[name.split("/")[0]]
    for line, module in imports(name, tree_of(name)):
        top, _, rest = module.partition(".")
        assert top not in FOLDERS, f"{name}:{line} imports {module}: write longtake.{module}"
        if top == "longtake" and rest:
            assert rest.split(".")[0] in allowed, f"{name}:{line} must not import {module}"


@every_source
def test_third_parties_have_one_door(name: str) -> None:
    for line, module in imports(name, tree_of(name)):
        top = module.split(".")[0]
        assert top not in PICKLE_DOORS, (
            f"{name}:{line} imports {module}: nothing of ours is pickled"
        )
        if top in DOORS:
            assert name.startswith(DOORS[top]), f"{name}:{line} imports {module}, see {DOORS[top]}"


@every_source
def test_nothing_is_unpickled(name: str) -> None:
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            pytest.fail(f"{name}:{node.lineno} calls torch.load: read safetensors")


@every_source
def test_sizes(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= MAX_FILE, f"{name}: {len(lines)} lines, at most {MAX_FILE}"
    for number, line in enumerate(lines, start=1):
        assert len(line) <= MAX_LINE, f"{name}:{number}: {len(line)} columns"
    for function in functions(ast.parse(text)):
        limit = MAX_CONSTRUCTOR if function.name == "__init__" else MAX_FUNCTION
        limit = MAX_LOOP if name in LOOP else limit
        size = body_lines(function)
        assert size <= limit, f"{name}:{function.lineno} {function.name}: {size} lines, max {limit}"


@every_source
def test_signatures_are_annotated(name: str) -> None:
    for function in functions(tree_of(name)):
        where = f"{name}:{function.lineno} {function.name}"
        assert function.returns is not None or function.name == "__init__", (
            f"{where}: no return type"
        )
        arguments = function.args
        everyone = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        bare = [a.arg for a in everyone if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{where}: {bare} not annotated"


@every_source
def test_names(name: str) -> None:
    stem = Path(name).stem
    assert stem not in BANNED_FILES, f"{name}: say what it holds"
    for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), start=1):
        assert not BANNED_NAMES.search(line), f"{name}:{number}: {line.strip()}"


@every_source
def test_no_error_is_swallowed(name: str) -> None:
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ExceptHandler):
            where = f"{name}:{node.lineno}"
            assert node.type is not None, f"{where}: name the exception"
            assert [type(s) for s in node.body] != [ast.Pass], f"{where}: except ...: pass"


@every_source
def test_every_module_and_public_name_is_explained(name: str) -> None:
    tree = tree_of(name)
    if not tree.body:
        return
    assert ast.get_docstring(tree), f"{name}: no module docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            if (node.end_lineno or 0) - node.lineno < SELF_EXPLAINING:
                continue
            assert ast.get_docstring(node), f"{name}:{node.lineno} {node.name}: no docstring"


def test_models_need_torch_alone() -> None:
    code = (
        "import sys, pkgutil, importlib, longtake.models as m\n"
        "for i in pkgutil.iter_modules(m.__path__):\n"
        "    importlib.import_module('longtake.models.' + i.name)\n"
        "banned = {'diffusers','transformers','hydra','omegaconf','deepspeed','accelerate','wandb',"
        "'av','decord','webdataset','pyarrow','duckdb','longtake.data','longtake.train'}\n"
        "print(sorted(banned & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in sources(*FOLDERS, "tests")}
    missing = [str(folder) for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing
