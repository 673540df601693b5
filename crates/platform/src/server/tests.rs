//! The limits of ports, as peers meet them: raw HTTP/2 over pipes within the
//! process, on a clock that is paused.

mod unread;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use bytes::{BufMut, Bytes, BytesMut};
use clap::Parser;
use h2::client::{Builder, SendRequest};
use h2::{RecvStream, SendStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;
use tonic_types::StatusExt;

use super::*;
use crate::CommonServices;
use crate::drain::{self, Trigger};
use crate::grpc::{
    Metadata, StreamSettings, bidirectional, frame_bytes, head_code, head_status, reject, reply,
};
use crate::health::Health;
use crate::streams::Streams;
use crate::tasks::{OwnedTask, spawn_owned};

const ANSWER_BYTES: usize = 1 << 20;
/// Less than the age of a connection.
const LONG: Duration = Duration::from_secs(3000);

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    server: ServerSettings,
}

/// A port, and what it shares.
struct Port {
    connector: memory::Connector,
    metrics: Arc<Metrics>,
    limits: Arc<MessageLimits>,
    streams: Streams,
    _trigger: Trigger,
    _serving: OwnedTask,
}

/// Serves calls: a large answer, the messages of a stream, health.
#[derive(Clone)]
struct Calls {
    limits: Arc<MessageLimits>,
    streams: Streams,
    common: CommonServices,
    drain: Drain,
}

impl Handler for Calls {
    async fn handle(&self, call: Call) -> Reply {
        match call.path() {
            "/large" => reply(frame_bytes(&vec![1; ANSWER_BYTES]), Metadata::new()),
            "/echo" => {
                let settings = StreamSettings {
                    concurrency: 4,
                    deadline: call.stream_deadline,
                    drain: self.drain.clone(),
                    open: match self.streams.open(&call.peer, &call.peer.holder()) {
                        Ok(open) => open,
                        Err(status) => return reject(&status),
                    },
                };
                let messages = call.into_messages(&self.limits);
                bidirectional(messages, settings, |message| async move {
                    Ok(message.framed().clone())
                })
            }
            "/one" => match call.into_messages(&self.limits).only().await {
                Ok(message) => reply(message.framed().clone(), Metadata::new()),
                Err(status) => reject(&status),
            },
            _ => self.common.serve(call).await,
        }
    }
}

/// A port with these flags; gRPC, or HTTP with one path. Unless a flag says so,
/// no connection ends of its age.
fn open(flags: &[&str], http: Option<Router>) -> Port {
    let age = ["--connection-age", "2h", "--http-connection-age", "2h"];
    let has_age = flags.contains(&"--connection-age");
    let age = if has_age { &[][..] } else { &age[..] };
    let arguments = ["test"].iter().chain(age).chain(flags);
    let settings = Flags::try_parse_from(arguments).unwrap().server;
    let metrics = Arc::new(Metrics::default());
    let pool = WorkPool::start(1, 100, &metrics).unwrap();
    let limits = Arc::new(settings.message_limits(&metrics, &pool));
    let streams = settings.streams(&metrics);
    let (connector, acceptor) = memory::pair();
    let (trigger, drain) = drain::channel();
    let server = Server {
        name: "test",
        settings,
        header_bytes_max: CALLER_HEADER_BYTES_MAX,
        metrics: ConnectionMetrics::register(&metrics),
        shards: Arc::new(Shards::current()),
        limits: limits.clone(),
        tls: None,
    };
    let health = Health::default();
    let calls = Calls {
        limits: limits.clone(),
        streams: streams.clone(),
        common: CommonServices::new(&health, tonic_health::pb::FILE_DESCRIPTOR_SET, &streams)
            .unwrap(),
        drain: drain.clone(),
    };
    let listener = Listener::Memory(acceptor);
    let serving = spawn_owned(async move {
        match http {
            Some(router) => server.run(listener, Http(router), drain).await,
            None => server.run(listener, Grpc(calls), drain).await,
        }
    });
    Port {
        connector,
        metrics,
        limits,
        streams,
        _trigger: trigger,
        _serving: serving,
    }
}

