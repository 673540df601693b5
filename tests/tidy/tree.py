"""The files of the repository, read once, and Rust code without strings, comments and tests."""

import pathlib
import re
import subprocess

TEST_MODULE = re.compile(
    r"#\[cfg\((?:test|all\(test\b[^\]]*)\)\]\s*(?:#\[[^\]]*\]\s*)*(?:pub(?:\([a-z]+\))? )?mod (\w+);"
)


class Tree:
    """The files of a repository."""

    def __init__(self, root):
        self.root = pathlib.Path(root)
        self.texts = {}
        self.tracked = sorted(self.list_tracked())
        self.code = None

    def list_tracked(self):
        if (self.root / ".git").exists():
            command = ["git", "-C", str(self.root), "ls-files", "-z", "--cached", "--others"]
            listed = subprocess.run(
                [*command, "--exclude-standard"], capture_output=True, check=True, text=True
            )
            names = {name for name in listed.stdout.split("\0") if name}
        else:
            files = (path for path in self.root.rglob("*") if path.is_file())
            names = {path.relative_to(self.root).as_posix() for path in files}
        return (name for name in names if (self.root / name).is_file())

    def text(self, name):
        if name not in self.texts:
            try:
                self.texts[name] = (self.root / name).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                self.texts[name] = ""
        return self.texts[name]

    def named(self, pattern):
        matches = re.compile(pattern).fullmatch
        return [name for name in self.tracked if matches(name)]

    def library_code(self):
        """(crate, module path, file, code) of each crate's sources, without its test modules."""
        if self.code is None:
            sources = self.named(r"crates/[^/]+/src/.+\.rs")
            tests = {folder for name in sources for folder in test_modules(name, self.text(name))}
            self.code = []
            for name in sources:
                stem = name.removesuffix(".rs")
                if any(stem == test or stem.startswith(f"{test}/") for test in tests):
                    continue
                _, crate, _, module = stem.removesuffix("/mod").split("/", 3)
                self.code.append((crate, module, name, code_only(self.text(name))))
        return self.code


def test_modules(name, text):
    """The paths, without `.rs`, of the files that a file declares as modules of tests."""
    folder = name.removesuffix(".rs")
    if folder.endswith(("/lib", "/main", "/mod")):
        folder = folder.rsplit("/", 1)[0]
    return [f"{folder}/{module}" for module in TEST_MODULE.findall(text)]


def code_only(text):
    """The text without strings, comments and test modules; its lines keep their numbers."""
    kept, closing, begun = [], None, False
    for line in text.split("\n"):
        line = re.sub(r'b?"(\\.|[^"\\])*"', '""', line)
        line = re.sub(r"//.*", "", line)
        if closing is not None:
            # rustfmt closes an item at the column where it began; some are one line.
            if line.rstrip() == closing or (begun and line.rstrip().endswith(";")):
                closing = None
            line, begun = "", False
        elif line.strip() == "#[cfg(test)]":
            closing = line[: len(line) - len(line.lstrip())] + "}"
            line, begun = "", True
        kept.append(line)
    return "\n".join(kept)


def found(pattern, text):
    """(line, match) of each match."""
    for match in re.finditer(pattern, text):
        yield text.count("\n", 0, match.start()) + 1, match
