//! The accept loop and its connections. Every connection has a preface timeout,
//! a place under the connection limit, a maximum age with jitter, and a hard
//! deadline when the server drains; tonic's own loop has none of these.

mod connection;
mod grpc;
mod half_close;
mod http;
mod readers;
#[cfg(test)]
mod tests;

pub use crate::answer::AnswerFor;
pub use grpc::Grpc;
pub use http::Http;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::answer::Open;
use crate::drain::{Drain, Phase};
use crate::grpc::{Call, MessageLimits, Reply};
use crate::memory;
use crate::metrics::{Bound, Metrics};
use crate::open_streams::OpenStreams;
use crate::pace::Pace;
use crate::peer::Peer;
use crate::pool::WorkPool;
use crate::pot::{Held, Holder, Pot};
use crate::seats::{Seat, Seats};
use crate::shards::Shards;
use crate::streams::Streams;
use crate::tls::{Tls, certificate_names};

/// All headers of a caller's request together.
pub const CALLER_HEADER_BYTES_MAX: u32 = 64 << 10;
/// All headers of a gateway's request to a worker: what it adds to a caller's
/// must never make them too many.
pub const WORKER_HEADER_BYTES_MAX: u32 = 2 * CALLER_HEADER_BYTES_MAX;
/// What a worker takes in a message beyond the limit of its gateways, which may
/// give a caller's message another name of a model.
pub const WORKER_MESSAGE_BYTES_MORE: usize = 64 << 10;
/// The pause after a connection could not be accepted.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// The limits and timeouts of every port.
#[derive(Debug, Clone, clap::Args)]
pub struct ServerSettings {
    /// Maximum number of open connections per port; further ones take the place
    /// of the idlest one of the peer that has the most
    #[arg(long, value_name = "COUNT", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    pub connections_max: u32,
    /// File descriptors that ports leave to probes and to connections that the
    /// process opens itself, where --connections-max exceeds the system's limit
    #[arg(long, value_name = "COUNT", default_value_t = 256)]
    pub descriptors_reserve: u32,
    /// Maximum number of calls in flight on one HTTP/2 connection
    #[arg(long, value_name = "COUNT", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub streams_max: u32,
    /// Timeout of a new connection's TLS handshake, and of its first bytes
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = crate::config::positive_duration)]
    pub preface_timeout: Duration,
    /// Maximum age of a gRPC connection, with 20% jitter, before it is told to
    /// end, so that callers spread over new servers; its open calls and streams
    /// go on
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = crate::config::positive_duration)]
    pub connection_age: Duration,
    /// The same of an HTTP connection: proxies keep theirs, and spread requests
    /// by themselves
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = crate::config::positive_duration)]
    pub http_connection_age: Duration,
    /// How long an HTTP connection may be idle: longer than in the proxies in
    /// front, which would else send a request on a connection that closes
    #[arg(long, value_name = "DURATION", default_value = "75s", value_parser = crate::config::positive_duration)]
    pub http_idle_timeout: Duration,
    /// Interval of keepalive pings on an HTTP/2 connection
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = crate::config::positive_duration)]
    pub keepalive_interval: Duration,
    /// Maximum size of one message, for example 64MiB; a worker takes 64 KiB more,
    /// for what a gateway adds to its callers' messages. By default an eighth of
    /// the container's memory limit, at most 64MiB
    #[arg(long, value_name = "BYTES", default_value = default_share(MESSAGE_SHARE), value_parser = crate::config::bytes)]
    pub message_bytes_max: usize,
    /// Maximum size of all messages in flight together, with what a worker makes
    /// of them. By default half of the container's memory limit, at most 1GiB
    #[arg(long, value_name = "BYTES", default_value = default_share(IN_FLIGHT_SHARE), value_parser = crate::config::bytes)]
    pub bytes_in_flight_max: usize,
    /// How long a message may take to arrive, or an answer to be read, before
    /// --transfer-rate-min holds
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = crate::config::positive_duration)]
    pub transfer_grace: Duration,
    /// Bytes a second that a message which has begun, or an answer that waits
    /// for its reader, must move on average
    #[arg(long, value_name = "BYTES", default_value = "16KiB", value_parser = crate::config::bytes)]
    pub transfer_rate_min: usize,
    /// Maximum size of the data that all connections of a port may have received
    /// and no call has read yet; a connection that is opened when little of it is
    /// left has a smaller flow-control window
    #[arg(long, value_name = "BYTES", default_value = "1GiB", value_parser = crate::config::bytes)]
    pub unread_bytes_max: usize,
    /// Maximum number of open streams that may wait for long, such as watches of
    /// health; when few are left, the idlest is ended
    #[arg(long, value_name = "COUNT", default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(8..))]
    pub waiting_streams_max: u32,
    /// Maximum number of such streams on one connection
    #[arg(long, value_name = "COUNT", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub waiting_streams_per_connection_max: u32,
    /// Maximum number of calls in flight on all connections of a port, from
    /// their headers to the end of their answers
    #[arg(long, value_name = "COUNT", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(8..))]
    pub streams_total_max: u32,
    /// Maximum deadline of a call, and the deadline of calls that set none
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = crate::config::positive_duration)]
    pub deadline_max: Duration,
    /// The cores that the process counts on: as many threads serve connections,
    /// compute and do other work. By default, and with 0, all that it may use;
    /// without a CPU limit a container sees those of its whole machine
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(0..=1024))]
    pub cores: Option<u16>,
    /// Threads for work that may take longer than a millisecond, such as
    /// tokenization and large JSON; as many as --cores by default
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub work_threads: Option<u16>,
    /// Maximum number of items, such as texts, that wait for these threads or
    /// run there; more are refused at once
    #[arg(long, value_name = "COUNT", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(1..))]
    pub work_items_max: u32,
    /// How long the ports stay open after the server began to drain and
    /// became not ready
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = crate::config::duration)]
    pub drain_delay: Duration,
    /// How long calls in flight may then take to finish
    #[arg(long, value_name = "DURATION", default_value = "65s", value_parser = crate::config::positive_duration)]
    pub drain_deadline: Duration,
}

