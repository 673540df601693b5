//! Who may call: keys, tokens and certificates, and attacks on them.

mod certificates;
mod tokens;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{call, pixels};
use fleet_tests::process::{Andon, free_port, scratch};
use fleet_tests::{Fleet, program, root, until};
use protocol::inference::{LogSettingsRequest, RepositoryModelUnloadRequest};
use tonic::{Code, Status};

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// A question of reflection: which services there are.
#[derive(Clone, PartialEq, prost::Message)]
struct ListServices {
    #[prost(string, tag = "7")]
    list_services: String,
}

const TENANTS: &str = r#"
    [tenants.vision]
    models = ["dig*"]
    certificates = ["spiffe://andon/vision"]
    [tenants.search]
    models = ["minilm", "rerank-*"]
    certificates = ["spiffe://andon/search"]
    [tenants.operations]
    administrator = true
    models = ["*"]
"#;

/// A gateway that asks who calls, over a worker that has the digits.
struct Guarded {
    fleet: Fleet,
    folder: PathBuf,
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // Nothing else is in it; a file that stays harms nobody.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Guarded {
    async fn start(policy: &str, files: &[(&str, &str)], flags: &[&str]) -> Result<Self> {
        let folder = scratch("identity")?;
        std::fs::create_dir_all(&folder)?;
        for (name, text) in [&[("policy.toml", policy), ("keys.toml", "")], files].concat() {
            std::fs::write(folder.join(name), text)?;
        }
        let path = |name: &str| folder.join(name).display().to_string();
        let (policy, keys) = (path("policy.toml"), path("keys.toml"));
        let mut all = vec!["--policy", &policy, "--keys", &keys, "--log", "debug"];
        all.extend(flags);
        let fleet = Fleet::with(1, &["--model", &digits()], &all).await?;
        Ok(Self { fleet, folder })
    }

