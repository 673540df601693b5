//! TLS whose certificates change, and callers who show their own.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{infer, pixels};
use fleet_tests::certificates::{Authority, Certificate, client};
use fleet_tests::until;
use tonic::Code;

use super::{Guarded, TENANTS};

const TIMEOUT: Duration = Duration::from_secs(20);

#[tokio::test]
async fn certificates_change_under_load_and_no_request_fails() -> Result<()> {
    let authority = Arc::new(Authority::new()?);
    let first = authority.issue(None)?;
    let folder = fleet_tests::process::scratch("certificates")?;
    std::fs::create_dir_all(&folder)?;
    let (cert, key) = (folder.join("tls.crt"), folder.join("tls.key"));
    first.write(&cert, &key)?;
    let (cert_flag, key_flag) = (cert.display().to_string(), key.display().to_string());
    let policy = format!("anonymous = \"vision\"\n{TENANTS}");
    let flags = ["--tls-cert", &cert_flag, "--tls-key", &key_flag];
    let guarded = Guarded::start(&policy, &[], &flags).await?;
    let address = guarded.fleet.gateway.grpc;

    // Each request has a connection of its own: those that are open keep the
    // certificate that they began with. One more goes on all the while.
    let (stop, response) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let seen = Arc::new(Mutex::new(None));
    let lasting = client(address, &authority, None, &Arc::default()).await?;
    let mut load = tokio::task::JoinSet::new();
    for slot in 0..4 {
        let (stop, response, seen) = (stop.clone(), response.clone(), seen.clone());
        let (authority, lasting) = (authority.clone(), lasting.clone());
        load.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let client = match slot {
                    0 => lasting.clone(),
                    _ => client(address, &authority, None, &seen).await?,
                };
                infer(&client, pixels(&[[1.0; 64]]), TIMEOUT).await?;
                response.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        });
    }
    for _ in 0..3 {
        let next = authority.issue(None)?;
        next.write(&cert, &key)?;
        let (seen, next) = (&seen, &next);
        until(TIMEOUT, "the new certificate is shown", || async move {
            Ok(seen
                .lock()
                .is_ok_and(|seen| seen.as_ref() == Some(&next.der)))
        })
        .await?;
        let before = response.load(Ordering::Relaxed);
        until(TIMEOUT, "the load goes on", || async {
            Ok(response.load(Ordering::Relaxed) > before + 20)
        })
        .await?;
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(outcome) = load.join_next().await {
        outcome?.context("a request failed")?;
    }
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}

#[tokio::test]
async fn a_certificate_stands_for_its_tenant() -> Result<()> {
    let (authority, callers) = (Authority::new()?, Authority::new()?);
    let server = authority.issue(None)?;
    let folder = fleet_tests::process::scratch("mutual")?;
    std::fs::create_dir_all(&folder)?;
    let path = |name: &str| folder.join(name).display().to_string();
    server.write(&folder.join("tls.crt"), &folder.join("tls.key"))?;
    std::fs::write(folder.join("ca.crt"), callers.pem())?;
    let (cert, key, ca) = (path("tls.crt"), path("tls.key"), path("ca.crt"));
    let flags = [
        "--tls-cert",
        &cert,
        "--tls-key",
        &key,
        "--tls-client-ca",
        &ca,
    ];
    let guarded = Guarded::start(TENANTS, &[], &flags).await?;
    let address = guarded.fleet.gateway.grpc;
    let code = async |shown: Option<&Certificate>| -> Result<Code> {
        let client = client(address, &authority, shown, &Arc::default()).await?;
        let response = infer(&client, pixels(&[[1.0; 64]]), TIMEOUT).await;
        Ok(response.err().map_or(Code::Ok, |status| status.code()))
    };
    let vision = callers.issue(Some("spiffe://andon/vision"))?;
    let search = callers.issue(Some("spiffe://andon/search"))?;
    let unknown = callers.issue(Some("spiffe://andon/unknown"))?;
    let forged = authority.issue(Some("spiffe://andon/vision"))?;
    ensure!(code(Some(&vision)).await? == Code::Ok);
    ensure!(code(Some(&search)).await? == Code::PermissionDenied);
    ensure!(code(Some(&unknown)).await? == Code::Unauthenticated);
    // Without a certificate that an authority vouches for there is no
    // connection: what the client makes of that is its own matter.
    for shown in [None, Some(&forged)] {
        let refused = code(shown).await;
        ensure!(!refused.is_ok_and(|code| code == Code::Ok), "it succeeded");
    }
    let refused = "andon_connections_refused_total{listener=\"gateway\",reason=\"tls\"}";
    until(TIMEOUT, "the refused connections are counted", || async {
        Ok(guarded.fleet.gateway.metric(refused).await? >= Some(2.0))
    })
    .await?;
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}
