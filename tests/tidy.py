"""What clippy does not see: the structure that ARCHITECTURE.md and STYLE.md promise.

    python3 tests/tidy.py              checks the repository
    python3 tests/tidy.py --self-test  shows that each rule can fail

Each rule yields (file, line, what is wrong); line 0 is the whole file. Needs Python 3.11.
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import tomllib

LINES_MAX = 500
BYTES_MAX = 4 << 20

# The import law: which crates of the workspace each may name. The lists are complete.
IMPORTS = {
    "tensor": set(),
    "protocol": {"tensor"},
    "platform": set(),
    "providers": {"protocol", "platform"},
    "engine": {"tensor"},
    "worker": {"tensor", "protocol", "platform", "engine"},
    "gateway": {"tensor", "protocol", "platform", "providers"},
}
# May name every crate.
EVERYTHING = {"cli", "tests"}
# What must not be reached, by whatever way.
NEVER_REACHED = {
    "gateway": ("candle-core", "candle-nn", "tokenizers"),
    "engine": ("tokio", "tonic", "hyper", "prost"),
}
# Where generated messages may be named. The law says `service` and `upstream`; what else stands
# here speaks the wire too: gateways listen to reports, translate HTTP, and cut and join the rows of
# answers that are kept; workers write reports and statistics.
MESSAGES = {
    "gateway": ("request", "http", "cache", "upstream", "discover", "fleet", "grpc"),
    "worker": ("service", "report", "metrics"),
    "cli": ("client",),
}
# Where tonic's Status and Code may be named besides: the layers that pass a status on.
STATUSES = {
    "gateway": (*MESSAGES["gateway"], "stack", "balance"),
    "worker": MESSAGES["worker"],
    "cli": MESSAGES["cli"],
}
# The one place that may start a task, since its handle owns it.
TASKS = "crates/platform/src/tasks.rs"
KERNELS = "crates/engine/src/kernels"

# Written in parts, so that this file does not break its own rules.
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b")
REGISTRIES = [
    ".".join(parts)
    for parts in (
        ("crates", "io"), ("pypi", "org"), ("npmjs", "org"), ("npmjs", "com"), ("debian", "org"),
        ("docker", "io"), ("ghcr", "io"), ("gcr", "io"), ("quay", "io"), ("nvcr", "io"),
        ("pythonhosted", "org"),
    )
]
FORBIDDEN = [
    (re.compile(r"\.unwrap\(\)"), "unwrap: return the error, or say why there is none"),
    (re.compile(r"\.expect\("), "expect: return the error, or say why there is none"),
    (re.compile(r"\b(panic|todo|unimplemented|unreachable)!"), "a panic is a defect"),
    (re.compile(r"\bdbg!"), "dbg! is for the moment"),
]
PRINTS = re.compile(r"\be?print(ln)?!")


class Tree:
    """The files of a repository, read once."""

    def __init__(self, root):
        self.root = pathlib.Path(root)
        self.texts = {}
        self.tracked = sorted(self.list_tracked())

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
        """(crate, module path, file, code) of each crate's sources."""
        for name in self.named(r"crates/[^/]+/src/.+\.rs"):
            if name.endswith("/tests.rs"):
                continue  # A test module in a file of its own.
            _, crate, _, module = name.split("/", 3)
            yield crate, module.removesuffix(".rs"), name, code_only(self.text(name))


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


def in_module(module, allowed):
    return module.split("/")[0] in allowed


# The rules.


def files_are_short(tree):
    sources = r"(crates/[^/]+/(src|tests|benches)|tests|demo|benches)/.+\.(rs|py|sh)"
    for name in tree.named(sources):
        count = len(tree.text(name).splitlines())
        if count > LINES_MAX:
            yield name, 0, f"{count} lines: a file has at most {LINES_MAX}"


def manifests(tree):
    for name in tree.named(r"(crates/[^/]+|tests)/Cargo\.toml"):
        folder = name.removesuffix("/Cargo.toml")
        yield name, folder.split("/")[-1], tomllib.loads(tree.text(name))


