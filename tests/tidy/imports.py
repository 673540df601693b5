"""The import law: which crate may import which, the floors inside the gateway, and no circles."""

import re
import tomllib

from tree import found

# The crates from the ground, and what each may import. A crate that is not there yet keeps its row.
CRATES = {
    "tensor": set(),
    "platform": set(),
    "stats": set(),
    "protocol": {"tensor"},
    "engine": {"tensor"},
    "providers": {"protocol", "platform"},
    "artifacts": {"platform"},
    "store": {"protocol"},
    "worker": {"tensor", "protocol", "platform", "engine", "stats", "artifacts"},
    "gateway": {"tensor", "protocol", "platform", "providers", "stats"},
    "web": {"tensor", "protocol", "platform", "gateway"},
    "control": {"protocol", "platform", "store", "stats", "artifacts"},
}
# May import every crate.
EVERYTHING = {"cli", "tests"}
# What a crate must not reach, through its dependencies and theirs.
NEVER_REACHED = {
    "gateway": ("candle-core", "candle-nn", "tokenizers"),
    "web": ("candle-core", "candle-nn", "tokenizers"),
    "providers": ("candle-core", "candle-nn", "tokenizers"),
    "control": ("candle-core", "candle-nn", "tokenizers"),
    "engine": ("tokio", "tonic", "hyper", "prost"),
}
# The floors of the gateway, from the ground. A module imports from lower floors and from itself;
# `lib` is the roof, so nothing imports from the crate's root.
FLOORS = {
    "gateway": (
        ("policy",),
        ("request",),
        ("redis",),
        ("auth", "limit", "shed"),
        ("upstream",),
        ("route",),
        ("balance", "cache", "discover"),
        ("stack",),
        ("fleet", "control"),
        ("grpc",),
        ("readings",),
    ),
}


def manifests(tree):
    for name in tree.named(r"(crates/[^/]+|tests)/Cargo\.toml"):
        folder = name.removesuffix("/Cargo.toml")
        yield name, folder.split("/")[-1], tomllib.loads(tree.text(name))


def crates_keep_the_law(tree):
    known = set(CRATES) | EVERYTHING
    for name, crate, manifest in manifests(tree):
        if crate not in known:
            yield name, 0, f"crate '{crate}' is not in the import law: add it to {__name__}.py"
            continue
        tables = [manifest, *manifest.get("target", {}).values()]
        kinds = ("dependencies", "dev-dependencies", "build-dependencies")
        for dependency in {d for table in tables for kind in kinds for d in table.get(kind, {})}:
            allowed = EVERYTHING if crate in EVERYTHING else CRATES[crate]
            if dependency in known and crate not in EVERYTHING and dependency not in allowed:
                yield name, 0, f"'{crate}' must not import '{dependency}'"


def nothing_forbidden_is_reached(tree):
    for name in tree.named(r"Cargo\.lock"):
        packages = tomllib.loads(tree.text(name)).get("package", [])
        by_name = {}
        for package in packages:
            by_name.setdefault(package["name"], []).append(package)
        for crate, forbidden in NEVER_REACHED.items():
            reached_from, waiting = {crate: None}, [crate]
            while waiting:
                current = waiting.pop()
                for package in by_name.get(current, []):
                    for dependency in package.get("dependencies", []):
                        reached = dependency.split(" ")[0]
                        if reached not in reached_from:
                            reached_from[reached] = current
                            waiting.append(reached)
            for reached in forbidden:
                if reached in reached_from:
                    yield name, 0, f"'{crate}' reaches '{reached}' through '{reached_from[reached]}'"


def modules_keep_to_their_floors(tree):
    for crate, floors in FLOORS.items():
        heights = {name: height for height, floor in enumerate(floors) for name in floor}
        seen = set()
        for module, target, name, line in Modules(tree, crate).edges():
            # Each breach once a file. `lib` is the roof and imports everything.
            if not module or (name, target[:1]) in seen:
                continue
            seen.add((name, target[:1]))
            if module[0] not in heights:
                yield name, line, f"'{module[0]}' has no floor: add it to FLOORS of {__name__}.py"
            elif not target:
                yield name, line, "the crate's root is the roof: import from the module itself"
            elif target[0] != module[0] and heights.get(target[0], 0) >= heights[module[0]]:
                yield name, line, f"'{module[0]}' must not import '{target[0]}': it is not below"