/// A default that is a part of the container's memory limit.
#[derive(Debug, Clone, Copy)]
struct Share {
    part: u64,
    mebibytes_max: u64,
}

const MESSAGE_SHARE: Share = Share {
    part: 8,
    mebibytes_max: 64,
};
/// The other half is for models, connections and what is computed.
const IN_FLIGHT_SHARE: Share = Share {
    part: 2,
    mebibytes_max: 1024,
};

impl Share {
    /// The share of a limit in whole MiB, at least one.
    fn mebibytes_of(self, limit: Option<u64>) -> u64 {
        let share = limit.map_or(self.mebibytes_max, |limit| (limit / self.part) >> 20);
        share.clamp(1, self.mebibytes_max)
    }
}

/// As people would write it, since the help shows it.
fn default_share(share: Share) -> clap::builder::OsStr {
    let mebibytes = share.mebibytes_of(crate::cgroup::memory_limit());
    clap::builder::OsStr::from(format!("{mebibytes}MiB"))
}

impl ServerSettings {
    /// The cores that the process counts on, at least one.
    pub fn cores(&self) -> usize {
        let all = || std::thread::available_parallelism().map_or(1, NonZero::get);
        // The downward API says 0 for a container that requests nothing.
        let set = self.cores.filter(|count| *count > 0);
        set.map_or_else(all, usize::from)
    }

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

    /// The same settings for a process that may open so many files, some of which
    /// are left to probes and to connections of its own.
    #[must_use]
    pub fn within_descriptors(mut self, descriptors: usize, ports: usize) -> Self {
        let left = descriptors.saturating_sub(self.descriptors_reserve as usize);
        let each = u32::try_from(left / ports.max(1))
            .unwrap_or(u32::MAX)
            .max(1);
        if each < self.connections_max {
            tracing::warn!(
                connections_max = each,
                "--connections-max is lowered to what the limit on open files (ulimit -n) allows, less --descriptors-reserve"
            );
            self.connections_max = each;
        }
        self
    }

    /// The limits on messages, counted in the metrics of a process, with its
    /// threads for work.
    pub fn message_limits(&self, metrics: &Metrics, pool: &WorkPool) -> MessageLimits {
        let limits = MessageLimits::new(self.message_bytes_max, self.bytes_in_flight_max);
        limits.with(self.pace(), metrics, pool)
    }

    /// The streams that wait, counted in the metrics of a process.
    pub fn streams(&self, metrics: &Metrics) -> Streams {
        let max = self.waiting_streams_max as usize;
        let per_connection = self.waiting_streams_per_connection_max as usize;
        Streams::new(max, per_connection, metrics)
    }

