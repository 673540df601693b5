//! The doors from outside, with clients that other people wrote: NVIDIA's,
//! KServe's, MLServer's, OpenAI's, Cohere's, gRPC's for Node, a browser, and
//! schemathesis.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};
use fleet_tests::certificates::Authority;
use fleet_tests::process::{Andon, scratch};
use fleet_tests::scripts::{node, python};
use fleet_tests::{Fleet, models, program, root, soaking};

/// The demo models, and tiny ones for what those cannot do.
fn all_models() -> Result<Vec<String>> {
    let golden = root().join("tests/golden");
    let demo = models()?;
    let flags = [
        ("minilm", demo.join("minilm/1")),
        ("digits", demo.join("digits/1")),
        ("classifier", golden.join("bert-classification")),
        ("reranker", golden.join("bert-rerank")),
    ];
    let flags =
        flags.map(|(name, folder)| ["--model".to_owned(), format!("{name}={}", folder.display())]);
    Ok(flags.concat())
}

/// `andon serve` of all models, which asks nobody for a key.
async fn serve() -> Result<Andon> {
    let serve = Andon::start("serve", &all_models()?, None)?;
    serve.ready().await?;
    Ok(serve)
}

async fn fleet() -> Result<Fleet> {
    let flags = all_models()?;
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    Fleet::with(2, &flags, &[]).await
}

/// A server that asks its callers for keys, and some keys.
struct Guarded {
    serve: Andon,
    folder: PathBuf,
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // A folder that stays harms nobody.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Guarded {
    /// Serves all models to the tenants of a policy. Each has a key, in the
    /// file of its name.
    async fn start(policy: &str, tenants: &[&str], tls: Option<&Authority>) -> Result<Self> {
        let folder = scratch("outside")?;
        std::fs::create_dir_all(&folder)?;
        let path = |name: &str| folder.join(name).display().to_string();
        std::fs::write(folder.join("policy.toml"), policy)?;
        std::fs::write(folder.join("keys.toml"), "")?;
        for tenant in tenants {
            let made = Command::new(program("andon")?)
                .args(["keys", "create", "--tenant", tenant])
                .args(["--keys", &path("keys.toml")])
                .output()?;
            let error = String::from_utf8_lossy(&made.stderr);
            ensure!(made.status.success(), "no key of {tenant}: {error}");
            std::fs::write(folder.join(tenant), made.stdout)?;
        }
        let mut flags = all_models()?;
        flags.extend(["--policy".to_owned(), path("policy.toml")]);
        flags.extend(["--keys".to_owned(), path("keys.toml")]);
        if let Some(authority) = tls {
            std::fs::write(folder.join("ca.pem"), authority.pem())?;
            let (cert, key) = (folder.join("cert.pem"), folder.join("key.pem"));
            authority.issue(None)?.write(&cert, &key)?;
            flags.extend(["--tls-cert".to_owned(), path("cert.pem")]);
            flags.extend(["--tls-key".to_owned(), path("key.pem")]);
        }
        let serve = Andon::start("serve", &flags, None)?;
        serve.ready().await?;
        Ok(Self { serve, folder })
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }
}

/// The addresses of both doors, as flags.
fn doors(andon: &Andon) -> [String; 4] {
    let flag = |name: &str, address: SocketAddr| [name.to_owned(), address.to_string()];
    let [http, http_address] = flag("--http", andon.http);
    let [grpc, grpc_address] = flag("--grpc", andon.grpc);
    [http, http_address, grpc, grpc_address]
}

async fn triton_http(andon: &Andon) -> Result<()> {
    let doors = doors(andon);
    let mut flags: Vec<&str> = doors.iter().map(String::as_str).collect();
    flags.push("--repository-control");
    python("triton_http.py", &flags).await?;
    Ok(())
}

#[tokio::test]
async fn tritons_client_over_http_gets_the_bits_of_grpc() -> Result<()> {
    triton_http(&serve().await?).await?;
    triton_http(&fleet().await?.gateway).await
}

