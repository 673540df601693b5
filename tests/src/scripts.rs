//! Scripts around clients that other people wrote: they know a server by its
//! addresses alone, and say how many checks passed.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::root;

/// Runs a script of `tests/python/conformance`; its failure is the caller's.
/// Its output is returned.
pub async fn python(name: &str, flags: &[&str]) -> Result<String> {
    let python = root().join("target/venv/bin/python");
    if !python.exists() {
        bail!("target/venv is missing: run `make test`");
    }
    let script = root().join("tests/python/conformance").join(name);
    run(python.as_os_str(), &script, flags).await
}

/// Runs a script of `tests/node`; its failure is the caller's. Its output is
/// returned.
pub async fn node(name: &str, flags: &[&str]) -> Result<String> {
    if !root().join("target/node/node_modules").exists() {
        bail!("target/node is missing: run `make test`");
    }
    let script = root().join("tests/node").join(name);
    run(OsStr::new("node"), &script, flags).await
}

async fn run(program: &OsStr, script: &Path, flags: &[&str]) -> Result<String> {
    let name = script.display();
    let output = tokio::process::Command::new(program)
        .arg(script)
        .args(flags)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .with_context(|| format!("{name} cannot be started"))?;
    let printed = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        // Checks that passed would hide those that did not.
        let failed = printed.lines().filter(|line| !line.starts_with("ok "));
        let failed = failed.collect::<Vec<_>>().join("\n");
        bail!("{name} failed:\n{error}\n{failed}");
    }
    if !printed.contains("checks passed") {
        bail!("{name} reported no checks:\n{printed}");
    }
    Ok(printed.into_owned())
}