    /// How fast a message or an answer that has begun must move.
    pub fn pace(&self) -> Pace {
        Pace {
            grace: self.transfer_grace,
            bytes_per_second: self.transfer_rate_min,
            longest: self.deadline_max,
        }
    }
}

/// What a call beyond `--streams-total-max` is told.
const TOO_MANY_STREAMS: &str = "overloaded: too many calls are in flight";

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
#[derive(Debug, Clone)]
pub struct ConnectionMetrics {
    open: Family<ListenerLabel, Gauge>,
    accepted: Family<ListenerLabel, Counter>,
    refused: Family<RefusedLabels, Counter>,
    evicted: Family<ListenerLabel, Counter>,
    full: Bound,
    streams_full: Bound,
}

impl ConnectionMetrics {
    /// Registers the metrics of connections.
    pub fn register(metrics: &Metrics) -> Self {
        let connections = Self {
            open: Family::default(),
            accepted: Family::default(),
            refused: Family::default(),
            evicted: Family::default(),
            full: metrics.bound("--connections-max"),
            streams_full: metrics.bound("--streams-total-max"),
        };
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
            registry.register(
                "andon_connections_evicted",
                "Connections that were closed since others needed their place",
                connections.evicted.clone(),
            );
        });
        connections
    }

    /// Creates a listener's series at zero, so that their rates are right.
    fn initialize(&self, listener: &'static str) {
        let label = ListenerLabel { listener };
        drop(self.open.get_or_create(&label));
        drop(self.accepted.get_or_create(&label));
        drop(self.evicted.get_or_create(&label));
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

    fn evict(&self, listener: &'static str) {
        self.evicted
            .get_or_create(&ListenerLabel { listener })
            .inc();
        self.full.reached();
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
        place: Place,
        drain: Drain,
    ) -> impl Future<Output = ()> + Send;
}

/// What a connection has of its port.
#[derive(Debug)]
pub struct Place {
    /// The other end.
    peer: Arc<Peer>,
    seat: Seat,
    /// The bytes that it may receive before a call reads them.
    window: Held,
    streams: Arc<OpenStreams>,
    streams_full: Bound,
}

impl Place {
    /// Opens a stream; it is refused when too many are open, or when the peer
    /// has its share.
    fn open(&self) -> Open {
        let stream = self.streams.open();
        if stream.is_none() {
            self.streams_full.reached();
        }
        Open {
            _busy: self.seat.busy(),
            stream,
            _request: None,
        }
    }

    /// The flow-control window of the connection.
    fn connection_window(&self) -> u32 {
        u32::try_from(self.window.amount())
            .unwrap_or(u32::MAX)
            .max(connection::WINDOW_BYTES_MIN)
    }

    /// The flow-control window of each of its streams.
    fn stream_window(&self) -> u32 {
        self.connection_window()
            .min(connection::STREAM_WINDOW_BYTES)
    }
}

/// What the connections of a port share.
#[derive(Debug)]
struct Port {
    seats: Seats,
    unread: Pot,
    streams: Pot,
    streams_full: Bound,
}

impl Port {
    /// A place for a connection; none when all are taken by connections that are
    /// busy.
    fn admit(&self, peer: Peer) -> Option<Place> {
        let holder = peer.holder();
        let seat = self.seats.take_or_evict(&holder, peer.connection.0.clone());
        Some(Place {
            seat: seat.ok()?,
            window: self.window(&holder),
            streams: OpenStreams::of(&self.streams, &holder),
            streams_full: self.streams_full.clone(),
            peer: Arc::new(peer),
        })
    }

    /// A part of what is left, so that something is left for every connection
    /// that comes later.
    fn window(&self, holder: &Holder) -> Held {
        let left = self.unread.capacity() - self.unread.used();
        let window = left / connection::WINDOW_PARTS;
        let window = window.min(connection::CONNECTION_WINDOW_BYTES as usize);
        // With none left, or a holder that has its share, it is the smallest.
        let taken = self.unread.take(holder, window);
        taken.unwrap_or_else(|_| self.unread.nothing())
    }
}

/// A port.
#[derive(Debug, Clone)]
pub struct Server {
    /// The port's name in metrics.
    pub name: &'static str,
    /// Its limits and timeouts.
    pub settings: ServerSettings,
    /// All headers of a request together, in bytes.
    pub header_bytes_max: u32,
    /// The metrics of its connections.
    pub metrics: ConnectionMetrics,
    /// The threads that its connections run on.
    pub shards: Arc<Shards>,
    /// The limits of messages. Answers that wait for their readers count too.
    pub limits: Arc<MessageLimits>,
    /// Its certificates; plain text without them.
    pub tls: Option<Tls>,
}

