//! The accept loop and its connections. Every connection has a preface timer,
//! a place under the cap, a jittered age, and a hard end when the server
//! drains; tonic's own loop has none of these.

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

/// What every port is held to.
#[derive(Debug, Clone, clap::Args)]
pub struct ServerSettings {
    /// Connections that may be open at once; more are closed at once
    #[arg(long, value_name = "COUNT", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    pub connections_max: u32,
    /// Calls that one connection may have under way
    #[arg(long, value_name = "COUNT", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub streams_max: u32,
    /// How long a new connection may take to shake hands and to say what it speaks
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = crate::config::positive_duration)]
    pub preface_timeout: Duration,
    /// How old a connection gets, give or take a tenth, before it is asked to
    /// end, so that callers spread over new servers
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = crate::config::positive_duration)]
    pub connection_age: Duration,
    /// How often an idle connection is asked whether it lives
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = crate::config::positive_duration)]
    pub keepalive_interval: Duration,
    /// The longest message, for example 64MiB
    #[arg(long, value_name = "BYTES", default_value = "64MiB", value_parser = crate::config::bytes)]
    pub message_bytes_max: usize,
    /// All messages in flight together
    #[arg(long, value_name = "BYTES", default_value = "1GiB", value_parser = crate::config::bytes)]
    pub bytes_in_flight_max: usize,
    /// The longest deadline a call may have, and the deadline of calls that
    /// bring none
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = crate::config::positive_duration)]
    pub deadline_max: Duration,
    /// How long the server stays open after it is told to end and has become
    /// not ready
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = crate::config::duration)]
    pub drain_delay: Duration,
    /// How long calls under way may then take to finish
    #[arg(long, value_name = "DURATION", default_value = "65s", value_parser = crate::config::positive_duration)]
    pub drain_deadline: Duration,
}

impl ServerSettings {
    /// Checks what the flags cannot check one by one.
    pub fn checked(self) -> Result<Self, String> {
        if self.message_bytes_max > self.bytes_in_flight_max {
            return Err(format!(
                "--message-bytes-max ({}) is more than --bytes-in-flight-max ({}): its longest messages would never fit",
                self.message_bytes_max, self.bytes_in_flight_max
            ));
        }
        if self.deadline_max > self.drain_deadline {
            return Err(format!(
                "--deadline-max ({:?}) is more than --drain-deadline ({:?}): its longest calls would be cut off when the server ends",
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

/// Where connections come from.
#[derive(Debug)]
pub enum Listener {
    /// A TCP port.
    Tcp(TcpListener),
    /// The same process.
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
        let made = Self::default();
        metrics.register(|registry| {
            registry.register(
                "andon_connections",
                "Connections that are open",
                made.open.clone(),
            );
            registry.register(
                "andon_connections_accepted",
                "Connections that were accepted",
                made.accepted.clone(),
            );
            registry.register(
                "andon_connections_refused",
                "Connections that were closed without a call",
                made.refused.clone(),
            );
        });
        made
    }

    /// Lets a listener's numbers begin at zero, so that their rates are right.
    fn begin(&self, listener: &'static str) {
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

/// What answers the calls of a gRPC port.
pub trait Handler: Clone + Send + Sync + 'static {
    /// Answers one call. Dropped when the caller leaves.
    fn handle(&self, call: Call) -> impl Future<Output = Reply> + Send;
}

/// What a port speaks.
pub trait Protocol: Clone + Send + Sync + 'static {
    /// The names that TLS agrees on, the preferred one first.
    const NAMES: &'static [&'static [u8]];

    /// Serves one connection to its end.
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
    /// What it is held to.
    pub settings: ServerSettings,
    /// Where its connections are counted.
    pub metrics: ConnectionMetrics,
    /// Where its connections run.
    pub shards: Arc<Shards>,
    /// Its certificates; without them it speaks clear text.
    pub tls: Option<Tls>,
}

impl Server {
    /// Accepts connections until the drain closes, then lets calls finish, and
    /// returns when all have or the hard deadline has passed.
    pub async fn run<P: Protocol>(&self, mut listener: Listener, protocol: P, mut drain: Drain) {
        self.metrics.begin(self.name);
        let places = Arc::new(Semaphore::new(self.settings.connections_max as usize));
        let mut connections = JoinSet::new();
        let mut closing = drain.clone();
        loop {
            tokio::select! {
                biased;
                () = closing.reached(Phase::Closing) => break,
                Some(_) = connections.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Accepted::Connection(io) => {
                        let place = places.clone().try_acquire_owned();
                        self.start(&mut connections, io, place.ok(), (protocol.clone(), drain.clone()));
                    }
                    Accepted::Failed(error) => {
                        tracing::warn!(%error, "a connection could not be accepted");
                        // Out of file descriptors: trying at once would spin.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    // Nobody can connect any more; the connections go on.
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

    fn start<P: Protocol>(
        &self,
        connections: &mut JoinSet<()>,
        io: Connection,
        place: Option<OwnedSemaphorePermit>,
        (protocol, drain): (P, Drain),
    ) {
        let Some(place) = place else {
            self.metrics.refuse(self.name, "cap");
            return;
        };
        let label = ListenerLabel {
            listener: self.name,
        };
        self.metrics.accepted.get_or_create(&label).inc();
        let open = self.metrics.open.get_or_create_owned(&label);
        let server = self.clone();
        let serving = async move {
            open.inc();
            match io {
                // The socket wakes the thread that it was registered on.
                Connection::Tcp(io, address) => match TcpStream::from_std(io) {
                    Ok(io) => server.shake_hands(io, address, protocol, drain).await,
                    Err(error) => tracing::warn!(%error, "a connection could not be served"),
                },
                Connection::Memory(io) => {
                    protocol.serve(&server, io, Arc::default(), drain).await;
                }
            }
            open.dec();
            drop(place);
        };
        connections.spawn_on(serving, self.shards.next());
    }

    /// TLS first, where the port has certificates.
    async fn shake_hands<P: Protocol>(
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
        let shaken = tls.accept(io, P::NAMES);
        match tokio::time::timeout(self.settings.preface_timeout, shaken).await {
            Ok(Ok(io)) => {
                let shown = io.get_ref().1.peer_certificates();
                if let Some(certificate) = shown.and_then(<[_]>::first) {
                    peer.certificate_names = certificate_names(certificate);
                }
                protocol.serve(self, io, Arc::new(peer), drain).await;
            }
            Ok(Err(error)) => {
                tracing::debug!(listener = self.name, %error, "TLS was not agreed on");
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
                    // Without it a small answer waits for the peer's ACK; a
                    // socket that refuses still works.
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

/// What a connection reads and writes.
pub trait Io: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Io for T {}
