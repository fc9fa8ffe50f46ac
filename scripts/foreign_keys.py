"""Keys of another tool that the tables of `hfstrat migrate` lack, read from the tool's source without importing it.

    pip download --no-deps axolotl llamafactory
    python scripts/foreign_keys.py axolotl axolotl-*.tar.gz
    python scripts/foreign_keys.py llama-factory llamafactory-*.whl

Prints one key a line; exit code 1 if there are any. TRL and transformers are compared by tests with what is installed.
"""

from __future__ import annotations

import ast
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from hfstrat.recipe.migration.convert import TOOLS

FILES = {  # where the keys of a tool are declared, and the prefix of the keys of a class that is a section of its own
    "axolotl": re.compile(r"axolotl/(utils/schemas/.+|integrations/[^/]+/args)\.py$"),
    "llama-factory": re.compile(r"llamafactory/hparams/[^/]+_args\.py$"),
}
ROOTS = {"axolotl": re.compile(r"AxolotlInputConfig$|(?!Compression).+Args$"), "llama-factory": re.compile(r".+Arguments?$")}
SECTIONS = {"TRLConfig": "trl."}


def sources(place: Path, wanted: re.Pattern[str]) -> Iterator[str]:
    """The texts of the wanted files of a folder, a wheel or a source archive."""
    if place.is_dir():
        yield from (file.read_text(encoding="utf-8") for file in sorted(place.rglob("*.py")) if wanted.search(file.as_posix()))
    elif zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as archive:
            yield from (archive.read(name).decode() for name in archive.namelist() if wanted.search(name))
    else:
        with tarfile.open(place) as archive:
            for member in archive:
                if wanted.search(member.name) and (content := archive.extractfile(member)):
                    yield content.read().decode()


def keys_of(tool: str, place: Path) -> set[str]:
    """The keys that a config of the tool may have: the annotated fields of its classes and of their bases."""
    classes = {
        node.name: node
        for text in sources(place, FILES[tool])
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef)
    }
    found = {f"{prefix}{key}" for name, prefix in SECTIONS.items() if name in classes for key in _fields(classes[name])}
    waiting, seen = [name for name in classes if ROOTS[tool].match(name)], set[str]()
    while waiting:
        name = waiting.pop()
        if name in classes and name not in seen:
            seen.add(name)
            found |= _fields(classes[name])
            waiting += [ast.unparse(base).split("[")[0].split(".")[-1] for base in classes[name].bases]
    return found


def _fields(node: ast.ClassDef) -> set[str]:
    return {part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)}


def main() -> int:
    tool, place = sys.argv[1], Path(sys.argv[2])
    known = keys_of(tool, place)
    lacking = sorted(known - set(TOOLS[tool].rules))
    print(*lacking, sep="\n", end="\n" * bool(lacking))
    print(f"{TOOLS[tool].title}: {len(known)} keys, {len(lacking)} without a rule", file=sys.stderr)
    return 1 if lacking or not known else 0


if __name__ == "__main__":
    sys.exit(main())