    /// Runs `andon keys` on the gateway's file; what it prints.
    fn keys(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new(program("andon")?)
            .arg("keys")
            .args(arguments)
            .arg("--keys")
            .arg(self.folder.join("keys.toml"))
            .output()?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{arguments:?}: {text}");
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// A key that the gateway knows already.
    async fn key(&self, tenant: &str) -> Result<String> {
        let key = self.keys(&["create", "--tenant", tenant])?;
        until(Duration::from_secs(20), "the key is known", || async {
            Ok(self.infer(&[("x-api-key", &key)]).await?.code() != Code::Unauthenticated)
        })
        .await?;
        Ok(key)
    }

    /// Asks for the label of an image.
    async fn infer(&self, metadata: &[(&str, &str)]) -> Result<Status> {
        let address = self.fleet.gateway.grpc;
        call(address, INFER, metadata, &pixels(&[[1.0; 64]])).await
    }

    async fn refused(&self, reason: &str) -> Result<f64> {
        let name = format!("andon_gateway_auth_refused_total{{reason=\"{reason}\"}}");
        Ok(self.fleet.gateway.metric(&name).await?.unwrap_or_default())
    }

    fn says_nothing_of(&self, secret: &str) -> Result<()> {
        let tail = &secret[secret.len() - 20..];
        ensure!(
            !self.fleet.gateway.logged().contains(tail),
            "a secret is in the log"
        );
        let worker = self.fleet.workers[0].as_ref().context("a worker")?;
        ensure!(
            !worker.logged().contains(tail),
            "a secret is in the worker's log"
        );
        Ok(())
    }
}

fn digits() -> String {
    format!("digits={}", root().join("demo/digits/1").display())
}

/// Another secret behind the same prefix.
fn forged(key: &str) -> String {
    let (rest, last) = key.split_at(key.len() - 1);
    format!("{rest}{}", if last == "A" { "Q" } else { "A" })
}

fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

fn is(status: &Status, code: Code, text: &str) -> Result<()> {
    ensure!(
        status.code() == code && status.message().contains(text),
        "{code:?} {text}: {status:?}"
    );
    Ok(())
}

#[tokio::test]
async fn keys_let_in_whom_they_stand_for() -> Result<()> {
    let guarded = Guarded::start(TENANTS, &[], &[]).await?;
    is(
        &guarded.infer(&[]).await?,
        Code::Unauthenticated,
        "x-api-key",
    )?;
    let key = guarded.key("vision").await?;
    let shown = bearer(&key);
    is(
        &guarded.infer(&[("authorization", &shown)]).await?,
        Code::Ok,
        "",
    )?;
    is(&guarded.infer(&[("api-key", &key)]).await?, Code::Ok, "")?;
    let forged = forged(&key);
    is(
        &guarded.infer(&[("x-api-key", &forged)]).await?,
        Code::Unauthenticated,
        "is unknown",
    )?;
    is(
        &guarded.infer(&[("x-api-key", "sk-1")]).await?,
        Code::Unauthenticated,
        "",
    )?;
    // Another tenant's key is good, but not for this model.
    let other = guarded.key("search").await?;
    is(
        &guarded.infer(&[("x-api-key", &other)]).await?,
        Code::PermissionDenied,
        "model",
    )?;
    let both = [
        ("x-api-key", key.as_str()),
        ("authorization", &bearer(&other)),
    ];
    is(
        &guarded.infer(&both).await?,
        Code::Unauthenticated,
        "several",
    )?;

    for reason in ["missing", "key_unknown", "malformed", "contradictory"] {
        ensure!(
            guarded.refused(reason).await? >= 1.0,
            "{reason} is not counted"
        );
    }
    for secret in [&key, &other, &forged] {
        guarded.says_nothing_of(secret)?;
    }
    Ok(())
}

#[tokio::test]
async fn keys_end_when_they_expire_or_are_revoked() -> Result<()> {
    let guarded = Guarded::start(TENANTS, &[], &[]).await?;
    let key = guarded.key("vision").await?;
    let other = guarded.key("search").await?;
    let brief = guarded.keys(&["create", "--tenant", "vision", "--expires", "1s"])?;
    let brief = [("x-api-key", brief.as_str())];
    until(Duration::from_secs(20), "the key expires", || async {
        Ok(guarded.infer(&brief).await?.message().contains("expired"))
    })
    .await?;
    guarded.keys(&["revoke", &key[6..14]])?;
    let revoked = [("x-api-key", key.as_str())];
    until(Duration::from_secs(20), "the key is revoked", || async {
        Ok(guarded.infer(&revoked).await?.message().contains("revoked"))
    })
    .await?;
    is(
        &guarded.infer(&[("x-api-key", &forged(&key))]).await?,
        Code::Unauthenticated,
        "is unknown",
    )?;
    is(
        &guarded.infer(&[("x-api-key", &other)]).await?,
        Code::PermissionDenied,
        "model",
    )?;

    let list = guarded.keys(&["list"])?;
    for text in [
        &key[6..14],
        "vision",
        "search",
        "revoked",
        "expired",
        "good",
    ] {
        ensure!(list.contains(text), "{text}: {list}");
    }
    let stored = std::fs::read_to_string(guarded.folder.join("keys.toml"))?;
    ensure!(!list.contains(&key[15..]) && !stored.contains(&key[15..]));
    ensure!(guarded.refused("key_expired").await? >= 1.0);
    ensure!(guarded.refused("key_revoked").await? >= 1.0);
    guarded.says_nothing_of(&key)
}

#[tokio::test]
async fn a_stream_ends_with_its_key() -> Result<()> {
    let guarded = Guarded::start(TENANTS, &[], &[]).await?;
    let key = guarded.key("vision").await?;
    let (sender, messages) = tokio::sync::mpsc::channel(1);
    let messages = futures::stream::unfold(messages, |mut messages| async move {
        let message = messages.recv().await?;
        Some((message, messages))
    });
    let mut request = tonic::Request::new(messages);
    request.metadata_mut().insert("x-api-key", key.parse()?);
    sender.send(pixels(&[[1.0; 64]])).await?;
    let mut client = fleet_tests::calls::client(guarded.fleet.gateway.grpc).await?;
    let mut responses = client.model_stream_infer(request).await?.into_inner();
    let response = responses.message().await?.context("no response")?;
    ensure!(response.error_message.is_empty(), "{response:?}");
    guarded.keys(&["revoke", &key[6..14]])?;
    let shown = [("x-api-key", key.as_str())];
    until(Duration::from_secs(20), "the key is revoked", || async {
        Ok(guarded.infer(&shown).await?.message().contains("revoked"))
    })
    .await?;
    sender.send(pixels(&[[1.0; 64]])).await?;
    let response = responses.message().await?.context("no response")?;
    ensure!(response.error_message.contains("revoked"), "{response:?}");
    guarded.says_nothing_of(&key)
}

#[tokio::test]
async fn administrative_calls_need_the_role() -> Result<()> {
    let guarded = Guarded::start(TENANTS, &[], &[]).await?;
    let address = guarded.fleet.gateway.grpc;
    let key = guarded.key("vision").await?;
    let administrator = guarded.key("operations").await?;
    let unload = RepositoryModelUnloadRequest {
        model_name: "digits".to_owned(),
        ..Default::default()
    };
    let service = "/inference.GRPCInferenceService";
    for method in [
        "RepositoryModelLoad",
        "RepositoryModelUnload",
        "TraceSetting",
        "LogSettings",
    ] {
        let path = format!("{service}/{method}");
        let status = call(address, &path, &[], &unload).await?;
        is(&status, Code::Unauthenticated, "")?;
        let status = call(address, &path, &[("x-api-key", &key)], &unload).await?;
        is(&status, Code::PermissionDenied, "administrator")?;
    }
    is(&guarded.infer(&[("x-api-key", &key)]).await?, Code::Ok, "")?;
    let role = [("x-api-key", administrator.as_str())];
    let path = format!("{service}/LogSettings");
    is(
        &call(address, &path, &role, &LogSettingsRequest::default()).await?,
        Code::Ok,
        "",
    )?;
    let path = format!("{service}/RepositoryModelUnload");
    is(&call(address, &path, &role, &unload).await?, Code::Ok, "")?;
    Ok(())
}

const PROBES: [&str; 3] = [
    "/grpc.health.v1.Health/Check",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
];

#[tokio::test]
async fn probes_are_open_and_all_else_requires_a_credential() -> Result<()> {
    let guarded = Guarded::start(TENANTS, &[], &[]).await?;
    let address = guarded.fleet.gateway.grpc;
    // Whoever it is may say little.
    let long = ListServices {
        list_services: "x".repeat(8192),
    };
    for path in PROBES {
        is(&call(address, path, &[], &()).await?, Code::Ok, "")?;
        let bad = [("x-api-key", "bad")];
        is(&call(address, path, &bad, &()).await?, Code::Ok, "")?;
        let status = call(address, path, &[], &long).await?;
        let refused = matches!(status.code(), Code::ResourceExhausted | Code::OutOfRange);
        ensure!(refused, "{path}: {status:?}");
    }
    let status = call(address, "/no.Such/Method", &[], &()).await?;
    is(&status, Code::Unimplemented, "")?;
    for path in [
        REFLECTION,
        "/inference.GRPCInferenceService/ServerMetadata",
        "/inference.GRPCInferenceService/RepositoryIndex",
        "/inference.GRPCInferenceService/ModelStreamInfer",
        "/tei.v1.Info/Info",
        "/tei.v1.Rerank/RerankStream",
    ] {
        let status = call(address, path, &[], &()).await?;
        is(&status, Code::Unauthenticated, "")?;
    }
    Ok(())
}

#[tokio::test]
async fn reflection_follows_the_policy() -> Result<()> {
    let guarded = Guarded::start(TENANTS, &[], &[]).await?;
    let address = guarded.fleet.gateway.grpc;
    let list = ListServices {
        list_services: "*".to_owned(),
    };
    let reflection =
        async |metadata: &[(&str, &str)]| call(address, REFLECTION, metadata, &list).await;
    let key = guarded.key("vision").await?;
    let with_key = reflection(&[("x-api-key", key.as_str())]).await?;
    is(&with_key, Code::Ok, "")?;

    let policy = guarded.folder.join("policy.toml");
    std::fs::write(&policy, format!("reflection = \"ajar\"\n{TENANTS}"))?;
    until(
        Duration::from_secs(20),
        "the bad policy is seen",
        || async {
            Ok(guarded
                .fleet
                .gateway
                .logged()
                .contains("line 1, reflection"))
        },
    )
    .await?;
    is(&guarded.infer(&[("x-api-key", &key)]).await?, Code::Ok, "")?;
    is(&reflection(&[]).await?, Code::Unauthenticated, "")?;
    std::fs::write(&policy, format!("reflection = \"open\"\n{TENANTS}"))?;
    until(Duration::from_secs(20), "reflection is open", || async {
        Ok(reflection(&[]).await?.code() == Code::Ok)
    })
    .await?;
    let logged = guarded.fleet.gateway.logged();
    let bad = logged.matches("line 1, reflection").count();
    ensure!(bad == 1, "the bad policy is logged {bad} times");
    is(&guarded.infer(&[]).await?, Code::Unauthenticated, "")
}

#[tokio::test]
async fn public_addresses_need_identity_and_loopback_does_not() -> Result<()> {
    let refused = |flags: &[&str]| -> Result<String> {
        let output = Command::new(program("andon")?).args(flags).output()?;
        ensure!(!output.status.success(), "it started: {flags:?}");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let worker = [
        "gateway",
        "--worker",
        "127.0.0.1:1",
        "--admin-addr",
        "127.0.0.1:0",
    ];
    let (public, local) = ("0.0.0.0:0", "127.0.0.1:0");
    for (grpc, http) in [(public, local), (local, public), ("[::]:0", local)] {
        let flags = [&worker[..], &["--grpc-addr", grpc, "--http-addr", http]].concat();
        let text = refused(&flags)?;
        ensure!(
            text.contains("--policy") && text.contains("--insecure"),
            "{text}"
        );
    }
    let model = digits();
    let flags = ["serve", "--model", &model, "--grpc-addr", public];
    ensure!(refused(&flags)?.contains("--insecure"));
    ensure!(refused(&[&worker[..], &["--policy", "/nowhere"]].concat())?.contains("policy file"));

    let port = free_port()?.port();
    let model = ["--model".to_owned(), digits()];
    let flags = [&model[..], &["--insecure".to_owned()]].concat();
    let open = Andon::start("serve", &flags, Some(([0, 0, 0, 0], port).into()))?;
    open.ready().await?;
    let address = ([127, 0, 0, 1], port).into();
    is(
        &call(address, INFER, &[], &pixels(&[[1.0; 64]])).await?,
        Code::Ok,
        "",
    )?;
    let local = Andon::start("serve", &model, None)?;
    local.ready().await?;
    is(
        &call(local.grpc, INFER, &[], &pixels(&[[1.0; 64]])).await?,
        Code::Ok,
        "",
    )
}

#[tokio::test]
async fn keys_over_clear_text_are_warned_of_and_may_be_refused() -> Result<()> {
    let folder = scratch("clear-text")?;
    std::fs::create_dir_all(&folder)?;
    let path = |name: &str| folder.join(name).display().to_string();
    std::fs::write(path("policy.toml"), TENANTS)?;
    std::fs::write(path("keys.toml"), "")?;
    let keys = ["keys", "create", "--tenant", "vision", "--keys"];
    let created = Command::new(program("andon")?)
        .args(keys)
        .arg(path("keys.toml"))
        .output()?;
    let key = String::from_utf8(created.stdout)?.trim().to_owned();
    let model = digits();
    let (policy, file) = (path("policy.toml"), path("keys.toml"));
    let common = ["--model", &model, "--policy", &policy, "--keys", &file];
    let (public, local) = ([0, 0, 0, 0], [127, 0, 0, 1]);
    for (address, flags, code, warned) in [
        (public, &[][..], Code::Ok, true),
        (public, &["--require-tls"], Code::Unauthenticated, true),
        (local, &["--require-tls"], Code::Ok, false),
    ] {
        let port = free_port()?.port();
        let flags = [&common[..], flags].concat();
        let flags: Vec<String> = flags.iter().map(ToString::to_string).collect();
        let andon = Andon::start("serve", &flags, Some((address, port).into()))?;
        andon.ready().await?;
        let address = (local, port).into();
        let status = call(
            address,
            INFER,
            &[("x-api-key", &key)],
            &pixels(&[[1.0; 64]]),
        )
        .await?;
        let text = if code == Code::Ok { "" } else { "clear text" };
        is(&status, code, text)?;
        ensure!(andon.logged().contains("clear text") == warned, "{flags:?}");
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}
