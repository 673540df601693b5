//! Redis, where gateways share quotas and cached responses. No call depends on
//! it: a command has a timeout of 20 ms, and a circuit breaker opens after a
//! timeout, or after several failures in a row, until Redis responds to a probe.
//! So a lost Redis costs a call one timeout at most.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ::redis::aio::MultiplexedConnection;
use ::redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, FromRedisValue, IntoConnectionInfo,
    Pipeline, RedisResult, ScriptInvocation,
};
use arc_swap::ArcSwapOption;
use platform::files::{ContentError, FileError, FileSource};
use platform::metrics::Metrics;
use platform::tasks::{OwnedTask, spawn_owned};
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

/// The timeout of a command, with the wait for the connection.
pub const COMMAND_TIMEOUT: Duration = Duration::from_millis(20);
/// The timeout of a connection, with its authentication.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two probes.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Failures in a row that open the circuit breaker.
const FAILURES_MAX: u32 = 3;
/// Commands that may wait to be sent.
const PIPELINE_MAX: usize = 256;
/// The largest password file, in bytes.
const PASSWORD_BYTES_MAX: u64 = 4096;

/// The Redis that several gateways share.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct RedisSettings {
    /// The Redis in which several gateways share quotas and cached responses:
    /// redis://HOST:PORT/DB
    #[arg(long, value_name = "URL")]
    pub redis: Option<String>,
    /// The file with the password of Redis
    #[arg(long, value_name = "FILE", requires = "redis")]
    pub redis_password_file: Option<PathBuf>,
}

impl RedisSettings {
    /// A client that is not connected yet; None when no Redis is configured.
    /// Each call makes one with a connection of its own.
    pub fn open(&self) -> Result<Option<Arc<Redis>>, RedisError> {
        let password = self.redis_password_file.as_deref();
        let url = self.redis.as_deref();
        url.map(|url| Redis::open(url, password)).transpose()
    }
}

/// Why Redis cannot be used as it is configured.
#[derive(Debug, thiserror::Error)]
pub enum RedisError {
    /// The URL is malformed. It is not repeated, since it may hold a secret.
    #[error("--redis: write redis://HOST:PORT or redis://HOST:PORT/DB")]
    Url,
    /// The URL holds a password: every user of the machine can read flags.
    #[error(
        "--redis: the URL holds a password; put it in a file and name it with --redis-password-file"
    )]
    Password,
    /// The file cannot be read.
    #[error("--redis-password-file: {0}")]
    File(#[from] FileError),
}

/// Why a script has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RedisFailure {
    /// It was not sent, or Redis refused it.
    NotExecuted,
    /// Redis may have executed it, or not.
    Unknown,
}

/// A client of a Redis that may be lost at any time, with a circuit breaker.
pub struct Redis {
    client: Client,
    /// None while Redis is lost: the circuit breaker is open.
    connection: ArcSwapOption<MultiplexedConnection>,
    failures: AtomicU32,
    lost: Notify,
    up: Gauge,
}

impl std::fmt::Debug for Redis {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The client holds the password.
        write!(formatter, "Redis(available: {})", self.available())
    }
}

impl Redis {
    /// Parses the URL; nothing is connected yet.
    pub fn new(url: &str, password: Option<String>) -> Result<Arc<Self>, RedisError> {
        let info = url.into_connection_info().map_err(|_| RedisError::Url)?;
        if !matches!(info.addr(), ConnectionAddr::Tcp(..)) {
            return Err(RedisError::Url);
        }
        let mut settings = info.redis_settings().clone();
        if settings.password().is_some() {
            return Err(RedisError::Password);
        }
        if let Some(password) = password {
            settings = settings.set_password(password);
        }
        let client = Client::open(info.set_redis_settings(settings.set_skip_set_lib_name()))
            .map_err(|_| RedisError::Url)?;
        Ok(Arc::new(Self {
            client,
            connection: ArcSwapOption::empty(),
            failures: AtomicU32::new(0),
            lost: Notify::new(),
            up: Gauge::default(),
        }))
    }

    /// Parses the URL and reads the password from a file.
    pub fn open(url: &str, password: Option<&Path>) -> Result<Arc<Self>, RedisError> {
        let read = |path: &Path| {
            let source = FileSource::new(path, "password file", PASSWORD_BYTES_MAX);
            let text = source.read_text()?;
            match text.trim_end_matches(['\r', '\n']) {
                "" => Err(source.invalid(ContentError::new("it is empty"))),
                password => Ok(password.to_owned()),
            }
        };
        Self::new(url, password.map(read).transpose()?)
    }

    /// Registers the gauge that is 1 while Redis responds.
    pub fn register(&self, metrics: &Metrics, name: &'static str, help: &'static str) {
        metrics.register(|registry| registry.register(name, help, self.up.clone()));
    }

    /// Whether the circuit breaker is closed: a command would be sent.
    pub fn available(&self) -> bool {
        self.connection.load().is_some()
    }

    /// Connects, and reconnects after every loss, until the task is dropped. A
    /// connection that lasted is replaced at once, so that a short failure costs
    /// milliseconds; otherwise a reconnect is tried every second.
    pub fn follow(self: &Arc<Self>) -> OwnedTask {
        let redis = self.clone();
        spawn_owned(async move {
            let mut reported = false;
            loop {
                let started = Instant::now();
                match redis.connect().await {
                    Ok(connection) => {
                        tracing::info!("Redis responds");
                        reported = false;
                        redis.failures.store(0, Ordering::Relaxed);
                        redis.connection.store(Some(Arc::new(connection)));
                        redis.up.set(1);
                        redis.probe_until_lost().await;
                        if started.elapsed() > 2 * PROBE_INTERVAL {
                            continue;
                        }
                    }
                    // Logged once for each loss.
                    Err(reason) if !reported => {
                        tracing::warn!(reason, "Redis cannot be reached");
                        reported = true;
                    }
                    Err(_) => {}
                }
                tokio::time::sleep(PROBE_INTERVAL).await;
            }
        })
    }