def imports_keep_the_law(tree):
    known = set(IMPORTS) | EVERYTHING
    for name, crate, manifest in manifests(tree):
        if crate not in known:
            yield name, 0, f"crate '{crate}' is not in the import law: add it to tests/tidy.py"
            continue
        tables = [manifest, *manifest.get("target", {}).values()]
        kinds = ("dependencies", "dev-dependencies", "build-dependencies")
        for dependency in {d for table in tables for kind in kinds for d in table.get(kind, {})}:
            allowed = EVERYTHING if crate in EVERYTHING else IMPORTS[crate]
            if dependency in known and crate not in EVERYTHING and dependency not in allowed:
                yield name, 0, f"'{crate}' must not import '{dependency}'"


def nothing_forbidden_is_reached(tree):
    for name in tree.named(r"Cargo\.lock"):
        packages = tomllib.loads(tree.text(name)).get("package", [])
        by_name = {}
        for package in packages:
            by_name.setdefault(package["name"], []).append(package)
        for crate, forbidden in NEVER_REACHED.items():
            came_by, waiting = {crate: None}, [crate]
            while waiting:
                current = waiting.pop()
                for package in by_name.get(current, []):
                    for dependency in package.get("dependencies", []):
                        reached = dependency.split(" ")[0]
                        if reached not in came_by:
                            came_by[reached] = current
                            waiting.append(reached)
            for reached in forbidden:
                if reached in came_by:
                    yield name, 0, f"'{crate}' reaches '{reached}' by '{came_by[reached]}'"


def messages_stay_at_the_wire(tree):
    pattern = (
        r"\bprotocol::(inference|tei|andon)\b|\bprost(_types)?::"
        r"|\buse protocol::\{[^;]*\b(inference|tei|andon)\b"
    )
    for crate, module, name, code in tree.library_code():
        if crate in ("protocol", "platform") or in_module(module, MESSAGES.get(crate, ())):
            continue
        for line, match in found(pattern, code):
            what = match.group().split("\n")[0]
            yield name, line, f"{what}: generated messages are named in {modules(MESSAGES, crate)}"


def tonic_stays_at_the_wire(tree):
    for crate, module, name, code in tree.library_code():
        if crate in ("protocol", "platform"):
            continue
        if not in_module(module, STATUSES.get(crate, ())):
            for line, _ in found(r"\btonic(_\w+)?::", code):
                yield name, line, f"tonic is named in {modules(STATUSES, crate)}"
        elif crate != "cli":
            for line, match in found(r"\btonic(?:_\w+)?::(\{[^}]*\}|\w+)", code):
                names = set(re.findall(r"\w+", match.group(1)))
                if match.group().startswith("tonic_") or names - {"Code", "Status"}:
                    yield name, line, f"{match.group()}: no more of tonic than Code and Status"


def modules(allowed, crate):
    return ", ".join(allowed.get(crate, ())) or "no module of this crate"


def unsafe_stays_in_kernels(tree):
    for crate, module, name, code in tree.library_code():
        for line, _ in found(r"\bunsafe\b", code):
            if not name.startswith(KERNELS):
                yield name, line, f"unsafe stands in {KERNELS} alone"
    blocks = [
        (name, line)
        for name in tree.named(r"(tests|crates/[^/]+/(tests|benches))/.+\.rs")
        for line, _ in found(r"\bunsafe\s*\{", code_only(tree.text(name)))
    ]
    for name, line in blocks[1:]:
        yield name, line, "tests have one unsafe block, which sends signals"


def tasks_have_owners(tree):
    for _, _, name, code in tree.library_code():
        if name == TASKS:
            continue
        for line, _ in found(r"\b(tokio|task)::spawn(_local)?\(", code):
            yield name, line, "a detached task outlives its owner: use platform::tasks"


def nothing_panics_or_prints(tree):
    for crate, _, name, code in tree.library_code():
        for pattern, why in FORBIDDEN:
            for line, match in found(pattern, code):
                yield name, line, f"{match.group()}: {why}"
        if crate != "cli":
            for line, match in found(PRINTS, code):
                yield name, line, f"{match.group()}: only the cli prints; use tracing"


