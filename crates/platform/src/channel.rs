//! One connection to another gRPC server. Which server, when to connect again
//! and where to send instead is the caller's to decide.
//!
//! A call's message is whole when it is sent, so that the h2 crate can be used
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
use crate::tasks::{Owned, owned};
use crate::tls::ClientTls;

const STREAM_WINDOW_BYTES: u32 = 2 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
const FRAME_BYTES_MAX: u32 = 256 << 10;

/// Whom to connect to.
#[derive(Debug, Clone)]
pub enum Target {
    /// A host and port.
    Tcp(String),
    /// The same over TLS.
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

/// Why a call has no reply, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The server has not begun the call: it can be sent again for nothing.
    #[error("the call was not begun: {0}")]
    NotBegun(h2::Error),
    /// The connection or the call broke; the server may have begun it.
    #[error("the connection broke: {0}")]
    Broken(h2::Error),
}

impl From<h2::Error> for ChannelError {
    fn from(error: h2::Error) -> Self {
        // A server that ends says which calls it has begun; h2 fails the rest
        // with what the server said.
        let refused = error.reason() == Some(Reason::REFUSED_STREAM);
        let ended = error.is_go_away() && error.is_remote();
        if refused || ended {
            return Self::NotBegun(error);
        }
        Self::Broken(error)
    }
}

/// A connection that takes calls until it closes.
pub struct Channel {
    sender: SendRequest<Bytes>,
    closed: Arc<AtomicBool>,
    connection: Owned,
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
            // Callers who leave reset streams, and many share a connection.
            .max_concurrent_reset_streams(4096)
            .max_local_error_reset_streams(None)
            .handshake(Coalesced::new(io))
            .await
            .map_err(io::Error::other)?;
        let closed = Arc::new(AtomicBool::new(false));
        let closes = closed.clone();
        let driven = owned(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to a server broke");
            }
            closes.store(true, Ordering::Release);
        });
        Ok(Self {
            sender,
            closed,
            connection: driven,
        })
    }

    /// Breaks the connection: the calls that it has fail at once.
    pub fn abort(&self) {
        self.closed.store(true, Ordering::Release);
        self.connection.abort();
    }

    /// Whether the connection takes no more calls.
    pub fn closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Sends one call with its framed message and returns the head of its
    /// reply. Dropping the future, or the reply's body, tells the server that
    /// nobody waits.
    pub async fn send(
        &self,
        head: Request<()>,
        framed: Bytes,
    ) -> Result<Response<Incoming>, ChannelError> {
        // A connection that was told to end says so here first, though the
        // calls that it has may go on for long.
        let ended = |error: h2::Error| {
            if error.is_go_away() {
                self.closed.store(true, Ordering::Release);
            }
            error
        };
        let not_begun = |error| ChannelError::NotBegun(ended(error));
        let mut sender = self.sender.clone().ready().await.map_err(not_begun)?;
        let (reply, mut message) = sender.send_request(head, false).map_err(not_begun)?;
        message.send_data(framed, true).map_err(ended)?;
        let reply = reply.await.map_err(ended)?;
        Ok(reply.map(|stream| Incoming {
            stream,
            data_ended: false,
        }))
    }
}

/// The body of a reply as it comes.
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
                    // Room for the next; an error is seen at the next poll.
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
