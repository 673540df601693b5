//! Redis, where gateways count together and keep answers. It is never waited
//! for: a command has 20 ms, and a Redis that does not answer within them, or
//! fails several times in a row, is passed by until it answers a probe. So no
//! call waits twice.

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
use platform::tasks::{OwnedTask, spawn_owned};
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

/// What a command may take, waiting for the connection included.
pub const COMMAND: Duration = Duration::from_millis(20);
/// What connecting may take, with the password.
const CONNECT: Duration = Duration::from_secs(1);
/// Between two probes.
const PROBE: Duration = Duration::from_secs(1);
/// Failures in a row after which it is passed by.
const FAILURES_MAX: u32 = 3;
/// Commands that may wait to be written.
const WAITING_MAX: usize = 256;
/// Bytes of a file with a password.
const PASSWORD_BYTES_MAX: u64 = 4096;

/// The Redis that several gateways share.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct RedisSettings {
    /// Redis, where several gateways share quotas and cached responses:
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
    /// The address cannot be read. It is not repeated, for there may be a
    /// secret in it.
    #[error("--redis: write redis://HOST:PORT or redis://HOST:PORT/DB")]
    Url,
    /// Flags are seen by everybody on the machine.
    #[error(
        "--redis: the URL holds a password; put it in a file and name it with --redis-password-file"
    )]
    Password,
    /// The file cannot be read.
    #[error("--redis-password-file: {0}")]
    File(String),
}

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoAnswer {
    /// It was not sent, or Redis refused it.
    Undone,
    /// Redis may have done it, or not.
    Unknown,
}

/// A Redis that may be lost at any time. Every method is safe to call from any
/// thread.
pub struct Redis {
    client: Client,
    /// None while it is lost.
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
    /// Reads the address; nothing is connected yet.
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

    /// The same with the password of a file.
    pub fn open(url: &str, password: Option<&Path>) -> Result<Arc<Self>, RedisError> {
        let read = |path: &Path| {
            let unreadable = |error: std::io::Error| RedisError::File(error.kind().to_string());
            let bytes = std::fs::metadata(path).map_err(unreadable)?.len();
            if bytes > PASSWORD_BYTES_MAX {
                return Err(RedisError::File("it is too long for a password".to_owned()));
            }
            let text = std::fs::read_to_string(path).map_err(unreadable)?;
            match text.trim_end_matches(['\r', '\n']) {
                "" => Err(RedisError::File("it is empty".to_owned())),
                password => Ok(password.to_owned()),
            }
        };
        Self::new(url, password.map(read).transpose()?)
    }

    /// 1 while it answers.
    pub fn up(&self) -> Gauge {
        self.up.clone()
    }

    /// Whether a command would be sent.
    pub fn available(&self) -> bool {
        self.connection.load().is_some()
    }

    /// Connects, and again after every loss, until the task is dropped. A
    /// connection that held is replaced at once, so that a hiccup costs
    /// milliseconds; where none holds, it is tried every second.
    pub fn follow(self: &Arc<Self>) -> OwnedTask {
        let redis = self.clone();
        spawn_owned(async move {
            let mut said = false;
            loop {
                let begun = Instant::now();
                match redis.connect().await {
                    Ok(connection) => {
                        tracing::info!("Redis answers");
                        said = false;
                        redis.failures.store(0, Ordering::Relaxed);
                        redis.connection.store(Some(Arc::new(connection)));
                        redis.up.set(1);
                        redis.watch().await;
                        if begun.elapsed() > 2 * PROBE {
                            continue;
                        }
                    }
                    // Once for each loss.
                    Err(reason) if !said => {
                        tracing::warn!(reason, "Redis cannot be reached");
                        said = true;
                    }
                    Err(_) => {}
                }
                tokio::time::sleep(PROBE).await;
            }
        })
    }

