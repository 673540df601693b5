"""The rules besides the import law. Each yields (file, line, what is wrong); line 0 is the whole file."""

import re

import imports
from imports import split
from tree import code_only, found

LINES_MAX = 700
BYTES_MAX = 4 << 20

# Where generated messages may be named. The law says `grpc` and `upstream`; what else stands
# here speaks the wire too: gateways listen to reports, translate HTTP, and cut and join the rows of
# cached responses; workers write reports and statistics.
MESSAGES = {
    "gateway": ("request", "cache", "upstream", "discover", "fleet", "grpc"),
    "web": ("context", "texts", "rest", "infer", "openai", "rerank", "classify"),
    "worker": ("service", "report", "metrics"),
    "cli": ("client",),
}
# Where tonic's Status and Code may be named besides: the layers that pass a status on.
STATUSES = {
    "gateway": (*MESSAGES["gateway"], "stack", "balance"),
    "web": ("error",),
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
TEST = re.compile(r"#\[(?:tokio::)?test\b[^\]]*\]\s*(?:#\[[^\]]*\]\s*)*(?:async )?fn (\w+)")
FUNCTION = re.compile(r"\bfn\s+(\w+)\s*(?=[<(])")


def in_module(module, allowed):
    return module.split("/")[0] in allowed


def files_are_short(tree):
    sources = r"(crates/[^/]+/(src|tests|benches)|tests|demo|benches)/.+\.(rs|py|sh)"
    for name in tree.named(sources):
        count = len(tree.text(name).splitlines())
        if count > LINES_MAX:
            yield name, 0, f"{count} lines: a file has at most {LINES_MAX}"


def no_argument_is_a_tuple(tree):
    """A function takes no argument whose type is a tuple or a reference to one, whatever its
    pattern, in production code and in tests. Inside of other types (`&[(K, V)]`,
    `impl Iterator<Item = (K, V)>`), in closures and as what a function returns, tuples are fine."""
    for name in tree.named(r"(crates|tests)/.+\.rs"):
        code = re.sub(r"//.*", "", tree.text(name))
        for line, match in found(FUNCTION, code):
            for argument in arguments(code[match.end() :]):
                _, _, kind = argument.partition(":")
                kind = re.sub(r"^(\s|&|'\w+|mut\b)*", "", kind)
                if is_tuple(argument) or is_tuple(kind):
                    yield name, line, f"an argument of '{match.group(1)}' is a tuple: make it a struct"


def is_tuple(text):
    """Whether a pattern or a type begins with a tuple: `(dyn Fn() + Sync)` is none."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return index > 0 and len(list(split(f"{text[1:index]} _"))) > 1
    return False


def arguments(signature):
    """The arguments of a function, from the text behind its name."""
    depth, begun = 0, None
    for index, letter in enumerate(signature):
        if letter == "(" and depth == 0:
            begun = index + 1
        depth += (letter in "<([{") - (letter in ")]}")
        depth -= letter == ">" and signature[index - 1] not in "-="
        if letter == ")" and depth == 0:
            return [re.sub(r"^(#\[[^]]*\]\s*)+", "", part) for part in split(signature[begun:index])]
    return []


def messages_stay_at_the_wire(tree):
    packages = "|".join(sorted({name.split("/")[1] for name in tree.named(r"proto/[^/]+/.+\.proto")}))
    pattern = (
        rf"\bprotocol::({packages})\b|\bprost(_types)?::"
        rf"|\buse protocol::\{{[^;]*\b({packages})\b"
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


def logged_crates_are_complete(tree):
    listed = r"const CRATES: &\[&str\] = &\[([^\]]*)\]"
    texts = [tree.text(name) for name in tree.named(r"crates/cli/src/.+\.rs")]
    logged = {crate for text in texts for _, m in found(listed, text) for crate in re.findall(r"\w+", m[1])}
    for name, crate, _ in imports.manifests(tree):
        if name.startswith("crates/") and crate != "cli" and crate not in logged:
            yield name, 0, f"'{crate}' is not in CRATES of the cli: its INFO lines would not be logged"


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


def promises_have_tests(tree):
    """Each promise of SECURITY.md, a row of a table, names a test function that exists."""
    sources = tree.named(r"(crates|tests)/.+\.rs")
    tests = {name for source in sources for name in TEST.findall(tree.text(source))}
    for name in tree.named(r"SECURITY\.md"):
        heading = True
        for line, text in enumerate(tree.text(name).splitlines(), 1):
            if not text.startswith("|"):
                heading = True
            elif heading or set(text) <= set("|-: "):
                heading = False
            else:
                named = re.findall(r"`(\w+)`", text.rstrip("| ").rpartition("|")[2])
                missing = [test for test in named if test not in tests]
                if not named:
                    yield name, line, "a promise names its test in the last column"
                yield from ((name, line, f"there is no test {test}") for test in missing)


def places_of_changes_exist(tree):
    """The files and names in the table "Where do I change" of ARCHITECTURE.md are there."""
    files = [f"/{name}" for name in tree.tracked]
    words = None
    for name in tree.named(r"ARCHITECTURE\.md"):
        in_table = False
        for line, text in enumerate(tree.text(name).splitlines(), 1):
            if text.startswith("#"):
                in_table = "Where do I change" in text
            if not in_table or not text.startswith("|"):
                continue
            for token in re.findall(r"`([^`]+)`", text):
                if re.fullmatch(r"[\w./-]+\.(rs|py|proto|md|txt)", token):
                    exists = any(file.endswith(f"/{token}") for file in files)
                elif re.fullmatch(r"[\w./-]+/", token):
                    exists = any(f"/{token}" in file for file in files)
                elif re.fullmatch(r"\w+(::\w+)*", token):
                    words = words or words_of(tree)
                    exists = all(word in words for word in token.split("::"))
                else:
                    continue
                if not exists:
                    yield name, line, f"there is no {token}"


def words_of(tree):
    sources = tree.named(r"(crates|tests|proto)/.+\.(rs|py|proto)")
    return {word for source in sources for word in re.findall(r"\w+", tree.text(source))}


RULES = [
    files_are_short,
    imports.crates_keep_the_law,
    imports.nothing_forbidden_is_reached,
    imports.modules_keep_to_their_floors,
    imports.modules_import_in_no_circle,
    no_argument_is_a_tuple,
    messages_stay_at_the_wire,
    tonic_stays_at_the_wire,
    logged_crates_are_complete,
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
    promises_have_tests,
    places_of_changes_exist,
]
