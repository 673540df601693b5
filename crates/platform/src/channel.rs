//! One connection to another gRPC server. Which server, when to connect again
//! and where to send instead is the caller's to decide.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::coalesce::Coalesced;
use crate::grpc::Body;
use crate::memory;
use crate::tasks::{ConnectionExecutor, Owned, owned};

const STREAM_WINDOW_BYTES: u32 = 2 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// Whom to connect to.
#[derive(Debug, Clone)]
pub enum Target {
    /// A host and port.
    Tcp(String),
    /// A server in the same process.
    Memory(memory::Connector),
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => formatter.write_str(address),
            Self::Memory(_) => formatter.write_str("in-process"),
        }
    }
}

/// A connection that takes calls until it closes.
#[derive(Debug)]
pub struct Channel {
    sender: http2::SendRequest<Body>,
    closed: Arc<AtomicBool>,
    _connection: Owned,
}

impl Channel {
    /// Connects within `timeout`. An idle peer is asked every 10 s whether it
    /// lives, so that a frozen or vanished one is noticed.
    pub async fn connect(target: &Target, timeout: Duration) -> io::Result<Self> {
        let connect = async {
            match target {
                Target::Tcp(address) => {
                    let stream = TcpStream::connect(address).await?;
                    stream.set_nodelay(true)?;
                    Self::over(stream).await
                }
                Target::Memory(connector) => {
                    Self::over(connector.connect().await?).await
                }
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
        let (sender, connection) = http2::Builder::new(ConnectionExecutor)
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(256 << 10)
            .max_concurrent_reset_streams(1024)
            .keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(5))
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(Coalesced::new(io)))
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
            _connection: driven,
        })
    }

    /// Whether the connection takes no more calls.
    pub fn closed(&self) -> bool {
        self.closed.load(Ordering::Acquire) || self.sender.is_closed()
    }

    /// Sends one call and returns the head of its reply. Dropping the future,
    /// or the reply's body, tells the server that nobody waits.
    pub async fn send(
        &self,
        request: Request<Body>,
    ) -> Result<http::Response<Incoming>, hyper::Error> {
        let mut sender = self.sender.clone();
        sender.ready().await?;
        sender.send_request(request).await
    }
}