/// What they send is taken as it is, over REST and over gRPC.
async fn sdks(andon: &Andon) -> Result<()> {
    let doors = doors(andon);
    let flags: Vec<&str> = doors.iter().map(String::as_str).collect();
    python("kserve_client.py", &flags).await?;
    python("mlserver_codecs.py", &flags).await?;
    Ok(())
}

#[tokio::test]
async fn the_sdks_of_kserve_and_mlserver_work_unchanged_against_serve() -> Result<()> {
    sdks(&serve().await?).await
}

#[tokio::test]
async fn the_sdks_of_kserve_and_mlserver_work_unchanged_against_a_fleet() -> Result<()> {
    sdks(&fleet().await?.gateway).await
}

#[tokio::test]
async fn openais_clients_in_python_and_node() -> Result<()> {
    let fleet = fleet().await?;
    let http = fleet.gateway.http.to_string();
    python("openai_client.py", &["--http", &http]).await?;
    node("openai_node.mjs", &["--http", &http]).await?;
    Ok(())
}

#[tokio::test]
async fn openais_errors_of_keys_and_quotas() -> Result<()> {
    let policy = "
        [tenants.team]
        models = [\"minilm\"]
        [tenants.spender]
        models = [\"*\"]
        quota = { requests_per_second = 0.01, burst = 1 }
    ";
    let guarded = Guarded::start(policy, &["team", "spender"], None).await?;
    let http = guarded.serve.http.to_string();
    let (key, spent) = (guarded.path("team"), guarded.path("spender"));
    let flags = [
        "--http",
        &http,
        "--key-file",
        &key,
        "--spent-key-file",
        &spent,
    ];
    python("openai_client.py", &flags).await?;
    Ok(())
}

#[tokio::test]
async fn coheres_clients_rerank() -> Result<()> {
    let serve = serve().await?;
    let http = serve.http.to_string();
    python(
        "cohere_client.py",
        &["--http", &http, "--reranker", "reranker"],
    )
    .await?;
    Ok(())
}

#[tokio::test]
async fn grpc_js_over_tls_with_a_key() -> Result<()> {
    let policy = "
        [tenants.team]
        models = [\"digits\"]
    ";
    let authority = Authority::new()?;
    let guarded = Guarded::start(policy, &["team"], Some(&authority)).await?;
    // The certificate is for a name, not for an address.
    let grpc = format!("localhost:{}", guarded.serve.grpc.port());
    let (ca, key) = (guarded.path("ca.pem"), guarded.path("team"));
    node(
        "grpc_js.mjs",
        &["--grpc", &grpc, "--ca", &ca, "--key-file", &key],
    )
    .await?;
    Ok(())
}

#[tokio::test]
async fn the_page_works_in_a_browser() -> Result<()> {
    let policy = "
        [tenants.team]
        models = [\"minilm\"]
    ";
    let serve = serve().await?;
    let guarded = Guarded::start(policy, &["team"], None).await?;
    let (http, keyed) = (serve.http.to_string(), guarded.serve.http.to_string());
    let key = guarded.path("team");
    let screenshots = root().join("target/browser").display().to_string();
    let flags = [
        "--http",
        &http,
        "--guarded",
        &keyed,
        "--key-file",
        &key,
        "--screenshots",
        &screenshots,
        "--operations",
        if soaking() { "all" } else { "some" },
    ];
    let output = node("browser.mjs", &flags).await?;
    print!("{output}");
    Ok(())
}

/// It takes ninety seconds, and ten minutes in `make soak`.
#[tokio::test]
async fn no_generated_call_breaks_the_document() -> Result<()> {
    let seconds = if soaking() { "600" } else { "90" };
    let serve = serve().await?;
    let http = serve.http.to_string();
    let output = python("openapi.py", &["--http", &http, "--seconds", seconds]).await?;
    print!("{output}");
    Ok(())
}
