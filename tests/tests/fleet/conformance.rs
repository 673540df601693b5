//! Clients that nobody here wrote, against one process and against a fleet.

use std::net::SocketAddr;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use fleet_tests::process::Andon;
use fleet_tests::scripts::python;
use fleet_tests::{Fleet, models, root};
use platform::server::WORKER_MESSAGE_BYTES_MORE;

/// Runs a script that calls a server over gRPC.
async fn script(name: &str, address: SocketAddr, flags: &[&str]) -> Result<()> {
    let grpc = address.to_string();
    python(name, &[&["--grpc", &grpc], flags].concat()).await?;
    Ok(())
}

async fn buf_curl(address: SocketAddr) -> Result<()> {
    let path = std::env::var("PATH").unwrap_or_default();
    let tools = root().join("target/tools/bin");
    let buf = format!("{}:{path}", tools.display())
        .split(':')
        .map(|folder| std::path::Path::new(folder).join("buf"))
        .find(|buf| buf.exists())
        .context("buf is missing: run `make test`")?;
    let output = tokio::process::Command::new("bash")
        .arg(root().join("tests/python/conformance/buf_curl.sh"))
        .arg(address.to_string())
        .arg(buf)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await?;
    if !output.status.success() {
        bail!(
            "buf_curl.sh failed:\n{}\n{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

async fn serve(flags: &[&str]) -> Result<Andon> {
    let mut all = vec!["--repository".to_owned(), models()?.display().to_string()];
    all.extend(flags.iter().map(ToString::to_string));
    let serve = Andon::start("serve", &all, None)?;
    serve.ready().await?;
    Ok(serve)
}

#[tokio::test]
async fn triton_client_against_serve() -> Result<()> {
    let serve = serve(&[]).await?;
    script("triton_client.py", serve.grpc, &["--repository-control"]).await
}

#[tokio::test]
async fn triton_client_against_a_fleet() -> Result<()> {
    let fleet = Fleet::start(2).await?;
    script(
        "triton_client.py",
        fleet.gateway.grpc,
        &["--repository-control"],
    )
    .await
}

#[tokio::test]
async fn health_and_reflection_of_every_role() -> Result<()> {
    let fleet = Fleet::start(1).await?;
    let serve = serve(&[]).await?;
    let flags = ["--repository-control"];
    for address in [fleet.gateway.grpc, serve.grpc] {
        script("health_reflection.py", address, &flags).await?;
    }
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    script("health_reflection.py", worker.grpc, &flags).await
}

#[tokio::test]
async fn text_calls_of_every_role() -> Result<()> {
    let golden = root().join("tests/golden");
    let model = |name: &str, folder: &str| format!("{name}={}", golden.join(folder).display());
    let minilm = format!("minilm={}", models()?.join("minilm/1").display());
    let classifier = model("classifier", "bert-classification");
    let reranker = model("reranker", "bert-rerank");
    let flags = [
        "--model",
        &minilm,
        "--model",
        &classifier,
        "--model",
        &reranker,
    ];
    let fleet = Fleet::with(1, &flags, &[]).await?;
    let flags = ["--classifier", "classifier", "--reranker", "reranker"];
    script("tei_client.py", fleet.gateway.grpc, &flags).await?;
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    script("tei_client.py", worker.grpc, &flags).await
}

#[tokio::test]
async fn text_calls_without_a_classifier() -> Result<()> {
    let serve = serve(&[]).await?;
    script("tei_client.py", serve.grpc, &[]).await
}

#[tokio::test]
async fn buf_curl_of_every_role() -> Result<()> {
    let fleet = Fleet::start(1).await?;
    buf_curl(fleet.gateway.grpc).await?;
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    buf_curl(worker.grpc).await?;
    buf_curl(serve(&[]).await?.grpc).await
}

#[tokio::test]
async fn bad_input_has_the_same_errors_in_every_role() -> Result<()> {
    let limit = ["--message-bytes-max", "8MiB"];
    let fleet = Fleet::with(1, &limit, &limit).await?;
    let flags = ["--message-bytes-max", "8388608"];
    script("bad_input.py", fleet.gateway.grpc, &flags).await?;
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    // A worker takes what a gateway may add to a message at its limit.
    let more = ((8 << 20) + WORKER_MESSAGE_BYTES_MORE).to_string();
    let more = ["--message-bytes-max", more.as_str()];
    script("bad_input.py", worker.grpc, &more).await?;
    script("bad_input.py", serve(&limit).await?.grpc, &flags).await
}
