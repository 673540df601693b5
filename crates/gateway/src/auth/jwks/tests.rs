//! Signers behind a page that the test serves.

use std::sync::atomic::AtomicUsize;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

const OLD: &str = r#"{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"old","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

/// A page, and how often it was fetched.
struct Page {
    url: reqwest::Url,
    answer: Arc<Mutex<String>>,
    fetches: Arc<AtomicUsize>,
    _serving: OwnedTask,
}

fn ok(body: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}

async fn page(answer: String) -> Page {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/keys", listener.local_addr().unwrap());
    let answer = Arc::new(Mutex::new(answer));
    let fetches = Arc::new(AtomicUsize::new(0));
    let (served, counted) = (answer.clone(), fetches.clone());
    let serving = spawn_owned(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            counted.fetch_add(1, Ordering::SeqCst);
            let answer = served.lock().unwrap().clone();
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    Page {
        url: url.parse().unwrap(),
        answer,
        fetches,
        _serving: serving,
    }
}

impl Page {
    fn signers(&self) -> Arc<Signers> {
        Arc::new(Signers::new(&JwksSource::Url(self.url.clone())).unwrap())
    }

    fn now_answers(&self, answer: String) {
        *self.answer.lock().unwrap() = answer;
    }

    fn fetched(&self) -> usize {
        self.fetches.load(Ordering::SeqCst)
    }
}

async fn first_fetch(signers: &Signers) {
    let mut fetched = signers.fetched.subscribe();
    fetched.changed().await.unwrap();
}

#[tokio::test]
async fn a_flood_of_unknown_keys_fetches_once_for_all() {
    let page = page(ok(OLD)).await;
    let signers = page.signers();
    let _fetching = signers.fetching();
    first_fetch(&signers).await;
    assert!(signers.choose(Some("old")).await.is_ok());
    let number = signers.number();
    assert_eq!(page.fetched(), 1);
    page.now_answers(ok(&OLD.replace("\"old\"", "\"new\"")));
    let names: Vec<String> = (0..200).map(|number| format!("made-up-{number}")).collect();
    let flood = names.iter().map(|name| signers.choose(Some(name)));
    // So many wait for it; the others are rejected at once with a retry delay.
    let refused = futures::future::join_all(flood).await;
    let refused: Vec<Rejection> = refused.into_iter().filter_map(Result::err).collect();
    let with = |rejection: Rejection| refused.iter().filter(|one| **one == rejection).count();
    assert_eq!(with(UNKNOWN) + with(BUSY), 200);
    assert!(with(UNKNOWN) >= WAITING_MAX && with(BUSY) > 0);
    assert_eq!(page.fetched(), 2);
    // That fetch brought the new key and took the old one away.
    assert!(signers.choose(Some("new")).await.is_ok());
    assert_ne!(signers.number(), number);
    assert_eq!(signers.choose(Some("old")).await.err(), Some(UNKNOWN));
    assert_eq!(page.fetched(), 2);
}

#[tokio::test]
async fn a_fetch_that_fails_keeps_what_is_known() {
    let page = page(ok(OLD)).await;
    let signers = page.signers();
    let _fetching = signers.fetching();
    first_fetch(&signers).await;
    let number = signers.number();
    let elsewhere =
        "HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n";
    for bad in [
        ok("{\"keys\":[]}"),
        ok("no JSON"),
        ok(&" ".repeat((1 << 20) + 1)),
        "HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n".to_owned(),
        elsewhere.to_owned(),
        String::new(),
    ] {
        page.now_answers(bad.clone());
        let before = page.fetched();
        *signers.demand.lock().unwrap() = FetchDemand::default();
        assert_eq!(signers.choose(Some("new")).await.err(), Some(UNKNOWN));
        assert!(page.fetched() > before, "{bad:.40} was not fetched");
        assert!(signers.choose(Some("old")).await.is_ok());
        assert_eq!(signers.number(), number);
    }
}

#[tokio::test]
async fn signers_that_were_never_fetched_are_not_the_callers_fault() {
    let page = page(String::new()).await;
    let signers = page.signers();
    let _fetching = signers.fetching();
    let refused = signers.choose(Some("old")).await.err();
    assert_eq!(refused, Some(NOT_FETCHED));
    page.now_answers(ok(OLD));
    // It tries again by itself.
    while signers.number().is_none() {
        first_fetch(&signers).await;
    }
    assert!(signers.choose(Some("old")).await.is_ok());
}
