//! One connection: its preface, its calls, its age and its end.

use std::convert::Infallible;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::{sleep, timeout};

use super::{Handler, Io, Server};
use crate::coalesce::Coalesced;
use crate::drain::{Drain, Phase};
use crate::grpc::{Call, reject};
use crate::tasks::ConnectionExecutor;

/// What a client of HTTP/2 says first.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Flow-control windows that let a tensor of 600 KB pass without a pause.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// Frames of this size halve the work of large messages against the default.
const FRAME_BYTES_MAX: u32 = 256 << 10;

pub(super) async fn serve<H: Handler>(server: &Server, mut io: impl Io, handler: H, drain: Drain) {
    let settings = &server.settings;
    // hyper waits for the preface for ever, and a graceful end with it.
    let preface = timeout(settings.preface_timeout, read_preface(&mut io)).await;
    match preface {
        Ok(Ok(())) => {}
        Ok(Err(_)) => return server.metrics.refuse(server.name, "not_http2"),
        Err(_) => return server.metrics.refuse(server.name, "preface_timeout"),
    }
    let deadline_max = settings.deadline_max;
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let handler = handler.clone();
        // Boxed, since hyper moves it several times before it runs.
        Box::pin(async move {
            let reply = match Call::new(request, deadline_max) {
                Ok(call) => handler.handle(call).await,
                Err(status) => reject(&status),
            };
            Ok::<_, Infallible>(reply)
        })
    });
    let connection = http2::Builder::new(ConnectionExecutor)
        .timer(TokioTimer::new())
        .max_concurrent_streams(settings.streams_max)
        // Callers who leave reset streams; a gateway has those of many.
        .max_pending_accept_reset_streams(settings.streams_max as usize)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .max_header_list_size(64 << 10)
        .keep_alive_interval(settings.keepalive_interval)
        .keep_alive_timeout(Duration::from_secs(20))
        .serve_connection(TokioIo::new(Coalesced::new(Rewound::new(io))), service);
    run(connection, server, drain).await;
}

async fn run<C>(connection: C, server: &Server, mut drain: Drain)
where
    C: Future<Output = hyper::Result<()>> + Graceful,
{
    let settings = &server.settings;
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = sleep(jittered(settings.connection_age)) => None,
        () = drain.reached(Phase::Closing) => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            // GOAWAY; calls under way finish, but not for ever.
            connection.as_mut().end_gracefully();
            timeout(settings.drain_deadline, connection)
                .await
                .unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!(listener = server.name, %error, "a connection broke");
    }
}

/// A connection that can be asked to end.
trait Graceful {
    fn end_gracefully(self: Pin<&mut Self>);
}

impl<I, B, S, E> Graceful for http2::Connection<I, S, E>
where
    S: hyper::service::HttpService<Incoming, ResBody = B>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
    B: http_body::Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    E: hyper::rt::bounds::Http2ServerConnExec<S::Future, B>,
{
    fn end_gracefully(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

/// A tenth more or less, so that connections made together do not end together.
fn jittered(age: Duration) -> Duration {
    age.mul_f64(rand::random_range(0.9..1.1))
}

async fn read_preface(io: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    let mut read = [0_u8; PREFACE.len()];
    let mut filled = 0;
    while filled < read.len() {
        let count = io.read(&mut read[filled..]).await?;
        // A peer that speaks something else is seen at its first bytes.
        if count == 0 || read[..filled + count] != PREFACE[..filled + count] {
            return Err(io::ErrorKind::InvalidData.into());
        }
        filled += count;
    }
    Ok(())
}

/// A connection whose preface was read and is given once more to hyper.
struct Rewound<T> {
    io: T,
    preface: &'static [u8],
}

impl<T> Rewound<T> {
    fn new(io: T) -> Self {
        Self {
            io,
            preface: PREFACE,
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Rewound<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.preface.is_empty() {
            let count = self.preface.len().min(buffer.remaining());
            let (now, later) = self.preface.split_at(count);
            buffer.put_slice(now);
            self.preface = later;
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Rewound<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