def exceptions_have_reasons(tree):
    for name in tree.named(r"(crates|tests)/.+\.rs"):
        for line, match in found(r"#!?\[(allow|expect)\((?s:.*?)\)\]", code_only(tree.text(name))):
            if "reason" not in match.group():
                yield name, line, "an exception from a lint says its reason"


def no_test_is_skipped(tree):
    for name in tree.named(r"(crates|tests)/.+\.rs"):
        for line, _ in found(r"#\[ignore\b", tree.text(name)):
            yield name, line, "a test runs or is removed"


def nothing_is_left_for_later(tree):
    for name in tree.tracked:
        for line, match in found(UNFINISHED, tree.text(name)):
            yield name, line, f"{match.group()}: do it, or open an issue"


def files_are_small(tree):
    for name in tree.tracked:
        size = (tree.root / name).stat().st_size
        if size > BYTES_MAX:
            yield name, 0, f"{size} bytes: git holds files of at most {BYTES_MAX}"


def no_build_output_is_tracked(tree):
    for name in tree.named(r"(.+/)?(target|node_modules|__pycache__)/.+"):
        yield name, 0, "a build made it: remove it from git"


def no_registry_is_named(tree):
    pattern = re.compile("|".join(re.escape(host) for host in REGISTRIES))
    for name in tree.tracked:
        if not name.endswith("Cargo.lock"):
            for line, match in found(pattern, tree.text(name)):
                yield name, line, f"{match.group()}: a mirror must be able to stand in; name the package"


def images_have_versions(tree):
    for name in tree.named(r"(k8s|deploy)/.+"):
        for line, _ in found(r":latest\b", tree.text(name)):
            yield name, line, "':latest' is another image tomorrow: name a version"


RULES = [
    files_are_short,
    imports_keep_the_law,
    nothing_forbidden_is_reached,
    messages_stay_at_the_wire,
    tonic_stays_at_the_wire,
    unsafe_stays_in_kernels,
    tasks_have_owners,
    nothing_panics_or_prints,
    exceptions_have_reasons,
    no_test_is_skipped,
    nothing_is_left_for_later,
    files_are_small,
    no_build_output_is_tracked,
    no_registry_is_named,
    images_have_versions,
]


def check(root):
    tree = Tree(root)
    return [(rule.__name__, *violation) for rule in RULES for violation in rule(tree)]


# The self-test: a tree that keeps the law, and what breaks each rule of it.