/// A client whose flow-control windows are as given, for each stream and for all.
struct Client {
    sender: SendRequest<Bytes>,
    closed: OwnedTask<Result<(), h2::Error>>,
}

impl Port {
    async fn connect(&self, window: u32) -> Client {
        let io = self.connector.connect().await.unwrap();
        let (sender, connection) = Builder::new()
            .initial_window_size(window)
            .initial_connection_window_size(1 << 24)
            .handshake(io)
            .await
            .unwrap();
        Client {
            sender,
            closed: spawn_owned(connection),
        }
    }

    fn reached(&self, flag: &str) -> bool {
        let text = self.metrics.to_text().unwrap();
        let line = format!("andon_limits_reached_total{{flag=\"{flag}\"}} ");
        let count = text.lines().find_map(|text| text.strip_prefix(&line));
        count.is_some_and(|count| count != "0")
    }
}

struct Open {
    head: ::http::response::Parts,
    body: RecvStream,
    sending: SendStream<Bytes>,
}

impl Client {
    async fn call(&self, path: &str, sent: &[u8], end: bool) -> Open {
        let head = ::http::Request::post(format!("http://test{path}"));
        let head = head.header("content-type", "application/grpc");
        self.send(head, sent, end).await
    }

    async fn send(&self, head: ::http::request::Builder, sent: &[u8], end: bool) -> Open {
        let request = head.body(()).unwrap();
        let mut sender = self.sender.clone().ready().await.unwrap();
        let (response, mut sending) = sender.send_request(request, false).unwrap();
        sending
            .send_data(Bytes::copy_from_slice(sent), end)
            .unwrap();
        let (head, body) = response.await.unwrap().into_parts();
        Open {
            head,
            body,
            sending,
        }
    }
}

