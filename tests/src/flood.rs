//! Connections of callers that mean harm: streams that are opened, filled in part
//! and never read, over the h2 crate, which does as it is told.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use h2::SendStream;
use h2::client::{Builder, ResponseFuture, SendRequest};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// One connection with its open streams, closed when it is dropped.
#[derive(Debug)]
pub struct Flood {
    sender: SendRequest<Bytes>,
    #[allow(dead_code, reason = "its task is aborted when it is dropped")]
    connection: JoinSet<()>,
    /// The streams that stay open, with their answers, which nobody reads.
    pub streams: Vec<(SendStream<Bytes>, ResponseFuture)>,
    /// Bytes of messages that were given to the streams.
    pub sent_bytes: usize,
}

/// A call of a flood.
#[derive(Debug, Clone, Copy)]
pub struct FloodCall<'c> {
    /// The method and the path, such as `POST /a.B/C`.
    pub head: &'c str,
    /// The headers besides those of every gRPC call.
    pub headers: &'c [(&'c str, &'c str)],
    /// Whether nothing follows what is sent first.
    pub ended: bool,
}

impl Flood {
    /// Connects; an answer may send so many bytes of its body, for which a real
    /// client would make room again.
    pub async fn connect(address: SocketAddr, window_bytes: u32) -> Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = Builder::new()
            .initial_window_size(window_bytes)
            .handshake(stream)
            .await?;
        let mut running = JoinSet::new();
        running.spawn(async move {
            // Its end is what the server does with it.
            let _ = connection.await;
        });
        Ok(Self {
            sender,
            connection: running,
            streams: Vec::new(),
            sent_bytes: 0,
        })
    }

    /// Opens a stream with these first bytes and keeps it.
    pub async fn open(&mut self, call: FloodCall<'_>, first: Bytes) -> Result<()> {
        let ready = self.sender.clone().ready();
        let mut sender = tokio::time::timeout(Duration::from_secs(5), ready).await??;
        let (method, path) = call.head.split_once(' ').context("a method and a path")?;
        let mut request = http::Request::builder()
            .method(method)
            .uri(format!("http://localhost{path}"))
            .header("te", "trailers");
        if path.contains('.') && method == "POST" {
            request = request.header("content-type", "application/grpc");
        }
        for (name, value) in call.headers {
            request = request.header(*name, *value);
        }
        let (answer, mut body) = sender.send_request(request.body(())?, false)?;
        self.sent_bytes += first.len();
        body.send_data(first, call.ended)?;
        self.streams.push((body, answer));
        Ok(())
    }

    /// Sends more on a stream, as far as the server makes room; whether it is
    /// still open.
    pub fn send(&mut self, stream: usize, bytes: Bytes) -> bool {
        let length = bytes.len();
        let sent = self.streams.get_mut(stream).is_some_and(|(body, _)| {
            body.reserve_capacity(length);
            body.send_data(bytes, false).is_ok()
        });
        self.sent_bytes += if sent { length } else { 0 };
        sent
    }
}
