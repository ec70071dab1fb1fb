"""The house rules, read off the sources themselves."""

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import fellray

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("platform", "actors", "serve", "jobs")
MAY_IMPORT = {
    "platform": {"platform"},
    "actors": {"platform", "actors"},
    "serve": {"platform", "serve"},
    "jobs": set(FOLDERS),
}
ONLY_IN = {
    "ray": ("actors/", "serve/", "jobs/"),
    "deepspeed": ("actors/engine.py",),
    "fastapi": ("serve/",),
    "implicit": ("platform/collaborative.py",),
    "flwr": ("jobs/flower_fedavg.py",),
    "pfl": ("jobs/pfl_fedavg.py",),
}


def sources() -> list[Path]:
    return [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


def place(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imported(file: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, wherever in it; a `from` names its members too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(file)}:{node.lineno}: write fellray.<folder>.<file>"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called(file: Path) -> Iterator[str]:
    """Every dotted name in a file, as written: `torch.load`, say."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def run_python(code: str) -> str:
    """In a process of its own that has this repository's root on its path."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_something_to_read() -> None:
    assert {"platform", "actors", "jobs"} <= {place(f).split("/")[0] for f in sources()}


def test_arrows() -> None:
    crossed = []
    for file in sources():
        folder = place(file).split("/")[0]
        for name in imported(file):
            parts = name.split(".")
            if parts[0] == "fellray" and len(parts) > 1 and parts[1] in FOLDERS:
                if parts[1] not in MAY_IMPORT[folder]:
                    crossed.append(f"{place(file)} imports {name}")
            elif parts[0] in FOLDERS and parts[0] != "platform":
                crossed.append(f"{place(file)} imports {name}: write fellray.{name}")
    assert crossed == []


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_has_its_rooms(library: str) -> None:
    strays = [
        place(file)
        for file in sources()
        if any(name.split(".")[0] == library for name in imported(file))
        and not place(file).startswith(ONLY_IN[library])
    ]
    assert strays == []


def test_rivals_stand_alone() -> None:
    """They run where fellray is not: torch, numpy, safetensors, their own framework, each other."""
    theirs = {"flwr", "pfl", "numpy", "torch", "safetensors", "plain_learner"}
    for name in ("flower_fedavg", "pfl_fedavg", "plain_learner"):
        roots = {found.split(".")[0] for found in imported(ROOT / f"jobs/{name}.py")}
        assert roots - set(sys.stdlib_module_names) <= theirs, name


def test_nothing_is_unpickled() -> None:
    loads = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    strays = []
    for file in sources():
        strays += [f"{place(file)}: {n}" for n in imported(file) if n.split(".")[0] in loads]
        strays += [
            f"{place(file)}: {name}"
            for name in called(file)
            if name in ("torch.load", "torch.save") or name.endswith(("read_pickle", "to_pickle"))
        ]
        assert "allow_pickle=True" not in file.read_text(encoding="utf-8")
    assert strays == []


def test_one_level_and_no_init() -> None:
    for file in sources():
        assert len(place(file).split("/")) == 2, f"{place(file)}: one level only"
        assert file.name != "__init__.py", f"{place(file)} hides the standard library"


def test_names_of_files() -> None:
    names = [file.stem for file in sources()]
    assert sorted(set(names) & (set(sys.stdlib_module_names) - {"platform"})) == []
    vague = ("util", "helper", "base", "common", "misc", "manager")
    assert [name for name in names if any(word in name for word in vague)] == []


def test_every_file_says_what_it_is() -> None:
    silent = [
        place(f)
        for f in sources()
        if not ast.get_docstring(ast.parse(f.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_nothing_is_left_to_do() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplemented)\b")
    found = [
        f"{place(file)}:{at}"
        for file in sources()
        for at, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if marks.search(line)
    ]
    assert found == []


def test_the_driver_is_the_paper() -> None:
    text = (ROOT / "jobs/train.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    for word in ("ray.get", "retry", "sleep", "device", "cuda", "perf_counter"):
        assert word not in text, word


def test_yaml_files_are_configs() -> None:
    from fellray.platform.config import load
    from fellray.platform.study import is_study

    files = sorted((ROOT / "jobs").glob("*.yaml"))
    configs = [file for file in files if not is_study(file)]  # those are test_study's
    assert configs
    for file in configs:
        load(file)


def test_no_two_test_files_have_one_name() -> None:
    """pytest would run one of them only, and say so at the end of everything."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_the_changelog_tells_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## +\[?v?(\d+\.\d+\.\d+)", text, flags=re.MULTILINE)
    assert versions[:1] == [fellray.__version__]


def test_platform_stays_the_standard_librarys() -> None:
    code = (
        "import platform, fellray.platform.config; print(platform.__file__); platform.system();"
        "print(fellray.platform.config.__file__)"
    )
    theirs, ours = run_python(code).splitlines()
    assert Path(theirs) == Path(os.__file__).with_name("platform.py")
    assert Path(ours).resolve().is_relative_to(ROOT)


def test_platform_is_pure() -> None:
    """Promise 10: everything in platform/ imports, and builds, without Ray, DeepSpeed, FastAPI."""
    modules = [f"fellray.platform.{file.stem}" for file in sorted((ROOT / "platform").glob("*.py"))]
    code = f"""
import importlib, json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "deepspeed", "fastapi"):
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Block())
for module in {modules!r}:
    importlib.import_module(module)
import transformers
transformers.AutoModel, transformers.AutoTokenizer
blocked = [m for m in sys.modules if m.split(".")[0] in ("ray", "deepspeed", "fastapi")]
print(json.dumps([len(sys.modules), blocked]))
"""
    count, blocked = json.loads(run_python(code).splitlines()[-1])
    assert count > 100
    assert blocked == []