impl Server {
    /// Accepts connections until the drain closes the port. Returns when the
    /// calls in flight have finished or the drain deadline has passed.
    pub async fn run<P: Protocol>(&self, mut listener: Listener, protocol: P, mut drain: Drain) {
        self.metrics.initialize(self.name);
        let port = Port {
            seats: Seats::new(self.settings.connections_max as usize),
            unread: Pot::new(self.settings.unread_bytes_max),
            streams: Pot::new(self.settings.streams_total_max as usize),
            streams_full: self.metrics.streams_full.clone(),
        };
        let mut connections = JoinSet::new();
        let mut closing = drain.clone();
        loop {
            tokio::select! {
                biased;
                () = closing.reached(Phase::Closing) => break,
                Some(_) = connections.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Accepted::Connection(io) => match port.admit(io.peer()) {
                        Some(place) => {
                            let (server, protocol) = (self.clone(), protocol.clone());
                            let serving = server.serve(io, place, protocol, drain.clone());
                            connections.spawn_on(serving, self.shards.next());
                        }
                        None => {
                            self.metrics.refuse(self.name, "cap");
                            self.metrics.full.reached();
                        }
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

    async fn serve<P: Protocol>(self, io: Connection, place: Place, protocol: P, drain: Drain) {
        let label = ListenerLabel {
            listener: self.name,
        };
        self.metrics.accepted.get_or_create(&label).inc();
        let open = self.metrics.open.get_or_create_owned(&label);
        open.inc();
        let evicted = place.seat.end().clone();
        match io {
            // The socket wakes the thread that it is registered on.
            Connection::Tcp(io, _) => match TcpStream::from_std(io) {
                Ok(io) => self.serve_tcp(io, place, protocol, drain).await,
                Err(error) => tracing::warn!(%error, "a connection could not be served"),
            },
            Connection::Memory(io) => protocol.serve(&self, io, place, drain).await,
        }
        if evicted.is_cancelled() {
            self.metrics.evict(self.name);
        }
        open.dec();
    }

    /// Serves a TCP connection, after the TLS handshake where the port has
    /// certificates.
    async fn serve_tcp<P: Protocol>(
        &self,
        io: TcpStream,
        mut place: Place,
        protocol: P,
        drain: Drain,
    ) {
        let Some(tls) = &self.tls else {
            return protocol.serve(self, io, place, drain).await;
        };
        let handshake = tls.accept(io, P::ALPN);
        match self.begin(&place, handshake).await {
            Begun::Done(Ok(io)) => {
                let presented = io.get_ref().1.peer_certificates();
                if let Some(certificate) = presented.and_then(<[_]>::first) {
                    place.peer = Arc::new(Peer {
                        address: place.peer.address,
                        certificate_names: certificate_names(certificate),
                        connection: place.peer.connection.clone(),
                    });
                }
                protocol.serve(self, io, place, drain).await;
            }
            Begun::Done(Err(error)) => {
                tracing::debug!(listener = self.name, %error, "a TLS handshake failed");
                self.metrics.refuse(self.name, "tls");
            }
            Begun::Late => self.metrics.refuse(self.name, "preface_timeout"),
            Begun::Evicted => {}
        }
    }

    /// Waits for what a connection must do first: in time, and as long as others
    /// do not need its place.
    async fn begin<T>(&self, place: &Place, first: impl Future<Output = T>) -> Begun<T> {
        tokio::select! {
            first = tokio::time::timeout(self.settings.preface_timeout, first) => {
                first.map_or(Begun::Late, Begun::Done)
            }
            () = place.seat.end().cancelled() => Begun::Evicted,
        }
    }
}

/// The beginning of a connection.
enum Begun<T> {
    Done(T),
    Late,
    Evicted,
}

enum Connection {
    Tcp(std::net::TcpStream, SocketAddr),
    Memory(tokio::io::DuplexStream),
}

impl Connection {
    fn peer(&self) -> Peer {
        Peer {
            address: match self {
                Self::Tcp(_, address) => Some(*address),
                Self::Memory(_) => None,
            },
            ..Peer::default()
        }
    }
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
