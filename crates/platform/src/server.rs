//! The accept loop and its connections. Every connection has a preface timeout,
//! a permit under the connection limit, a maximum age with jitter, and a hard
//! deadline when the server drains; tonic's own loop has none of these.

mod connection;
mod grpc;
mod http;

pub use grpc::Grpc;
pub use http::Http;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::drain::{Drain, Phase};
use crate::grpc::{Call, MessageLimits, Reply};
use crate::memory;
use crate::metrics::Metrics;
use crate::shards::Shards;
use crate::tls::{Peer, Tls, certificate_names};

/// The pause after a connection could not be accepted.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// The limits and timeouts of every port.
#[derive(Debug, Clone, clap::Args)]
pub struct ServerSettings {
    /// Maximum number of open connections per port; further ones are closed at
    /// once
    #[arg(long, value_name = "COUNT", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    pub connections_max: u32,
    /// Maximum number of calls in flight on one HTTP/2 connection
    #[arg(long, value_name = "COUNT", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub streams_max: u32,
    /// Timeout of a new connection's TLS handshake, and of its first bytes
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = crate::config::positive_duration)]
    pub preface_timeout: Duration,
    /// Maximum age of a connection, with 10% jitter, before it is closed
    /// gracefully, so that callers spread over new servers
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = crate::config::positive_duration)]
    pub connection_age: Duration,
    /// Interval of keepalive pings on an HTTP/2 connection
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = crate::config::positive_duration)]
    pub keepalive_interval: Duration,
    /// Maximum size of one message, for example 64MiB
    #[arg(long, value_name = "BYTES", default_value = "64MiB", value_parser = crate::config::bytes)]
    pub message_bytes_max: usize,
    /// Maximum size of all messages in flight together
    #[arg(long, value_name = "BYTES", default_value = "1GiB", value_parser = crate::config::bytes)]
    pub bytes_in_flight_max: usize,
    /// Maximum deadline of a call, and the deadline of calls that set none
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = crate::config::positive_duration)]
    pub deadline_max: Duration,
    /// How long the ports stay open after the server began to drain and
    /// became not ready
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = crate::config::duration)]
    pub drain_delay: Duration,
    /// How long calls in flight may then take to finish
    #[arg(long, value_name = "DURATION", default_value = "65s", value_parser = crate::config::positive_duration)]
    pub drain_deadline: Duration,
}

impl ServerSettings {
    /// Checks the settings that depend on each other.
    pub fn checked(self) -> Result<Self, String> {
        if self.message_bytes_max > self.bytes_in_flight_max {
            return Err(format!(
                "--message-bytes-max ({}) must be at most --bytes-in-flight-max ({}): a longer message would never fit",
                self.message_bytes_max, self.bytes_in_flight_max
            ));
        }
        if self.deadline_max > self.drain_deadline {
            return Err(format!(
                "--deadline-max ({:?}) must be at most --drain-deadline ({:?}): the longest calls would be cut off when the server stops",
                self.deadline_max, self.drain_deadline
            ));
        }
        Ok(self)
    }

    /// The limits on messages.
    pub fn message_limits(&self) -> MessageLimits {
        MessageLimits::new(self.message_bytes_max, self.bytes_in_flight_max)
    }
}

/// A source of connections.
#[derive(Debug)]
pub enum Listener {
    /// A TCP port.
    Tcp(TcpListener),
    /// Connections within the process.
    Memory(memory::Acceptor),
}

/// Binds a TCP port; the error names the address.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let bind = || {
        let kind = socket2::Type::STREAM;
        let socket = socket2::Socket::new(socket2::Domain::for_address(address), kind, None)?;
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(1024)?;
        TcpListener::from_std(socket.into())
    };
    bind().map_err(|error| {
        io::Error::new(error.kind(), format!("cannot listen on {address}: {error}"))
    })
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ListenerLabel {
    listener: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedLabels {
    listener: &'static str,
    reason: &'static str,
}

/// The metrics of all listeners of a process.
#[derive(Debug, Clone, Default)]
pub struct ConnectionMetrics {
    open: Family<ListenerLabel, Gauge>,
    accepted: Family<ListenerLabel, Counter>,
    refused: Family<RefusedLabels, Counter>,
}

impl ConnectionMetrics {
    /// Registers the metrics of connections.
    pub fn register(metrics: &Metrics) -> Self {
        let connections = Self::default();
        metrics.register(|registry| {
            registry.register(
                "andon_connections",
                "Open connections",
                connections.open.clone(),
            );
            registry.register(
                "andon_connections_accepted",
                "Accepted connections",
                connections.accepted.clone(),
            );
            registry.register(
                "andon_connections_refused",
                "Connections that were closed before their first call, by reason",
                connections.refused.clone(),
            );
        });
        connections
    }

    /// Creates a listener's series at zero, so that their rates are right.
    fn initialize(&self, listener: &'static str) {
        let label = ListenerLabel { listener };
        drop(self.open.get_or_create(&label));
        drop(self.accepted.get_or_create(&label));
        for reason in ["cap", "not_http2", "preface_timeout", "tls"] {
            drop(
                self.refused
                    .get_or_create(&RefusedLabels { listener, reason }),
            );
        }
    }

    fn refuse(&self, listener: &'static str, reason: &'static str) {
        self.refused
            .get_or_create(&RefusedLabels { listener, reason })
            .inc();
    }
}

/// Serves the calls of a gRPC port.
pub trait Handler: Clone + Send + Sync + 'static {
    /// Serves one call. The future is dropped when the caller cancels.
    fn handle(&self, call: Call) -> impl Future<Output = Reply> + Send;
}

