//! One connection to another gRPC server. Endpoint selection, reconnection and
//! retries belong to the caller.
//!
//! A call's message is complete when it is sent, so that the h2 crate can be used
//! without hyper's client, which hands each call and each body to other tasks.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Builder, SendRequest};
use h2::{Reason, RecvStream};
use http::{Request, Response};
use http_body::Frame;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::coalesce::Coalesced;
use crate::memory;
use crate::tasks::{OwnedTask, spawn_owned};
use crate::tls::ClientTls;

/// Flow-control windows, frames and resets as on the server's side.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
const FRAME_BYTES_MAX: u32 = 256 << 10;
/// Reset streams whose late frames are still ignored.
const RESET_STREAMS_MAX: usize = 4096;

/// The address of a server.
#[derive(Debug, Clone)]
pub enum Target {
    /// A host and port.
    Tcp(String),
    /// A host and port, over TLS.
    Tls(String, ClientTls),
    /// A server in the same process.
    Memory(memory::Connector),
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) | Self::Tls(address, _) => formatter.write_str(address),
            Self::Memory(_) => formatter.write_str("in-process"),
        }
    }
}

/// Why a call has no response, or an incomplete one.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The server has not processed the call: a retry is safe even if the call
    /// is not idempotent.
    #[error("the server did not process the call: {0}")]
    Unprocessed(h2::Error),
    /// The server, or the limits of this end, ended the stream of this call
    /// alone: the connection goes on, and so do the other calls on it.
    #[error("the stream was reset: {0}")]
    Reset(h2::Error),
    /// The connection failed; the server may have processed the call.
    #[error("the connection failed: {0}")]
    Failed(h2::Error),
}

impl From<h2::Error> for ChannelError {
    fn from(error: h2::Error) -> Self {
        // GOAWAY names the last stream that the server processed; h2 fails the
        // later ones with the server's error.
        let refused = error.reason() == Some(Reason::REFUSED_STREAM);
        let goaway = error.is_go_away() && error.is_remote();
        if refused || goaway {
            return Self::Unprocessed(error);
        }
        if error.is_reset() {
            return Self::Reset(error);
        }
        Self::Failed(error)
    }
}

/// A connection that sends calls until it closes.
pub struct Channel {
    sender: SendRequest<Bytes>,
    closed: Arc<AtomicBool>,
    connection: OwnedTask,
}

impl fmt::Debug for Channel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Channel")
    }
}

impl Channel {
    /// Connects within `timeout`.
    pub async fn connect(target: &Target, timeout: Duration) -> io::Result<Self> {
        let connect = async {
            match target {
                Target::Tcp(address) => {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    Self::over(stream).await
                }
                Target::Tls(address, tls) => {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    Self::over(tls.connect(address, stream).await?).await
                }
                Target::Memory(connector) => Self::over(connector.connect().await?).await,
            }
        };
        tokio::time::timeout(timeout, connect)
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    async fn over<I>(io: I) -> io::Result<Self>
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = Builder::new()
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .enable_push(false)
            // Callers who cancel reset their streams, and many share a connection.
            .max_concurrent_reset_streams(RESET_STREAMS_MAX)
            .max_local_error_reset_streams(None)
            .handshake(Coalesced::new(io))
            .await
            .map_err(io::Error::other)?;
        let closed = Arc::new(AtomicBool::new(false));
        let closing = closed.clone();
        let driver = spawn_owned(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to a server failed");
            }
            closing.store(true, Ordering::Release);
        });
        Ok(Self {
            sender,
            closed,
            connection: driver,
        })
    }

    /// Closes the connection at once: its calls in flight fail.
    pub fn abort(&self) {
        self.closed.store(true, Ordering::Release);
        self.connection.abort();
    }

    /// Whether the connection accepts no more calls.
    pub fn closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Sends one call with its framed message and returns the head of the
    /// response. Dropping the future or the response's body cancels the call.
    pub async fn send(
        &self,
        head: Request<()>,
        framed: Bytes,
    ) -> Result<Response<Incoming>, ChannelError> {
        // GOAWAY is seen here first, since calls in flight may go on for long
        // before the connection ends.
        let noted = |error: h2::Error| {
            if error.is_go_away() {
                self.closed.store(true, Ordering::Release);
            }
            error
        };
        let unprocessed = |error| ChannelError::Unprocessed(noted(error));
        let mut sender = self.sender.clone().ready().await.map_err(unprocessed)?;
        let (response, mut message) = sender.send_request(head, false).map_err(unprocessed)?;
        message.send_data(framed, true).map_err(noted)?;
        let response = response.await.map_err(noted)?;
        Ok(response.map(|stream| Incoming {
            stream,
            data_ended: false,
        }))
    }
}

/// The body of a response as it arrives.
#[derive(Debug)]
pub struct Incoming {
    stream: RecvStream,
    data_ended: bool,
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = ChannelError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ChannelError>>> {
        let own = self.get_mut();
        if !own.data_ended {
            match ready!(own.stream.poll_data(context)) {
                Some(Ok(data)) => {
                    // Opens the flow-control window again; an error is seen at
                    // the next poll.
                    let _ = own.stream.flow_control().release_capacity(data.len());
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => own.data_ended = true,
            }
        }
        match ready!(own.stream.poll_trailers(context)) {
            Ok(trailers) => Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers)))),
            Err(error) => Poll::Ready(Some(Err(error.into()))),
        }
    }
}