/// The prefix of a message that claims so many bytes.
fn claim(bytes: u32) -> BytesMut {
    let mut claim = BytesMut::new();
    claim.put_u8(0);
    claim.put_u32(bytes);
    claim
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_nobody_reads_counts_and_ends() {
    for window in [0, 1, 1000, ANSWER_BYTES as u32 / 2] {
        let port = open(&[], None);
        let client = port.connect(window).await;
        let mut unread = client.call("/large", &frame_bytes(b""), true).await;
        sleep(Duration::from_secs(1)).await;
        let left = ANSWER_BYTES - window as usize;
        let used = port.limits.budget.used();
        assert!(
            used >= left,
            "{used} of {left} bytes with a window of {window}"
        );
        let begun = Instant::now();
        let ended = async {
            while let Some(data) = unread.body.data().await {
                if let Err(error) = data {
                    return error.reason();
                }
            }
            None
        };
        // The window is never opened: nothing is released.
        assert_eq!(ended.await, Some(h2::Reason::CANCEL), "window {window}");
        let took = begun.elapsed().as_secs();
        assert!((3..30).contains(&took), "{took} s");
        assert_eq!(port.limits.budget.used(), 0);
        assert!(port.reached("--transfer-rate-min"));
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_read_slowly_arrives_whole() {
    let port = open(&[], None);
    let client = port.connect(20 << 10).await;
    let mut slow = client.call("/large", &frame_bytes(b""), true).await;
    let (mut bytes, begun) = (0, Instant::now());
    while let Some(data) = slow.body.data().await {
        let length = data.unwrap().len();
        bytes += length;
        sleep(Duration::from_secs_f64(length as f64 / f64::from(20 << 10))).await;
        slow.body.flow_control().release_capacity(length).unwrap();
    }
    assert_eq!(bytes, ANSWER_BYTES + 5);
    assert!(begun.elapsed() > Duration::from_secs(40));
    let trailers = slow.body.trailers().await.unwrap().unwrap();
    assert_eq!(head_code(&trailers), Code::Ok);
}

#[tokio::test(start_paused = true)]
async fn an_unread_answer_has_the_deadline_of_its_call() {
    let flags = ["--deadline-max", "3s", "--drain-deadline", "9s"];
    let port = open(&flags, None);
    let client = port.connect(0).await;
    let begun = Instant::now();
    let mut unread = client.call("/large", &frame_bytes(b""), true).await;
    assert!(unread.body.data().await.unwrap().is_err());
    assert_eq!(begun.elapsed().as_secs(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_not_read_ends() {
    let port = open(&[], None);
    let client = port.connect(1 << 24).await;
    for _ in 0..3 {
        client.call("/large", &frame_bytes(b""), true).await;
    }
    // HTTP/1.1, and a peer that stops reading.
    let body = "x".repeat(8 << 20);
    let router = Router::new().route("/", get(move || async move { body }));
    let port = open(&[], Some(router));
    let mut io: DuplexStream = port.connector.connect().await.unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    io.write_all(request).await.unwrap();
    let mut begin = [0; 12];
    io.read_exact(&mut begin).await.unwrap();
    assert_eq!(&begin, b"HTTP/1.1 200");
    sleep(Duration::from_secs(1)).await;
    let used = port.limits.budget.used();
    assert!(used > 6 << 20, "{used} bytes are counted");
    sleep(Duration::from_secs(120)).await;
    assert_eq!(port.limits.budget.used(), 0);
    assert!(port.reached("--transfer-rate-min"));
    let mut rest = Vec::new();
    let _ = io.read_to_end(&mut rest).await;
    assert!(rest.len() < 8 << 20);
}

#[tokio::test(start_paused = true)]
async fn a_message_that_has_begun_arrives_or_ends_and_a_silent_stream_stays() {
    let port = open(&[], None);
    let client = port.connect(1 << 20).await;
    // Between messages a stream owes nothing.
    let mut idle = client.call("/echo", &[], false).await;
    assert!(timeout(LONG, idle.body.data()).await.is_err());
    idle.sending.send_data(frame_bytes(b"late"), false).unwrap();
    let echoed = idle.body.data().await.unwrap().unwrap();
    assert_eq!(echoed, frame_bytes(b"late"));
    // A byte every five seconds is no progress.
    for first in [&b"\0"[..], &claim(60 << 20)] {
        let mut half = client.call("/echo", first, false).await;
        let begun = Instant::now();
        let ended = loop {
            tokio::select! {
                trailers = half.body.trailers() => break trailers.unwrap().unwrap(),
                () = sleep(Duration::from_secs(5)) => {
                    // The stream may have ended meanwhile.
                    let _ = half.sending.send_data(Bytes::from_static(b"\0"), false);
                }
            }
        };
        assert_eq!(head_code(&ended), Code::DeadlineExceeded);
        let took = begun.elapsed().as_secs();
        assert!((4..7).contains(&took), "{took} s");
    }
    assert!(port.reached("--transfer-rate-min"));
    assert_eq!(port.limits.budget.used(), 0);
    // The first stream is open still.
    idle.sending.send_data(frame_bytes(b"later"), true).unwrap();
    assert!(idle.body.data().await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn age_cuts_off_no_stream_and_the_connection_ends_with_it() {
    let port = open(&["--connection-age", "10s"], None);
    let client = port.connect(1 << 20).await;
    let mut stream = client.call("/echo", &[], false).await;
    // Longer than the age and the drain deadline together.
    assert!(timeout(LONG, stream.body.data()).await.is_err());
    stream
        .sending
        .send_data(frame_bytes(b"late"), true)
        .unwrap();
    let echoed = stream.body.data().await.unwrap().unwrap();
    assert_eq!(echoed, frame_bytes(b"late"));
    drop(stream);
    let _sender = client.sender;
    let closed = timeout(Duration::from_secs(60), client.closed).await;
    assert!(closed.is_ok(), "the connection was not told to end");
}

#[tokio::test(start_paused = true)]
async fn an_idle_http_connection_ends_later_than_those_of_proxies() {
    let router = Router::new().route("/", get(|| async { "answer" }));
    let port = open(&[], Some(router));
    let mut io = port.connector.connect().await.unwrap();
    let begun = Instant::now();
    for _ in 0..3 {
        let request = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        io.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"answer") {
            assert!(io.read_buf(&mut answer).await.unwrap() > 0, "it ended");
        }
        sleep(Duration::from_secs(70)).await;
    }
    assert_eq!(io.read(&mut [0; 9]).await.unwrap(), 0);
    let took = begun.elapsed().as_secs();
    assert!((213..=218).contains(&took), "{took} s");
    // HTTP/2, where pings keep no connection from being idle.
    let client = port.connect(1 << 20).await;
    let begun = Instant::now();
    let _sender = client.sender;
    let closed = timeout(LONG, client.closed).await;
    let took = begun.elapsed().as_secs();
    assert!(closed.is_ok() && (73..=78).contains(&took), "{took} s");
}

#[test]
fn limits_of_bytes_are_shares_of_the_memory() {
    let mebibytes = |limit: Option<u64>| {
        let limit = limit.map(|limit| limit << 20);
        [MESSAGE_SHARE, IN_FLIGHT_SHARE].map(|share| share.mebibytes_of(limit))
    };
    for (limit, message, in_flight) in [
        (None, 64, 1024),
        (Some(64 << 10), 64, 1024),
        (Some(1024), 64, 512),
        (Some(512), 64, 256),
        (Some(256), 32, 128),
        (Some(1), 1, 1),
    ] {
        assert_eq!(mebibytes(limit), [message, in_flight], "{limit:?}");
    }
    let settings = Flags::try_parse_from(["test"]).unwrap().server;
    let checked = settings.checked().unwrap();
    assert!(checked.message_bytes_max <= checked.bytes_in_flight_max);
    let written = ["test", "--bytes-in-flight-max", "1MiB"];
    let error = Flags::try_parse_from(written).unwrap().server.checked();
    assert!(error.unwrap_err().contains("--message-bytes-max"));
}

#[test]
fn cores_are_those_of_the_machine_unless_they_are_set() {
    let cores = |flags: &[&str]| {
        let arguments = ["test"].iter().chain(flags);
        Flags::try_parse_from(arguments).unwrap().server.cores()
    };
    let all = std::thread::available_parallelism().unwrap().get();
    assert_eq!(cores(&[]), all);
    assert_eq!(cores(&["--cores", "0"]), all);
    assert_eq!(cores(&["--cores", "3"]), 3);
}

#[tokio::test(start_paused = true)]
async fn claimed_lengths_take_no_memory() {
    let port = open(&[], None);
    let mut clients = Vec::new();
    let mut streams = Vec::new();
    for _ in 0..20 {
        let client = port.connect(1 << 20).await;
        for _ in 0..100 {
            let mut sent = claim(60 << 20);
            sent.put_bytes(7, 25);
            streams.push(client.call("/echo", &sent, false).await);
        }
        clients.push(client);
    }
    sleep(Duration::from_secs(1)).await;
    let used = port.limits.budget.used();
    assert!(
        (30 * 2000..=4 << 20).contains(&used),
        "{used} bytes are held"
    );
    drop((streams, clients));
    sleep(Duration::from_secs(10)).await;
    assert_eq!(port.limits.budget.used(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_new_connection_takes_the_place_of_the_idlest() {
    let port = open(&["--connections-max", "4"], None);
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(port.connect(1 << 20).await);
        sleep(Duration::from_millis(10)).await;
    }
    // The first two are used: one waits in a stream, one has made a call.
    let _stream = clients[0].call("/echo", &[], false).await;
    clients[1].call("/one", &frame_bytes(b"a"), true).await;
    sleep(Duration::from_secs(1)).await;
    let new = port.connect(1 << 20).await;
    let answer = new.call("/one", &frame_bytes(b"a"), true).await;
    assert_eq!(answer.head.status, 200);
    let closed = timeout(Duration::from_secs(1), clients.remove(2).closed).await;
    assert!(closed.unwrap().unwrap().is_ok(), "GOAWAY ends it");
    clients[1].call("/one", &frame_bytes(b"a"), true).await;
    let text = port.metrics.to_text().unwrap();
    let line = "andon_connections_evicted_total{listener=\"test\"} 1";
    assert!(text.contains(line), "{text}");
    assert!(port.reached("--connections-max"));
}

#[tokio::test(start_paused = true)]
async fn a_watch_at_the_bound_answers_and_ends() {
    let flags = ["--waiting-streams-per-connection-max", "2"];
    let port = open(&flags, None);
    let client = port.connect(1 << 20).await;
    let watch = "/grpc.health.v1.Health/Watch";
    let reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    let mut first = client.call(watch, &frame_bytes(b""), true).await;
    let second = client.call(reflection, &[], false).await;
    let mut more = client.call(watch, &frame_bytes(b""), true).await;
    let expected = frame_bytes(&[8, 2]);
    for open in [&mut first, &mut more] {
        assert_eq!(open.body.data().await.unwrap().unwrap(), expected);
    }
    assert!(more.body.data().await.is_none());
    let trailers = more.body.trailers().await.unwrap().unwrap();
    assert_eq!(head_code(&trailers), Code::Ok);
    // The others wait.
    assert!(timeout(LONG, first.body.data()).await.is_err());
    let refused = client.call(reflection, &[], false).await;
    assert_eq!(head_code(&refused.head.headers), Code::Unavailable);
    let refused = client.call("/echo", &[], false).await;
    assert_eq!(head_code(&refused.head.headers), Code::Unavailable);
    assert_eq!(port.streams.count(), 2);
    drop((first, second));
    sleep(Duration::from_secs(2)).await;
    assert_eq!(port.streams.count(), 0);
    assert!(port.reached("--waiting-streams-per-connection-max"));
}

#[tokio::test(start_paused = true)]
async fn open_streams_of_a_port_are_bounded() {
    let flags = ["--streams-total-max", "8"];
    let port = open(&flags, None);
    let clients = [port.connect(1 << 20).await, port.connect(1 << 20).await];
    let mut streams = Vec::new();
    for _ in 0..4 {
        for client in &clients {
            streams.push(client.call("/echo", &[], false).await);
        }
    }
    let refused = clients[0].call("/one", &frame_bytes(b"a"), true).await;
    let status = head_status(&refused.head.headers).unwrap();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.get_details_retry_info().is_some());
    assert!(port.reached("--streams-total-max"));
    streams.pop();
    sleep(Duration::from_secs(1)).await;
    let answer = clients[0].call("/one", &frame_bytes(b"a"), true).await;
    assert_eq!(head_code(&answer.head.headers), Code::Ok);

    let router = Router::new().route("/", get(std::future::pending::<()>));
    let port = open(&flags, Some(router));
    let client = port.connect(1 << 20).await;
    let mut sender = client.sender.clone().ready().await.unwrap();
    let get = || ::http::Request::get("http://test/").body(()).unwrap();
    let _waiting: Vec<_> = (0..8)
        .map(|_| sender.send_request(get(), true).unwrap())
        .collect();
    let (refused, _) = sender.send_request(get(), true).unwrap();
    let refused = refused.await.unwrap();
    assert_eq!(refused.status(), 503);
    assert_eq!(refused.headers()["retry-after"], "1");
}

#[tokio::test(start_paused = true)]
async fn a_long_word_of_a_caller_makes_no_long_status() {
    let port = open(&[], None);
    let client = port.connect(1 << 20).await;
    let path = format!("/{}", "x".repeat(20_000));
    let refused = client.call(&path, &[], true).await;
    let status = head_status(&refused.head.headers).unwrap();
    assert_eq!(status.code(), Code::Unimplemented);
    assert!(status.message().len() < 128, "{}", status.message());
}

/// Counts as running while it lives.
struct Running(Arc<AtomicUsize>);

impl Running {
    fn begin(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_half_closed_request_is_answered_and_one_whose_caller_left_ends() {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let slow = move || {
        let running = Running::begin(&counted);
        async move {
            sleep(Duration::from_secs(10)).await;
            drop(running);
            "whole"
        }
    };
    let port = open(&[], Some(Router::new().route("/", get(slow))));
    let ask = async |version: &str| {
        let mut caller = port.connector.connect().await.unwrap();
        let request = format!("GET / {version}\r\nhost: a\r\n\r\n");
        caller.write_all(request.as_bytes()).await.unwrap();
        caller
    };
    let mut caller = ask("HTTP/1.1").await;
    caller.shutdown().await.unwrap();
    let mut answer = String::new();
    caller.read_to_string(&mut answer).await.unwrap();
    let whole = answer.rsplit("100 Continue\r\n\r\n").next().unwrap();
    assert!(whole.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(whole.ends_with("whole"), "{answer}");

    for version in ["HTTP/1.1", "HTTP/1.0"] {
        let caller = ask(version).await;
        sleep(Duration::from_secs(1)).await;
        assert_eq!(count.load(Ordering::Relaxed), 1, "{version}");
        drop(caller);
        sleep(Duration::from_secs(2)).await;
        assert_eq!(count.load(Ordering::Relaxed), 0, "{version}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_no_call_is_an_unsupported_media_type() {
    let port = open(&[], None);
    let client = port.connect(1 << 20).await;
    let post = || ::http::Request::post("http://test/one");
    for head in [
        post(),
        post().header("content-type", "application/json"),
        post().header("content-type", "application/grpc-web"),
        ::http::Request::get("http://test/one"),
    ] {
        let mut refused = client.send(head, b"{}", true).await;
        assert_eq!(refused.head.status, 415);
        assert!(!refused.head.headers.contains_key("grpc-status"));
        let text = refused.body.data().await.unwrap().unwrap();
        assert!(text.starts_with(b"this is a gRPC port"), "{text:?}");
    }
    // The connection serves on.
    let answer = client.call("/one", &frame_bytes(b"a"), true).await;
    assert_eq!(head_code(&answer.head.headers), Code::Ok);
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_message_in_gzip_has_members_and_nothing_behind_them() {
    let port = open(&[], None);
    let client = port.connect(1 << 20).await;
    let two = [gzip(b"one "), gzip(b"two")].concat();
    let rubbish = [&gzip(b"one")[..], b"rubbish"].concat();
    for (encoding, packed, code) in [
        ("gzip", &two, Code::Ok),
        ("GZIP", &two, Code::Ok),
        ("x-gzip", &two, Code::Ok),
        ("identity", &two, Code::Unimplemented),
        ("br", &two, Code::Unimplemented),
        ("gzip", &rubbish, Code::InvalidArgument),
    ] {
        let mut message = claim(packed.len() as u32);
        message[0] = 1;
        message.put_slice(packed);
        let head = ::http::Request::post("http://test/one")
            .header("content-type", "application/grpc")
            .header("grpc-encoding", encoding);
        let mut answer = client.send(head, &message, true).await;
        assert_eq!(head_code(&answer.head.headers), code, "{encoding}");
        if code == Code::Ok {
            let whole = answer.body.data().await.unwrap().unwrap();
            assert_eq!(whole, frame_bytes(b"one two"), "{encoding}");
        }
    }
    // What says of itself that it is not compressed is read in any case.
    for encoding in ["Identity", "identity"] {
        let head = ::http::Request::post("http://test/one")
            .header("content-type", "application/grpc")
            .header("grpc-encoding", encoding);
        let answer = client.send(head, &frame_bytes(b"a"), true).await;
        assert_eq!(head_code(&answer.head.headers), Code::Ok, "{encoding}");
    }
}

#[test]
fn what_all_connections_may_leave_unread_is_bounded() {
    let port = super::Port {
        seats: Seats::new(4096),
        unread: Pot::new(1 << 30),
        streams: Pot::new(8),
        streams_full: Metrics::default().bound("--streams-total-max"),
    };
    let places: Vec<_> = (0..4096)
        .map(|_| port.admit(Peer::default()).unwrap())
        .collect();
    let windows: Vec<usize> = places
        .iter()
        .map(|place| place.connection_window() as usize)
        .collect();
    assert_eq!(windows[0], connection::CONNECTION_WINDOW_BYTES as usize);
    let sum: usize = windows.iter().sum();
    let least = 4096 * connection::WINDOW_BYTES_MIN as usize;
    assert!(sum <= (1 << 30) + least, "{sum} bytes");
    assert!(windows[100] > 2 << 20, "{} bytes", windows[100]);
    assert!(
        places
            .iter()
            .all(|place| place.stream_window() <= place.connection_window())
    );
}