    async fn connect(&self) -> Result<MultiplexedConnection, String> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None)
            .set_pipeline_buffer_size(WAITING_MAX);
        let connecting = async {
            let client = &self.client;
            let mut connection = client
                .get_multiplexed_async_connection_with_config(&config)
                .await?;
            let () = ::redis::cmd("PING").query_async(&mut connection).await?;
            Ok::<_, ::redis::RedisError>(connection)
        };
        match timeout(CONNECT, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(error.category().to_owned()),
            Err(_) => Err("no answer in time".to_owned()),
        }
    }

    /// Asks every second, until the connection is given up.
    async fn watch(&self) {
        while self.available() {
            tokio::select! {
                () = self.lost.notified() => {}
                () = tokio::time::sleep(PROBE) => {
                    // What it comes to is counted.
                    let _: Option<()> = self.run(&::redis::cmd("PING")).await;
                }
            }
        }
    }

    /// The answer to a command. None when Redis is lost or passed by, does not
    /// answer in time, or answers with an error.
    pub async fn run<T: FromRedisValue>(&self, command: &Cmd) -> Option<T> {
        let connection = self.connection.load_full()?;
        let mut sent = (*connection).clone();
        let answer = command.query_async(&mut sent);
        self.within(&connection, answer).await.ok()
    }

    /// The answers to several commands of one round trip.
    pub async fn run_all<T: FromRedisValue>(&self, commands: &Pipeline) -> Option<T> {
        let connection = self.connection.load_full()?;
        let mut sent = (*connection).clone();
        let answer = commands.query_async(&mut sent);
        self.within(&connection, answer).await.ok()
    }

    /// What a script returns. It is sent by its hash, and whole when Redis does
    /// not know it.
    pub async fn run_script<T: FromRedisValue>(
        &self,
        script: &ScriptInvocation<'_>,
    ) -> Result<T, NoAnswer> {
        let connection = self.connection.load_full().ok_or(NoAnswer::Undone)?;
        let mut sent = (*connection).clone();
        let answer = script.invoke_async(&mut sent);
        self.within(&connection, answer).await
    }

    async fn within<T>(
        &self,
        connection: &Arc<MultiplexedConnection>,
        answer: impl Future<Output = RedisResult<T>>,
    ) -> Result<T, NoAnswer> {
        match timeout(COMMAND, answer).await {
            Ok(Ok(value)) => {
                self.failures.store(0, Ordering::Relaxed);
                Ok(value)
            }
            // A connection that broke answers nothing any more.
            Ok(Err(error)) if error.is_unrecoverable_error() => {
                self.pass_by(connection, "connection lost");
                Err(NoAnswer::Unknown)
            }
            // Its own refusals too: read-only, loading, out of memory.
            Ok(Err(_)) => {
                if self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= FAILURES_MAX {
                    self.pass_by(connection, "it answers with errors");
                }
                Err(NoAnswer::Undone)
            }
            Err(_) => {
                self.pass_by(connection, "it does not answer in time");
                Err(NoAnswer::Unknown)
            }
        }
    }

    /// Gives a connection up. Another may have taken its place meanwhile, which
    /// is as good as it was.
    fn pass_by(&self, connection: &Arc<MultiplexedConnection>, reason: &'static str) {
        let own = Some(connection.clone());
        let before = self.connection.compare_and_swap(&own, None);
        if before
            .as_ref()
            .is_some_and(|before| Arc::ptr_eq(before, connection))
        {
            self.up.set(0);
            tracing::warn!(reason, "Redis is lost and passed by");
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
    async fn one_that_hangs_is_passed_by_at_once_and_comes_back() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        // Answers what connecting needs and nothing after it.
        let server = spawn_owned(async move {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let mut kept = Vec::new();
            loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                let mut bytes = [0; 1024];
                let _ = socket.read(&mut bytes).await.unwrap();
                socket.write_all(b"+PONG\r\n").await.unwrap();
                kept.push(socket);
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
