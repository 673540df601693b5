//! Attacks with tokens.

use anyhow::{Result, ensure};
use fleet_tests::tokens::{AUDIENCE, ISSUER, Signer, claims, key_set, now};
use serde_json::{Value, json};
use tonic::Code;
use wiremock::matchers::path;
use wiremock::{Mock, MockServer, ResponseTemplate};

use super::{Guarded, TENANTS, bearer, is};

fn policy(source: &str) -> String {
    format!(
        "{TENANTS}\n[jwt]\n{source}\nissuer = \"{ISSUER}\"\naudience = \"{AUDIENCE}\"\nleeway = \"5s\""
    )
}

async fn infer(guarded: &Guarded, token: &str) -> Result<tonic::Status> {
    guarded.infer(&[("authorization", &bearer(token))]).await
}

#[tokio::test]
async fn tokens_that_lie_are_refused() -> Result<()> {
    let signers = [Signer::rsa("r")?, Signer::p256("e")?, Signer::ed25519("d")?];
    let set = key_set(&[&signers[0], &signers[1], &signers[2]])?;
    let policy = policy("jwks_file = \"jwks.json\"");
    let guarded = Guarded::start(&policy, &[("jwks.json", &set)], &[]).await?;
    let right = claims("vision");
    for signer in &signers {
        let token = signer.sign(&right)?;
        is(&infer(&guarded, &token).await?, Code::Ok, "")?;
        is(&infer(&guarded, &token).await?, Code::Ok, "")?;
        guarded.says_nothing_of(&token)?;
        let other = signer.sign(&claims("search"))?;
        is(
            &infer(&guarded, &other).await?,
            Code::PermissionDenied,
            "model",
        )?;
        for (name, value, expected) in [
            ("exp", json!(now() - 60), "expired"),
            ("exp", Value::Null, "claim"),
            ("nbf", json!(now() + 60), "not valid yet"),
            ("aud", json!("others"), "audience of the token"),
            ("aud", Value::Null, "claim"),
            ("iss", json!("https://login.other"), "issuer of the token"),
            ("iss", Value::Null, "claim"),
            ("tenant", json!("nobody"), "tenant"),
        ] {
            let mut wrong = right.clone();
            wrong[name] = value;
            let status = infer(&guarded, &signer.sign(&wrong)?).await?;
            is(&status, Code::Unauthenticated, expected)?;
        }
        // One signer's token in another's name, and in nobody's.
        for kid in ["r", "e", "d", "none"] {
            let own = kid == signer.kid();
            let status = infer(&guarded, &signer.sign_as(kid, &right)?).await?;
            ensure!(own == (status.code() == Code::Ok), "{kid}: {status:?}");
        }
    }
    let forgeries = signers[0].forgeries(&right)?;
    ensure!(forgeries.len() == 16);
    for token in forgeries {
        is(&infer(&guarded, &token).await?, Code::Unauthenticated, "")?;
    }
    let stranger = Signer::rsa("r")?.sign(&right)?;
    is(
        &infer(&guarded, &stranger).await?,
        Code::Unauthenticated,
        "signature",
    )?;
    guarded.says_nothing_of(&stranger)
}

#[tokio::test]
async fn a_flood_of_unknown_signers_fetches_once() -> Result<()> {
    let (old, new) = (Signer::p256("old")?, Signer::ed25519("new")?);
    let server = MockServer::start().await;
    let answer = |set: String| ResponseTemplate::new(200).set_body_string(set);
    let page = Mock::given(path("/keys")).respond_with(answer(key_set(&[&old])?));
    let page = page.mount_as_scoped(&server).await;
    let source = format!("jwks_url = \"{}/keys\"", server.uri());
    let guarded = Guarded::start(&policy(&source), &[], &[]).await?;
    let timeout = std::time::Duration::from_secs(20);
    fleet_tests::until(timeout, "the signers are known", || async {
        Ok(guarded.fleet.gateway.logged().contains("keys were fetched"))
    })
    .await?;
    let token = old.sign(&claims("vision"))?;
    is(&infer(&guarded, &token).await?, Code::Ok, "")?;
    drop(page);
    Mock::given(path("/keys"))
        .respond_with(answer(key_set(&[&new])?))
        .mount(&server)
        .await;
    let fetches = async || server.received_requests().await.unwrap_or_default().len();
    let before = fetches().await;
    let mut flood = tokio::task::JoinSet::new();
    for number in 0..200 {
        let token = old.sign_as(&format!("made-up-{number}"), &claims("vision"))?;
        let address = guarded.fleet.gateway.grpc;
        flood.spawn(async move {
            let bearer = bearer(&token);
            let request = fleet_tests::calls::pixels(&[[1.0; 64]]);
            fleet_tests::calls::call(
                address,
                super::INFER,
                &[("authorization", &bearer)],
                &request,
            )
            .await
        });
    }
    // So many wait for the page; the others are rejected with a retry delay.
    while let Some(response) = flood.join_next().await {
        let status = response??;
        match status.code() {
            Code::Unavailable => is(&status, Code::Unavailable, "too many calls wait")?,
            _ => is(&status, Code::Unauthenticated, "unknown key")?,
        }
    }
    let after = fetches().await;
    ensure!(
        before >= 1 && after <= before + 1,
        "{before} fetches, then {after}"
    );
    // That fetch brought the new signer and took the old one away, with what
    // it had signed.
    is(
        &infer(&guarded, &new.sign(&claims("vision"))?).await?,
        Code::Ok,
        "",
    )?;
    is(
        &infer(&guarded, &token).await?,
        Code::Unauthenticated,
        "unknown key",
    )?;
    ensure!(fetches().await == after);
    Ok(())
}

#[tokio::test]
async fn signers_that_cannot_be_fetched_are_not_the_callers_fault() -> Result<()> {
    let server = MockServer::start().await;
    let source = format!("jwks_url = \"{}/keys\"", server.uri());
    let guarded = Guarded::start(&policy(&source), &[], &[]).await?;
    let signer = Signer::p256("e")?;
    let token = signer.sign(&claims("vision"))?;
    is(
        &infer(&guarded, &token).await?,
        Code::Unavailable,
        "unavailable",
    )?;
    let set = ResponseTemplate::new(200).set_body_string(key_set(&[&signer])?);
    Mock::given(path("/keys"))
        .respond_with(set)
        .mount(&server)
        .await;
    fleet_tests::until(
        std::time::Duration::from_secs(90),
        "the token is taken",
        || async { Ok(infer(&guarded, &token).await?.code() == Code::Ok) },
    )
    .await
}
