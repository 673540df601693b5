"""What clippy does not see: the structure that ARCHITECTURE.md and STYLE.md promise.

    python3 tests/tidy              checks the repository
    python3 tests/tidy --self-test  shows that each rule can fail

`imports.py` holds the import law, `rules.py` the rest. Needs Python 3.11.
"""

import pathlib
import sys

from rules import RULES
from self_test import self_test
from tree import Tree


def main():
    if sys.argv[1:] == ["--self-test"]:
        sys.exit(0 if self_test() else 1)
    if sys.argv[1:]:
        sys.exit("usage: tidy [--self-test]")
    tree = Tree(pathlib.Path(__file__).resolve().parents[2])
    violations = [(rule.__name__, *violation) for rule in RULES for violation in rule(tree)]
    for rule, name, line, message in violations:
        site = f"{name}:{line}" if line else name
        print(f"{site}: {message} [{rule}]")
    print(f"tidy: {len(RULES)} rules, {len(violations)} violations")
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
