//! Who calls over HTTP: TLS, certificates of callers, and tokens.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::pixels;
use fleet_tests::certificates::{Authority, Certificate};
use fleet_tests::process::scratch;
use fleet_tests::tokens::{AUDIENCE, ISSUER, Signer, claims, key_set};
use fleet_tests::{Fleet, until};
use reqwest::{Client, Version};
use serde_json::json;

use super::{Protocol, Response, digits, fetch, in_json};

const TENANTS: &str = r#"
    [tenants.vision]
    models = ["dig*"]
    certificates = ["spiffe://andon/vision"]
    [tenants.search]
    models = ["minilm"]
    certificates = ["spiffe://andon/search"]
"#;

/// A gateway that speaks TLS, over a worker that has the digits.
struct Secure {
    fleet: Fleet,
    folder: PathBuf,
    authority: Authority,
}

impl Drop for Secure {
    fn drop(&mut self) {
        // A folder that stays harms nobody.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Secure {
    /// With these files, some of which flags name.
    async fn start(files: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Self> {
        let (folder, authority) = (scratch("secure")?, Authority::new()?);
        std::fs::create_dir_all(&folder)?;
        let server = authority.issue(None)?;
        server.write(&folder.join("tls.crt"), &folder.join("tls.key"))?;
        for (name, text) in files {
            std::fs::write(folder.join(name), text)?;
        }
        let own = [("--tls-cert", "tls.crt"), ("--tls-key", "tls.key")];
        let flags = own.iter().chain(flags).flat_map(|(flag, name)| {
            let file = folder.join(name).display().to_string();
            [(*flag).to_owned(), file]
        });
        let flags: Vec<String> = flags.collect();
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let fleet = Fleet::with(1, &["--model", &digits()?], &flags).await?;
        Ok(Self {
            fleet,
            folder,
            authority,
        })
    }

    /// A client that trusts the gateway, and may show a certificate.
    fn client(&self, protocol: Protocol, shown: Option<&Certificate>) -> Result<Client> {
        let trusted = reqwest::Certificate::from_pem(self.authority.pem().as_bytes())?;
        let mut builder = Client::builder()
            .no_proxy()
            .tls_certs_only([trusted])
            .resolve("localhost", self.fleet.gateway.http)
            .timeout(Duration::from_secs(60));
        if let Some(shown) = shown {
            let (cert, key) = (self.folder.join("own.crt"), self.folder.join("own.key"));
            shown.write(&cert, &key)?;
            let pem = [std::fs::read(cert)?, std::fs::read(key)?].concat();
            builder = builder.identity(reqwest::Identity::from_pem(&pem)?);
        }
        let builder = match protocol {
            Protocol::Http1 => builder.http1_only(),
            Protocol::Http2 => builder.http2_prior_knowledge(),
        };
        Ok(builder.build()?)
    }

    /// A request for the label of an image.
    fn request(&self, client: &Client) -> reqwest::RequestBuilder {
        let port = self.fleet.gateway.http.port();
        let (body, _) = in_json(&pixels(&[[1.0; 64]]), true);
        let url = format!("https://localhost:{port}/v2/models/digits/infer");
        client.post(url).body(body)
    }
}

fn is(response: &Response, status: u16, code: &str) -> Result<()> {
    let found = response.json()?["code"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    ensure!(response.status == status && found == code, "{response:?}");
    Ok(())
}

#[tokio::test]
async fn both_versions_are_spoken_over_tls() -> Result<()> {
    let secure = Secure::start(&[], &[]).await?;
    for (protocol, version) in [
        (Protocol::Http1, Version::HTTP_11),
        (Protocol::Http2, Version::HTTP_2),
    ] {
        let client = secure.client(protocol, None)?;
        let response = secure.request(&client).send().await?;
        ensure!(response.version() == version, "{response:?}");
        ensure!(response.status() == 200, "{response:?}");
    }
    // Without TLS there is no answer.
    let url = format!("http://{}/v2/health/live", secure.fleet.gateway.http);
    let plain = Client::builder().no_proxy().build()?.get(url).send().await;
    ensure!(plain.is_err(), "{plain:?}");
    // Whoever trusts others does not speak to this gateway.
    let others = reqwest::Certificate::from_pem(Authority::new()?.pem().as_bytes())?;
    let others = Client::builder().no_proxy().tls_certs_only([others]);
    let refused = secure.request(&others.build()?).send().await;
    ensure!(refused.is_err(), "{refused:?}");
    Ok(())
}

#[tokio::test]
async fn a_certificate_stands_for_its_tenant_over_http() -> Result<()> {
    let callers = Authority::new()?;
    let pem = callers.pem();
    let files = [
        ("policy.toml", TENANTS),
        ("keys.toml", ""),
        ("ca.crt", pem.as_str()),
    ];
    let flags = [
        ("--policy", "policy.toml"),
        ("--keys", "keys.toml"),
        ("--tls-client-ca", "ca.crt"),
    ];
    let secure = Secure::start(&files, &flags).await?;
    let vision = callers.issue(Some("spiffe://andon/vision"))?;
    let search = callers.issue(Some("spiffe://andon/search"))?;
    let unknown = callers.issue(Some("spiffe://andon/unknown"))?;
    let forged = secure.authority.issue(Some("spiffe://andon/vision"))?;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let call = async |shown: Option<&Certificate>| -> Result<Response> {
            let client = secure.client(protocol, shown)?;
            fetch(secure.request(&client)).await
        };
        let response = call(Some(&vision)).await?;
        ensure!(response.status == 200, "{response:?}");
        is(&call(Some(&search)).await?, 403, "PERMISSION_DENIED")?;
        is(&call(Some(&unknown)).await?, 401, "UNAUTHENTICATED")?;
        for shown in [None, Some(&forged)] {
            let refused = call(shown).await;
            ensure!(refused.is_err(), "{refused:?}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_token_stands_for_its_tenant_over_http() -> Result<()> {
    let (signer, stranger) = (Signer::p256("e")?, Signer::p256("e")?);
    let policy = format!(
        "{TENANTS}\n[jwt]\njwks_file = \"jwks.json\"\nissuer = \"{ISSUER}\"\naudience = \"{AUDIENCE}\""
    );
    let set = key_set(&[&signer])?;
    let files = [
        ("policy.toml", policy.as_str()),
        ("keys.toml", ""),
        ("jwks.json", set.as_str()),
    ];
    let flags = [("--policy", "policy.toml"), ("--keys", "keys.toml")];
    let secure = Secure::start(&files, &flags).await?;
    let mut late = claims("vision");
    late["exp"] = json!(1);
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let client = secure.client(protocol, None)?;
        let call = async |token: String| fetch(secure.request(&client).bearer_auth(token)).await;
        let response = call(signer.sign(&claims("vision"))?).await?;
        ensure!(response.status == 200, "{response:?}");
        let other = call(signer.sign(&claims("search"))?).await?;
        is(&other, 403, "PERMISSION_DENIED")?;
        for token in [
            signer.sign(&late)?,
            stranger.sign(&claims("vision"))?,
            "no.real.token".to_owned(),
        ] {
            let refused = call(token).await?;
            is(&refused, 401, "UNAUTHENTICATED")?;
            ensure!(
                refused.headers.contains_key("www-authenticate"),
                "{refused:?}"
            );
        }
        is(
            &fetch(secure.request(&client)).await?,
            401,
            "UNAUTHENTICATED",
        )?;
    }
    Ok(())
}

#[tokio::test]
async fn a_call_whose_caller_leaves_counts_for_its_model() -> Result<()> {
    let fleet = Fleet::with(1, &["--model", &digits()?], &[]).await?;
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    let url = format!("http://{}/v2/models/digits/infer", fleet.gateway.http);
    let (body, _) = in_json(&pixels(&[[1.0; 64]]), true);
    let client = Client::builder().no_proxy().http1_only().build()?;
    worker.signal(libc::SIGSTOP)?;
    let call = client
        .post(url)
        .body(body)
        .timeout(Duration::from_millis(500));
    let left = call.send().await;
    ensure!(
        left.is_err_and(|error| error.is_timeout()),
        "it was answered"
    );
    let counted = until(Duration::from_secs(10), "the call is counted", || async {
        let page = fleet.gateway.get("/metrics").await?;
        Ok(page.lines().any(|line| {
            line.starts_with("andon_gateway_requests_total{model=\"digits\"")
                && line.ends_with("code=\"CANCELLED\"} 1")
        }))
    })
    .await;
    worker.signal(libc::SIGCONT)?;
    counted
}
