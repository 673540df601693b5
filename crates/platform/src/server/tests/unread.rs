//! Answers over HTTP that nobody reads: they count for whom they are, end, and
//! leave others their share.

use axum::body::Body;
use axum::response::Response;
use axum::routing::MethodRouter;
use h2::client::ResponseFuture;

use super::*;

/// More than a pipe takes up.
const BODY_BYTES: usize = 8 << 20;
/// Four answers, half of which are one tenant's share beside another.
const FLAGS: [&str; 4] = [
    "--message-bytes-max",
    "8MiB",
    "--bytes-in-flight-max",
    "32MiB",
];

/// An answer for the tenant of each path, who waits for so long.
fn answers(within: Duration) -> Router {
    let large = |tenant: &'static str| -> MethodRouter {
        get(move || async move {
            let mut response = Response::new(Body::from(vec![1_u8; BODY_BYTES]));
            response.extensions_mut().insert(AnswerFor {
                holder: Holder::Tenant(tenant.into()),
                deadline: Instant::now() + within,
                counted: false,
            });
            response
        })
    };
    Router::new()
        .route("/a", large("a"))
        .route("/b", large("b"))
}

/// Asks over HTTP/2; nothing of the answer is read.
async fn ask(client: &Client, path: &str) -> ResponseFuture {
    let request = ::http::Request::get(format!("http://test{path}"));
    let mut sender = client.sender.clone().ready().await.unwrap();
    let request = request.body(()).unwrap();
    sender.send_request(request, true).unwrap().0
}

/// Asks over HTTP/1.1; nothing of the answer is read.
async fn ask_http1(port: &Port, path: &str) -> DuplexStream {
    let mut io = port.connector.connect().await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    io.write_all(request.as_bytes()).await.unwrap();
    io
}

/// How an answer ends whose reader makes no room for it.
async fn end(answer: ResponseFuture) -> Option<h2::Reason> {
    let mut body = match answer.await {
        Ok(answer) => answer.into_body(),
        Err(error) => return error.reason(),
    };
    while let Some(data) = body.data().await {
        if let Err(error) = data {
            return error.reason();
        }
    }
    None
}

/// A message of the tenant `b`, for whom a share is kept then.
fn message_of_b(port: &Port) -> crate::pot::Held {
    let b = Holder::Tenant("b".into());
    port.limits.hold_for(&b, 1).unwrap()
}

#[tokio::test(start_paused = true)]
async fn unread_answers_over_http2_are_their_tenants_and_end() {
    let port = open(&FLAGS, Some(answers(LONG)));
    let message = message_of_b(&port);
    let hostile = port.connect(0).await;
    let mut unread = Vec::new();
    for _ in 0..8 {
        unread.push(ask(&hostile, "/a").await);
    }
    sleep(Duration::from_secs(1)).await;
    // Its share, and not what is left beyond it.
    assert_eq!(port.limits.budget.used(), 2 * BODY_BYTES + 1);
    assert!(port.reached("--bytes-in-flight-max"));
    let other = port.connect(64 << 10).await;
    let answer = ask(&other, "/b").await.await.unwrap();
    let (mut body, mut length) = (answer.into_body(), 0);
    while let Some(data) = body.data().await {
        let part = data.unwrap().len();
        length += part;
        body.flow_control().release_capacity(part).unwrap();
    }
    assert_eq!(length, BODY_BYTES);
    let begun = Instant::now();
    for answer in unread {
        assert_eq!(end(answer).await, Some(h2::Reason::CANCEL));
    }
    let took = begun.elapsed().as_secs();
    assert!((3..30).contains(&took), "{took} s");
    drop(message);
    assert_eq!(port.limits.budget.used(), 0);
    assert!(port.reached("--transfer-rate-min"));
}

#[tokio::test(start_paused = true)]
async fn unread_answers_over_http1_are_their_tenants_and_end() {
    let port = open(&FLAGS, Some(answers(LONG)));
    let message = message_of_b(&port);
    let mut unread = Vec::new();
    for _ in 0..8 {
        unread.push(ask_http1(&port, "/a").await);
    }
    sleep(Duration::from_secs(1)).await;
    // Two of them, but for what their pipes have taken up.
    let used = port.limits.budget.used();
    let share = 2 * BODY_BYTES;
    assert!((share - (4 << 20)..=share + 1).contains(&used), "{used}");
    assert!(port.reached("--bytes-in-flight-max"));
    let mut other = ask_http1(&port, "/b").await;
    let mut whole = Vec::new();
    other.read_to_end(&mut whole).await.unwrap();
    assert!(whole.starts_with(b"HTTP/1.1 200"));
    assert!(whole.len() > BODY_BYTES, "{} bytes", whole.len());
    assert!(port.limits.budget.used() > BODY_BYTES, "the others wait");
    sleep(Duration::from_secs(60)).await;
    drop(message);
    assert_eq!(port.limits.budget.used(), 0);
    assert!(port.reached("--transfer-rate-min"));
    for mut io in unread {
        let mut part = Vec::new();
        // It was cut off, which may be an error.
        let _ = io.read_to_end(&mut part).await;
        assert!(part.len() < BODY_BYTES, "{} bytes", part.len());
    }
}

#[tokio::test(start_paused = true)]
async fn unread_answers_over_http_have_the_deadlines_of_their_requests() {
    let within = Duration::from_secs(3);
    let port = open(&[], Some(answers(within)));
    let client = port.connect(0).await;
    let begun = Instant::now();
    let unread = ask(&client, "/a").await;
    assert_eq!(end(unread).await, Some(h2::Reason::CANCEL));
    assert_eq!(begun.elapsed().as_secs(), 3);
    let _unread = ask_http1(&port, "/a").await;
    sleep(within - Duration::from_secs(1)).await;
    let used = port.limits.budget.used();
    assert!(used > BODY_BYTES / 2, "{used} bytes are counted");
    sleep(Duration::from_secs(2)).await;
    assert_eq!(port.limits.budget.used(), 0);
}
