"""The self-test: a tree that keeps all rules, and changes of it that each break one."""

import pathlib
import tempfile

from imports import (
    crates_keep_the_law,
    modules_import_in_no_circle,
    modules_keep_to_their_floors,
    nothing_forbidden_is_reached,
)
from rules import (
    BYTES_MAX,
    LINES_MAX,
    REGISTRIES,
    RULES,
    TASKS,
    exceptions_have_reasons,
    files_are_short,
    files_are_small,
    images_have_versions,
    logged_crates_are_complete,
    messages_stay_at_the_wire,
    no_argument_is_a_tuple,
    no_build_output_is_tracked,
    no_registry_is_named,
    no_test_is_skipped,
    nothing_is_left_for_later,
    nothing_panics_or_prints,
    places_of_changes_exist,
    promises_have_tests,
    tasks_have_owners,
    tonic_stays_at_the_wire,
    unsafe_stays_in_kernels,
)
from tree import Tree

CLEAN = {
    "Cargo.lock": '[[package]]\nname = "gateway"\ndependencies = ["tonic"]\n'
    '[[package]]\nname = "engine"\ndependencies = ["candle-core"]\n',
    "crates/gateway/Cargo.toml": "[dependencies]\nprotocol.workspace = true\ntokio.workspace = true\n",
    "crates/gateway/src/upstream.rs": "use protocol::inference::ModelInferRequest;\nuse tonic::{Code, Status};\n"
    "use crate::request::Request;\npub fn send(a: &[(u8, u8)], b: (), c: impl Fn((u8, u8)), d: &mut (impl A + B)) -> (u8, u8) {\n"
    "    a.map(|(a, b): (u8, u8)| a)\n}\n",
    "crates/gateway/src/request.rs": "use crate::policy::{Caller, file::{self, File}};\npub struct Request;\n",
    "crates/gateway/src/policy.rs": "mod file;\npub use file::File;\npub struct Caller;\n",
    "crates/gateway/src/policy/file.rs": "use super::Caller;\npub struct File;\n"
    "#[cfg(test)]\nmod tests {\n    use crate::stack::Stack;\n}\n",
    "crates/gateway/src/lib.rs": "pub mod grpc;\npub use grpc::Grpc;\n",
    "crates/gateway/src/grpc/mod.rs": "#[cfg(test)]\nmod checks;\npub struct Grpc;\n",
    "crates/gateway/src/grpc/checks.rs": "fn a() {\n    crate::readings::b().unwrap();\n}\n",
    "crates/gateway/src/route.rs": "// never unsafe, no .unwrap()\nlet a = \"panic! unsafe\";\n"
    "#[cfg(test)]\nuse a::b;\n#[cfg(test)]\nmod tests {\n    use super::*;\n    fn a() {\n        b().unwrap();\n    }\n}\n",
    TASKS: "#[allow(x, reason = \"owned\")]\ntokio::task::spawn(future)\n",
    "crates/engine/src/kernels/avx.rs": "unsafe { go() }\n",
    "crates/cli/src/main.rs": "println!(\"a\");\n",
    "crates/cli/src/roles.rs": 'const CRATES: &[&str] = &["control", "gateway", "other", "tensor"];\n',
    "ARCHITECTURE.md": "`lost` of `lost.rs`\n## Where do I change\n"
    "| a | `Request` of `gateway/src/request.rs`, `--flag`, `gateway/src/policy/` |\n",
    "SECURITY.md": "| promise | test |\n|---|---|\n| kept | `a_test`, `b_test` |\n",
    "crates/gateway/src/checked.rs": "#[cfg(test)]\nmod tests {\n    #[test]\n    fn a_test() {}\n"
    "    #[tokio::test(start_paused = true)]\n    async fn b_test() {}\n    fn c_test() {}\n}\n",
    "tests/src/process.rs": "unsafe { kill() }\n",
    "k8s/base/gateway.yaml": "image: andon:0.1.0\n",
}
BROKEN = [
    (files_are_short, "crates/gateway/src/long.rs", "\n" * (LINES_MAX + 1)),
    (files_are_short, "tests/python/long.py", "\n" * (LINES_MAX + 1)),
    (crates_keep_the_law, "crates/gateway/Cargo.toml", "[dependencies]\nengine.workspace = true\n"),
    (crates_keep_the_law, "crates/gateway/Cargo.toml", "[dependencies]\nweb.workspace = true\n"),
    (crates_keep_the_law, "crates/control/Cargo.toml", "[build-dependencies]\ngateway = '1'\n"),
    (crates_keep_the_law, "crates/tensor/Cargo.toml", "[dev-dependencies]\nprotocol = '1'\n"),
    (crates_keep_the_law, "crates/other/Cargo.toml", "[dependencies]\n"),
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
    (modules_keep_to_their_floors, "crates/gateway/src/auth.rs", "use crate::limit::Limit;\n"),
    (modules_keep_to_their_floors, "crates/gateway/src/auth.rs", "fn a(b: super::stack::B) {}\n"),
    (modules_keep_to_their_floors, "crates/gateway/src/auth/jwks.rs", "use super::super::cache::B;\n"),
    (modules_keep_to_their_floors, "crates/gateway/src/auth.rs", "use crate::{\n    grpc::{A, B},\n};\n"),
    (modules_keep_to_their_floors, "crates/gateway/src/auth.rs", "use crate::Grpc;\n"),
    (modules_keep_to_their_floors, "crates/gateway/src/auth.rs", "use crate::Settings;\n"),
    (modules_keep_to_their_floors, "crates/gateway/src/other.rs", "use crate::policy::Policy;\n"),
    *[
        (modules_import_in_no_circle, files)
        for files in (
            {"crates/worker/src/a.rs": "use crate::b::B;\n", "crates/worker/src/b.rs": "use super::a::A;\n"},
            {
                "crates/worker/src/a/deep.rs": "use crate::b::B;\n",
                "crates/worker/src/a.rs": "mod deep;\n",
                "crates/worker/src/b.rs": "use crate::{c as d, e};\n",
                "crates/worker/src/c.rs": "fn c() {\n    crate::a::f()\n}\n",
            },
            {
                "crates/worker/src/a.rs": "mod b;\nmod c;\npub use c::C;\n",
                "crates/worker/src/a/b.rs": "use super::C;\n",
                "crates/worker/src/a/c.rs": "use super::b::B;\n",
            },
        )
    ],
    *[
        (no_argument_is_a_tuple, "crates/worker/src/a.rs", f"{code}\n")
        for code in (
            "fn a((b, c): (u8, u8)) {}",
            "fn a<F: Fn(u8) -> u8>(\n    &self,\n    b: u8,\n    c: &'static mut (u8, u8),\n) {}",
            "#[cfg(test)]\nmod tests {\n    fn a(#[x] _: (u8, Vec<(u8, u8)>)) {}\n}",
        )
    ],
    (no_argument_is_a_tuple, "tests/src/lib.rs", "async fn a(b: (u8, u8)) {}\n"),
    (messages_stay_at_the_wire, "crates/gateway/src/route.rs", "use protocol::inference::A;\n"),
    (messages_stay_at_the_wire, "crates/gateway/src/route.rs", "use protocol::{Error,\n tei::v1};\n"),
    (messages_stay_at_the_wire, "crates/worker/src/infer.rs", "fn a(b: prost::bytes::Bytes) {}\n"),
    (tonic_stays_at_the_wire, "crates/worker/src/queue.rs", "use tonic::Status;\n"),
    (tonic_stays_at_the_wire, "crates/engine/src/lib.rs", "use tonic::Status;\n"),
    (tonic_stays_at_the_wire, "crates/gateway/src/upstream.rs", "use tonic::{Code, transport};\n"),
    (logged_crates_are_complete, "crates/worker/Cargo.toml", "[dependencies]\n"),
    (logged_crates_are_complete, "crates/cli/src/roles.rs", 'const CRATES: &[&str] = &["andon"];\n'),
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
    *[
        (promises_have_tests, "SECURITY.md", f"| promise | test |\n|---|---|\n| kept | {test} |\n")
        for test in ("", "a_test", "`d_test`", "`a_test`, `d_test`", "`c_test`")
    ],
    *[
        (places_of_changes_exist, "ARCHITECTURE.md", f"## Where do I change\n| a | `{place}` |\n")
        for place in ("lost_name", "Request::lost_name", "gateway/src/lost.rs", "gateway/src/lost/")
    ],
    (images_have_versions, "k8s/base/gateway.yaml", "image: andon:latest\n"),
]


def self_test():
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        failures += [f"the clean tree: {violation}" for violation in checked_tree(folder, {})]
    for rule, *change in BROKEN:
        # One file and its text, or several files.
        changes = change[0] if len(change) == 1 else {change[0]: change[1]}
        with tempfile.TemporaryDirectory() as folder:
            broken = {violation[0] for violation in checked_tree(folder, changes)}
        if broken != {rule.__name__}:
            shown = {name: text[:40] for name, text in changes.items()}
            failures.append(f"{shown}: {rule.__name__} expected, {broken or 'none'} failed")
    untried = {rule.__name__ for rule in RULES} - {rule.__name__ for rule, *_ in BROKEN}
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
    tree = Tree(folder)
    return [(rule.__name__, *violation) for rule in RULES for violation in rule(tree)]
