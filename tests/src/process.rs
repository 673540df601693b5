//! One process of the fleet.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// A running `andon`, killed when it is dropped.
#[derive(Debug)]
pub struct Andon {
    child: Child,
    /// Where it serves gRPC.
    pub grpc: SocketAddr,
    /// Where a gateway serves HTTP.
    pub http: SocketAddr,
    /// Where it serves metrics and probes.
    pub admin: SocketAddr,
    /// Where it logs.
    pub log: PathBuf,
}

/// The ports that tests give out: below those that the system gives to
/// connections of its own accord, any of which a flood may take at any time.
const PORTS: std::ops::Range<u16> = 12_000..32_000;
/// So many belong to one process of tests.
const PORTS_EACH: u16 = 100;

/// The ports of this process.
struct Ports {
    first: u16,
    next: u16,
    /// Held to the end: no other process of tests has the same.
    _lock: File,
}

impl Ports {
    fn take() -> Result<Self> {
        // One for all checkouts: they share the ports.
        let folder = std::env::temp_dir().join("andon-test-ports");
        std::fs::create_dir_all(&folder)?;
        for first in PORTS.step_by(PORTS_EACH.into()) {
            let lock = File::create(folder.join(first.to_string()))?;
            if lock.try_lock().is_ok() {
                return Ok(Self {
                    first,
                    next: 0,
                    _lock: lock,
                });
            }
        }
        bail!("all ports of tests are taken")
    }
}

/// A loopback port that is free, and that nobody else is given for long.
pub fn free_port() -> Result<SocketAddr> {
    static OWN: Mutex<Option<Ports>> = Mutex::new(None);
    let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    let own = match &mut *own {
        Some(own) => own,
        none => none.insert(Ports::take()?),
    };
    for _ in 0..PORTS_EACH {
        let address = SocketAddr::from(([127, 0, 0, 1], own.first + own.next));
        own.next = (own.next + 1) % PORTS_EACH;
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    bail!("all ports of this process are taken")
}

/// A new file in the target folder.
pub fn scratch(name: &str) -> Result<PathBuf> {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let folder = crate::root().join("target/fleet");
    std::fs::create_dir_all(&folder)?;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    Ok(folder.join(format!("{}-{number}-{name}", std::process::id())))
}

impl Andon {
    /// A worker of the demo models.
    pub fn worker(flags: &[String], grpc: Option<SocketAddr>) -> Result<Self> {
        let mut all = Vec::from(flags);
        if !flags
            .iter()
            .any(|flag| flag == "--repository" || flag == "--model")
        {
            all.push("--repository".to_owned());
            all.push(crate::models()?.display().to_string());
        }
        Self::start("worker", &all, grpc)
    }

    /// Starts a role; it may not be ready yet.
    pub fn start(role: &str, flags: &[String], grpc: Option<SocketAddr>) -> Result<Self> {
        let program = crate::program("andon")?;
        let mut command = Command::new(program);
        command.arg(role);
        let http = free_port()?;
        if role != "worker" {
            command.args(["--http-addr", &http.to_string()]);
        }
        let mut started = Self::run(&mut command, flags, grpc)?;
        started.http = http;
        Ok(started)
    }

    /// Starts a program that takes the same flags.
    pub fn run(command: &mut Command, flags: &[String], grpc: Option<SocketAddr>) -> Result<Self> {
        let grpc = grpc.map_or_else(free_port, Ok)?;
        let admin = free_port()?;
        let log = scratch("log")?;
        let child = command
            .args(["--grpc-addr", &grpc.to_string()])
            .args(["--admin-addr", &admin.to_string()])
            .args(["--drain-delay", "300ms"])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(File::create(&log)?)
            .stderr(File::options().append(true).open(&log)?)
            .spawn()
            .context("the process cannot be started")?;
        Ok(Self {
            child,
            grpc,
            http: grpc,
            admin,
            log,
        })
    }

    /// The process's number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until its probe says ready; an error at once if it ends.
    pub async fn ready(&self) -> Result<()> {
        let ready = crate::until(Duration::from_secs(60), "ready", || async {
            Ok(self.get("/readyz").await?.starts_with("ready"))
        });
        let ready = tokio::select! {
            ready = ready => ready,
            error = self.unexpected_end() => Err(error),
        };
        ready.with_context(|| self.logged())
    }

    async fn unexpected_end(&self) -> anyhow::Error {
        let status = format!("/proc/{}/stat", self.id());
        loop {
            // Its state stands behind its name; Z is for a process that ended.
            let status = std::fs::read_to_string(&status).unwrap_or_default();
            if status.contains(") Z ") {
                return anyhow!("it ended before it was ready");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What it logged.
    pub fn logged(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The body of a page of the admin port.
    pub async fn get(&self, path: &str) -> Result<String> {
        let (address, path) = (self.admin, path.to_owned());
        tokio::task::spawn_blocking(move || get(address, &path)).await?
    }

    /// The value of one metric, named with its labels as the page has them.
    pub async fn metric(&self, name: &str) -> Result<Option<f64>> {
        let page = self.get("/metrics").await?;
        let line = page
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(line.and_then(|value| value.trim().parse().ok()))
    }

    /// The sum of all metrics whose line begins so.
    pub async fn metric_sum(&self, prefix: &str) -> Result<f64> {
        let page = self.get("/metrics").await?;
        Ok(page
            .lines()
            .filter(|line| line.starts_with(prefix))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum())
    }

    /// Resident bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes = line.and_then(|line| line.split_whitespace().next());
        let kilobytes: u64 = kilobytes.context("no VmRSS")?.parse()?;
        Ok(kilobytes * 1024)
    }

    /// Sends a signal, for example `libc::SIGTERM`.
    pub fn signal(&self, signal: i32) -> Result<()> {
        send(&self.child, signal)
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for its end.
    pub async fn ended(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let started = Instant::now();
        while started.elapsed() < timeout {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        bail!("it did not end within {timeout:?}:\n{}", self.logged())
    }
}

/// Sends a signal to a process that has not been waited for.
#[allow(
    unsafe_code,
    reason = "kill(2) takes two integers and touches no memory"
)]
pub(crate) fn send(child: &Child, signal: i32) -> Result<()> {
    let id = i32::try_from(child.id())?;
    // SAFETY: the process is our child and has not been waited for, so that
    // its number is still its own.
    let result = unsafe { libc::kill(id, signal) };
    if result != 0 {
        bail!("the signal could not be sent");
    }
    Ok(())
}

impl Drop for Andon {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !std::thread::panicking() {
            let _ = std::fs::remove_file(&self.log);
        }
    }
}

fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: andon\r\nconnection: close\r\n\r\n"
    )?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    let (_, body) = response.split_once("\r\n\r\n").context("no answer")?;
    Ok(body.to_owned())
}