def modules_import_in_no_circle(tree):
    """Modules side by side, each with all that is below it, import each other in one direction.
    A parent and its own children may use each other."""
    for crate in sorted({crate for crate, *_ in tree.library_code()}):
        groups = {}
        for module, target, name, line in Modules(tree, crate).edges():
            depth = 0
            while depth < min(len(module), len(target)) and module[depth] == target[depth]:
                depth += 1
            if depth < min(len(module), len(target)):
                edges = groups.setdefault(module[:depth], {}).setdefault(module[depth], {})
                edges.setdefault(target[depth], (name, line))
        for parent, edges in groups.items():
            for circle in circles(edges):
                steps = [edges[a][b] for a, b in zip(circle, circle[1:])]
                sites = ", ".join(f"{name}:{line}" for name, line in steps[1:])
                yield *steps[0], f"a circle of imports: {' -> '.join(circle)} (and {sites})"


def circles(edges):
    """One shortest circle for each group of nodes that reach each other."""
    seen = set()
    for start in sorted(edges):
        if start in seen:
            continue
        came_from, waiting = {start: None}, [start]
        while waiting:
            current = waiting.pop(0)
            if start in edges.get(current, {}):
                circle = [current]
                while came_from[circle[-1]] is not None:
                    circle.append(came_from[circle[-1]])
                seen |= set(circle)
                yield [*reversed(circle), start]
                break
            for following in sorted(edges.get(current, {})):
                if following not in came_from:
                    came_from[following] = current
                    waiting.append(following)


class Modules:
    """The modules of one crate, and what their paths lead to."""

    def __init__(self, tree, crate):
        self.files = {}
        for owner, module, name, code in tree.library_code():
            if owner == crate and module != "main":
                path = () if module == "lib" else tuple(module.split("/"))
                self.files[path] = (name, re.sub(r"\bpub\(in [^)]*\)", "pub", code))
        # What each module's `use` gives a name to, so that a name is followed to where it is made.
        self.names = {path: {} for path in self.files}
        for path, (_, code) in self.files.items():
            for _, segments, name in uses(code):
                self.names[path].setdefault(name, segments)

    def edges(self):
        """(module, module that it imports from, file, line), without what stays in a module."""
        for path, (name, code) in self.files.items():
            for line, segments in [*imported(code), *inline_paths(code)]:
                target = self.leads_to(path, segments)
                if target is not None and target != path:
                    yield path, target, name, line

    def leads_to(self, path, segments, depth=0):
        """The module where the item that a path names is made; none outside of the crate."""
        current, rest = self.start(path, segments)
        if current is None:
            return None
        while rest and (*current, rest[0]) in self.files:
            current, rest = (*current, rest[0]), rest[1:]
        followed = self.names.get(current, {}).get(rest[0]) if rest else None
        if followed and depth < 8:
            return self.leads_to(current, (*followed, *rest[1:]), depth + 1)
        return current

    def start(self, path, segments):
        """The module where a path begins, and the rest of it; none for another crate's."""
        first, rest = segments[0], segments[1:]
        if first == "crate":
            return (), rest
        if first == "self" or first == "super":
            current = path if first == "self" else path[:-1]
            while rest and rest[0] == "super":
                current, rest = current[:-1], rest[1:]
            return current, rest
        return (path, segments) if (*path, first) in self.files else (None, ())


USE = re.compile(r"\buse\s+([^;]+);")
INLINE = re.compile(r"(?<![\w:$])((?:crate|super|self)(?:::\w+)+)")


def imported(code):
    return [(line, segments) for line, segments, _ in uses(code)]


def uses(code):
    """(line, path, name that it gets) of each import."""
    for line, match in found(USE, code):
        for segments, name in leaves(re.sub(r"\s+", " ", match.group(1)).strip()):
            yield line, segments, name


def leaves(tree, prefix=()):
    """(path, name) of each leaf of a tree of imports."""
    head, brace, inner = tree.partition("{")
    head, _, alias = head.partition(" as ")
    segments = (*prefix, *(part for part in head.strip().split("::") if part))
    if brace:
        for part in split(inner.rstrip().removesuffix("}")):
            yield from leaves(part, segments)
        return
    if len(segments) > 1 and segments[-1] == "self":
        segments = segments[:-1]
    yield segments, alias.strip() or segments[-1]


def split(text):
    """The parts between the commas that stand outside of all brackets."""
    depth, start = 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "{([<") - (letter in "})]")
        depth -= letter == ">" and text[index - 1] not in "-="
        if letter == "," and depth == 0:
            yield text[start:index].strip()
            start = index + 1
    if text[start:].strip():
        yield text[start:].strip()


def inline_paths(code):
    """(line, path) of each path outside of imports."""
    code = USE.sub(lambda match: "\n" * match.group().count("\n"), code)
    for line, match in found(INLINE, code):
        yield line, tuple(match.group(1).split("::"))