/// The protocol of a port.
pub trait Protocol: Clone + Send + Sync + 'static {
    /// The protocol names that TLS negotiates by ALPN, the preferred one first.
    const ALPN: &'static [&'static [u8]];

    /// Serves one connection until it closes.
    fn serve(
        self,
        server: &Server,
        io: impl Io,
        peer: Arc<Peer>,
        drain: Drain,
    ) -> impl Future<Output = ()> + Send;
}

/// A port.
#[derive(Debug, Clone)]
pub struct Server {
    /// The port's name in metrics.
    pub name: &'static str,
    /// Its limits and timeouts.
    pub settings: ServerSettings,
    /// The metrics of its connections.
    pub metrics: ConnectionMetrics,
    /// The threads that its connections run on.
    pub shards: Arc<Shards>,
    /// Its certificates; plain text without them.
    pub tls: Option<Tls>,
}

impl Server {
    /// Accepts connections until the drain closes the port. Returns when the
    /// calls in flight have finished or the drain deadline has passed.
    pub async fn run<P: Protocol>(&self, mut listener: Listener, protocol: P, mut drain: Drain) {
        self.metrics.initialize(self.name);
        let permits = Arc::new(Semaphore::new(self.settings.connections_max as usize));
        let mut connections = JoinSet::new();
        let mut closing = drain.clone();
        loop {
            tokio::select! {
                biased;
                () = closing.reached(Phase::Closing) => break,
                Some(_) = connections.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Accepted::Connection(io) => match permits.clone().try_acquire_owned() {
                        Ok(permit) => {
                            let (server, protocol) = (self.clone(), protocol.clone());
                            let serving = server.serve(io, permit, protocol, drain.clone());
                            connections.spawn_on(serving, self.shards.next());
                        }
                        Err(_) => self.metrics.refuse(self.name, "cap"),
                    },
                    Accepted::Failed(error) => {
                        tracing::warn!(%error, "a connection could not be accepted");
                        // Out of file descriptors: an immediate retry would spin.
                        tokio::time::sleep(ACCEPT_BACKOFF).await;
                    }
                    // No connector is left; open connections go on.
                    Accepted::Ended => break,
                }
            }
        }
        drop(listener);
        let finish = async { while connections.join_next().await.is_some() {} };
        drain.reached(Phase::Closing).await;
        if tokio::time::timeout(self.settings.drain_deadline, finish)
            .await
            .is_err()
        {
            tracing::warn!(
                listener = self.name,
                "calls were cut off at the drain deadline"
            );
        }
    }

    async fn serve<P: Protocol>(
        self,
        io: Connection,
        permit: OwnedSemaphorePermit,
        protocol: P,
        drain: Drain,
    ) {
        let label = ListenerLabel {
            listener: self.name,
        };
        self.metrics.accepted.get_or_create(&label).inc();
        let open = self.metrics.open.get_or_create_owned(&label);
        open.inc();
        match io {
            // The socket wakes the thread that it is registered on.
            Connection::Tcp(io, address) => match TcpStream::from_std(io) {
                Ok(io) => self.serve_tcp(io, address, protocol, drain).await,
                Err(error) => tracing::warn!(%error, "a connection could not be served"),
            },
            Connection::Memory(io) => {
                protocol.serve(&self, io, Arc::default(), drain).await;
            }
        }
        open.dec();
        drop(permit);
    }

    /// Serves a TCP connection, after the TLS handshake where the port has
    /// certificates.
    async fn serve_tcp<P: Protocol>(
        &self,
        io: TcpStream,
        address: SocketAddr,
        protocol: P,
        drain: Drain,
    ) {
        let mut peer = Peer {
            address: Some(address),
            certificate_names: Vec::new(),
        };
        let Some(tls) = &self.tls else {
            return protocol.serve(self, io, Arc::new(peer), drain).await;
        };
        let handshake = tls.accept(io, P::ALPN);
        match tokio::time::timeout(self.settings.preface_timeout, handshake).await {
            Ok(Ok(io)) => {
                let presented = io.get_ref().1.peer_certificates();
                if let Some(certificate) = presented.and_then(<[_]>::first) {
                    peer.certificate_names = certificate_names(certificate);
                }
                protocol.serve(self, io, Arc::new(peer), drain).await;
            }
            Ok(Err(error)) => {
                tracing::debug!(listener = self.name, %error, "a TLS handshake failed");
                self.metrics.refuse(self.name, "tls");
            }
            Err(_) => self.metrics.refuse(self.name, "preface_timeout"),
        }
    }
}

enum Connection {
    Tcp(std::net::TcpStream, SocketAddr),
    Memory(tokio::io::DuplexStream),
}

enum Accepted {
    Connection(Connection),
    Failed(io::Error),
    Ended,
}

impl Listener {
    async fn accept(&mut self) -> Accepted {
        match self {
            Self::Tcp(listener) => match listener.accept().await {
                Ok((stream, address)) => {
                    // Without it a small response waits for the peer's ACK; a
                    // socket that rejects the option still works.
                    let _ = stream.set_nodelay(true);
                    match stream.into_std() {
                        Ok(stream) => Accepted::Connection(Connection::Tcp(stream, address)),
                        Err(error) => Accepted::Failed(error),
                    }
                }
                Err(error) => Accepted::Failed(error),
            },
            Self::Memory(acceptor) => match acceptor.accept().await {
                Some(stream) => Accepted::Connection(Connection::Memory(stream)),
                None => Accepted::Ended,
            },
        }
    }
}

/// A connection's byte stream.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Io for T {}