CLEAN = {
    "Cargo.lock": '[[package]]\nname = "gateway"\ndependencies = ["tonic"]\n'
    '[[package]]\nname = "engine"\ndependencies = ["candle-core"]\n',
    "crates/gateway/Cargo.toml": "[dependencies]\nprotocol.workspace = true\ntokio.workspace = true\n",
    "crates/gateway/src/grpc.rs": "use protocol::inference::ModelInferRequest;\nuse tonic::{Code, Status};\n",
    "crates/gateway/src/route.rs": "// never unsafe, no .unwrap()\nlet a = \"panic! unsafe\";\n"
    "#[cfg(test)]\nuse a::b;\n#[cfg(test)]\nmod tests {\n    use super::*;\n    fn a() {\n        b().unwrap();\n    }\n}\n",
    TASKS: "#[allow(x, reason = \"owned\")]\ntokio::task::spawn(future)\n",
    "crates/engine/src/kernels/avx.rs": "unsafe { go() }\n",
    "crates/cli/src/main.rs": "println!(\"a\");\n",
    "tests/src/process.rs": "unsafe { kill() }\n",
    "k8s/base/gateway.yaml": "image: andon:0.1.0\n",
}
BROKEN = [
    (files_are_short, "crates/gateway/src/long.rs", "\n" * (LINES_MAX + 1)),
    (files_are_short, "tests/python/long.py", "\n" * (LINES_MAX + 1)),
    (imports_keep_the_law, "crates/gateway/Cargo.toml", "[dependencies]\nengine.workspace = true\n"),
    (imports_keep_the_law, "crates/tensor/Cargo.toml", "[dev-dependencies]\nprotocol = '1'\n"),
    (imports_keep_the_law, "crates/other/Cargo.toml", "[dependencies]\n"),
    (
        nothing_forbidden_is_reached,
        "Cargo.lock",
        '[[package]]\nname = "gateway"\ndependencies = ["a 1.0.0"]\n'
        '[[package]]\nname = "a"\nversion = "1.0.0"\ndependencies = ["candle-core"]\n',
    ),
    (
        nothing_forbidden_is_reached,
        "Cargo.lock",
        '[[package]]\nname = "engine"\ndependencies = ["tokio"]\n',
    ),
    (messages_stay_at_the_wire, "crates/gateway/src/route.rs", "use protocol::inference::A;\n"),
    (messages_stay_at_the_wire, "crates/gateway/src/route.rs", "use protocol::{Error,\n tei::v1};\n"),
    (messages_stay_at_the_wire, "crates/worker/src/infer.rs", "fn a(b: prost::bytes::Bytes) {}\n"),
    (tonic_stays_at_the_wire, "crates/worker/src/queue.rs", "use tonic::Status;\n"),
    (tonic_stays_at_the_wire, "crates/engine/src/lib.rs", "use tonic::Status;\n"),
    (tonic_stays_at_the_wire, "crates/gateway/src/grpc.rs", "use tonic::{Code, transport};\n"),
    (unsafe_stays_in_kernels, "crates/engine/src/layers/a.rs", "unsafe { go() }\n"),
    (unsafe_stays_in_kernels, "tests/tests/fleet/main.rs", "unsafe { kill() }\n"),
    (tasks_have_owners, "crates/gateway/src/a.rs", "tokio::spawn(async {});\n"),
    (tasks_have_owners, "crates/worker/src/a.rs", "task::spawn(async {});\n"),
    *[
        (nothing_panics_or_prints, "crates/worker/src/a.rs", f"a{code};\n")
        for code in (".unwrap()", ".expect(1)", "; panic!()", "; todo!()", "; dbg!(1)", "; println!()")
    ],
    (nothing_panics_or_prints, "crates/cli/src/main.rs", "a.unwrap();\n"),
    (nothing_panics_or_prints, "crates/cli/src/main.rs", "#[cfg(test)]\nuse a;\nb.unwrap();\n"),
    (exceptions_have_reasons, "crates/worker/src/a.rs", "#[allow(dead_code)]\nfn a() {}\n"),
    (no_test_is_skipped, "crates/worker/src/a.rs", "#[test]\n#[ignore]\nfn a() {}\n"),
    (nothing_is_left_for_later, "docs/a.md", "TO" + "DO: all of it\n"),
    (files_are_small, "models.bin", "0" * (BYTES_MAX + 1)),
    (no_build_output_is_tracked, "crates/engine/target/a.json", "{}\n"),
    *[(no_registry_is_named, "deploy/Dockerfile", f"FROM {host}/a:1\n") for host in REGISTRIES],
    (images_have_versions, "k8s/base/gateway.yaml", "image: andon:latest\n"),
]


def self_test():
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        failures += [f"the clean tree: {violation}" for violation in checked_tree(folder, {})]
    for rule, name, text in BROKEN:
        with tempfile.TemporaryDirectory() as folder:
            broken = {violation[0] for violation in checked_tree(folder, {name: text})}
        if broken != {rule.__name__}:
            failures.append(f"{name} {text[:40]!r}: {rule.__name__} expected, {broken or 'none'} failed")
    untried = {rule.__name__ for rule in RULES} - {rule.__name__ for rule, _, _ in BROKEN}
    failures += [f"{name} is never seen to fail" for name in sorted(untried)]
    for failure in failures:
        print(failure)
    print(f"self-test: {len(BROKEN)} breaches of {len(RULES)} rules, {len(failures)} failures")
    return not failures


def checked_tree(folder, changes):
    for name, text in (CLEAN | changes).items():
        path = pathlib.Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return check(folder)


def main():
    if sys.argv[1:] == ["--self-test"]:
        sys.exit(0 if self_test() else 1)
    if sys.argv[1:]:
        sys.exit("usage: tidy.py [--self-test]")
    violations = check(pathlib.Path(__file__).resolve().parents[1])
    for rule, name, line, message in violations:
        place = f"{name}:{line}" if line else name
        print(f"{place}: {message} [{rule}]")
    print(f"tidy: {len(RULES)} rules, {len(violations)} violations")
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