    async fn connect(&self) -> Result<MultiplexedConnection, String> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None)
            .set_pipeline_buffer_size(PIPELINE_MAX);
        let connecting = async {
            let client = &self.client;
            let mut connection = client
                .get_multiplexed_async_connection_with_config(&config)
                .await?;
            let () = ::redis::cmd("PING").query_async(&mut connection).await?;
            Ok::<_, ::redis::RedisError>(connection)
        };
        match timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(error.category().to_owned()),
            Err(_) => Err("no response within the timeout".to_owned()),
        }
    }

    /// Probes every second, until the circuit breaker opens.
    async fn probe_until_lost(&self) {
        while self.available() {
            tokio::select! {
                () = self.lost.notified() => {}
                () = tokio::time::sleep(PROBE_INTERVAL) => {
                    // `run` counts a failure.
                    let _: Option<()> = self.run(&::redis::cmd("PING")).await;
                }
            }
        }
    }

    /// The response to a command. None when Redis is lost, does not respond
    /// within the timeout, or responds with an error.
    pub async fn run<T: FromRedisValue>(&self, command: &Cmd) -> Option<T> {
        let connection = self.connection.load_full()?;
        let mut sent = (*connection).clone();
        let response = command.query_async(&mut sent);
        self.within_timeout(&connection, response).await.ok()
    }

    /// The responses to several commands of one round trip.
    pub async fn run_all<T: FromRedisValue>(&self, commands: &Pipeline) -> Option<T> {
        let connection = self.connection.load_full()?;
        let mut sent = (*connection).clone();
        let response = commands.query_async(&mut sent);
        self.within_timeout(&connection, response).await.ok()
    }

    /// The result of a script. It is sent by its hash, and as a whole when Redis
    /// does not have it.
    pub async fn run_script<T: FromRedisValue>(
        &self,
        script: &ScriptInvocation<'_>,
    ) -> Result<T, RedisFailure> {
        let connection = self
            .connection
            .load_full()
            .ok_or(RedisFailure::NotExecuted)?;
        let mut sent = (*connection).clone();
        let response = script.invoke_async(&mut sent);
        self.within_timeout(&connection, response).await
    }

    async fn within_timeout<T>(
        &self,
        connection: &Arc<MultiplexedConnection>,
        response: impl Future<Output = RedisResult<T>>,
    ) -> Result<T, RedisFailure> {
        match timeout(COMMAND_TIMEOUT, response).await {
            Ok(Ok(value)) => {
                self.failures.store(0, Ordering::Relaxed);
                Ok(value)
            }
            // A broken connection carries no further response.
            Ok(Err(error)) if error.is_unrecoverable_error() => {
                self.open_circuit(connection, "connection lost");
                Err(RedisFailure::Unknown)
            }
            // Errors of Redis itself count too: read-only, loading, out of memory.
            Ok(Err(_)) => {
                if self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= FAILURES_MAX {
                    self.open_circuit(connection, "it responds with errors");
                }
                Err(RedisFailure::NotExecuted)
            }
            Err(_) => {
                self.open_circuit(connection, "it does not respond within the timeout");
                Err(RedisFailure::Unknown)
            }
        }
    }

    /// Opens the circuit breaker of a connection. A newer connection that has
    /// replaced it meanwhile stays.
    fn open_circuit(&self, connection: &Arc<MultiplexedConnection>, reason: &'static str) {
        let own = Some(connection.clone());
        let before = self.connection.compare_and_swap(&own, None);
        if before
            .as_ref()
            .is_some_and(|before| Arc::ptr_eq(before, connection))
        {
            self.up.set(0);
            tracing::warn!(reason, "Redis is lost: the circuit breaker is open");
            self.lost.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_in_the_url_is_refused_and_not_repeated() {
        for url in [
            "redis://:secret@localhost:1",
            "redis://user:secret@localhost/0",
        ] {
            let error = Redis::new(url, None).unwrap_err();
            assert!(matches!(error, RedisError::Password), "{error}");
            assert!(!error.to_string().contains("secret"));
        }
        for url in [
            "",
            "localhost",
            "http://localhost",
            "rediss://:secret@localhost",
        ] {
            let error = Redis::new(url, None).unwrap_err();
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        let redis = Redis::new("redis://localhost:1/2", Some("secret".to_owned())).unwrap();
        assert!(!format!("{redis:?}").contains("secret"));
    }

    #[tokio::test]
    async fn a_redis_that_hangs_opens_the_circuit_and_comes_back() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        // Responds to the handshake and to nothing after it.
        let server = spawn_owned(async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let mut sockets = Vec::new();
            loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                let mut bytes = [0; 1024];
                let _ = socket.read(&mut bytes).await.unwrap();
                socket.write_all(b"+PONG\r\n").await.unwrap();
                sockets.push(socket);
            }
        });
        let redis = Redis::new(&format!("redis://127.0.0.1:{port}"), None).unwrap();
        let _following = redis.follow();
        while !redis.available() {
            tokio::task::yield_now().await;
        }
        let none: Option<String> = redis.run(&::redis::cmd("GET")).await;
        assert_eq!(none, None);
        assert!(!redis.available());
        let none: Option<String> = redis.run(&::redis::cmd("GET")).await;
        assert_eq!(none, None);
        while !redis.available() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(server);
    }
}
